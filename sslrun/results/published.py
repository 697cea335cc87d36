"""Published tables: numbers from papers, each with its source."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from sslrun.errors import UserError
from sslrun.registry import did_you_mean
from sslrun.results.record import YAML_LOADER


@dataclass(frozen=True)
class Number:
    """One published number."""

    value: float
    deviation: float | None
    verified: bool
    """False: recalled from memory, not seen in the source; always printed with a mark."""
    note: str | None = None
    unit: str | None = None
    """The number's unit; None: the table's."""
    where: str | None = None
    """The place in the paper; None: the table's."""
    evidence: str = ""
    """How the number is known; see the head of published.yaml."""


@dataclass(frozen=True)
class Published:
    """A published table."""

    name: str
    paper: str
    where: str
    unit: str
    rows: dict[str, dict[str, Number]]
    spread: str | None = None
    """The meaning of the deviations, if the source states it."""
    setting: dict[str, Any] = field(default_factory=dict)
    """How the numbers were measured (data, steps, parameters …), as far as the source states it."""
    aliases: dict[str, list[str]] = field(default_factory=dict)
    """Row or column -> its other names."""
    task: str | None = None
    """The task, if the columns are protocols."""


def names() -> list[str]:
    """List the names of all published tables."""
    return list(_tables())


def short_names() -> dict[str, list[str]]:
    """Short name of a paper's tables -> their names."""
    groups: dict[str, list[str]] = {}
    for name, table in _tables().items():
        if "short" in table:
            groups.setdefault(table["short"], []).append(name)
    return groups


def published(name: str) -> Published:
    """Return a published table by name. Raises UserError if there is none."""
    if name not in _tables():
        raise _unknown(name)
    table = _tables()[name]
    rows: dict[str, dict[str, Number]] = {}
    for row, cells in table["rows"].items():
        rows[row] = {column: _number(cell, table["evidence"]) for column, cell in cells.items()}
    return Published(
        name,
        paper=table["paper"],
        where=table["where"],
        unit=table["unit"],
        rows=rows,
        spread=table.get("std_kind"),
        setting=table.get("setting", {}),
        aliases=table.get("aliases", {}),
        task=table.get("protocols_of"),
    )


def published_as(name: str) -> list[Published]:
    """Return the table of a name or the tables of a short name.

    Raises UserError if there is none.
    """
    if name not in _tables() and name not in short_names():
        raise _unknown(name)
    return [published(table) for table in short_names().get(name, [name])]


def _unknown(name: str) -> UserError:
    known = [*short_names(), *names()]
    hint = did_you_mean(name, known)
    if "Did you mean" not in hint:  # a list of all would not fit on a line
        hint = f" There is: {', '.join(short_names())}; and more, see `sslrun show table`."
    return UserError(f"no such published table: '{name}'.{hint}")


@cache
def _tables() -> dict[str, Any]:
    text = (files("sslrun.results") / "published.yaml").read_text(encoding="utf-8")
    return yaml.load(text, YAML_LOADER)


def _number(cell: Any, evidence: str) -> Number:
    """Read a cell of published.yaml; `evidence` is the table's, which the cell may replace."""
    match cell:
        case [value, std]:
            values = {"value": value, "std": std}
        case dict():
            values = cell
        case _:
            values = {"value": cell}
    evidence = values.get("evidence", evidence)
    return Number(
        values["value"],
        deviation=values.get("std"),
        verified=values.get("verified", evidence != "memory"),
        note=values.get("note"),
        unit=values.get("unit"),
        where=values.get("where"),
        evidence=evidence,
    )
