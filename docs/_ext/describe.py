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
    """A docstring as paragraphs; empty if there is none."""
    return text(inspect.getdoc(thing) or "")


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A pipe table. Cells are Markdown already."""
    lines = [list(header), ["---"] * len(list(header)), *map(list, rows)]
    return "\n".join(
        "| " + " | ".join(" ".join(cell.split()) for cell in line) + " |" for line in lines
    )


def options(model: type[BaseModel], leave_out: Iterable[str] = ()) -> str:
    """A table of a model's fields: name, default, and what each means, with its type."""
    fields = {
        name: field for name, field in model.model_fields.items() if name not in set(leave_out)
    }
    if not fields:
        return "No options."
    rows = [
        (
            f"`{field.alias or name}`",
            _default(field),
            f"{text(_about(model, name, field))} *({_field_type(field)})*",
        )
        for name, field in fields.items()
    ]
    return table(("option", "default", "meaning"), rows)


def nested_models(model: type[BaseModel]) -> list[type[BaseModel]]:
    """The models that a model's fields hold, in order."""
    found: dict[type[BaseModel], None] = {}
    for field in model.model_fields.values():
        _collect(field.annotation, found)
    return list(found)


def has_fields(model: type[BaseModel]) -> bool:
    """Whether a model holds anything; the bare base class of options does not."""
    return bool(model.model_fields)


def anchor(model: type[BaseModel]) -> str:
    """The target of a nested model's section."""
    return f"options-{model.__qualname__.lower().replace('.', '-')}"


def title(model: type[BaseModel]) -> str:
    """A nested model's name in headings and types."""
    return model.__name__.removesuffix("Options")


def _collect(annotation: Any, found: dict[type[BaseModel], None]) -> None:
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        found[annotation] = None
    for argument in get_args(annotation):
        _collect(argument, found)


def _about(model: type[BaseModel], name: str, field: FieldInfo) -> str:
    """The field's description; models without `use_attribute_docstrings` have theirs in the source alone."""
    if field.description:
        return " ".join(field.description.split())
    return " ".join(_attribute_docstrings(model).get(name, "").split())


def _attribute_docstrings(model: type[BaseModel]) -> dict[str, str]:
    """The string below each field in the source of the model and of its bases."""
    found: dict[str, str] = {}
    for cls in reversed(model.__mro__):
        if not issubclass(cls, BaseModel) or cls is BaseModel:
            continue
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        assert isinstance(definition, ast.ClassDef)
        for field, below in pairwise(definition.body):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                found[ast.unparse(field.target)] = inspect.cleandoc(ast.literal_eval(below.value))
    return found


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        changed = value.model_dump(mode="json", exclude_defaults=True)
        return f"`{_flow(changed)}`" if changed else "its own defaults"
    return f"`{_flow(value)}`"


def _flow(value: Any) -> str:
    """A value as one line of YAML, as a recipe writes it."""
    plain = list(value) if isinstance(value, tuple | frozenset | set) else value
    plain = str(plain) if isinstance(plain, Path) else plain
    return (
        yaml.safe_dump(plain, default_flow_style=True, width=10_000).removesuffix("...\n").strip()
    )


def _field_type(field: FieldInfo) -> str:
    """The field's type in words. Bounds are those of the value, if null is allowed, too."""
    words = _type(field.annotation)
    value = words.removesuffix(" or null")
    return _limited(value, field.metadata) + words[len(value) :]


def _type(annotation: Any) -> str:
    """A type in words, with links to nested options."""
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
    """A type with its bounds: "number > 0"."""
    bounds: list[str] = []
    for entry in metadata:
        for item in getattr(entry, "metadata", None) or [entry]:
            bounds += [
                f"{sign} {getattr(item, name):g}"
                for name, sign in SIGNS.items()
                if hasattr(item, name)
            ]
    return " ".join((words, " and ".join(bounds).replace("<", "\\<"))).strip()
