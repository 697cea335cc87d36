"""File formats: the ending of a file selects the function that writes it.

To add a format of tables, also in a plug-in, register one function:

    @table_formats.register(".html")
    def to_html(table: Table) -> str: ...
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from sslrun.errors import UserError
from sslrun.results import layout
from sslrun.runs import check_output, write_atomically

if TYPE_CHECKING:
    from sslrun.results.table import Table

T = TypeVar("T")
Join = Callable[[Sequence[str]], str]
"""Joins several texts into one."""


class Formats(Generic[T]):
    """The formats of one kind of object: file ending -> function that returns the file's text."""

    def __init__(self, kind: str) -> None:
        """Create an empty registry. `kind` is the word in messages, such as "tables"."""
        self.kind = kind
        self._functions: dict[str, tuple[Callable[[T], str], Join]] = {}

    def register(
        self, ending: str, join: Join = "\n".join
    ) -> Callable[[Callable[[T], str]], Callable[[T], str]]:
        """Decorator: register a function under a file ending such as ".md".

        `join` joins the texts of several objects into one. Raises ValueError for an ending that is
        already registered.
        """

        def decorate(function: Callable[[T], str]) -> Callable[[T], str]:
            if ending in self._functions:
                raise ValueError(f"{self.kind}: the ending '{ending}' is registered twice")
            self._functions[ending] = function, join
            return function

        return decorate

    def __iter__(self) -> Iterator[str]:
        """Iterate over the endings, in the order of registration."""
        return iter(self._functions)

    def check(self, path: Path) -> None:
        """Raise UserError if no format has the ending of `path`, or if it can't be written."""
        if path.suffix not in self._functions:
            *most, last = self._functions
            endings = f"{', '.join(most)} or {last}" if most else last
            raise UserError(f"{path}: {self.kind} are written to files that end in {endings}")
        check_output(path)

    def text(self, ending: str, value: T) -> str:
        """Format one object."""
        function, _ = self._functions[ending]
        return function(value)

    def joined(self, ending: str, values: Sequence[T]) -> str:
        """Format several objects as one text."""
        function, join = self._functions[ending]
        return join([function(value) for value in values])

    def write(self, path: Path, value: T) -> None:
        """Write one object to a file.

        Raises UserError if there is no such format or the file cannot be written.
        """
        self.check(path)
        write_atomically(path, self.text(path.suffix, value), "name another place")

    def write_joined(self, path: Path, values: Sequence[T]) -> None:
        """Write several objects to one file.

        Raises UserError if there is no such format or the file cannot be written.
        """
        self.check(path)
        write_atomically(path, self.joined(path.suffix, values), "name another place")


table_formats: Formats[Table] = Formats("tables")
"""The formats of tables and comparisons."""


# ---------------------------------------------------------------- tables


@table_formats.register(".md")
def to_markdown(table: Table) -> str:
    """Format as Markdown, the best of each column bold."""
    grid = layout.grid(table, lambda text: f"**{text}**", lambda text: text.replace("|", "\\|"))
    rule = ["---"] * grid.label_columns + ["---:"] * len(table.columns)
    above = [*(f"{line}  " for line in table.preface), ""] if table.preface else []
    lines = ["| " + " | ".join(line) + " |" for line in (grid.head, rule, *grid.body)]
    below = [f"{note}  " for note in table.notes]
    return "\n".join([f"**{table.title}**", "", *above, *lines, "", *below]) + "\n"


@table_formats.register(".tex")
def to_latex(table: Table) -> str:
    """Format as a LaTeX table with booktabs rules."""
    grid = layout.grid(table, lambda text: f"\\textbf{{{text}}}", _escape_latex, " $\\pm$ ")
    remarks = "; ".join(table.preface + table.notes)
    lines = [
        "\\begin{table}",
        f"\\caption{{{_escape_latex(table.title)}. {_escape_latex(remarks)}.}}",
        f"\\begin{{tabular}}{{{'l' * grid.label_columns}{'r' * len(table.columns)}}}",
        "\\toprule",
        " & ".join(grid.head) + " \\\\",
        "\\midrule",
    ]
    for index, line in enumerate(grid.body):
        if index and line[0] and grid.label_columns > 1:
            lines.append("\\addlinespace")
        lines.append(" & ".join(line) + " \\\\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", "\\end{table}"]) + "\n"


def _escape_latex(text: str) -> str:
    special = {
        "\\": "\\textbackslash{}",
        "~": "\\textasciitilde{}",
        "^": "\\textasciicircum{}",
        "±": "$\\pm$",
        "·": "$\\cdot$",
        "–": "--",
        layout.LOWER_IS_BETTER: "$\\downarrow$",
    }
    return "".join(
        special.get(letter, f"\\{letter}" if letter in "&%$#_{}" else letter) for letter in text
    )


def _under_one_head(texts: Sequence[str]) -> str:
    """Join CSV texts under one head."""
    head, *_ = texts[0].splitlines(keepends=True)
    return head + "".join(text.removeprefix(head) for text in texts)


@table_formats.register(".csv", join=_under_one_head)
def to_csv(table: Table) -> str:
    """Format as CSV, one line per cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table.CSV_HEAD)
    writer.writerows(table.csv_rows())
    return text.getvalue()


def _as_list(texts: Sequence[str]) -> str:
    """Join JSON texts into one list."""
    return json.dumps([json.loads(text) for text in texts], indent=2)


@table_formats.register(".json", join=_as_list)
def to_json(table: Table) -> str:
    """Format as JSON, with the values of every seed."""
    return json.dumps(table.as_dict(), indent=2)
