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
    """The number's unit; None: its table's."""
    where: str | None = None
    """The place in the paper; None: its table's."""
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
    """What the deviations are, if the source says."""
    setting: dict[str, Any] = field(default_factory=dict)
    """How the numbers were measured (data, steps, parameters …), as far as the source says."""
    aliases: dict[str, list[str]] = field(default_factory=dict)
    """Row or column -> its other names."""
    task: str | None = None
    """The task, if the columns are protocols."""


def names() -> list[str]:
    """The names of all published tables."""
    return list(_tables())


def short_names() -> dict[str, list[str]]:
    """Short name of a paper's tables -> their names."""
    found: dict[str, list[str]] = {}
    for name, table in _tables().items():
        if "short" in table:
            found.setdefault(table["short"], []).append(name)
    return found


def published(name: str) -> Published:
    """Get a published table by name. UserError: there is none."""
    if name not in _tables():
        raise _unknown(name)
    table = _tables()[name]
    rows = {
        row: {column: _number(cell, table["evidence"]) for column, cell in cells.items()}
        for row, cells in table["rows"].items()
    }
    return Published(
        name, table["paper"], table["where"], table["unit"], rows,
        table.get("std_kind"), table.get("setting", {}), table.get("aliases", {}),
        table.get("protocols_of"),
    )  # fmt: skip


def published_as(name: str) -> list[Published]:
    """Get the table of that name, or those of that short name. UserError: there is none."""
    if name not in _tables() and name not in short_names():
        raise _unknown(name)
    return [published(each) for each in short_names().get(name, [name])]


def _unknown(name: str) -> UserError:
    known = [*short_names(), *names()]
    hint = did_you_mean(name, known)
    if "Did you mean" not in hint:  # listing all would not fit a line
        hint = f" There is: {', '.join(short_names())}; and more, see `sslrun show table`."
    return UserError(f"no such published table: '{name}'.{hint}")


@cache
def _tables() -> dict[str, Any]:
    text = (files("sslrun.results") / "published.yaml").read_text(encoding="utf-8")
    return yaml.load(text, YAML_LOADER)


def _number(cell: Any, evidence: str) -> Number:
    match cell:
        case [value, std]:
            given = {"value": value, "std": std}
        case dict():
            given = cell
        case _:
            given = {"value": cell}
    known = given.get("evidence", evidence)
    return Number(
        given["value"], given.get("std"), given.get("verified", known != "memory"), given.get("note"),
        given.get("unit"), given.get("where"), known,
    )  # fmt: skip
