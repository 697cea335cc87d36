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


def names() -> list[str]:
    """The published tables there are."""
    return list(_tables())


def published(name: str) -> Published:
    """A published table by name. UserError: there is none."""
    if name not in _tables():
        raise UserError(f"no such published table: '{name}'.{did_you_mean(name, names())}")
    table = _tables()[name]
    rows = {
        row: {column: _number(cell, table["evidence"]) for column, cell in cells.items()}
        for row, cells in table["rows"].items()
    }
    return Published(
        name, table["paper"], table["where"], table["unit"], rows,
        table.get("std_kind"), table.get("setting", {}), table.get("aliases", {}),
    )  # fmt: skip


@cache
def _tables() -> dict[str, Any]:
    return yaml.safe_load((files("sslrun.results") / "published.yaml").read_text(encoding="utf-8"))


def _number(cell: Any, evidence: str) -> Number:
    if isinstance(cell, list):
        return Number(cell[0], cell[1], evidence != "memory")
    if isinstance(cell, dict):
        seen = cell.get("verified", cell.get("evidence", evidence) != "memory")
        return Number(cell["value"], cell.get("std"), seen, cell.get("note"), cell.get("unit"))
    return Number(cell, None, evidence != "memory")
