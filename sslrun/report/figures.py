"""The charts of a report, from records and tables."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import suppress

from sslrun.errors import UserError
from sslrun.metric import Metric
from sslrun.report.charts import Chart, Series
from sslrun.results.address import MEAN, Column, Labels, Row
from sslrun.results.compute import expenses
from sslrun.results.naming import distinguish
from sslrun.results.record import RunRecord
from sslrun.results.table import Cell, Table

CURVES = {
    "loss": "loss",
    "held_out_loss": "held-out loss",
    "knn": "kNN accuracy, % (online)",
    "rankme": "effective rank (RankMe)",
    "feature_std": "standard deviation of features",
    "grad_norm": "gradient norm",
    "lr": "learning rate",
    "rate": "examples per second",
}
"""Quantity in metrics.jsonl -> title of its chart."""
LINES = 24
"""Largest number of rows in a chart of scores over labels; lines, and their intervals, overlap."""


def learning_curves(runs: Sequence[RunRecord]) -> Iterator[Chart]:
    """Chart each logged quantity of pretrainings over their steps."""
    titles = [title_of(run) for run in runs]
    options = distinguish(titles, runs)
    names = [f"{a} ({b})" if b else a for a, b in zip(titles, options, strict=True)]
    logs = [list(run.log()) for run in runs]
    for quantity, title in CURVES.items():
        series = []
        for run, name, log in zip(runs, names, logs, strict=True):
            points = [
                (line["step"], line[quantity])
                for line in log
                if isinstance(line.get(quantity), int | float) and "step" in line
            ]
            if points:
                steps, values = zip(*points, strict=True)
                series.append(Series(name, steps, values, label=f"{name} · {seed_of(run)}"))
        if any(len(line.x) > 1 for line in series):
            yield Chart(title, "step", "", series)


def title_of(run: RunRecord) -> str:
    """Name a pretraining by its row in a sweep, or by its recipe and pretext task."""
    if run.row_name is not None:
        return run.row_name
    pretext = run.identity.get("pretext") or {}
    return " · ".join(filter(None, (run.folder.parent.name, pretext.get("name"))))


def seed_of(run: RunRecord) -> str:
    return f"seed {run.identity.get('seed', '?')}"


def cost_against_score(table: Table) -> Iterator[Chart]:
    """Chart the score of each row over the compute of all its stages, with the Pareto front.

    One chart per task, of its column with the most labels.
    """
    for column in _fullest(table):
        points = []
        for row in table.rows:
            cell = table.cells.get((row, column))
            cost = _cost(table, row, column)
            if cell is not None and cost:
                points.append((cost, cell.mean, row.title))
        if len(points) > 1:
            series = [Series(name, (cost,), (score,)) for cost, score, name in points]
            yield Chart(
                f"cost against {_metric(column)}, {column.title}",
                "core-seconds of all stages",
                _metric(column),
                series,
                log_x=True,
                lines=False,
                front=pareto([(cost, score) for cost, score, _ in points], column.metric),
            )


def pareto(points: Sequence[tuple[float, float]], metric: Metric) -> list[tuple[float, float]]:
    """List the points (cost, score) that no cheaper point reaches, from cheap to costly."""
    front: list[tuple[float, float]] = []
    for cost, score in sorted(points, key=lambda point: (point[0], -metric.gain(point[1], 0))):
        if not front or metric.gain(score, front[-1][1]) > 0:
            front.append((cost, score))
    return front


def _cost(table: Table, row: Row, column: Column) -> float:
    """Mean seconds of a cell's runs and those they needed, times threads or devices."""
    totals = []
    for record in table.records:
        if record.row == row and record.task == column.task and record.labels == column.labels:
            units = record.threads or record.devices
            with suppress(UserError):  # a damaged pretraining, which the page names
                totals.append(sum(expense.seconds for expense in expenses(record)) * units)
    return statistics.fmean(totals) if totals else 0.0


def label_efficiency(table: Table) -> Iterator[Chart]:
    """Chart the score over the amount of labels, one chart per task and protocol."""
    tasks = dict.fromkeys(column.task for column in _shares(table))
    protocols = dict.fromkeys(row.protocol for row in table.rows)
    for task in tasks:
        columns = [column for column in _shares(table) if column.task == task]
        for protocol in protocols:
            rows = [row for row in table.rows if row.protocol == protocol]
            series = [line for row in rows if (line := _over_labels(table, row, columns))]
            metric, title = columns[0].metric, f"{task}: {protocol}"
            if len(series) > LINES:
                title += f", the best {LINES} of {len(series)} rows"
                gains = [metric.gain(line.y[-1], 0) for line in series]
                least = sorted(gains, reverse=True)[LINES - 1]
                best = [line for line, gain in zip(series, gains, strict=True) if gain >= least]
                series = best[:LINES]
            if series:
                yield Chart(
                    title, "labels", _metric(columns[0]), series, log_x=True, percent_x=True
                )


def _shares(table: Table) -> list[Column]:
    """The columns of tests in distribution that differ in their share of the labels."""
    return [
        column
        for column in table.columns
        if column.labels is not None and not column.labels.per_class and column.shift is None
    ]


def _over_labels(table: Table, row: Row, columns: Sequence[Column]) -> Series | None:
    """The means of a row over the amounts of labels, with the deviation over seeds."""
    cells = [
        (column.labels.amount, cell)
        for column in columns
        if column.labels is not None and (cell := table.cells.get((row, column))) is not None
    ]
    if len(cells) < 2:
        return None
    shares, values = zip(*cells, strict=True)
    low, high = zip(*map(_spread, values), strict=True)
    return Series(row.name, shares, [cell.mean for cell in values], low, high)


def _spread(cell: Cell) -> tuple[float, float]:
    deviation = cell.deviation or 0.0
    return cell.mean - deviation, cell.mean + deviation


def in_and_out(table: Table) -> Iterator[Chart]:
    """Chart scores on each shifted test over those in distribution, with the line y = x."""
    tasks: dict[tuple[str, Labels], list[Column]] = {}
    for column in table.columns:
        if column.labels is not None and column.shift is not None:
            tasks.setdefault((column.task, column.labels), []).append(column)
    for (task, labels), columns in tasks.items():
        own = Column(task, labels, None)
        chosen = [column for column in columns if column.shift is MEAN] or columns
        for column in chosen:
            series = [
                Series(row.title, (inside.mean,), (outside.mean,))
                for row in table.rows
                if (inside := table.cells.get((row, own))) is not None
                and (outside := table.cells.get((row, column))) is not None
            ]
            if series:
                yield Chart(
                    column.title, "in distribution", column.shift_title, series,
                    lines=False, diagonal=True,
                )  # fmt: skip


def _fullest(table: Table) -> list[Column]:
    """Each task's column in distribution with the most labels."""
    fullest: dict[str, Column] = {}
    for column in table.columns:
        if column.labels is None or column.shift is not None:
            continue
        other = fullest.get(column.task)
        if other is None or other.labels is None or column.labels.order > other.labels.order:
            fullest[column.task] = column
    return list(fullest.values())


def _metric(column: Column) -> str:
    unit = f", {column.metric.unit}" if column.metric.unit else ""
    return f"{column.metric.title}{unit}"
