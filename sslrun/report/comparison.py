"""Compare two runs, or the runs of two folders: what differs, and each metric with its interval."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from sslrun.errors import UserError
from sslrun.report.collect import finished_evaluations
from sslrun.results.naming import without_options
from sslrun.results.paired import half_width, judge
from sslrun.results.record import RunRecord

VARYING = ("command", "started")
"""Keys of environments that always differ."""
ABSENT = "–"


@dataclass(frozen=True)
class Difference:
    """A setting that two sides have different values of."""

    kind: str
    """recipe or environment."""
    key: str
    first: str
    second: str


@dataclass(frozen=True)
class MetricPair:
    """A metric of both sides."""

    name: str
    """Task, protocol, labels and metric; or the metric alone."""
    first: float
    second: float
    interval: tuple[float, float] | None
    """95 % interval of the mean of second - first."""
    over: str
    """What the interval is over; or why there is none."""

    @property
    def difference(self) -> float:
        return self.second - self.first


@dataclass(frozen=True)
class RunComparison:
    """What differs between two runs or folders."""

    first: str
    second: str
    differences: Sequence[Difference]
    metrics: Sequence[MetricPair]
    unmatched: Sequence[str]
    """Evaluations that only one side has."""

    def as_dict(self) -> dict[str, Any]:
        """Return the comparison as JSON values."""
        metrics = [{**asdict(pair), "difference": pair.difference} for pair in self.metrics]
        return {**asdict(self), "metrics": metrics}

    def render(self) -> Group:
        """Lay the comparison out for the terminal."""
        settings = RichTable("", "setting", self.first, self.second, box=None, padding=(0, 2, 0, 0))
        for line in self.differences:
            settings.add_row(*map(Text, (line.kind, line.key, line.first, line.second)))
        metrics = RichTable(
            "metric", self.first, self.second, "difference", "95 % interval", "over",
            box=None, padding=(0, 2, 0, 0),
        )  # fmt: skip
        for pair in self.metrics:
            numbers = (f"{pair.first:.4g}", f"{pair.second:.4g}", f"{pair.difference:+.3g}")
            interval = (
                ABSENT if pair.interval is None else "[{:+.3g}, {:+.3g}]".format(*pair.interval)
            )
            metrics.add_row(*map(Text, (pair.name, *numbers, interval, pair.over)))
        left = [Text(f"only one side has {name}") for name in self.unmatched]
        same = Text("recipe and environment are the same")
        above: list[RenderableType] = [settings, Text()] if self.differences else [same]
        return Group(*above, metrics, *left)


def compare_runs(first: Path, second: Path) -> RunComparison:
    """Compare two runs, or two folders of runs whose evaluations are paired by what they measure.

    Raises UserError if a folder holds no finished run, or if the two have no metric in common.
    """
    sides = [_read(first), _read(second)]
    names = _short(first, second)
    unmatched: list[str] = []
    if all(len(side) == 1 for side in sides):
        pairs = _pairs_of_runs(sides[0][0], sides[1][0])
    else:
        pairs, unmatched = _pairs_of_folders(*sides)
    if not pairs:
        raise UserError(f"{first} and {second} have no metric in common: name runs of one stage")
    differences = list(_differences(sides[0][0], sides[1][0]))
    return RunComparison(*names, differences, pairs, unmatched)


def _read(folder: Path) -> list[RunRecord]:
    """Read a run, or all finished evaluations in a folder of runs."""
    if (folder / "result.json").is_file():
        return [RunRecord(folder)]
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name a run or a folder of runs")
    records, problems = finished_evaluations(folder)
    if not records:
        why = "".join(f"; {name}: {reason}" for name, reason in problems[:1])
        raise UserError(f"{folder}: no finished run there{why}")
    return records


def _short(first: Path, second: Path) -> tuple[str, str]:
    """The shortest ends of two paths that differ."""
    a, b = first.resolve().parts, second.resolve().parts
    for count in range(1, min(len(a), len(b)) + 1):
        if a[-count:] != b[-count:]:
            return "/".join(a[-count:]), "/".join(b[-count:])
    return str(first), str(second)


# ---------------------------------------------------------------- settings


def _differences(first: RunRecord, second: RunRecord) -> Iterator[Difference]:
    """Yield the settings of recipe and environment that differ.

    A section that only one side has is one setting.
    """
    sources = {
        "recipe": (first.recipe, second.recipe),
        "environment": (first.environment, second.environment),
    }
    for kind, (one, other) in sources.items():
        a, b = dict(_leaves(one, other)), dict(_leaves(other, one))
        keys = dict.fromkeys([*a, *b])
        for key in without_options(key for key in keys if a.get(key) != b.get(key)):
            if key not in VARYING:
                yield Difference(kind, key, a.get(key, ABSENT), b.get(key, ABSENT))


def _leaves(values: Mapping[str, Any], others: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the dotted key and the text of each value, down to where `others` has no section."""
    for key, value in values.items():
        other = others.get(key) if isinstance(others, Mapping) else None
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            yield from _leaves(value, other, f"{prefix}{key}.")
        elif isinstance(value, Mapping) and value:
            yield prefix + str(key), str(value.get("name", "set"))
        else:
            yield prefix + str(key), value if isinstance(value, str) else json.dumps(value)


