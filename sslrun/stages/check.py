"""Estimate what a recipe costs, without training it and without its data.

The estimate covers parameters, FLOPs, memory and time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from rich.table import Table as RichTable
from rich.text import Text
from torch import Tensor, nn

from sslrun.backbones import build_backbone
from sslrun.backbones.weights import WEIGHTS
from sslrun.data.source import explain_missing, sources
from sslrun.data.specs import InputSpec, TextSpec
from sslrun.pretexts.base import pretexts
from sslrun.recipe import Pretrain, Recipe
from sslrun.tasks.base import tasks
from sslrun.training.device import Compute
from sslrun.training.flops import flop_counter
from sslrun.training.learner import Learner

TIMED_STEPS = 3
"""Number of timed steps. The fastest counts, since other processes may slow down the rest."""
PROBE_BATCH = 8
"""Largest number of examples on which FLOPs and time are measured, if there is time."""
LEAST_BATCH = 2
"""Examples of the first pass, which shows how many fit into the time limit. Some losses need two
examples."""
SECONDS = 15.0
"""Time limit for measuring all recipes of one `check`, so that the command ends within 20 s."""


class Budget:
    """The time left to measure the recipes of one `check`, shared evenly by those that remain."""

    def __init__(self, recipes: int = 1, seconds: float = SECONDS) -> None:
        self.recipes = recipes
        self.end = time.perf_counter() + seconds
        self.measured: dict[str, Measured] = {}
        """Measurements by network, so that recipes that train the same network measure it once."""

    def next(self) -> float:
        """Return the next recipe's share of the time, in seconds; 0 if none is left."""
        share = max(0.0, self.end - time.perf_counter()) / max(1, self.recipes)
        self.recipes -= 1
        return share


@dataclass(frozen=True)
class Measured:
    """The measured cost of one pretraining step on `count` examples."""

    count: int
    flops: int
    seconds: float
    kept: dict[int, int]
    """Number of examples -> bytes kept for the backward pass, for two numbers."""

    def activations(self, examples: int) -> float:
        """Extrapolate the bytes kept for the backward pass from the two measured numbers."""
        (few, of_few), (many, of_many) = sorted(self.kept.items())
        return of_many + (of_many - of_few) / (many - few) * (examples - many)


def estimate(
    row: str, recipe: Recipe, compute: Compute, budget: Budget | None = None
) -> dict[str, Any]:
    """Estimate what one recipe costs. Numbers that depend on the data's size may be None.

    FLOPs cover the forward and backward pass, as torch counts them (2 per multiply-add). Memory
    covers weights, gradients, the optimizer's state, and what one batch (or one accumulated part of
    it) keeps for the backward pass. The last is extrapolated from two small batches, since a part
    of it does not grow with the batch. The time is measured on as many examples as `budget` allows;
    `measured_on` holds that number. If it is 0, no time was left and the measured numbers are
    missing.
    """
    source = sources[recipe.data.name](recipe.data.options)
    spec, _ = source.sketch(PROBE_BATCH)
    backbone = build_backbone(
        recipe.backbone.name, recipe.backbone.options, backbone_spec(recipe, spec)
    )
    costs: dict[str, Any] = {
        "row": row,
        "backbone": recipe.backbone.name,
        "parameters": sum(parameter.numel() for parameter in backbone.parameters()),
        "input": str(spec),
        "cells": _count_cells(recipe),
        "lacking": _explain_missing_data(recipe),
        "budgets": _list_budgets(recipe),
    }
    if recipe.pretext is None or recipe.pretrain is None:
        return costs
    schedule = recipe.pretrain
    budget = Budget() if budget is None else budget
    network = repr((recipe.data, recipe.backbone, recipe.pretext, schedule.precision))
    pretext = pretexts[recipe.pretext.name](recipe.pretext.options, backbone)
    compute.put(pretext)
    share = budget.next()  # after building the networks, which takes time too
    measured = budget.measured.get(network)
    if measured is None and share > 0:
        measured = budget.measured[network] = _measure(pretext, source, schedule, compute, share)
    count = source.count()
    steps = _count_steps(schedule, count)
    state = _state_bytes(pretext, schedule)
    costs |= {
        "pretext": recipe.pretext.name,
        "examples": count,
        "steps": steps,
        **({} if schedule.budget is None else {"budget": schedule.budget}),
        "state_bytes": state,
        "trained_parameters": _count_trained(pretext),
        "convolutional": _is_convolutional(backbone),
        "length": spec.length if isinstance(spec, TextSpec) else None,
    }
    if measured is None:
        return costs | {"measured_on": 0}
    return costs | _extrapolate(measured, schedule, steps, state)


def _count_cells(recipe: Recipe) -> int:
    """Count the cells of a recipe's evaluations."""
    return sum(
        len(evaluation.labels_of(protocol)) * evaluation.restarts_of(protocol)
        for evaluation in recipe.evaluate.values()
        for protocol in evaluation.protocols
    )


