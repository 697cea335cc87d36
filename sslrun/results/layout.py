"""The layout of tables: heads, labels and bold cells, as text and for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.measure import Measurement
from rich.table import Table as RichTable
from rich.text import Text

from sslrun.metric import ID, Metric
from sslrun.results.address import Column, Labels, Place, Row, join_titles

if TYPE_CHECKING:
    from sslrun.results.table import Table

LOWER_IS_BETTER = "↓"
FULL = Labels(1.0)


def has_protocols(table: Table) -> bool:
    """Return whether the protocol needs its own column, because rows differ in it."""
    return len({row.protocol for row in table.rows}) > 1


def has_one_task(table: Table) -> bool:
    """Return whether all columns are of one task, which is then part of the heading."""
    return len({column.task for column in table.columns}) == 1


def label_heads(table: Table) -> list[str]:
    """Return the heads of the columns that name the rows."""
    return ["", *([table.second] if has_protocols(table) else [])]


def column_head(table: Table, column: Column) -> str:
    """Return a column's head without its task, with an arrow if lower is better."""
    lower = table.marks_best and column.metric.better == "lower" and column not in table.costs
    return _column_words(table, column) + (f" {LOWER_IS_BETTER}" if lower else "")


def _column_words(table: Table, column: Column) -> str:
    """Return the words of a column's head that the rest of the table does not imply.

    The test set if all columns of the task have the same labels; the metric if tasks differ in it.
    """
    of_task = [other for other in table.columns if other.task == column.task]
    one_share = len({other.labels for other in of_task}) == 1
    if column.labels is not None and one_share and len(of_task) > 1:
        return column.shift_title or ID
    metrics = {record.task: record.metric for record in table.records}
    if len(set(metrics.values())) < 2 or column.task not in metrics:
        return column.label
    in_full = column.labels == FULL and column.shift is None
    return _metric_words(metrics[column.task]) + ("" if in_full else f" {column.label}")


def _metric_words(metric: Metric) -> str:
    """Return the metric's title, with its unit unless that is percent."""
    return metric.title if metric.unit in ("", "%") else f"{metric.title} ({metric.unit})"


def best_cells(table: Table) -> set[Place]:
    """Find the best cells of each column; cells that print the same mean are equally good."""
    if not table.marks_best:
        return set()
    means: dict[Column, list[float]] = {}
    cells = {place: cell for place, cell in table.cells.items() if place[1] not in table.costs}
    for (_, column), cell in cells.items():
        means.setdefault(column, []).append(cell.mean)
    best = {
        column: f"{column.metric.best(values):{table.spec_of(column)}}"
        for column, values in means.items()
    }
    return {
        place
        for place, cell in cells.items()
        if f"{cell.mean:{table.spec_of(place[1])}}" == best[place[1]]
    }


# ---------------------------------------------------------------- text


@dataclass(frozen=True)
class Grid:
    """A table as text."""

    head: list[str]
    body: list[list[str]]
    label_columns: int
    """The number of columns that name the rows."""


def grid(
    table: Table, bold: Callable[[str], str], escape: Callable[[str], str], plus_minus: str = " ± "
) -> Grid:
    """Lay out head and body as text; a row's name is printed only where it changes."""
    one_task, labels = has_one_task(table), label_heads(table)
    head = [*labels]
    for column in table.columns:
        words = column_head(table, column)
        head.append(escape(words if one_task else f"{column.task} {words}"))
    best = best_cells(table)

    def cell_text(place: Place) -> str:
        cell = table.cells.get(place)
        text = "" if cell is None else cell.text(table.spec_of(place[1]), plus_minus)
        return bold(text) if place in best else text

    body = []
    for row_labels, row in _labeled_rows(table):
        line = [escape(label) for label in row_labels]
        line += [cell_text((row, column)) for column in table.columns]
        body.append(line)
    return Grid(head, body, len(labels))


def _labeled_rows(table: Table) -> list[tuple[list[str], Row]]:
    """Return each row with its labels; a name that repeats the one above is blank."""
    protocols, previous, rows = has_protocols(table), None, []
    for row in table.rows:
        name = "" if row.name == previous else row.name
        rows.append(([name, row.protocol] if protocols else [name], row))
        previous = row.name
    return rows


# ---------------------------------------------------------------- terminal


def render(table: Table) -> Group:
    """Lay a table out for the terminal, the best of each column bold."""
    rows, columns = table.rows, table.columns
    task = columns[0].task if has_one_task(table) else ""
    protocol = "" if has_protocols(table) or not rows else rows[0].protocol
    heading = join_titles(table.title, task, protocol)
    above, below = map(Text, table.preface), map(Text, table.notes)
    return Group(Text(heading, style="bold"), *above, Text(), WrappedTable(table), Text(), *below)


def rich_table(table: Table, columns: Sequence[Column]) -> RichTable:
    """Lay out some of the columns for the terminal."""
    best, one_task = best_cells(table), has_one_task(table)
    rich = RichTable(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for head in label_heads(table):
        rich.add_column(head)
    for column in columns:
        words = column_head(table, column)
        rich.add_column(
            words if one_task else f"{column.task}\n{words}", justify="right", no_wrap=True
        )
    for index, (labels, row) in enumerate(_labeled_rows(table)):
        if index and labels[0] and has_protocols(table):
            rich.add_section()
        cells = [_rich_cell(table, (row, column), best) for column in columns]
        rich.add_row(*map(Text, labels), *cells)
    return rich


def _rich_cell(table: Table, place: Place, best: set[Place]) -> Text:
    cell = table.cells.get(place)
    if cell is None:
        return Text("–", style="dim")
    return Text(cell.text(table.spec_of(place[1])), style="bold" if place in best else "")


@dataclass(frozen=True)
class WrappedTable:
    """A table for the terminal that wraps columns.

    Columns that do not fit the width go below, with the rows' names repeated. Numbers are never
    truncated, since that would change them.
    """

    table: Table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        unbounded = options.update(max_width=10_000)

        def width(columns: Sequence[Column]) -> int:
            return Measurement.get(console, unbounded, rich_table(self.table, columns)).maximum

        remaining = list(self.table.columns)
        while remaining:
            count = len(remaining)
            while count > 1 and width(remaining[:count]) > options.max_width:
                count -= 1
            yield rich_table(self.table, remaining[:count])
            remaining = remaining[count:]
            if remaining:
                yield Text()


def two_columns(rows: Iterable[tuple[str, str]], *, one_line: bool = False) -> RichTable:
    """Lay out names and their descriptions in two columns.

    `one_line` truncates a description at the end of the line; names are never truncated.
    """
    rows = list(rows)
    table = RichTable.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, min_width=max((len(name) for name, _ in rows), default=0))
    table.add_column(no_wrap=one_line, overflow="ellipsis" if one_line else "fold")
    for left, right in rows:
        table.add_row(Text(left, style="bold"), Text(right))
    return table