# ---------------------------------------------------------------- metrics


def _pairs_of_runs(first: RunRecord, second: RunRecord) -> list[MetricPair]:
    """Pair the metrics of two runs."""
    if first.is_evaluation != second.is_evaluation:
        return []
    if not first.is_evaluation:
        numbers = (_numbers(first.result), _numbers(second.result))
        return [
            MetricPair(name, value, numbers[1][name], None, "one run each")
            for name, value in numbers[0].items()
            if name in numbers[1]
        ]
    pairs = []
    for name, value in first.test.items():
        if name in second.test:
            interval, over = None, "one run each"
            if name == "accuracy":
                interval, over = _over_examples(first, second)
            pairs.append(MetricPair(name, value, second.test[name], interval, over))
    return pairs


def _numbers(result: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a pretraining's result, by name."""
    numbers = {
        **result.get("watched", {}),
        "steps": result.get("steps"),
        "seconds": result["seconds"],
    }
    return {
        name: float(value)
        for name, value in numbers.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }


def _over_examples(first: RunRecord, second: RunRecord) -> tuple[tuple[float, float] | None, str]:
    """The interval of the difference in accuracy, paired over test examples, and what it is over.

    It covers other test examples, not other seeds.
    """
    a, b = first.predictions, second.predictions
    if a is None or b is None:
        return None, "no predictions were kept"
    if not np.array_equal(a.truth, b.truth):
        return None, "other test examples"
    differences = 100 * (b.correct.astype(float) - a.correct.astype(float))
    reach, mean = half_width(differences), float(differences.mean())
    return (mean - reach, mean + reach), f"{len(differences):,} test examples"


def _pairs_of_folders(
    first: Sequence[RunRecord], second: Sequence[RunRecord]
) -> tuple[list[MetricPair], list[str]]:
    """Pair evaluations by task, protocol and labels, and their values by seed."""
    a, b = _by_cell(first), _by_cell(second)
    pairs = [_pair_of_cells(name, a[name], b[name]) for name in a if name in b]
    return pairs, [name for name in (*a, *b) if (name in a) != (name in b)]


def _by_cell(records: Sequence[RunRecord]) -> dict[str, dict[str, RunRecord]]:
    """Name of a cell -> seed -> evaluation; the newest of several evaluations counts."""
    cells: dict[str, dict[str, RunRecord]] = {}
    for record in records:
        parts = (record.task, record.labels.title, record.protocol, record.metric.title)
        cells.setdefault(" · ".join(parts), {})[record.seed_key] = record
    return cells


def _pair_of_cells(
    name: str, first: Mapping[str, RunRecord], second: Mapping[str, RunRecord]
) -> MetricPair:
    a, b = (
        {seed: run.test[run.metric.name] for seed, run in side.items()} for side in (first, second)
    )
    means = (float(np.mean(list(a.values()))), float(np.mean(list(b.values()))))
    shared = [seed for seed in a if seed in b]
    if len(shared) == 1 and name.endswith("accuracy"):
        interval, over = _over_examples(first[shared[0]], second[shared[0]])
        return MetricPair(name, *means, interval, over)
    verdict = judge(b, a)
    over = verdict.reason or f"{verdict.seeds} seeds ({verdict.method})"
    return MetricPair(name, *means, verdict.interval, over)


def _scores(runs: Mapping[str, RunRecord]) -> dict[str, float]:
    return {seed: run.test[run.metric.name] for seed, run in runs.items()}
