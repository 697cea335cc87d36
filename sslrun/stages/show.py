"""Describe what a recipe can name, and every option with its default."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

from pydantic import BaseModel
from rich.console import Group
from rich.table import Table as RichTable
from rich.text import Text

from sslrun.data.image.corruptions import CORRUPTIONS
from sslrun.errors import UserError
from sslrun.metric import Metric
from sslrun.recipe.json_schema import SECTIONS, recipe_schema
from sslrun.registry import Registry, did_you_mean, first_line
from sslrun.results import published
from sslrun.results.address import Column, Row
from sslrun.results.settings import KINDS as SETTINGS
from sslrun.results.table import Table, TextCell

OTHER_KINDS = ("corruption", "section", "table")
HIDDEN = {"evaluation": {"options"}}
"""Fields of a section's model that are no keys of a recipe."""
BASE = {
    "name": "base",
    "type": "str | Recipe",
    "default": "required",
    "about": "The recipe that the rows change: a file, or the recipe itself.",
}


def kinds() -> list[str]:
    """What `sslrun show` knows, the registries of plug-ins included."""
    return [*Registry.kinds, *OTHER_KINDS, "schema"]


def describe(kind: str | None, name: str | None) -> dict[str, Any]:
    """Describe all kinds, the names of one kind, or one thing with its options; as JSON values.

    UserError: no such kind, or no such name of the kind.
    """
    known = kinds()
    if kind is None:
        return {"kinds": {kind: list(_summaries(kind)) for kind in known if kind != "schema"}}
    if kind not in known and kind.removesuffix("s") in known:
        kind = kind.removesuffix("s")
    if kind not in known:
        raise UserError(f"no such kind: '{kind}'.{did_you_mean(kind, known)}")
    if kind == "schema":
        return recipe_schema()
    if name is None:
        return {"kind": kind, "names": _summaries(kind)}
    if name not in _summaries(kind):
        raise UserError(f"no such {kind}: '{name}'.{did_you_mean(name, list(_summaries(kind)))}")
    return {"kind": kind, "name": name, **_whole(kind, name)}


def _summaries(kind: str) -> dict[str, str]:
    """Each name of a kind, with one line about it."""
    if kind in Registry.kinds:
        return {name: first_line(Registry.kinds[kind][name]) for name in Registry.kinds[kind]}
    if kind == "corruption":
        return {
            name: f"{first_line(of).rstrip('.')}: {_listed(constants)}"
            for name, (of, constants) in CORRUPTIONS.items()
        }
    if kind == "section":
        return {name: first_line(model) for name, model in SECTIONS.items()}
    short = {
        short: f"together: {', '.join(those)}" for short, those in published.short_names().items()
    }
    return short | {name: _source(published.published(name)) for name in published.names()}


def _whole(kind: str, name: str) -> dict[str, Any]:
    """Describe one thing: its docstring, and its options if it has any."""
    if kind in Registry.kinds:
        cls = Registry.kinds[kind][name]
        found: dict[str, Any] = {
            "about": inspect.getdoc(cls) or "",
            "inputs": inputs_of(cls),
            "options": _options(cls.Options),
        }
        if kind == "data":
            found["where"] = cls.describe()
        return found
    if kind == "corruption":
        return {"about": f"{_summaries(kind)[name]}, at severity 1 to 5", "options": []}
    if kind == "section":
        options = [
            option
            for option in _options(SECTIONS[name])
            if option["name"] not in HIDDEN.get(name, ())
        ]
        return {
            "about": inspect.getdoc(SECTIONS[name]) or "",
            "options": [BASE] * (name == "sweep") + options,
        }
    tables = published.published_as(name)
    found = {"about": "\n".join(f"{each.name}: {_source(each)}" for each in tables), "options": []}
    if len(tables) == 1:
        found["where"] = {kind: tables[0].setting.get(kind, "not reported") for kind in SETTINGS}
    found["tables"] = {
        each.name: {"unit": each.unit, "rows": {row: {column: asdict(number) for column, number in cells.items()}
                                                for row, cells in each.rows.items()}}
        for each in tables
    }  # fmt: skip
    return found


