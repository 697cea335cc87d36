"""What rows of a table cost: FLOPs, hours on what they ran on, and the same in TPUv3-core-days, as ViT's table has it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sslrun.results.published import published
from sslrun.results.table import Column, Cost, Row, Table, row_of
from sslrun.runs import read_result
from sslrun.training.flops import COUNTED_STEPS

TASK = "compute"
"""What the columns stand under, in the place of a task."""
PRETRAINING, ALL = "PFLOPs, pretraining", "PFLOPs, all stages"
CORE_DAYS = "TPUv3-core-days"

CORE_FLOPS = 123e12 / 2
"""Peak of a TPUv3 core in bf16, a second: two of them share a chip's 123 TFLOP/s (https://cloud.google.com/tpu/docs/v3)."""
DAY = 86_400.0
YARDSTICKS = {"ViT-L/16 (14 ep)": "Ours-JFT (ViT-L/16)", "ViT-H/14 (14 ep)": "Ours-JFT (ViT-H/14)"}
"""Models of which Dosovitskiy et al. give both: exaFLOPs in Table 6, TPUv3-core-days in Table 2."""


def utilisations() -> dict[str, float]:
    """The share of a core's peak that the paper's models come to, by their published FLOPs and core-days."""
    flops, days = published("vit_table6").rows, published("vit_table2").rows[CORE_DAYS]
    return {
        row: flops[row]["exaFLOPs"].value * 1e18 / (days[model].value * DAY * CORE_FLOPS)
        for row, model in YARDSTICKS.items()
    }


def core_days(flops: float) -> float:
    """TPUv3-core-days that so many FLOPs would take at the mean of those utilisations."""
    found = utilisations().values()
    return flops / (sum(found) / len(found) * CORE_FLOPS * DAY)


def spent(run: Path) -> list[dict[str, Any]]:
    """What an evaluation took, and the runs that it stands on and that lie beside it: pretraining, a probe's head.

    Of each: its folder's name, its stage, FLOPs (None where they weren't counted), seconds, the device and how many. What
    was pretrained elsewhere (a file's weights, the hub's) took what nobody knows.
    """
    identity = _json(run / "identity.json")
    origin = identity.get("origin", {})
    beside = {"pretrain": origin.get("pretrain"), "probe": identity.get("head")}
    runs = [run.parent / f"{stage}-{digest}" for stage, digest in beside.items() if digest]
    found = [_of(each) for each in (*runs, run) if (each / "result.json").is_file()]
    elsewhere = "checkpoint" in origin or origin.get("initial", {}).get("pretrained", False)
    if elsewhere and found and identity.get("stage") != "scratch":
        unknown = {"run": f"what {run.name} starts from", "stage": "pretrain", "flops": None, "seconds": 0.0}
        found.insert(0, {**found[-1], **unknown})
    return found


def _of(run: Path) -> dict[str, Any]:
    result, environment = read_result(run), _json(run / "environment.json")
    return {
        "run": f"{run.parent.name}/{run.name}",
        "stage": result.get("stage"),
        "flops": result.get("flops"),
        "seconds": result["seconds"],
        "device": environment.get("device", "unknown"),
        "devices": environment.get("devices", 1),
    }


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def add_compute(table: Table) -> None:
    """Columns of what each row took, a value a seed: each run counts once in a row, however many cells read it.

    Read from `table.results`, each with what `spent` tells of its run under 'spent'. A row of which a number isn't
    known (weights from a file, runs of before FLOPs were counted) has none there.
    """
    uncounted: dict[str, None] = {}
    for (row, seed), runs in _by_row(table.results).items():
        pretraining = [each for each in runs if each["stage"] == "pretrain"]
        for what, of in ((PRETRAINING, pretraining), (ALL, runs)):
            if of and all(each["flops"] is not None for each in of):
                _add(table, row, what, "PFLOPs", sum(each["flops"] for each in of) / 1e15, seed)
            elif of:
                uncounted[" · ".join(row)] = None
        if pretraining and all(each["flops"] is not None for each in pretraining):
            _add(table, row, CORE_DAYS, CORE_DAYS, core_days(sum(each["flops"] for each in pretraining)), seed)
        for device in dict.fromkeys(each["device"] for each in runs):
            hours = sum(each["seconds"] * each["devices"] for each in runs if each["device"] == device) / 3600
            _add(table, row, f"hours on {device}", "hours", hours, seed)
    table.notes += _notes(list(uncounted))


def _by_row(results: Iterable[dict[str, Any]]) -> dict[tuple[Row, str], list[dict[str, Any]]]:
    """The runs of each row and seed, each once."""
    found: dict[tuple[Row, str], dict[str, dict[str, Any]]] = {}
    for each in results:
        runs = found.setdefault((row_of(each), str(each["seed"])), {})
        runs.update({run["run"]: run for run in each.get("spent", ())})
    return {key: list(runs.values()) for key, runs in found.items() if runs}


def _add(table: Table, row: Row, what: str, unit: str, value: float, seed: str) -> None:
    column: Column = (TASK, what)
    table.units[column] = unit
    cell = table.cells.setdefault((row, column), Cost())
    cell.values[seed] = value


def _notes(uncounted: Sequence[str]) -> list[str]:
    shares = utilisations()
    mean = sum(shares.values()) / len(shares)
    each = ", ".join(f"{100 * share:.0f} % for {name}" for name, share in shares.items())
    notes = [
        f"PFLOPs: 10^15, as torch counts those of a stage's first training step (of texts: of about {COUNTED_STEPS} steps; a multiplication "
        "and an addition are two; forward and backward), times its steps; of frozen features one forward pass over the labelled examples; passes over "
        "validation and test, and what fits a classifier to frozen features, are not counted. All stages: pretraining "
        "once a row, and each of its evaluations",
        "hours: of all stages, evaluation included, times devices",
        f"{CORE_DAYS}: of pretraining alone, as in Dosovitskiy et al., Table 2; by FLOPs, at {100 * mean:.0f} % of a core's peak "
        f"of {CORE_FLOPS / 1e12:.1f} TFLOP/s in bf16 (cloud.google.com/tpu/docs/v3: 123 a chip of two cores), the mean of "
        f"what their own Tables 2 and 6 come to: {each}",
    ]
    if uncounted:
        notes.append(
            f"FLOPs not known, since they were not counted or weights are from elsewhere: {'; '.join(uncounted)}"
        )
    return notes
