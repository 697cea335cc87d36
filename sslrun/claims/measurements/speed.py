"""Time a token against the length of the sequence: what can't be done in parallel."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from sslrun.backbones import build_backbone
from sslrun.backbones.base import Backbone
from sslrun.claims.measurements.base import Measurement, measurements
from sslrun.data.specs import TextSpec
from sslrun.data.text.sequences import Tokens
from sslrun.data.text.tokenizer import blank_tokenizer
from sslrun.metric import Metric
from sslrun.registry import Options
from sslrun.results.address import Column, Row
from sslrun.results.table import Table
from sslrun.training.device import Compute

VOCAB = 512


class Stepwise(nn.Module):
    """An LSTM's layer as the formula on the slide reads, one token after the other, with that layer's weights."""

    def __init__(self, layer: nn.LSTM) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(layer.input_size, layer.hidden_size)
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            setattr(self.cell, name, getattr(layer, f"{name}_l0"))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """(B, T, D) to states (B, T, D)."""
        state: tuple[Tensor, Tensor] | None = None
        found = []
        for step in x.unbind(1):
            state = self.cell(step, state)
            found.append(state[0])
        return torch.stack(found, dim=1), None


def step_by_step(backbone: Any) -> Backbone:
    """A recurrent backbone with every layer run one token at a time."""
    for stack in filter(None, (backbone.ahead, backbone.back)):
        stack.cells = nn.ModuleList(Stepwise(layer) for layer in stack.cells)
    return backbone


@measurements.register("speed")
class Speed(Measurement):
    """Microseconds a token of a training step (forward and backward), by length, as many tokens in every batch.

    Three networks of about as many parameters: a two-directional LSTM by torch's own kernels, the
    same one token after the other, a Transformer. They take turns, and of several rounds the
    fastest of each counts, so that what else the machine does harms none more than another. In
    float32, without dropout, which would keep attention from its fast kernels.
    """

    class Options(Options):
        lengths: tuple[Annotated[int, Field(ge=2)], ...] = (32, 128, 512)
        """Sequence lengths, in tokens."""
        tokens: int = Field(4096, ge=2)
        """Tokens per batch."""
        width: int = Field(256, ge=64, multiple_of=64)
        """Width of the Transformer and of each direction of the LSTM."""
        rounds: int = Field(3, ge=1)
        """Number of timed rounds; the fastest one counts."""

    options: Options

    def table(self, seed: int, compute: Compute, folder: Path, check: Callable[[], None]) -> Table:
        given = self.options
        torch.manual_seed(seed)
        spec = TextSpec(blank_tokenizer(VOCAB), max(given.lengths))
        lstm = {"width": given.width, "depth": 2, "bidirectional": True, "dropout": 0.0}
        transformer = {
            "width": given.width,
            "depth": 3,
            "positions": max(8, *given.lengths),
            "dropout": 0.0,
        }
        networks: dict[str, Backbone] = {
            "LSTM, both ways": build_backbone("lstm", lstm, spec),
            "LSTM, both ways, token by token": step_by_step(build_backbone("lstm", lstm, spec)),
            "Transformer": build_backbone("bert-tiny", transformer, spec),
        }
        made = Table("time a token by length of the sequence")
        for network in networks.values():
            network.to(compute.device)
        for length in given.lengths:
            batch = _tokens(given.tokens // length, length, compute.device)
            check()
            steps = {name: _step(network, batch) for name, network in networks.items()}
            column = Column(metric=Metric(f"{length} tokens", "µs a token", "lower", digits=2))
            for name, seconds in _fastest(steps, given.rounds, compute.device).items():
                made.add(Row(name), column, 1e6 * seconds / batch.ids.numel(), str(seed))
        counts = ", ".join(
            f"{name} {sum(each.numel() for each in network.parameters()):,}"
            for name, network in networks.items()
        )
        made.note(
            f"µs a token, forward and backward, {given.tokens:,} tokens a batch, on {compute}; parameters: {counts}"
        )
        return made


def _tokens(count: int, length: int, device: torch.device) -> Tokens:
    ids = torch.randint(5, VOCAB, (max(1, count), length), device=device)
    return Tokens(ids, torch.zeros_like(ids), torch.ones_like(ids))


def _step(network: Backbone, batch: Tokens) -> Callable[[], None]:
    def step() -> None:
        network.zero_grad(set_to_none=True)
        tokens = network(batch).tokens
        assert tokens is not None
        tokens.square().mean().backward()

    return step


def _fastest(
    steps: dict[str, Callable[[], None]], rounds: int, device: torch.device
) -> dict[str, float]:
    """Seconds of each step, the least of so many rounds in which they take turns, after one that isn't timed."""
    best = dict.fromkeys(steps, float("inf"))
    for number in range(rounds + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if number:
                best[name] = min(best[name], time.perf_counter() - began)
    return best
