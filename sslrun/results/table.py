"""The table of results: mean ± standard deviation over seeds, by row and column."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Group

from sslrun.errors import UserError
from sslrun.metric import ID, Metric
from sslrun.results import layout
from sslrun.results.address import MEAN, Column, Labels, Place, Row, Shift, join_titles
from sslrun.results.formats import table_formats
from sslrun.results.known_protocols import protocol_rank
from sslrun.results.naming import with_distinct_rows
from sslrun.results.record import RunRecord

OWN_COLUMNS = {
    "real_accuracy": "ReaL",
    "everything": "everything",
    "centered_box": "centered box",
    "rank_correlation": "rank correlation",
    "final_distance": "distance",
    "coverage_entropy": "coverage",
    "neighbor_r2": "neighbor R²",
}
"""Metrics with a column of their own next to the task's, and its title after the task's name:
ImageNet ReaL, the baselines of `objects`, the correlation of asked and achieved returns, and what
`practice` measures in addition to success."""
OWN_METRICS = {
    "final_distance": Metric("final_distance", unit="", better="lower", digits=2),
    "coverage_entropy": Metric("coverage_entropy", unit="nats", digits=2),
    "neighbor_r2": Metric("neighbor_r2", unit="", digits=3),
}
"""Metrics of these columns that are not percentages."""
ASKED = "asked_"
"""Prefix of metrics of `rollout` with a column of their own: the score when asked for a return."""

DISTORTION = Metric("distance", unit="", better="lower")


@dataclass
class Cell:
    """The values of one cell by seed (and restart, as "0.1")."""

    values: dict[str, float] = field(default_factory=dict)
    pretrainings: dict[str, str] = field(default_factory=dict)
    """Key of a value -> the pretraining that it rests on, if it shares it with other values. A key
    that is missing stands for itself."""

    def by_pretraining(self) -> dict[str, float]:
        """Average the values that rest on one pretraining, such as restarts: what is left is
        independent."""
        groups: dict[str, list[float]] = {}
        for key, value in self.values.items():
            groups.setdefault(self.pretrainings.get(key, key), []).append(value)
        return {name: statistics.fmean(values) for name, values in groups.items()}

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values.values())

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation over seeds; None for one seed."""
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else None

    def text(self, format_spec: str = ".1f", plus_minus: str = " ± ") -> str:
        """Format mean and deviation."""
        deviation = "" if self.deviation is None else f"{plus_minus}{self.deviation:{format_spec}}"
        return f"{self.mean:{format_spec}}{deviation}"


def format_amount(value: float, sign: str = "") -> str:
    """Format a number of any size, with three significant digits or as a whole number.

    `sign` "+" prints its sign.
    """
    return f"{value:{sign},.0f}" if abs(value) >= 1000 else f"{value:{sign}.3g}"


@dataclass
class Cost(Cell):
    """A cell whose numbers may have any size."""

    def text(self, format_spec: str = ".1f", plus_minus: str = " ± ") -> str:
        deviation = "" if self.deviation is None else f"{plus_minus}{format_amount(self.deviation)}"
        return format_amount(self.mean) + deviation


@dataclass
class TextCell(Cell):
    """A cell with a fixed text."""

    words: str = ""

    def text(self, format_spec: str = ".1f", plus_minus: str = " ± ") -> str:
        return self.words.replace(" ± ", plus_minus)


