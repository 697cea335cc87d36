"""The cost of rows: FLOPs, hours by device, and TPUv3-core-days as in ViT's table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from sslrun.metric import Metric
from sslrun.results.address import Column, Row
from sslrun.results.published import published
from sslrun.results.record import RunRecord
from sslrun.results.table import Table
from sslrun.training.flops import COUNTED_STEPS

TASK = "compute"
"""Replaces a task's name in cost columns."""
PRETRAINING, ALL = "PFLOPs, pretraining", "PFLOPs, all stages"
CORE_DAYS = "TPUv3-core-days"

CORE_FLOPS = 123e12 / 2
"""Peak FLOP/s of a TPUv3 core in bf16: two share a chip's 123 TFLOP/s
(https://cloud.google.com/tpu/docs/v3)."""
DAY = 86_400.0
YARDSTICKS = {"ViT-L/16 (14 ep)": "Ours-JFT (ViT-L/16)", "ViT-H/14 (14 ep)": "Ours-JFT (ViT-H/14)"}
"""Models with both numbers in Dosovitskiy et al.: exaFLOPs in Table 6, core-days in Table 2."""

FLOPS_NOTE = (
    "PFLOPs: 10^15, as torch counts them in a stage's first training step (for texts, in "
    f"{COUNTED_STEPS} steps; a multiplication and an addition are two; forward and backward), "
    "times its steps; for frozen features, one forward pass over the labeled examples. Passes over "
    "validation and test, and fitting a classifier to frozen features, are not counted. All "
    "stages: pretraining once per row, and each of its evaluations"
)
HOURS_NOTE = "hours: of all stages, evaluation included, times devices"


@cache
def utilizations() -> dict[str, float]:
    """Model -> share of a core's peak, from its published FLOPs and core-days."""
    flops, days = published("vit_table6").rows, published("vit_table2").rows[CORE_DAYS]
    return {
        row: flops[row]["exaFLOPs"].value * 1e18 / (days[model].value * DAY * CORE_FLOPS)
        for row, model in YARDSTICKS.items()
    }


def core_days(flops: float) -> float:
    """Convert FLOPs into TPUv3-core-days at the mean of `utilizations`."""
    shares = utilizations().values()
    return flops / (sum(shares) / len(shares) * CORE_FLOPS * DAY)


@dataclass(frozen=True)
class Expense:
    """The cost of one run."""

    run: str
    stage: str
    flops: float | None
    """None if not counted."""
    seconds: float
    device: str
    devices: int = 1

    @classmethod
    def of(cls, record: RunRecord) -> Expense:
        return cls(
            record.name, record.stage, record.flops, record.seconds, record.device, record.devices
        )


def expenses(record: RunRecord) -> list[Expense]:
    """List the costs of an evaluation and of the runs that it needed.

    These are its pretraining and the probe that trained its head. If it was pretrained elsewhere (a
    file of weights, a hub), the FLOPs are unknown.
    """
    needed = (record.pretraining, record.probe, record)
    costs = [Expense.of(run) for run in needed if run is not None and run.finished]
    if costs and record.pretrained_elsewhere:
        weights = Expense(f"weights of {record.name}", "pretrain", None, 0.0, costs[-1].device)
        costs.insert(0, weights)
    return costs


def add_compute(table: Table) -> None:
    """Add columns with the cost of each row, one value per seed.

    A run counts once per row, even if several cells use it. If a number is unknown (weights from a
    file, FLOPs that were not counted), the cell stays empty.
    """
    uncounted: dict[str, None] = {}
    core_days_note = _core_days_note()
    for (row, seed), runs in _by_row(table.records).items():
        pretraining = [run for run in runs if run.stage == "pretrain"]
        for name, members in ((PRETRAINING, pretraining), (ALL, runs)):
            flops = _total_flops(members)
            if flops is not None:
                _add(table, row, _metric(name, "PFLOPs"), flops / 1e15, seed, FLOPS_NOTE)
            elif members:
                uncounted[row.title] = None
        flops = _total_flops(pretraining)
        if flops is not None:
            _add(table, row, _metric(CORE_DAYS, CORE_DAYS), core_days(flops), seed, core_days_note)
        for device, hours in _hours_by_device(runs).items():
            _add(table, row, _metric(f"hours on {device}", "hours"), hours, seed, HOURS_NOTE)
    table.notes += [FLOPS_NOTE, HOURS_NOTE, core_days_note]
    if uncounted:
        rows = "; ".join(uncounted)
        table.note(
            f"FLOPs unknown, since they were not counted or weights are from elsewhere: {rows}"
        )


def _hours_by_device(runs: Sequence[Expense]) -> dict[str, float]:
    """Device -> hours of the runs, times the number of devices."""
    seconds: dict[str, list[float]] = {}
    for run in runs:
        seconds.setdefault(run.device, []).append(run.seconds * run.devices)
    return {device: sum(values) / 3600 for device, values in seconds.items()}


def _total_flops(runs: Sequence[Expense]) -> float | None:
    """Sum the FLOPs; None if there is no run, or if one was not counted."""
    counted = [run.flops for run in runs if run.flops is not None]
    return sum(counted) if runs and len(counted) == len(runs) else None


def _by_row(records: Iterable[RunRecord]) -> dict[tuple[Row, str], list[Expense]]:
    """Group the runs by row and seed; each run occurs once."""
    groups: dict[tuple[Row, str], dict[str, Expense]] = {}
    for record in records:
        runs = groups.setdefault((record.row, str(record.seed)), {})
        runs.update({run.run: run for run in expenses(record)})
    return {key: list(runs.values()) for key, runs in groups.items() if runs}


def _metric(name: str, unit: str) -> Metric:
    return Metric(name, unit, better="lower")


def _add(table: Table, row: Row, metric: Metric, value: float, seed: str, note: str) -> None:
    table.add_cost(row, Column(TASK, metric=metric), value, seed, note)


def _core_days_note() -> str:
    shares = utilizations()
    mean = sum(shares.values()) / len(shares)
    listed = ", ".join(f"{100 * share:.0f} % for {name}" for name, share in shares.items())
    return (
        f"{CORE_DAYS}: of pretraining alone, as in Dosovitskiy et al., Table 2; by FLOPs, at "
        f"{100 * mean:.0f} % of a core's peak of {CORE_FLOPS / 1e12:.1f} TFLOP/s in bf16 "
        "(cloud.google.com/tpu/docs/v3: 123 a chip of two cores), the mean of what their own "
        f"Tables 2 and 6 come to: {listed}"
    )
