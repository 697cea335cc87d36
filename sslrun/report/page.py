"""The page of a report: sections with tables, figures and details, as one file of HTML."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import NamedTuple

from sslrun.report.looks import Look
from sslrun.results import layout
from sslrun.results.table import Table


class TextCell(NamedTuple):
    """A cell of a table on the page."""

    text: str
    value: float | None = None
    """The number to sort by; None in a column of words, or without a number."""
    best: bool = False


@dataclass(frozen=True)
class TextTable:
    """A table on the page."""

    title: str
    head: Sequence[str]
    body: Sequence[Sequence[TextCell]]
    label_columns: int
    """The number of columns that name the rows."""
    preface: Sequence[str] = ()
    notes: Sequence[str] = ()

    @classmethod
    def of(cls, table: Table) -> TextTable:
        """Lay out a table of results. Names of rows are repeated, so that rows can be sorted."""
        labels, best = layout.label_heads(table), layout.best_cells(table)
        one_task = layout.has_one_task(table)
        heads = []
        for column in table.columns:
            words = layout.column_head(table, column)
            heads.append(words if one_task else f"{column.task} {words}")
        body = []
        for row in table.rows:
            names = (row.name, row.protocol)[: len(labels)]
            line = [TextCell(name) for name in names]
            for column in table.columns:
                cell = table.cells.get((row, column))
                if cell is None:
                    line.append(TextCell("–"))
                    continue
                value = cell.mean if cell.values else None
                text = cell.text(table.spec_of(column))
                line.append(TextCell(text, value, (row, column) in best))
            body.append(line)
        task = table.columns[0].task if one_task and table.columns else ""
        title = " · ".join(filter(None, (table.title, task)))
        return cls(title, [*labels, *heads], body, len(labels), table.preface, table.notes)


@dataclass(frozen=True)
class Group:
    """Figures beside each other under a title."""

    title: str
    looks: Sequence[Look]


@dataclass(frozen=True)
class Detail:
    """Facts and a text that open by a click."""

    title: str
    facts: Sequence[tuple[str, str]] = ()
    text: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the page with its own entry in the navigation."""

    title: str
    notes: Sequence[str] = ()
    tables: Sequence[TextTable] = ()
    groups: Sequence[Group] = ()
    details: Sequence[Detail] = ()

    @property
    def anchor(self) -> str:
        return self.title.lower().replace(" ", "-")

    @property
    def is_empty(self) -> bool:
        return not (self.notes or self.tables or self.groups or self.details)


@dataclass(frozen=True)
class Report:
    """All that the page shows."""

    title: str
    about: str
    sections: Sequence[Section] = field(default=())


def render(report: Report, live: bool = False) -> str:
    """Render the page. All text is escaped, and the page runs no script other than its own.

    A `live` page asks its server for changes.
    """
    from jinja2 import Environment
    from markupsafe import Markup

    script = _read("page.js") + (_read("live.js") if live else "")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'" + ("; connect-src 'self'" if live else "")
    )
    return environment.from_string(_read("page.html")).render(
        report=report, policy=policy, style=Markup(_read("page.css")), script=Markup(script)
    )


def _read(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")