@dataclass
class Table:
    """Cells by row and column, in the order of addition. Each column has its metric."""

    title: str
    cells: dict[Place, Cell] = field(default_factory=dict)
    preface: list[str] = field(default_factory=list)
    """Lines above the table."""
    notes: list[str] = field(default_factory=list)
    """Lines below the table."""
    records: list[RunRecord] = field(default_factory=list)
    """The evaluations behind the table; empty for measurements."""
    stand_ins: dict[str, dict[str, str]] = field(default_factory=dict)
    """Published table -> our task -> the published column that it stands in for, on other data."""
    format_spec: str | None = None
    """Format of all numbers; None: the digits of the column's metric."""
    marks_best: bool = True
    """Whether to print the best cell of each column bold and to mark lower-is-better columns."""
    costs: dict[Column, str] = field(default_factory=dict)
    """Cost column -> the note that explains it. Cost columns come last, without bold cells."""
    empty: dict[Place, str] = field(default_factory=dict)
    """Place of a cell that could not be computed -> the reason, which the notes repeat."""

    second: str = "protocol"
    """Head of the column with the second part of a row."""

    def add(
        self,
        row: Row,
        column: Column,
        value: float,
        seed: str = "0",
        pretraining: str | None = None,
    ) -> None:
        """Put a value into a cell; it replaces an earlier value of the same seed.

        `pretraining` names what several values rest on, such as the restarts of one pretraining;
        None: the value is independent of the cell's others.
        """
        cell = self.cells.setdefault((row, column), Cell())
        cell.values[seed] = value
        if pretraining not in (None, seed):
            cell.pretrainings[seed] = pretraining

    def add_cost(self, row: Row, column: Column, value: float, seed: str, note: str = "") -> None:
        """Put a value into a cell of a cost column."""
        self.costs[column] = note
        self.cells.setdefault((row, column), Cost()).values[seed] = value

    def note(self, text: str) -> None:
        self.notes.append(text)

    def leave_empty(self, row: Row, column: Column, reason: str) -> None:
        """Mark a cell as empty because it could not be computed; existing cells stay."""
        if (row, column) in self.cells or (row, column) in self.empty:
            return
        if reason not in self.empty.values():
            self.notes.append(f"empty, {column.title}: {reason}")
        self.empty[row, column] = reason

    @property
    def rows(self) -> list[Row]:
        return list(dict.fromkeys(row for row, _ in (*self.cells, *self.empty)))

    @property
    def columns(self) -> list[Column]:
        """All columns; costs come last."""
        every = dict.fromkeys(column for _, column in (*self.cells, *self.empty))
        return sorted(every, key=lambda column: column in self.costs)

    def metric_of(self, column: Column) -> Metric:
        """Return the metric of the table's column that equals a planned one."""
        return next(own.metric for own in self.columns if own == column)

    def spec_of(self, column: Column) -> str:
        """Return the format of a column's numbers."""
        return self.format_spec or f".{column.metric.digits}f"

    # ------------------------------------------------------------ tables of records

    @classmethod
    def from_records(cls, records: Sequence[RunRecord], title: str = "") -> Table:
        """Make the table of finished evaluations.

        Rows are in order of appearance, protocols and labels in their natural order. Evaluations
        of other options get rows of their own. Raises UserError if there is no record.
        """
        if not records:
            raise UserError("no finished evaluation to make a table of")
        records = with_distinct_rows(records)
        table = cls(title, records=records)
        names = _places(record.row.name for record in records)
        tasks = _places(record.task for record in records)

        def row_order(row: Row) -> tuple[int, int]:
            return names[row.name], protocol_rank(row.protocol)

        def record_order(record: RunRecord) -> tuple[Any, ...]:
            return *row_order(record.row), tasks[record.task], *record.labels.order

        ordered = sorted(records, key=record_order)
        numbers = [(record, _numbers(record)) for record in ordered]
        for column in _ordered_columns(numbers, tasks):
            for record, of_record in numbers:
                if column in of_record:
                    value = of_record[column]
                    table.add(record.row, column, value, record.seed_key, record.pretraining_key)
        _add_suites(table, ordered)
        table.cells = dict(sorted(table.cells.items(), key=lambda item: row_order(item[0][0])))
        table.note(f"test {_describe_metrics(records)}, {_describe_seeds(records)}")
        if any(record.shifts for record in records):
            table.note(
                "columns with a name are out of distribution: nothing is trained on, or chosen by, "
                "what they hold"
            )
        return table

    @classmethod
    def of_distortion(cls, records: Sequence[RunRecord], title: str = "") -> Table:
        """Make the table of feature distortion: how far training moved the features of each test.

        Raises UserError if no record has measured it.
        """
        measured = [record for record in records if record.distortion is not None]
        if not measured:
            raise UserError(
                "no distances of features in these runs: only finetune and lpft measure them"
            )
        table = cls(
            join_titles(title, "feature distortion"),
            records=measured,
            format_spec=".3g",
            marks_best=False,
        )
        for record in measured:
            for name, distance in (record.distortion or {}).items():
                column = Column(
                    record.task, record.labels, None if name == ID else name, DISTORTION
                )
                table.add(record.row, column, distance, record.seed_key)
        lengths = [record.feature_length or 0.0 for record in measured]
        extent = " to ".join(
            dict.fromkeys(f"{length:.3g}" for length in (min(lengths), max(lengths)))
        )
        over = _describe_seeds(measured)
        table.note(f"mean Euclidean distance of test features before and after training, {over}")
        table.note(f"mean length of the test features before training: {extent}")
        return table

    @classmethod
    def of_layers(cls, records: Sequence[RunRecord], title: str = "") -> Table:
        """Make the table of the test scores of each layer, for protocols that choose one.

        Raises UserError if no record has chosen a layer.
        """
        measured = [record for record in records if record.layers]
        if not measured:
            raise UserError(
                "no scores of single layers in these runs: set probe.layers or knn.layers to best"
            )
        table = cls(join_titles(title, "layers"), records=measured, second="layer")
        for record in measured:
            for layer, scores in record.layers.items():
                row = Row(record.row.name, f"{record.row.protocol}, layer {layer}")
                column = Column(record.task, record.labels, None, record.metric)
                table.add(row, column, scores["test"], record.seed_key, record.pretraining_key)
        table.note(f"test {_describe_metrics(measured)} of each layer, {_describe_seeds(measured)}")
        return table

    # ------------------------------------------------------------ output

    def render(self) -> Group:
        """Lay the table out for the terminal, the best of each column bold."""
        return layout.render(self)

    def write(self, path: Path) -> None:
        """Write to a file, in the format of its ending.

        Raises UserError if there is no such format or the file cannot be written.
        """
        table_formats.write(path, self)

    def to_json(self) -> str:
        """Format as JSON, with the values of every seed."""
        return table_formats.text(".json", self)

    def as_dict(self) -> dict[str, Any]:
        """Return the table as JSON values, each cell with the values of every seed."""
        columns = [column_dict(column) for column in self.columns]
        cells = [_cell_dict(place, cell) for place, cell in self.cells.items()]
        empty = [{**place_dict(place), "reason": reason} for place, reason in self.empty.items()]
        return {
            "title": self.title,
            "columns": columns,
            "notes": self.notes,
            "cells": cells,
            "empty": empty,
        }

    CSV_HEAD: ClassVar[tuple[str, ...]] = (
        "row", "protocol", "task", "labels", "per_class", "shift", "metric", "unit",
        "mean", "std", "seeds",
    )  # fmt: skip

    def csv_rows(self) -> list[list[Any]]:
        """One row per cell, in the columns of `CSV_HEAD`."""
        return [
            [*place_dict(place).values(), place[1].metric.unit, *cell_numbers(cell)]
            for place, cell in self.cells.items()
        ]

    def add_cells(self, table: Mapping[str, Any]) -> None:
        """Add the cells of a table from the values of `as_dict`."""
        metrics = {_address(column): Metric(**column["metric"]) for column in table["columns"]}
        for cell in table["cells"]:
            column = Column.from_dict(
                cell, metrics[_address({**cell, "metric": {"name": cell["metric"]}})]
            )
            shared = cell.get("pretrainings", {})
            for seed, value in cell["values"].items():
                self.add(Row(cell["row"], cell["protocol"]), column, value, seed, shared.get(seed))


