"""What there is to name in a recipe, and every option with its default and its paper."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from pydantic import BaseModel
from rich.console import Group
from rich.table import Table as RichTable
from rich.text import Text

from sslrun.backbones.base import backbones
from sslrun.claims.measurements.base import measurements
from sslrun.data.image.corruptions import CORRUPTIONS
from sslrun.data.source import sources
from sslrun.errors import UserError
from sslrun.pretexts.base import pretexts
from sslrun.protocols import protocols
from sslrun.recipe import Pretrain, Watch
from sslrun.registry import Registry, did_you_mean
from sslrun.results import published
from sslrun.results.compare import KINDS as SETTINGS
from sslrun.results.compare import TextCell
from sslrun.results.table import Table
from sslrun.tasks.base import tasks

REGISTRIES: dict[str, Registry[Any]] = {
    "backbone": backbones,
    "pretext": pretexts,
    "data": sources,
    "task": tasks,
    "measurement": measurements,
}
SECTIONS: dict[str, type[BaseModel]] = {"pretrain": Pretrain, "watch": Watch}
KINDS = (*REGISTRIES, "corruption", "protocol", "section", "table")


def described(kind: str | None, name: str | None) -> dict[str, Any]:
    """All kinds and their names; a kind's names with a line each; or one thing whole. UserError: no such kind, name."""
    if kind is None:
        return {"kinds": {each: list(_summaries(each)) for each in KINDS}}
    kind = kind.removesuffix("s") if kind not in KINDS and kind.removesuffix("s") in KINDS else kind
    if kind not in KINDS:
        raise UserError(f"no such kind: '{kind}'.{did_you_mean(kind, list(KINDS))}")
    if name is None:
        return {"kind": kind, "names": _summaries(kind)}
    if name not in _summaries(kind):
        raise UserError(f"no such {kind}: '{name}'.{did_you_mean(name, list(_summaries(kind)))}")
    return {"kind": kind, "name": name, **_whole(kind, name)}


def _summaries(kind: str) -> dict[str, str]:
    """Name -> one line."""
    if kind in REGISTRIES:
        return {name: _first_line(REGISTRIES[kind][name]) for name in REGISTRIES[kind]}
    if kind == "protocol":
        return {name: protocols[name].about() for name in protocols.in_order}
    if kind == "corruption":
        return {
            name: f"{_first_line(of).rstrip('.')}: {_listed(constants)}"
            for name, (of, constants) in CORRUPTIONS.items()
        }
    if kind == "section":
        return {name: _first_line(model) for name, model in SECTIONS.items()}
    short = {short: f"together: {', '.join(those)}" for short, those in published.short_names().items()}
    return short | {name: _source(published.published(name)) for name in published.names()}


def _whole(kind: str, name: str) -> dict[str, Any]:
    """Everything about one thing: its text, and its options where it has any."""
    if kind in REGISTRIES:
        cls = REGISTRIES[kind][name]
        found: dict[str, Any] = {
            "about": inspect.getdoc(cls) or "",
            "inputs": _inputs(cls),
            "options": _options(cls.Options),
        }
        if kind == "data":
            found["where"] = cls.describe()
        return found
    if kind == "protocol":
        return {"about": inspect.getdoc(protocols[name]), "options": _options(protocols[name].Options)}
    if kind == "corruption":
        return {"about": f"{_summaries(kind)[name]}, at severity 1 to 5", "options": []}
    if kind == "section":
        return {"about": inspect.getdoc(SECTIONS[name]) or "", "options": _options(SECTIONS[name])}
    tables = published.published_as(name)
    found = {"about": "\n".join(f"{each.name}: {_source(each)}" for each in tables), "options": []}
    if len(tables) == 1:
        found["where"] = {kind: tables[0].setting.get(kind, "not told") for kind in SETTINGS}
    found["tables"] = {
        each.name: {"unit": each.unit, "rows": {row: {column: asdict(number) for column, number in cells.items()}
                                                for row, cells in each.rows.items()}}
        for each in tables
    }  # fmt: skip
    return found


def _inputs(component: type[Any]) -> str | None:
    """The kind of data that a component is for."""
    specs = (getattr(component, name, None) for name in ("takes", "reads", "gives"))
    return next((spec.kind for spec in specs if spec is not None), None)


def _numbers(table: published.Published) -> Table:
    """A published table as it was published."""
    made = Table(f"{table.name}, {table.unit}", table.unit, rank=None)
    remarks: dict[str, list[str]] = {}
    for row, cells in table.rows.items():
        for column, number in cells.items():
            deviation = "" if number.deviation is None else f" ± {number.deviation:,}"
            mark = "" if number.verified else " †"
            made.cells[(row, ""), ("", column)] = TextCell(words=f"{number.value:,}{deviation}{mark}")
            remark = "; ".join(filter(None, [number.unit and f"in {number.unit}", number.where, number.note]))
            remarks.setdefault(remark, []).append(f"{row}, {column}")
    made.notes += [f"{'; '.join(places)}: {remark}" for remark, places in remarks.items() if remark]
    if table.spread:
        made.note(f"±: {table.spread}")
    if not all(number.verified for cells in table.rows.values() for number in cells.values()):
        made.note("† recalled from the paper, not seen in it")
    return made


def _source(table: published.Published) -> str:
    """Where a published table's numbers are from, and how many of them were not seen there."""
    numbers = [number for cells in table.rows.values() for number in cells.values()]
    recalled = sum(not number.verified for number in numbers)
    return f"{table.paper}, {table.where}: {len(numbers)} numbers" + (
        f", {recalled} recalled, not seen" * bool(recalled)
    )


def _options(model: type[BaseModel]) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "type": _type_name(field.annotation),
            "default": "required" if field.is_required() else _plain(field.get_default(call_default_factory=True)),
            "about": " ".join((field.description or "").split()),
        }
        for name, field in model.model_fields.items()
    ]


def _listed(constants: tuple[Any, ...]) -> str:
    return ", ".join(
        " and ".join(f"{each:.3g}" for each in (one if isinstance(one, tuple) else (one,))) for one in constants
    )


def _type_name(annotation: Any) -> str:
    text = getattr(annotation, "__name__", None) if isinstance(annotation, type) else str(annotation)
    return str(text).replace("typing.", "").replace("NoneType", "None")


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value


def _first_line(thing: Any) -> str:
    return (inspect.getdoc(thing) or "").split("\n")[0]


def shown(found: dict[str, Any]) -> Any:
    """What `described` found, to print."""
    return Group(*_blocks(found))


def _blocks(found: dict[str, Any]) -> Iterator[Any]:
    if "kinds" in found:
        yield _grid((kind, ", ".join(names)) for kind, names in found["kinds"].items())
        yield Text("\nsslrun show KIND lists one kind; sslrun show KIND NAME gives every option.")
        return
    if "names" in found:
        yield _grid(found["names"].items())
        return
    yield Text(f"{found['kind']} {found['name']}\n", style="bold")
    yield Text(found["about"] + "\n")
    for name, value in found.get("where", {}).items():
        yield Text(f"{name}: {value}")
    for name in found.get("tables", ()):
        yield Group(Text(), _numbers(published.published(name)).render())
    if found["options"]:
        table = RichTable("option", "default", "what it is", box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for option in found["options"]:
            table.add_row(Text(option["name"]), Text(str(option["default"])), Text(option["about"] or option["type"]))
        yield table


def _grid(rows: Any) -> RichTable:
    table = RichTable.grid(padding=(0, 2, 0, 0))
    for left, right in rows:
        table.add_row(Text(left, style="bold"), Text(right))
    return table
