"""Describe everything that a recipe can name, and every option with its default."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
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
from sslrun.results.layout import two_columns
from sslrun.results.settings import KINDS as SETTINGS
from sslrun.results.table import Table, TextCell

OTHER_KINDS = ("corruption", "section", "table")
HIDDEN = {"evaluation": {"options"}}
"""Fields of a section's model that are not keys of a recipe."""
BASE = {
    "name": "base",
    "type": "str | Recipe",
    "default": "required",
    "about": "The recipe that the rows change: a file, or the recipe itself.",
}


def kinds() -> list[str]:
    """List what `sslrun show` knows, including the registries of plug-ins."""
    return [*Registry.kinds, *OTHER_KINDS, "schema"]


def describe(kind: str | None, name: str | None) -> dict[str, Any]:
    """Describe all kinds, the names of one kind, or one thing with its options; as JSON values.

    Raises UserError if there is no such kind, or no such name of the kind.
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
    """Name -> one line about it, for all names of a kind."""
    if kind in Registry.kinds:
        return {name: first_line(Registry.kinds[kind][name]) for name in Registry.kinds[kind]}
    if kind == "corruption":
        return {
            name: f"{first_line(corruption).rstrip('.')}: {_list_constants(constants)}"
            for name, (corruption, constants) in CORRUPTIONS.items()
        }
    if kind == "section":
        return {name: first_line(model) for name, model in SECTIONS.items()}
    groups = {
        short: f"together: {', '.join(names)}" for short, names in published.short_names().items()
    }
    return groups | {name: _source(published.published(name)) for name in published.names()}


def _whole(kind: str, name: str) -> dict[str, Any]:
    """Describe one thing: its docstring, and its options if it has any."""
    if kind in Registry.kinds:
        cls = Registry.kinds[kind][name]
        component: dict[str, Any] = {
            "about": inspect.getdoc(cls) or "",
            "inputs": inputs_of(cls),
            "options": _options(cls.Options),
        }
        if kind == "data":
            component["where"] = cls.describe()
        return component
    if kind == "corruption":
        return {"about": f"{_summaries(kind)[name]}, at severity 1 to 5", "options": []}
    if kind == "section":
        hidden = HIDDEN.get(name, ())
        options = [option for option in _options(SECTIONS[name]) if option["name"] not in hidden]
        return {
            "about": inspect.getdoc(SECTIONS[name]) or "",
            "options": [BASE] * (name == "sweep") + options,
        }
    return _published_tables(published.published_as(name))


def _published_tables(tables: list[published.Published]) -> dict[str, Any]:
    """Describe published tables: sources, numbers, and the settings of a single table."""
    about = "\n".join(f"{table.name}: {_source(table)}" for table in tables)
    description: dict[str, Any] = {"about": about, "options": []}
    if len(tables) == 1:
        setting = tables[0].setting
        description["where"] = {kind: setting.get(kind, "not reported") for kind in SETTINGS}
    description["tables"] = {
        table.name: {"unit": table.unit, "rows": _rows_as_dict(table)} for table in tables
    }
    return description


def _rows_as_dict(table: published.Published) -> dict[str, dict[str, Any]]:
    """Return a published table's numbers as JSON values: row -> column -> number."""
    rows: dict[str, dict[str, Any]] = {}
    for row, cells in table.rows.items():
        rows[row] = {column: asdict(number) for column, number in cells.items()}
    return rows


def inputs_of(component: type[Any]) -> str | None:
    """Return the kind of data that a component reads; None if it reads any kind."""
    specs = (getattr(component, name, None) for name in ("takes", "reads", "gives"))
    return next((spec.kind for spec in specs if spec is not None), None)


def _numbers(table: published.Published) -> Table:
    """Build a table of the numbers as they were published."""
    shown = Table(f"{table.name}, {table.unit}", marks_best=False)
    remarks: dict[str, list[str]] = {}
    for row, cells in table.rows.items():
        for column, number in cells.items():
            deviation = "" if number.deviation is None else f" ± {number.deviation:,}"
            mark = "" if number.verified else " †"
            shown.cells[Row(row), Column(metric=Metric(column, table.unit))] = TextCell(
                words=f"{number.value:,}{deviation}{mark}"
            )
            remark = "; ".join(
                filter(None, [number.unit and f"in {number.unit}", number.where, number.note])
            )
            remarks.setdefault(remark, []).append(f"{row}, {column}")
    shown.notes += [
        f"{'; '.join(places)}: {remark}" for remark, places in remarks.items() if remark
    ]
    if table.spread:
        shown.note(f"±: {table.spread}")
    if not all(number.verified for cells in table.rows.values() for number in cells.values()):
        shown.note("† recalled from the paper, not seen in it")
    return shown


def _source(table: published.Published) -> str:
    """Describe a published table's source, and how many numbers were recalled and not checked."""
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


def _list_constants(constants: tuple[Any, ...]) -> str:
    """List a corruption's constants by severity; a severity may have one number or several."""
    texts = []
    for severity in constants:
        numbers = severity if isinstance(severity, tuple) else (severity,)
        texts.append(" and ".join(f"{number:.3g}" for number in numbers))
    return ", ".join(texts)


def _type_name(annotation: Any) -> str:
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    return text.replace("typing.", "").replace("NoneType", "None")


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value


def render(description: dict[str, Any]) -> Any:
    """Render what `describe` returned."""
    return Group(*_blocks(description))


def _blocks(description: dict[str, Any]) -> Iterator[Any]:
    if "kinds" in description:
        yield two_columns((kind, ", ".join(names)) for kind, names in description["kinds"].items())
        yield Text("\nsslrun show KIND lists one kind; sslrun show KIND NAME gives every option.")
        return
    if "names" in description:
        yield two_columns(description["names"].items())
        return
    yield Text(f"{description['kind']} {description['name']}\n", style="bold")
    yield Text(description["about"] + "\n")
    for name, value in description.get("where", {}).items():
        yield Text(f"{name}: {value}")
    for name in description.get("tables", ()):
        yield Group(Text(), _numbers(published.published(name)).render())
    if description["options"]:
        table = RichTable(
            "option", "default", "what it is", box=None, pad_edge=False, padding=(0, 2, 0, 0)
        )
        for option in description["options"]:
            table.add_row(
                Text(option["name"]),
                Text(str(option["default"])),
                Text(option["about"] or option["type"]),
            )
        yield table