def column_dict(column: Column) -> dict[str, Any]:
    """Return a column's address as JSON values, with its whole metric."""
    return {**column.as_dict(), "metric": column.metric.as_dict()}


def place_dict(place: Place) -> dict[str, Any]:
    """Return a cell's address as JSON values, one key per part."""
    row, column = place
    return {"row": row.name, "protocol": row.protocol, **column.as_dict()}


def _cell_dict(place: Place, cell: Cell) -> dict[str, Any]:
    numbers = {"values": cell.values, "mean": cell.mean, "std": cell.deviation}
    shared = {"pretrainings": cell.pretrainings} if cell.pretrainings else {}
    return {**place_dict(place), **numbers, **shared}


def cell_numbers(cell: Cell) -> tuple[str, str, int]:
    """Format mean, standard deviation and number of seeds for CSV."""
    return (
        f"{cell.mean:.6g}",
        "" if cell.deviation is None else f"{cell.deviation:.6g}",
        len(cell.values),
    )


def _address(column: Mapping[str, Any]) -> str:
    parts = [column[key] for key in ("task", "labels", "per_class", "shift")]
    return json.dumps([*parts, column["metric"]["name"]])


def columns_of(task: str, labels: Labels, shifts: Iterable[str], metric: Metric) -> list[Column]:
    """List the columns of an evaluation: the test, each shift, and the mean over several shifts."""
    names: list[Shift] = [None, *shifts]
    if len(names) > 2:
        names.append(MEAN)
    return [Column(task, labels, shift, metric) for shift in names]


