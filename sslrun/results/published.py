"""Published numbers, each with its source."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from sslrun.errors import UserError
from sslrun.registry import did_you_mean


@dataclass(frozen=True)
class Number:
    """One published number."""

    value: float
    deviation: float | None
    verified: bool
    """False: recalled, not seen; never shown without a mark."""
    note: str | None = None
    unit: str | None = None
    """None: its table's."""
    where: str | None = None
    """Where in the paper; None: where its table is."""
    evidence: str = ""
    """How it is known; see the head of published.yaml."""


@dataclass(frozen=True)
class Published:
    """A published table."""

    name: str
    paper: str
    where: str
    unit: str
    rows: dict[str, dict[str, Number]]
    spread: str | None = None
    """What the numbers' deviations are, where the source says."""
    setting: dict[str, Any] = field(default_factory=dict)
    """What the numbers were measured on (data, steps, parameters …), as far as the source says."""
    aliases: dict[str, list[str]] = field(default_factory=dict)
    """Other names of its rows and columns."""
    task: str | None = None
    """What it is of, where its columns are protocols."""


def names() -> list[str]:
    """The published tables there are."""
    return list(_tables())


def short_names() -> dict[str, list[str]]:
    """What the tables of a paper are called together -> their names."""
    found: dict[str, list[str]] = {}
    for name, table in _tables().items():
        if "short" in table:
            found.setdefault(table["short"], []).append(name)
    return found


def published(name: str) -> Published:
    """A published table by name. UserError: there is none."""
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
    """The table of that name, or those of that short name. UserError: there is none."""
    if name not in _tables() and name not in short_names():
        raise _unknown(name)
    return [published(each) for each in short_names().get(name, [name])]


def _unknown(name: str) -> UserError:
    known = [*short_names(), *names()]
    hint = did_you_mean(name, known)
    if "Did you mean" not in hint:  # all of them would be no line
        hint = f" There is: {', '.join(short_names())}; and more, see `sslrun show table`."
    return UserError(f"no such published table: '{name}'.{hint}")


@cache
def _tables() -> dict[str, Any]:
    return yaml.safe_load((files("sslrun.results") / "published.yaml").read_text(encoding="utf-8"))


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
