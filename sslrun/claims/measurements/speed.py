"""Time per token against sequence length: recurrent networks and a Transformer."""

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
"""Size of the vocabulary from which random tokens are drawn."""


class StepwiseLayer(nn.Module):
    """An LSTM layer that processes one token after the other, with the weights of a fused layer."""

    def __init__(self, layer: nn.LSTM) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(layer.input_size, layer.hidden_size)
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            setattr(self.cell, name, getattr(layer, f"{name}_l0"))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """Map inputs (B, T, D) to hidden states (B, T, D). The second value is unused."""
        state: tuple[Tensor, Tensor] | None = None
        outputs = []
        for step in x.unbind(1):
            state = self.cell(step, state)
            outputs.append(state[0])
        return torch.stack(outputs, dim=1), None


def replace_layers(backbone: Any) -> Backbone:
    """Replace every layer of a recurrent backbone by a `StepwiseLayer`, in place."""
    for stack in filter(None, (backbone.ahead, backbone.back)):
        stack.cells = nn.ModuleList(StepwiseLayer(layer) for layer in stack.cells)
    return backbone


@measurements.register("speed")
class Speed(Measurement):
    """Time per token of a training step, by sequence length, in microseconds.

    Compares three networks of similar size: a bidirectional LSTM with torch's fused kernels, the
    same LSTM one token after the other, and a Transformer. A step is forward and backward, and all
    batches have the same number of tokens. The networks take turns, and the fastest of several
    rounds counts for each, so that other load on the machine affects all of them alike. Runs in
    float32, and without dropout so that attention can use its fast kernels.
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
        options = self.options
        torch.manual_seed(seed)
        networks = self._build_networks()
        table = Table("time per token by sequence length")
        for network in networks.values():
            network.to(compute.device)
        for length in options.lengths:
            batch = _draw_batch(options.tokens // length, length, compute.device)
            check()
            steps = {name: _build_step(network, batch) for name, network in networks.items()}
            column = Column(metric=Metric(f"{length} tokens", "µs per token", "lower", digits=2))
            for name, seconds in _time_steps(steps, options.rounds, compute.device).items():
                table.add(Row(name), column, 1e6 * seconds / batch.ids.numel(), str(seed))
        table.note(
            f"µs per token, forward and backward, {options.tokens:,} tokens per batch, "
            f"on {compute}; parameters: {_describe_sizes(networks)}"
        )
        return table

    def _build_networks(self) -> dict[str, Backbone]:
        width, lengths = self.options.width, self.options.lengths
        spec = TextSpec(blank_tokenizer(VOCAB), max(lengths))
        lstm = {"width": width, "depth": 2, "bidirectional": True, "dropout": 0.0}
        transformer = {
            "width": width,
            "depth": 3,
            "positions": max(8, *lengths),
            "dropout": 0.0,
        }
        return {
            "LSTM, both ways": build_backbone("lstm", lstm, spec),
            "LSTM, both ways, token by token": replace_layers(build_backbone("lstm", lstm, spec)),
            "Transformer": build_backbone("bert-tiny", transformer, spec),
        }


def _draw_batch(count: int, length: int, device: torch.device) -> Tokens:
    """Draw `count` random sequences, at least one."""
    ids = torch.randint(5, VOCAB, (max(1, count), length), device=device)
    return Tokens(ids, torch.zeros_like(ids), torch.ones_like(ids))


def _build_step(network: Backbone, batch: Tokens) -> Callable[[], None]:
    """Build the function that runs forward and backward on a batch."""

    def step() -> None:
        network.zero_grad(set_to_none=True)
        tokens = network(batch).tokens
        assert tokens is not None
        tokens.square().mean().backward()

    return step


def _time_steps(
    steps: dict[str, Callable[[], None]], rounds: int, device: torch.device
) -> dict[str, float]:
    """Time each step in turn, and return the fewest seconds of each over `rounds` rounds.

    One more round comes first to warm up, and does not count.
    """
    fastest = dict.fromkeys(steps, float("inf"))
    for number in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if number:
                fastest[name] = min(fastest[name], time.perf_counter() - start)
    return fastest


def _describe_sizes(networks: dict[str, Backbone]) -> str:
    """List the number of parameters of each network."""
    sizes = []
    for name, network in networks.items():
        count = sum(parameter.numel() for parameter in network.parameters())
        sizes.append(f"{name} {count:,}")
    return ", ".join(sizes)
