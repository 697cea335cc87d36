"""The metric table: rows by columns of mean ± deviation over seeds, in whatever format it is wanted."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.measure import Measurement
from rich.table import Table as RichTable
from rich.text import Text

from sslrun.data.shifts import ID, MEAN_SHIFT
from sslrun.errors import UserError
from sslrun.protocols import protocols as registered
from sslrun.runs import write_atomically

Row = tuple[str, str]
"""(what was pretrained, protocol)."""
Column = tuple[str, str]
"""(task, what of it: the share of labels, and the split if not the test)."""


REASSESSED = "real_accuracy"
"""A metric that has a column of its own, beside the task's: ImageNet ReaL."""


@dataclass
class Cell:
    """The values of one cell, by seed (and restart, as "0.1")."""

    values: dict[str, float] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values.values())

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation over seeds; None for one seed."""
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else None

    def text(self, number: str = ".1f", plus_minus: str = " ± ") -> str:
        deviation = "" if self.deviation is None else f"{plus_minus}{self.deviation:{number}}"
        return f"{self.mean:{number}}{deviation}"


def amount(value: float, sign: str = "") -> str:
    """A number of any size, to three digits or all those before the point; `sign` "+": with its sign."""
    return f"{value:{sign},.0f}" if abs(value) >= 1000 else f"{value:{sign}.3g}"


@dataclass
class Cost(Cell):
    """Of any size."""

    def text(self, number: str = ".1f", plus_minus: str = " ± ") -> str:
        return amount(self.mean) + ("" if self.deviation is None else f"{plus_minus}{amount(self.deviation)}")


@dataclass
class Table:
    """Rows by columns of cells. Rows and columns stand in the order in which they came."""

    title: str
    metric: str = ""
    """What the cells are, with its unit."""
    cells: dict[tuple[Row, Column], Cell] = field(default_factory=dict)
    preface: list[str] = field(default_factory=list)
    """Lines above the table."""
    notes: list[str] = field(default_factory=list)
    """Lines below the table."""
    results: list[dict[str, Any]] = field(default_factory=list)
    """The evaluations that it was made of, where it was."""
    stand_ins: dict[str, dict[str, str]] = field(default_factory=dict)
    """Published table -> our task -> the published column that it stands in for: of the same kind, on other data."""
    number: str = ".1f"
    """How a number is printed."""
    rank: Literal["high", "low"] | None = "high"
    """Which cell of a column is set off as the best."""
    units: dict[Column, str] = field(default_factory=dict)
    """Columns that are not of the metric: what they cost; no cell of theirs is the best."""
    empty: dict[tuple[Row, Column], str] = field(default_factory=dict)
    """Places that could not be filled, and why; the notes say so."""

    second = "protocol"
    """What the second part of a row is."""

    def add(self, row: Row, column: Column, value: float, seed: str = "0") -> None:
        """Put a value into a cell; a later one of the same seed takes the earlier one's place."""
        self.cells.setdefault((row, column), Cell()).values[seed] = value

    def note(self, text: str) -> None:
        self.notes.append(text)

    def leave_empty(self, row: Row, column: Column, reason: str) -> None:
        """A place for a cell that can't be had."""
        if (row, column) in self.cells or (row, column) in self.empty:
            return
        if reason not in self.empty.values():
            self.notes.append(f"empty, {' '.join(column)}: {reason}")
        self.empty[row, column] = reason

    @property
    def rows(self) -> list[Row]:
        return list(dict.fromkeys(row for row, _ in (*self.cells, *self.empty)))

    @property
    def columns(self) -> list[Column]:
        every = dict.fromkeys(column for _, column in (*self.cells, *self.empty))
        return sorted(every, key=lambda column: column in self.units)

    @classmethod
    def from_results(cls, results: Sequence[dict[str, Any]], title: str = "") -> Table:
        """The table of evaluations' results (the contents of result.json, with `row` where a sweep names it).

        Rows stand in order of appearance, protocols and shares of labels in their natural one. UserError: no result.
        """
        if not results:
            raise UserError("no finished evaluation to make a table of")
        metrics = list(dict.fromkeys(map(metric_of, results)))
        table = cls(title, metrics[0] if len(metrics) == 1 else "each task's own metric", results=list(results))
        names = list(dict.fromkeys(row_of(each)[0] for each in results))
        tasks = list(dict.fromkeys(each["task"] for each in results))
        protocols = list(dict.fromkeys([*registered.in_order, *(each["protocol"] for each in results)]))

        def order(each: dict[str, Any]) -> tuple[int, int, int, bool, float]:
            place = names.index(row_of(each)[0]), protocols.index(each["protocol"])
            return *place, tasks.index(each["task"]), _a_class(each), each["labels"]

        ordered = sorted(results, key=order)
        # Columns in the natural order, even where the first row lacks some.
        columns: dict[Column, Any] = {}
        for each in results:
            for at, column in enumerate(_numbers(each)):
                columns.setdefault(column, (*order(each)[2:], at))
        for column in sorted(columns, key=lambda column: columns[column]):
            for each in ordered:
                numbers = _numbers(each)
                if column in numbers:
                    table.add(row_of(each), column, numbers[column], _seed(each))
        _add_suites(table, ordered)
        table.cells = dict(sorted(table.cells.items(), key=lambda item: _row_order(item[0][0], names, protocols)))
        table.note(f"test {table.metric}{' in %' if 'accuracy' in table.metric else ''}, {_over(results)}")
        if any(each.get("shifts") for each in results):
            table.note(
                "columns with a name are out of distribution: nothing is trained on, or chosen by, what they hold"
            )
        return table

    @classmethod
    def of_distortion(cls, results: Sequence[dict[str, Any]], title: str = "") -> Table:
        """How far training moved each task's features, in distribution and out of it. UserError: nobody measured it."""
        measured = [each for each in results if "distortion" in each]
        if not measured:
            raise UserError("no run moved features: finetune and lpft do, and tell how far; these runs are of none")
        title = " · ".join(filter(None, [title, "feature distortion"]))
        table = cls(title, "Euclidean distance", number=".3g", rank=None, results=measured)
        for each in measured:
            task, what = column_of(each)
            for place, distance in each["distortion"].items():
                table.add(row_of(each), (task, f"{what} · {place}"), distance, _seed(each))
        lengths = [each["feature_length"] for each in measured]
        long = " to ".join(dict.fromkeys(f"{each:.3g}" for each in (min(lengths), max(lengths))))
        table.note(f"mean Euclidean distance of test features before and after training, {_over(measured)}")
        table.note(f"before it, features of the test set are {long} long in the mean")
        return table

    # ------------------------------------------------------------ formats

    def render(self) -> Group:
        """For the terminal. Best of each column bold."""
        rows, columns = self.rows, self.columns
        one_task = self._one_task
        one_protocol = "" if self._several_protocols or not rows else rows[0][1]
        heading = " · ".join(filter(None, [self.title, columns[0][0] if one_task else "", one_protocol]))
        above, below = ([Text(line) for line in lines] for lines in (self.preface, self.notes))
        return Group(Text(heading, style="bold"), *above, Text(), WrappedTable(columns, self._rendered), Text(), *below)

    def _rendered(self, columns: Sequence[Column]) -> RichTable:
        """Some of the columns, for the terminal."""
        best, one_task = self._best(), self._one_task
        shown = RichTable(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        shown.add_column("")
        if self._several_protocols:
            shown.add_column(self.second)
        for task, what in columns:
            shown.add_column(
                self._what(task, what) if one_task else f"{task}\n{self._what(task, what)}",
                justify="right",
                no_wrap=True,
            )
        named = None
        for row in self.rows:
            if named is not None and row[0] != named and self._several_protocols:
                shown.add_section()
            label = [Text(row[0] if row[0] != named else "")]
            named = row[0]
            protocol = [Text(row[1])] if self._several_protocols else []
            cells = [self._styled(row, column, best) for column in columns]
            shown.add_row(*label, *protocol, *cells)
        return shown

    def to_markdown(self) -> str:
        head, body = self._grid(lambda text: f"**{text}**", lambda text: text.replace("|", "\\|"))
        rule = ["---"] * self._label_columns + ["---:"] * len(self.columns)
        above = [*(f"{line}  " for line in self.preface), ""] if self.preface else []
        lines = [f"**{self.title}**", "", *above, *("| " + " | ".join(each) + " |" for each in (head, rule, *body))]
        return "\n".join([*lines, "", *(f"{note}  " for note in self.notes)]) + "\n"

    def to_latex(self) -> str:
        """A booktabs table."""
        head, body = self._grid(lambda text: f"\\textbf{{{text}}}", _latex, " $\\pm$ ")
        lines = [
            "\\begin{table}",
            f"\\caption{{{_latex(self.title)}. {_latex('; '.join(self.preface + self.notes))}.}}",
            f"\\begin{{tabular}}{{{'l' * self._label_columns}{'r' * len(self.columns)}}}",
            "\\toprule",
            " & ".join(head) + " \\\\",
            "\\midrule",
        ]
        for at, each in enumerate(body):
            if at and each[0] and self._several_protocols:
                lines.append("\\addlinespace")
            lines.append(" & ".join(each) + " \\\\")
        return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", "\\end{table}"]) + "\n"

    def to_csv(self) -> str:
        """One line a cell: row, protocol, task, labels, mean, std, seeds."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["row", "protocol", "task", "column", "mean", "std", "seeds"])
        for (row, column), cell in self.cells.items():
            deviation = "" if cell.deviation is None else f"{cell.deviation:.6g}"
            writer.writerow([*row, *column, f"{cell.mean:.6g}", deviation, len(cell.values)])
        return text.getvalue()

    def to_json(self) -> str:
        """Every value of every seed."""
        cells = [
            {"row": row[0], "protocol": row[1], "task": column[0], "column": column[1], "values": cell.values,
             "mean": cell.mean, "std": cell.deviation}
            for (row, column), cell in self.cells.items()
        ]  # fmt: skip
        empty = [
            {"row": row[0], "protocol": row[1], "task": column[0], "column": column[1], "reason": reason}
            for (row, column), reason in self.empty.items()
        ]
        return json.dumps(
            {"title": self.title, "metric": self.metric, "notes": self.notes, "cells": cells, "empty": empty}, indent=2
        )

    def write(self, path: Path) -> None:
        """To a file, in the format of its ending. UserError: another ending, or the file can't be written."""
        write_table(path, self.to_markdown, self.to_latex, self.to_csv, self.to_json)

    # ------------------------------------------------------------ parts

    @property
    def _several_protocols(self) -> bool:
        return len({protocol for _, protocol in self.rows}) > 1

    @property
    def _one_task(self) -> bool:
        return len({task for task, _ in self.columns}) == 1

    @property
    def _label_columns(self) -> int:
        return 1 + self._several_protocols

    def _what(self, task: str, what: str) -> str:
        """A column's second line: the share of labels; the metric where the tasks have several, with the share if not all;
        of the one share that a task was learned from, where it was tested."""
        _, _, place = what.partition(" · ")
        of_task = [each for named, each in self.columns if named == task]
        if len({each.split(" · ")[0] for each in of_task}) == 1 < len(of_task):
            return place or ID
        metrics = {each["task"]: metric_of(each) for each in self.results}
        if len(set(metrics.values())) < 2 or task not in metrics:
            return what
        return metrics[task].replace("_", " ") + ("" if what == "100 %" else f" {what}")

    def _best(self) -> set[tuple[Row, Column]]:
        """The best cells of each column, by their means as printed: equals as printed are equally best."""
        if self.rank is None:
            return set()
        means: dict[Column, list[float]] = {}
        cells = {place: cell for place, cell in self.cells.items() if place[1] not in self.units}
        for (_, column), cell in cells.items():
            means.setdefault(column, []).append(cell.mean)
        best = max if self.rank == "high" else min
        top = {column: f"{best(values):{self.number}}" for column, values in means.items()}
        return {place for place, cell in cells.items() if f"{cell.mean:{self.number}}" == top[place[1]]}

    def _styled(self, row: Row, column: Column, best: set[tuple[Row, Column]]) -> Text:
        cell = self.cells.get((row, column))
        if cell is None:
            return Text("–", style="dim")
        return Text(cell.text(self.number), style="bold" if (row, column) in best else "")

    def _grid(
        self, bold: Callable[[str], str], escape: Callable[[str], str], plus_minus: str = " ± "
    ) -> tuple[list[str], list[list[str]]]:
        """Head and body as text; a row's name stands only where it changes."""
        one_task = self._one_task
        labels = ["", *([self.second] if self._several_protocols else [])]
        head = [
            *labels,
            *(
                escape(self._what(task, what) if one_task else f"{task} {self._what(task, what)}")
                for task, what in self.columns
            ),
        ]
        body, named, best = [], None, self._best()
        for row in self.rows:
            line = [escape(row[0] if row[0] != named else ""), *([escape(row[1])] if self._several_protocols else [])]
            named = row[0]
            for column in self.columns:
                cell = self.cells.get((row, column))
                text = "" if cell is None else cell.text(self.number, plus_minus)
                line.append(bold(text) if (row, column) in best else text)
            body.append(line)
        return head, body


@dataclass(frozen=True)
class WrappedTable:
    """A table for the terminal: where its columns don't fit the width, in pieces below one another, each with the rows'
    names, since a number that is cut short is another number."""

    columns: Sequence[Column]
    of: Callable[[Sequence[Column]], RichTable]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        unbounded = options.update(max_width=10_000)

        def width(columns: Sequence[Column]) -> int:
            return Measurement.get(console, unbounded, self.of(columns)).maximum

        left = list(self.columns)
        while left:
            some = len(left)
            while some > 1 and width(left[:some]) > options.max_width:
                some -= 1
            yield self.of(left[:some])
            left = left[some:]
            if left:
                yield Text()


def write_table(
    path: Path,
    markdown: Callable[[], str],
    latex: Callable[[], str],
    csv: Callable[[], str],
    json: Callable[[], str],
) -> None:
    """What one of them gives, to a file, by its ending. UserError: another ending, or the file can't be written."""
    formats = {".md": markdown, ".tex": latex, ".csv": csv, ".json": json}
    if path.suffix not in formats:
        raise UserError(f"{path}: tables are written to files that end in {', '.join(formats)}")
    write_atomically(path, formats[path.suffix](), "name another place")


def _add_suites(table: Table, results: Sequence[dict[str, Any]]) -> None:
    """Columns of a benchmark's score, the mean over its sets: for a seed that has all of them."""
    found: dict[tuple[Row, Column, str], dict[str, float]] = {}
    sizes: dict[str, int] = {}
    for each in results:
        if each.get("suite"):
            name, sizes[name] = each["suite"]
            key = row_of(each), (name, column_of(each)[1]), _seed(each)
            found.setdefault(key, {})[each["task"]] = each["metrics"]["test"][metric_of(each)]
    for (row, column, seed), values in found.items():
        if len(values) == sizes[column[0]]:
            table.add(row, column, statistics.fmean(values.values()), seed)
    for name, size in sizes.items():
        most = max(len(values) for (_, column, _), values in found.items() if column[0] == name)
        if most < size:
            table.note(f"{name} is the mean over {size} sets, of which there are {most} here")


def row_of(result: dict[str, Any]) -> Row:
    """The row that an evaluation's result stands in."""
    pretext = result["pretext"] or "no pretraining"
    name = result.get("row") or f"{result['recipe']} ({result['backbone']} · {pretext})"
    return str(name), result["protocol"]


def column_of(result: dict[str, Any]) -> Column:
    """The column that an evaluation's result stands in."""
    labels = result["labels"]
    return result["task"], f"{labels:g} a class" if _a_class(result) else f"{100 * labels:g} %"


def columns_of(result: dict[str, Any]) -> list[Column]:
    """Every column that an evaluation has a number for: its test's, each shift's, and the mean over several."""
    task, what = column_of(result)
    shifts = list(result.get("shifts", ()))
    names = [*shifts, MEAN_SHIFT] if len(shifts) > 1 else shifts
    return [(task, what), *((task, f"{what} · {name}") for name in names)]


def _numbers(result: dict[str, Any]) -> dict[Column, float]:
    """What stands in each of an evaluation's columns."""
    metric, shifts = metric_of(result), result.get("shifts", {})
    values = [result["metrics"]["test"][metric], *(scores[metric] for scores in shifts.values())]
    if len(shifts) > 1:
        values.append(statistics.fmean(values[1:]))
    numbers = dict(zip(columns_of(result), values, strict=True))
    if REASSESSED in result["metrics"]["test"]:
        task, what = column_of(result)
        numbers[f"{task} ReaL", what] = result["metrics"]["test"][REASSESSED]
    return numbers


def _a_class(result: dict[str, Any]) -> bool:
    """Whether its labels are a number a class, not a share of all."""
    name = result["protocol"]
    return (name in registered and registered[name].per_class) or result["labels"] > 1


def metric_of(result: dict[str, Any]) -> str:
    """The name of the metric that stands in an evaluation's cells."""
    metric = result["metric"]
    return str(metric["name"] if isinstance(metric, dict) else metric)


def _row_order(row: Row, names: list[str], protocols: list[str]) -> tuple[int, int]:
    return names.index(row[0]), protocols.index(row[1])


def _seed(result: dict[str, Any]) -> str:
    restart = result.get("restart", 0)
    return f"{result['seed']}.{restart}" if restart else str(result["seed"])


def _over(results: Sequence[dict[str, Any]]) -> str:
    """What means and deviations are over."""
    seeds = sorted({each["seed"] for each in results})
    restarts = 1 + max(each.get("restart", 0) for each in results)
    said = (
        f"{len(seeds)} seeds" if len(seeds) > 1 else f"seed {seeds[0]} alone" if restarts == 1 else f"seed {seeds[0]}"
    )
    if restarts > 1:
        said += f" and up to {restarts} restarts"
    return said if len(seeds) == restarts == 1 else f"mean ± standard deviation over {said}"


def _latex(text: str) -> str:
    special = {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "±": "$\\pm$",
               "·": "$\\cdot$", "–": "--"}  # fmt: skip
    return "".join(special.get(each, f"\\{each}" if each in "&%$#_{}" else each) for each in text)
