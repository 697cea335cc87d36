"""Render options, docstrings and types as Markdown (MyST)."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
import types
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

WORDS: dict[Any, str] = {
    int: "integer",
    float: "number",
    str: "text",
    bool: "true or false",
    Path: "path",
    Any: "any value",
    type(None): "null",
}
SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def text(words: str) -> str:
    """Escape what Markdown would read as markup, outside of `code`."""
    parts = re.split(r"(`[^`]*`)", words)
    return "".join(
        part if part.startswith("`") else re.sub(r"([<*_|\[\]\\])", r"\\\1", part) for part in parts
    )


def docstring(thing: Any) -> str:
    """Render a docstring as paragraphs; empty if there is none."""
    return text(inspect.getdoc(thing) or "")


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Render a pipe table from cells that are Markdown already."""
    lines = [list(header), ["---"] * len(list(header)), *map(list, rows)]
    return "\n".join(
        "| " + " | ".join(" ".join(cell.split()) for cell in line) + " |" for line in lines
    )


def options(model: type[BaseModel], leave_out: Iterable[str] = ()) -> str:
    """Render a table of a model's fields: name, default, and meaning with the type."""
    fields = {
        name: field for name, field in model.model_fields.items() if name not in set(leave_out)
    }
    if not fields:
        return "No options."
    rows = [
        (
            f"`{field.alias or name}`",
            _default(field),
            f"{text(_description(model, name, field))} *({_field_type(field)})*",
        )
        for name, field in fields.items()
    ]
    return table(("option", "default", "meaning"), rows)


def nested_models(model: type[BaseModel]) -> list[type[BaseModel]]:
    """List the models that a model's fields hold, in order of appearance."""
    models: dict[type[BaseModel], None] = {}
    for field in model.model_fields.values():
        _collect(field.annotation, models)
    return list(models)


def has_fields(model: type[BaseModel]) -> bool:
    """Report whether a model has any field; the bare base class of options has none."""
    return bool(model.model_fields)


def anchor(model: type[BaseModel]) -> str:
    """Return the anchor of a nested model's section."""
    return f"options-{model.__qualname__.lower().replace('.', '-')}"


def title(model: type[BaseModel]) -> str:
    """Return a nested model's name for headings and types."""
    return model.__name__.removesuffix("Options")


def _collect(annotation: Any, models: dict[type[BaseModel], None]) -> None:
    """Add the models that a type holds, at any depth, as keys of `models`."""
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        models[annotation] = None
    for argument in get_args(annotation):
        _collect(argument, models)


def _description(model: type[BaseModel], name: str, field: FieldInfo) -> str:
    """Return the description of a field.

    Models without `use_attribute_docstrings` have it in their source only.
    """
    if field.description:
        return " ".join(field.description.split())
    return " ".join(_attribute_docstrings(model).get(name, "").split())


def _attribute_docstrings(model: type[BaseModel]) -> dict[str, str]:
    """Map each field to the string below it in the source of the model or of its bases."""
    docstrings: dict[str, str] = {}
    for cls in reversed(model.__mro__):
        if not issubclass(cls, BaseModel) or cls is BaseModel:
            continue
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        assert isinstance(definition, ast.ClassDef)
        for field, below in pairwise(definition.body):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                name = ast.unparse(field.target)
                docstrings[name] = inspect.cleandoc(ast.literal_eval(below.value))
    return docstrings


def _default(field: FieldInfo) -> str:
    """Render a field's default as a recipe would write it."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        changed = value.model_dump(mode="json", exclude_defaults=True)
        return f"`{_flow(changed)}`" if changed else "its own defaults"
    return f"`{_flow(value)}`"


def _flow(value: Any) -> str:
    """Render a value as one line of YAML, as a recipe writes it."""
    plain = list(value) if isinstance(value, tuple | frozenset | set) else value
    plain = str(plain) if isinstance(plain, Path) else plain
    return (
        yaml.safe_dump(plain, default_flow_style=True, width=10_000).removesuffix("...\n").strip()
    )


def _field_type(field: FieldInfo) -> str:
    """Render a field's type in words. If null is allowed, bounds stay with the other type."""
    words = _type(field.annotation)
    value = words.removesuffix(" or null")
    return _limited(value, field.metadata) + words[len(value) :]


def _type(annotation: Any) -> str:
    """Render a type in words, with links to nested options."""
    if annotation in WORDS:
        return WORDS[annotation]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _limited(_type(arguments[0]), arguments[1:])
    if origin is Literal:
        return ", ".join(f"`{_flow(choice)}`" for choice in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_type(argument) for argument in arguments)
    if origin in (tuple, list, Iterable):
        return _sequence_type(arguments)
    if origin in (dict, Mapping):
        return f"mapping from {_type(arguments[0])} to {_type(arguments[1])}"
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return f"[{title(annotation)}](#{anchor(annotation)})"
    return text(getattr(annotation, "__name__", str(annotation)))


def _sequence_type(arguments: tuple[Any, ...]) -> str:
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return f"list of: {_type(arguments[0])}"
    kinds = list(dict.fromkeys(_type(argument) for argument in arguments))
    return f"list of {len(arguments)}: {', '.join(kinds)}"


def _limited(words: str, metadata: Iterable[Any]) -> str:
    """Add the bounds to a type: "number > 0"."""
    bounds: list[str] = []
    for entry in metadata:
        for item in getattr(entry, "metadata", None) or [entry]:
            bounds += [
                f"{sign} {getattr(item, name):g}"
                for name, sign in SIGNS.items()
                if hasattr(item, name)
            ]
    return " ".join((words, " and ".join(bounds).replace("<", "\\<"))).strip()
