"""What a recipe will cost, without training and without its data: parameters, FLOPs, memory and time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Group
from rich.table import Table as RichTable
from rich.text import Text
from torch import Tensor, nn

from sslrun.backbones import build_backbone
from sslrun.data.source import explain_missing, sources
from sslrun.pretexts.base import pretexts
from sslrun.recipe import Pretrain, Recipe
from sslrun.training.device import Compute
from sslrun.training.flops import flop_counter

TIMED_STEPS = 3
"""Steps that are timed; the quickest counts, as others are slowed by whatever else runs."""
PROBE_BATCH = 8
"""Examples that FLOPs are counted and time is measured on."""


def checked(row: str, recipe: Recipe, compute: Compute) -> dict[str, Any]:
    """What one recipe costs. Numbers of the data are None where only loading it would tell.

    FLOPs are of forward and backward, as torch counts them (2 a multiplication and addition). Memory is weights,
    gradients, the optimizer's state, and what a batch, or a part of it, keeps for the backward pass: extrapolated from
    two small ones, since some of it is of any batch. The time is measured on a few examples.
    """
    source = sources[recipe.data.name](recipe.data.options)
    spec, _ = source.sketch(PROBE_BATCH)
    backbone = build_backbone(recipe.backbone.name, recipe.backbone.options, spec)
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
    pretext: Any = compute.put(pretexts[recipe.pretext.name](recipe.pretext.options, backbone))
    schedule = recipe.pretrain
    batches = {count: source.sketch(count)[1].to(compute.device) for count in (PROBE_BATCH, PROBE_BATCH // 2)}
    generator = compute.generator()

    def forward(count: int) -> Tensor:
        with torch.no_grad():
            views = pretext.views(batches[count], generator)
        with compute.autocast(schedule.precision):
            return pretext(views).loss

    def step() -> None:
        forward(PROBE_BATCH).backward()

    with flop_counter() as counter, _kept_for_backward(pretext) as kept:
        step()
    with _kept_for_backward(pretext) as kept_of_half:
        forward(PROBE_BATCH // 2)
    seconds = min(_timed(step, compute) for _ in range(TIMED_STEPS)) / PROBE_BATCH
    count = source.count()
    steps = None if count is None and schedule.steps is None else schedule.total_steps(count or schedule.batch)
    examples = None if steps is None else steps * schedule.batch
    flops = counter.get_total_flops() / PROBE_BATCH
    whole, half = sum(kept.values()), sum(kept_of_half.values())
    part = schedule.batch // schedule.accumulate
    activations = whole + (whole - half) / (PROBE_BATCH / 2) * (part - PROBE_BATCH)
    state = _state_bytes(pretext, schedule)
    return found | {
        "pretext": recipe.pretext.name,
        "examples": count,
        "steps": steps,
        "flops_an_example": flops,
        "flops": None if examples is None else flops * examples,
        "examples_a_second": 1 / seconds,
        "seconds": None if examples is None else examples * seconds,
        "state_bytes": state,
        "activation_bytes": round(activations),
        "memory_bytes": round(state + activations),
    }


def _lacking(recipe: Recipe) -> list[str]:
    """Why data sets that the recipe reads can't be had, where that can be told at once."""
    read = (recipe.data, *(each for evaluation in recipe.evaluate.values() for each in evaluation.reads))
    return list(dict.fromkeys(filter(None, (explain_missing(data.name, data.options) for data in read))))


@contextmanager
def _kept_for_backward(module: nn.Module) -> Iterator[dict[int, int]]:
    """Bytes by address of the storages that forward passes inside keep for the backward pass, but for the module's."""
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
    """Of the weights, teachers included, their gradients, the optimizer's moments, and the moving average."""
    every = sum(each.numel() * each.element_size() for each in module.parameters())
    trained = sum(each.numel() * each.element_size() for each in module.parameters() if each.requires_grad)
    moments = 2 if schedule.optimizer == "adamw" else 1
    return every * (2 if schedule.ema else 1) + trained * (1 + moments)


def _timed(step: Callable[[], None], compute: Compute) -> float:
    """Seconds that a step takes."""
    began = time.perf_counter()
    step()
    if compute.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def shown(rows: Sequence[dict[str, Any]]) -> Group:
    """What `checked` found, to print."""
    table = RichTable(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for head in ("recipe", "backbone", "parameters", "pretext", "steps", "FLOPs", "memory", "time", "cells"):
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
        f"valid · FLOPs, memory and time are of pretraining: the time by measuring {PROBE_BATCH} examples on this device, "
        "the memory for weights, optimizer and a batch's activations on one device"
    )
    lacking = dict.fromkeys(each for row in rows for each in row.get("lacking", ()))
    return Group(table, Text(), Text(note), *(Text(f"not there yet: {each}") for each in lacking))


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
