"""What a recipe will cost, without training and without its data: parameters, FLOPs, memory and time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Group
from rich.table import Table as RichTable
from rich.text import Text
from torch import Tensor, nn

from sslrun.backbones import build_backbone
from sslrun.data.source import explain_missing, sources
from sslrun.data.specs import InputSpec
from sslrun.pretexts.base import pretexts
from sslrun.recipe import Pretrain, Recipe
from sslrun.tasks.base import tasks
from sslrun.training.device import Compute
from sslrun.training.flops import flop_counter

TIMED_STEPS = 3
"""Number of timed steps. The fastest one counts, because other processes slow the others."""
PROBE_BATCH = 8
"""Examples that FLOPs are counted and time is measured on, if there is time."""
LEAST_BATCH = 2
"""Examples of the first pass, from which it follows how many fit into the time. Some losses need
two examples."""
SECONDS = 15.0
"""Time limit for measuring all recipes of one `check` together, so that it ends within 20 s."""


class Budget:
    """The time left to measure the recipes of one `check`, shared evenly among those still to come."""

    def __init__(self, recipes: int = 1, seconds: float = SECONDS) -> None:
        self.recipes = recipes
        self.end = time.perf_counter() + seconds
        self.measured: dict[str, Measured] = {}
        """What each network took, so that recipes that train the same one measure it once."""

    def next(self) -> float:
        """The share of the next recipe, in seconds; 0 when none is left."""
        share = max(0.0, self.end - time.perf_counter()) / max(1, self.recipes)
        self.recipes -= 1
        return share


@dataclass(frozen=True)
class Measured:
    """What a step of pretraining on `count` examples took."""

    count: int
    flops: int
    seconds: float
    kept: dict[int, int]
    """Bytes kept for the backward pass by number of examples, for two numbers."""

    def activations(self, examples: int) -> float:
        """Bytes kept for the backward pass of a batch, extrapolated from the two that were measured."""
        (few, of_few), (many, of_many) = sorted(self.kept.items())
        return of_many + (of_many - of_few) / (many - few) * (examples - many)


def estimate(
    row: str, recipe: Recipe, compute: Compute, budget: Budget | None = None
) -> dict[str, Any]:
    """Estimate what one recipe costs. Numbers are None if only loading the data could give them.

    FLOPs are of forward and backward, as torch counts them (2 a multiplication and addition).
    Memory is weights, gradients, the optimizer's state, and what a batch, or a part of it, keeps
    for the backward pass: extrapolated from two small ones, since some of it is of any batch. The
    time is measured on a few examples: as many as `budget` leaves time for, and `measured_on` says
    how many. 0: there was no time left, and what is measured is missing.
    """
    source = sources[recipe.data.name](recipe.data.options)
    spec, _ = source.sketch(PROBE_BATCH)
    backbone = build_backbone(
        recipe.backbone.name, recipe.backbone.options, _backbone_spec(recipe, spec)
    )
    found: dict[str, Any] = {
        "row": row,
        "backbone": recipe.backbone.name,
        "parameters": sum(each.numel() for each in backbone.parameters()),
        "input": str(spec),
        "cells": sum(
            len(each.labels_of(protocol)) * each.restarts_of(protocol)
            for each in recipe.evaluate.values()
            for protocol in each.protocols
        ),
        "lacking": _lacking(recipe),
    }
    if recipe.pretext is None or recipe.pretrain is None:
        return found
    schedule = recipe.pretrain
    budget = Budget() if budget is None else budget
    network = repr((recipe.data, recipe.backbone, recipe.pretext, schedule.precision))
    pretext = compute.put(pretexts[recipe.pretext.name](recipe.pretext.options, backbone))
    share = budget.next()  # of what building the networks left
    measured = budget.measured.get(network)
    if measured is None and share > 0:
        measured = budget.measured[network] = _measure(pretext, source, schedule, compute, share)
    count = source.count()
    steps = (
        None
        if count is None and schedule.steps is None
        else schedule.total_steps(count or schedule.batch)
    )
    examples = None if steps is None else steps * schedule.batch
    state = _state_bytes(pretext, schedule)
    found |= {
        "pretext": recipe.pretext.name,
        "examples": count,
        "steps": steps,
        "state_bytes": state,
    }
    if measured is None:
        return found | {"measured_on": 0}
    flops, seconds = measured.flops / measured.count, measured.seconds / measured.count
    activations = measured.activations(schedule.batch // schedule.accumulate)
    return found | {
        "measured_on": measured.count,
        "flops_an_example": flops,
        "flops": None if examples is None else flops * examples,
        "examples_a_second": 1 / seconds,
        "seconds": None if examples is None else examples * seconds,
        "activation_bytes": round(activations),
        "memory_bytes": round(state + activations),
    }


def _measure(
    pretext: nn.Module, source: Any, schedule: Pretrain, compute: Compute, share: float
) -> Measured:
    """Measure a step of pretraining on as many examples, up to PROBE_BATCH, as `share` seconds allow."""
    end = time.perf_counter() + share
    generator = compute.generator()
    learner: Any = pretext

    def forward(batch: Any) -> Tensor:
        with torch.no_grad():
            views = learner.views(batch, generator)
        with compute.autocast(schedule.precision):
            return learner(views).loss

    def step(batch: Any) -> None:
        forward(batch).backward()

    def examples(count: int) -> Any:
        return source.sketch(count)[1].to(compute.device)

    kept: dict[int, int] = {}

    def look(count: int) -> float:
        """Seconds of a forward pass of `count` examples, whose bytes for the backward pass are noted."""
        batch = examples(count)
        with _kept_for_backward(pretext) as storages:
            seconds = _timed(lambda: forward(batch), compute)
        kept[count] = sum(storages.values())
        return seconds

    # A step takes about three times as long as its forward pass. The first pass is slower than
    # those after it.
    with flop_counter() as counter:
        ahead = look(LEAST_BATCH)
    affordable = LEAST_BATCH * (end - time.perf_counter()) / max(3 * ahead, 1e-9)
    if affordable < LEAST_BATCH:
        return Measured(LEAST_BATCH, 3 * counter.get_total_flops(), 3 * ahead, kept | {0: 0})
    count = next(
        (each for each in (PROBE_BATCH, PROBE_BATCH // 2) if each <= affordable), LEAST_BATCH
    )
    batch = examples(count)
    with flop_counter() as counter, _kept_for_backward(pretext) as storages:
        seconds = _timed(lambda: step(batch), compute)
    kept[count] = sum(storages.values())
    if len(kept) == 1 and time.perf_counter() + seconds < end:
        look(2 * LEAST_BATCH)
    elif len(kept) == 1:
        kept[0] = 0  # no time for a second number: all of it is assumed to grow with the batch
    timed = [seconds]
    while len(timed) <= TIMED_STEPS and time.perf_counter() + seconds < end:
        timed.append(_timed(lambda: step(batch), compute))
    return Measured(count, counter.get_total_flops(), min(timed), kept)


def _backbone_spec(recipe: Recipe, spec: InputSpec) -> InputSpec:
    """The spec that the recipe's pretext task, or else its first evaluation, gives the backbone for such data."""
    if recipe.pretext is not None:
        return pretexts[recipe.pretext.name].backbone_spec(recipe.pretext.options, spec)
    for evaluation in recipe.evaluate.values():
        task = tasks[evaluation.task.name]
        if evaluation.data == recipe.data and task.gives is not None:
            return task(evaluation.task.options, spec, ()).backbone_spec
    return spec


