"""What a recipe will cost, without training and without its data: parameters, FLOPs, memory and time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Group
from rich.table import Table as RichTable
from rich.text import Text
from torch.utils.flop_counter import FlopCounterMode

from sslrun.backbones import build_backbone
from sslrun.data.sources import sources
from sslrun.pretexts.base import pretexts
from sslrun.recipe import Recipe
from sslrun.training.device import Compute

PROBE_BATCH = 8
"""Examples that FLOPs are counted and time is measured on."""


def checked(row: str, recipe: Recipe, compute: Compute) -> dict[str, Any]:
    """What one recipe costs. Numbers of the data are None where only loading it would tell.

    FLOPs are of forward and backward, as torch counts them (2 a multiplication and addition). Memory is weights,
    gradients, two moments, and activations in proportion to the batch. The time is measured on a few examples.
    """
    source = sources[recipe.data.name](recipe.data.options)
    spec, batch = source.sketch(PROBE_BATCH)
    backbone = build_backbone(recipe.backbone.name, recipe.backbone.options, spec)
    found: dict[str, Any] = {
        "row": row,
        "backbone": recipe.backbone.name,
        "parameters": sum(each.numel() for each in backbone.parameters()),
        "input": str(spec),
        "cells": sum(len(each.protocols) * len(each.labels) for each in recipe.evaluate.values()),
    }
    if recipe.pretext is None or recipe.pretrain is None:
        return found
    pretext: Any = compute.put(pretexts[recipe.pretext.name](recipe.pretext.options, backbone))
    batch = batch.to(compute.device)
    generator = compute.generator()

    def step() -> None:
        with torch.no_grad():
            views = pretext.views(batch, generator)
        with compute.autocast(recipe.pretrain.precision):  # type: ignore[union-attr]
            loss = pretext(views).loss
        loss.backward()

    with FlopCounterMode(display=False) as counter:
        step()
    began = time.perf_counter()
    step()
    if compute.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / PROBE_BATCH
    count = source.count()
    schedule = recipe.pretrain
    steps = None if count is None and schedule.steps is None else schedule.total_steps(count or schedule.batch)
    examples = None if steps is None else steps * schedule.batch
    flops = counter.get_total_flops() / PROBE_BATCH
    return found | {
        "pretext": recipe.pretext.name,
        "examples": count,
        "steps": steps,
        "flops_an_example": flops,
        "flops": None if examples is None else flops * examples,
        "examples_a_second": 1 / seconds,
        "seconds": None if examples is None else examples * seconds,
        "state_bytes": 4 * 4 * sum(each.numel() for each in pretext.parameters()),
    }


def shown(rows: Sequence[dict[str, Any]]) -> Group:
    """What `checked` found, to print."""
    table = RichTable(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for head in ("recipe", "backbone", "parameters", "pretext", "steps", "FLOPs", "weights and state", "time", "cells"):
        table.add_column(head, justify="left" if head in ("recipe", "backbone", "pretext") else "right")
    for each in rows:
        table.add_row(
            each["row"], each["backbone"], f"{each['parameters'] / 1e6:.2f} M", each.get("pretext", "–"),
            _count(each.get("steps")), _flops(each.get("flops")),
            f"{each['state_bytes'] / 2**20:,.0f} MiB" if "state_bytes" in each else "–",
            _duration(each.get("seconds")), str(each["cells"]),
        )  # fmt: skip
    note = f"valid · time and FLOPs are of pretraining, the time by measuring {PROBE_BATCH} examples on this device"
    return Group(table, Text(), Text(note))


def _count(steps: int | None) -> str:
    return "–" if steps is None else f"{steps:,}"


def _flops(flops: float | None) -> str:
    return "–" if flops is None else f"{flops / 1e15:.3g} P"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    for unit, length in (("days", 86400), ("hours", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"