def inputs_of(component: type[Any]) -> str | None:
    """The kind of data that a component reads; None: any."""
    specs = (getattr(component, name, None) for name in ("takes", "reads", "gives"))
    return next((spec.kind for spec in specs if spec is not None), None)


def _numbers(table: published.Published) -> Table:
    """Render a published table as it was published."""
    made = Table(f"{table.name}, {table.unit}", marks_best=False)
    remarks: dict[str, list[str]] = {}
    for row, cells in table.rows.items():
        for column, number in cells.items():
            deviation = "" if number.deviation is None else f" ± {number.deviation:,}"
            mark = "" if number.verified else " †"
            made.cells[Row(row), Column(metric=Metric(column, table.unit))] = TextCell(
                words=f"{number.value:,}{deviation}{mark}"
            )
            remark = "; ".join(
                filter(None, [number.unit and f"in {number.unit}", number.where, number.note])
            )
            remarks.setdefault(remark, []).append(f"{row}, {column}")
    made.notes += [f"{'; '.join(places)}: {remark}" for remark, places in remarks.items() if remark]
    if table.spread:
        made.note(f"±: {table.spread}")
    if not all(number.verified for cells in table.rows.values() for number in cells.values()):
        made.note("† recalled from the paper, not seen in it")
    return made


def _source(table: published.Published) -> str:
    """Where a published table's numbers are from, and how many of them were recalled, not checked."""
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
            "default": "required"
            if field.is_required()
            else _plain(field.get_default(call_default_factory=True)),
            "about": " ".join((field.description or "").split()),
        }
        for name, field in model.model_fields.items()
    ]


def _listed(constants: tuple[Any, ...]) -> str:
    return ", ".join(
        " and ".join(f"{each:.3g}" for each in (one if isinstance(one, tuple) else (one,)))
        for one in constants
    )


def _type_name(annotation: Any) -> str:
    text = (
        getattr(annotation, "__name__", None) if isinstance(annotation, type) else str(annotation)
    )
    return str(text).replace("typing.", "").replace("NoneType", "None")


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value


def render(found: dict[str, Any]) -> Any:
    """Render what `describe` returned."""
    return Group(*_blocks(found))


def _blocks(found: dict[str, Any]) -> Iterator[Any]:
    if "kinds" in found:
        yield grid((kind, ", ".join(names)) for kind, names in found["kinds"].items())
        yield Text("\nsslrun show KIND lists one kind; sslrun show KIND NAME gives every option.")
        return
    if "names" in found:
        yield grid(found["names"].items())
        return
    yield Text(f"{found['kind']} {found['name']}\n", style="bold")
    yield Text(found["about"] + "\n")
    for name, value in found.get("where", {}).items():
        yield Text(f"{name}: {value}")
    for name in found.get("tables", ()):
        yield Group(Text(), _numbers(published.published(name)).render())
    if found["options"]:
        table = RichTable(
            "option", "default", "what it is", box=None, pad_edge=False, padding=(0, 2, 0, 0)
        )
        for option in found["options"]:
            table.add_row(
                Text(option["name"]),
                Text(str(option["default"])),
                Text(option["about"] or option["type"]),
            )
        yield table


def grid(rows: Iterable[tuple[str, str]], *, one_line: bool = False) -> RichTable:
    """Names and what they are, in two columns; `one_line` cuts the text off where the line ends, never a name."""
    rows = list(rows)
    table = RichTable.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, min_width=max((len(name) for name, _ in rows), default=0))
    table.add_column(no_wrap=one_line, overflow="ellipsis" if one_line else "fold")
    for left, right in rows:
        table.add_row(Text(left, style="bold"), Text(right))
    return table