def _lacking(recipe: Recipe) -> list[str]:
    """Why data sets that the recipe reads are missing, as far as that is known without a download."""
    read = (
        recipe.data,
        *(each for evaluation in recipe.evaluate.values() for each in evaluation.reads),
    )
    return list(
        dict.fromkeys(filter(None, (explain_missing(data.name, data.options) for data in read)))
    )


@contextmanager
def _kept_for_backward(module: nn.Module) -> Iterator[dict[int, int]]:
    """Bytes by address of the storages that forward passes keep for the backward pass, except the module's own."""
    own = {each.untyped_storage().data_ptr() for each in (*module.parameters(), *module.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


def _state_bytes(module: nn.Module, schedule: Pretrain) -> int:
    """Bytes of the weights (with teachers), their gradients, the optimizer's moments, and the moving average."""
    every = sum(each.numel() * each.element_size() for each in module.parameters())
    trained = sum(
        each.numel() * each.element_size() for each in module.parameters() if each.requires_grad
    )
    moments = 2 if schedule.optimizer == "adamw" else 1
    return every * (2 if schedule.ema else 1) + trained * (1 + moments)


def _timed(step: Callable[[], object], compute: Compute) -> float:
    """Seconds that a step takes."""
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
        named = head in ("recipe", "backbone", "pretext")
        table.add_column(head, justify="left" if named else "right", no_wrap=head != "recipe")
    for each in rows:
        table.add_row(
            each["row"], each["backbone"], f"{each['parameters'] / 1e6:.2f} M", each.get("pretext", "–"),
            _count(each.get("steps")), _flops(each.get("flops")),
            _memory(each.get("memory_bytes")), _duration(each.get("seconds")),
            str(each["cells"]),
        )  # fmt: skip
    note = (
        f"valid · FLOPs, memory and time are of pretraining: the time by measuring {_examples(rows)} on this device, "
        "the memory for weights, optimizer and a batch's activations on one device"
    )
    lacking = dict.fromkeys(each for row in rows for each in row.get("lacking", ()))
    return Group(table, Text(), Text(note), *(Text(f"not there yet: {each}") for each in lacking))


def _examples(rows: Sequence[dict[str, Any]]) -> str:
    """The numbers of measured examples in words, and the number of recipes that were not measured."""
    counts = sorted({row["measured_on"] for row in rows if row.get("measured_on")})
    missing = sum(row.get("measured_on") == 0 for row in rows)
    numbers = " or ".join(map(str, counts))
    text = f"{numbers or 'no'} examples"
    return (
        f"{text} (recipes not measured, since {SECONDS:.0f} s had passed: {missing})"
        if missing
        else text
    )


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