def own_column(task: str, labels: Labels, metric: str) -> Column | None:
    """Return the column of its own that a metric has next to its task's; None if it has none."""
    asked = metric.startswith(ASKED)
    title = Metric(metric).title if asked else OWN_COLUMNS.get(metric)
    if title is None:
        return None
    return Column(f"{task} {title}", labels, None, OWN_METRICS.get(metric, Metric(metric)))


def columns_of_record(record: RunRecord) -> list[Column]:
    """List the columns of a finished evaluation."""
    return columns_of(record.task, record.labels, record.shifts, record.metric)


def _numbers(record: RunRecord) -> dict[Column, float]:
    """Column -> an evaluation's number."""
    metric = record.metric.name
    values = [record.test[metric], *(scores[metric] for scores in record.shifts.values())]
    if len(values) > 2:
        values.append(statistics.fmean(values[1:]))
    numbers = dict(zip(columns_of_record(record), values, strict=True))
    for name, value in record.test.items():
        column = own_column(record.task, record.labels, name)
        if column is not None:
            numbers[column] = value
    return numbers


def _ordered_columns(
    numbers: Sequence[tuple[RunRecord, Mapping[Column, float]]], tasks: Mapping[str, int]
) -> list[Column]:
    """Sort all columns in their natural order, even if the first row lacks some."""
    order: dict[Column, tuple[Any, ...]] = {}
    for record, of_record in numbers:
        for index, column in enumerate(of_record):
            order.setdefault(column, (tasks[record.task], *record.labels.order, index))
    return sorted(order, key=lambda column: order[column])


def _add_suites(table: Table, records: Sequence[RunRecord]) -> None:
    """Add each benchmark's score, the mean over its data sets, for seeds that have all of them."""
    scores: dict[tuple[Row, Column, str, str], dict[str, float]] = {}
    sizes: dict[str, int] = {}
    for record in records:
        if record.suite is not None:
            name, sizes[name] = record.suite
            column = Column(name, record.labels, None, record.metric)
            key = record.row, column, record.seed_key, record.pretraining_key
            scores.setdefault(key, {})[record.task] = record.test[record.metric.name]
    for (row, column, seed, pretraining), values in scores.items():
        if len(values) == sizes[column.task]:
            table.add(row, column, statistics.fmean(values.values()), seed, pretraining)
    for name, size in sizes.items():
        most = max(len(values) for (_, column, *_), values in scores.items() if column.task == name)
        if most < size:
            table.note(f"{name} is the mean over {size} sets, but only {most} of them are here")


def _places(names: Iterable[str]) -> dict[str, int]:
    """Name -> its position in the order of first appearance."""
    return {name: index for index, name in enumerate(dict.fromkeys(names))}


def _describe_metrics(records: Sequence[RunRecord]) -> str:
    """Describe the metric with its unit and direction, or that of each task if they differ.

    If all are percentages, they are not listed.
    """
    metrics = list(dict.fromkeys(record.metric for record in records))
    if len(metrics) == 1:
        return f"{metrics[0].name}{_unit_and_direction(metrics[0])}"
    if all(metric.unit == "%" and metric.better == "higher" for metric in metrics):
        return "each task's own metric"
    of_tasks = dict.fromkeys((record.task, record.metric) for record in records)
    listed = "; ".join(
        f"{task}: {metric.title}{_unit_and_direction(metric)}" for task, metric in of_tasks
    )
    return f"each task's own metric ({listed})"


def _unit_and_direction(metric: Metric) -> str:
    unit = f" in {metric.unit}" if metric.unit else ""
    return unit + (" (lower is better)" if metric.better == "lower" else "")


def _describe_seeds(records: Sequence[RunRecord]) -> str:
    """Describe the seeds and restarts that means and deviations are over."""
    seeds = sorted({record.seed for record in records})
    restarts = 1 + max(record.restart for record in records)
    if len(seeds) == restarts == 1:
        return f"seed {seeds[0]} alone"
    over = f"{len(seeds)} seeds" if len(seeds) > 1 else f"seed {seeds[0]}"
    if restarts > 1:
        over += f" and up to {restarts} restarts"
    return f"mean ± standard deviation over {over}"