def _list_budgets(recipe: Recipe) -> list[str]:
    """Describe what the recipe's protocols train in addition to heads, as in "practice: ..."."""
    return [
        f"{name}: {budget}"
        for evaluation in recipe.evaluate.values()
        for name in evaluation.protocols
        if (budget := evaluation.protocol(name).describe_budget())
    ]


def _count_steps(schedule: Pretrain, examples: int | None) -> int | None:
    """Count the steps of pretraining; None if examples are unknown, or if a budget decides."""
    if examples is None and schedule.steps is None:
        return None
    return schedule.planned_steps(examples or schedule.batch)


def _extrapolate(
    measured: Measured, schedule: Pretrain, steps: int | None, state: int
) -> dict[str, Any]:
    """Extrapolate the cost of pretraining from a measured step. `state`: see `_state_bytes`.

    With a budget of time, the steps too follow from the measured speed.
    """
    flops, seconds = measured.flops / measured.count, measured.seconds / measured.count
    if schedule.budget is not None:
        steps = max(1, round(schedule.budget / seconds / schedule.batch))
    examples = None if steps is None else steps * schedule.batch
    activations = measured.activations(schedule.batch // schedule.accumulate)
    return {
        "steps": steps,
        "measured_on": measured.count,
        "flops_an_example": flops,
        "flops": None if examples is None else flops * examples,
        "examples_a_second": 1 / seconds,
        "seconds": schedule.budget or (None if examples is None else examples * seconds),
        "activation_bytes": round(activations),
        "memory_bytes": round(state + activations),
    }


class _Probe:
    """Runs and times passes of pretraining on a few examples."""

    def __init__(
        self, pretext: nn.Module, source: Any, schedule: Pretrain, compute: Compute
    ) -> None:
        self.pretext: Any = pretext
        self.source = source
        self.precision = schedule.precision
        self.compute = compute
        self.generator = compute.generator()
        self.kept: dict[int, int] = {}
        """Number of examples -> bytes kept for the backward pass."""

    def examples(self, count: int) -> Any:
        """Return a batch of synthetic examples on the device."""
        return self.source.sketch(count)[1].to(self.compute.device)

    def forward(self, batch: Any) -> Tensor:
        """Compute the loss of a batch."""
        with torch.no_grad():
            views = self.pretext.views(batch, self.generator)
        with self.compute.autocast(self.precision):
            return self.pretext(views).loss

    def time_forward(self, count: int) -> float:
        """Time a forward pass, and add its bytes for the backward pass to `kept`."""
        batch = self.examples(count)
        with _kept_for_backward(self.pretext) as storages:
            seconds = _timed(lambda: self.forward(batch), self.compute)
        self.kept[count] = sum(storages.values())
        return seconds

    def time_step(self, batch: Any) -> float:
        """Time a forward and backward pass."""
        return _timed(lambda: self.forward(batch).backward(), self.compute)


def _measure(
    pretext: Learner, source: Any, schedule: Pretrain, compute: Compute, share: float
) -> Measured:
    """Measure a pretraining step on up to PROBE_BATCH examples within `share` seconds.

    If the task needs multiples of a number of examples, up to that many times as many.
    """
    end = time.perf_counter() + share
    probe = _Probe(pretext, source, schedule, compute)
    kept = probe.kept
    # A step takes about three times as long as its forward pass. The first pass is slower than
    # those after it.
    unit = pretext.batch_multiple
    least = LEAST_BATCH * unit
    with flop_counter() as counter:
        step_seconds = 3 * probe.time_forward(least)
    affordable = least * (end - time.perf_counter()) / max(step_seconds, 1e-9)
    if affordable < least:
        return Measured(least, 3 * counter.get_total_flops(), step_seconds, kept | {0: 0})
    sizes = (PROBE_BATCH * unit, PROBE_BATCH * unit // 2)
    count = next((size for size in sizes if size <= affordable), least)
    batch = probe.examples(count)
    with flop_counter() as counter, _kept_for_backward(pretext) as storages:
        seconds = probe.time_step(batch)
    kept[count] = sum(storages.values())
    if len(kept) == 1 and time.perf_counter() + seconds < end:
        probe.time_forward(2 * least)
    elif len(kept) == 1:
        kept[0] = 0  # no time for a second number: assume that all of it grows with the batch
    timed = [seconds]
    while len(timed) <= TIMED_STEPS and time.perf_counter() + seconds < end:
        timed.append(probe.time_step(batch))
    return Measured(count, counter.get_total_flops(), min(timed), kept)


def backbone_spec(recipe: Recipe, spec: InputSpec) -> InputSpec:
    """Return the backbone's input spec, by the pretext task or else the first evaluation."""
    if recipe.pretext is not None:
        return pretexts[recipe.pretext.name].backbone_spec(recipe.pretext.options, spec)
    for evaluation in recipe.evaluate.values():
        task, data = tasks[evaluation.task.name], evaluation.data
        if task.gives is not None:
            own = spec if data == recipe.data else sources[data.name](data.options).sketch(1)[0]
            return task(evaluation.task.options, own, ()).backbone_spec
    return spec


def _explain_missing_data(recipe: Recipe) -> list[str]:
    """Explain why data sets of the recipe are missing, as far as known without a download."""
    data_sets = [recipe.data]
    for evaluation in recipe.evaluate.values():
        data_sets += evaluation.reads
    reasons = [explain_missing(data.name, data.options) for data in data_sets]
    if recipe.weights is not None:
        reasons.append(_explain_missing_weights(recipe.weights.file))
    return list(dict.fromkeys(filter(None, reasons)))


def _explain_missing_weights(path: Path) -> str | None:
    """Explain that there are no weights at `path`; None if there are."""
    file = path / WEIGHTS if path.is_dir() else path
    return None if file.is_file() else f"weights: no checkpoint at {path}: put it there"


@contextmanager
def _kept_for_backward(module: nn.Module) -> Iterator[dict[int, int]]:
    """Yield storage's address -> bytes that forward passes keep for the backward pass.

    The module's own parameters and buffers are not counted.
    """
    tensors = (*module.parameters(), *module.buffers())
    own = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


def _count_trained(module: nn.Module) -> int:
    """Count the parameters that are trained."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def _is_convolutional(module: nn.Module) -> bool:
    """Whether most of the parameters are those of convolutions."""
    convolutions = [part for part in module.modules() if isinstance(part, nn.Conv2d)]
    weights = sum(part.weight.numel() for part in convolutions)
    return 2 * weights > sum(parameter.numel() for parameter in module.parameters())


def _state_bytes(module: nn.Module, schedule: Pretrain) -> int:
    """Sum the bytes of weights (with teachers), gradients, moments, and the moving average."""
    parameters = list(module.parameters())
    every = sum(parameter.nbytes for parameter in parameters)
    trained = sum(parameter.nbytes for parameter in parameters if parameter.requires_grad)
    moments = 2 if schedule.optimizer == "adamw" else 1
    return every * (2 if schedule.ema else 1) + trained * (1 + moments)


def _timed(step: Callable[[], object], compute: Compute) -> float:
    """Measure the seconds that a step takes."""
    began = time.perf_counter()
    step()
    if compute.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def render(rows: Sequence[dict[str, Any]]) -> Group:
    """Render the estimates of several recipes as a table."""
    table = RichTable(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for head in (
        "recipe",
        "backbone",
        "parameters",
        "pretext",
        "steps",
        "FLOPs",
        "memory",
        "time",
        "cells",
    ):
        is_name = head in ("recipe", "backbone", "pretext")
        table.add_column(head, justify="left" if is_name else "right", no_wrap=head != "recipe")
    for row in rows:
        table.add_row(
            row["row"],
            row["backbone"],
            f"{row['parameters'] / 1e6:.2f} M",
            row.get("pretext", "–"),
            _count(row.get("steps")),
            _flops(row.get("flops")),
            _memory(row.get("memory_bytes")),
            _duration(row.get("seconds", row.get("budget"))),
            str(row["cells"]),
        )
    lacking = dict.fromkeys(reason for row in rows for reason in row.get("lacking", ()))
    missing = [Text(f"not there yet: {reason}") for reason in lacking]
    budgets = [Text(f"{row['row']}: {line}") for row in rows for line in row.get("budgets", ())]
    return Group(table, Text(), Text(_note(rows)), *budgets, *missing)


def _note(rows: Sequence[dict[str, Any]]) -> str:
    """Say how the numbers of the rows that pretrain came about."""
    if all("measured_on" not in row for row in rows):
        return "valid"
    note = (
        "valid · FLOPs, memory and time are of pretraining: the time by measuring "
        f"{_examples(rows)} on this device, the memory for weights, optimizer and a batch's "
        "activations on one device"
    )
    if any(row.get("budget") for row in rows):
        note += (
            "; where the time is a budget, its steps and FLOPs are estimated from the measured "
            "speed"
        )
    return note


def _examples(rows: Sequence[dict[str, Any]]) -> str:
    """Describe how many examples were measured, and how many recipes were not measured."""
    counts = sorted({row["measured_on"] for row in rows if row.get("measured_on")})
    missing = sum(row.get("measured_on") == 0 for row in rows)
    numbers = " or ".join(map(str, counts))
    text = f"{numbers or 'no'} examples"
    if not missing:
        return text
    return f"{text} (recipes not measured, since {SECONDS:.0f} s had passed: {missing})"


def _count(steps: int | None) -> str:
    return "–" if steps is None else f"{steps:,}"


def _flops(flops: float | None) -> str:
    if flops is None:
        return "–"
    for unit, size in (("E", 1e18), ("P", 1e15), ("T", 1e12)):
        if flops >= size:
            return f"{flops / size:.3g} {unit}"
    return f"{flops / 1e9:.3g} G"


def _memory(size: int | None) -> str:
    if size is None:
        return "–"
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    for unit, length in (("days", 86400), ("hours", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"
