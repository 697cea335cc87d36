"""JSON schema of recipes and sweeps, for completion and checks in editors.

The version is JSON Schema 2020-12. The schema is made from the registries and the option classes,
including those of plug-ins. It is more lenient than `sslrun check`, which also checks whether
components fit together.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, create_model

from sslrun.backbones.base import backbones
from sslrun.data.shifts import Shift
from sslrun.data.source import sources
from sslrun.pretexts.base import pretexts
from sslrun.protocols import protocols
from sslrun.recipe.axes import Axes, Random, Search
from sslrun.recipe.schema import Against, Evaluation, Pretrain, Recipe, Sweep, Watch, Weights
from sslrun.registry import Options, Registry, first_line
from sslrun.tasks.base import tasks

COMPONENTS: dict[str, Registry[Any]] = {
    "data": sources,
    "backbone": backbones,
    "pretext": pretexts,
    "task": tasks,
}
"""Key of a recipe that names a component -> its registry."""
SECTIONS: dict[str, type[BaseModel]] = {
    "recipe": Recipe,
    "pretrain": Pretrain,
    "watch": Watch,
    "weights": Weights,
    "evaluation": Evaluation,
    "shift": Shift,
    "sweep": Sweep,
    "random": Random,
    "search": Search,
}
"""The sections of recipes and sweeps that belong to no component and no protocol."""
NOTHING: dict[str, Any] = {"type": "null"}
Definitions = dict[str, dict[str, Any]]


def protocol_options() -> dict[str, type[Options]]:
    """Return protocol -> its options, which are sections of recipes and evaluations."""
    return {
        name: protocols[name].Options
        for name in protocols.in_order
        if protocols[name].Options.model_fields
    }


def recipe_schema() -> dict[str, Any]:
    """Return the schema of recipes and sweeps as JSON values."""
    defs: Definitions = {}
    for key, registry in COMPONENTS.items():
        defs[key] = _component(key, registry, defs)
    for name, model in protocol_options().items():
        defs[f"protocol.{name}"] = _partial(_section(name, model, defs))
    for name, model in (("pretrain", Pretrain), ("watch", Watch)):
        defs[name] = _section(name, model, defs)
    weights = _section("weights", Weights, defs)
    defs["weights"] = {
        "anyOf": [{"type": "string"}, weights, NOTHING],
        "description": weights["description"],
    }
    defs["shift"] = _shift(defs)
    defs["evaluation"] = _evaluation(defs)
    defs["recipe"] = _recipe(defs)
    defs["evaluation.changes"] = _partial(defs["evaluation"])
    defs["row"] = _row(defs["recipe"]["properties"])
    defs["sweep"] = _sweep(defs)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A recipe or a sweep of sslrun",
        "type": "object",
        "if": {"anyOf": [{"required": [key]} for key in ("base", "rows", *Axes.model_fields)]},
        "then": _ref("sweep"),
        "else": _ref("recipe"),
        "$defs": defs,
    }


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/$defs/{name}"}


def _section(name: str, model: type[BaseModel], defs: Definitions) -> dict[str, Any]:
    """Build the schema of a model's options; nested models go to `defs` as "name.Model"."""
    schema = model.model_json_schema(ref_template=f"#/$defs/{name}.{{model}}", mode="validation")
    for nested, inner in schema.pop("$defs", {}).items():
        defs[f"{name}.{nested}"] = _partial(inner)
    schema["additionalProperties"] = False
    schema["description"] = first_line(model)
    schema.pop("title", None)
    return json.loads(json.dumps(schema, default=str))  # defaults such as paths as JSON values


def _partial(schema: dict[str, Any]) -> dict[str, Any]:
    """Drop the required options of a section, because they may be inherited."""
    return {key: value for key, value in schema.items() if key != "required"}


def _component(key: str, registry: Registry[Any], defs: Definitions) -> dict[str, Any]:
    """Build the schema of a component: its name, or a mapping of its name and options."""
    choices: list[dict[str, Any]] = []
    for name in registry:
        cls = registry[name]
        schema = _section(f"{key}.{name}", cls.Options, defs)
        properties = {"name": {"const": name}, **schema.get("properties", {})}
        defs[f"{key}.{name}"] = {
            **schema,
            "description": first_line(cls),
            "properties": properties,
            "required": ["name", *schema.get("required", ())],
        }
        choices.append(_ref(f"{key}.{name}"))
    shorthands = [name for name in registry if getattr(registry[name], "shorthand", None)]
    names: list[dict[str, Any]] = [{"enum": list(registry)}]
    if shorthands:
        names.append({"type": "string", "pattern": f"^({'|'.join(shorthands)}):."})
        choices.append(_named_otherwise(f"^({'|'.join(shorthands)}):."))
    if key == "task":  # default: the task of the data's labels
        choices.append({"type": "object", "not": {"required": ["name"]}})
    return {"anyOf": [*names, {"oneOf": choices}]}


def _named_otherwise(pattern: str) -> dict[str, Any]:
    """Build the schema of a component with an option in its name, as `hf:bert-base-uncased`."""
    return {
        "type": "object",
        "required": ["name"],
        "properties": {"name": {"type": "string", "pattern": pattern}},
    }


def _properties(
    model: type[BaseModel], names: Iterable[str], defs: Definitions, prefix: str
) -> dict[str, Any]:
    """Build the schemas of some fields of a model."""
    fields: dict[str, Any] = {
        name: (model.model_fields[name].annotation, model.model_fields[name]) for name in names
    }
    schema = _section(prefix, create_model(model.__name__, **fields), defs)
    return schema["properties"]


def _shift(defs: Definitions) -> dict[str, Any]:
    properties = _properties(Shift, ("classes", "corruption", "severity"), defs, "shift")
    whole = {
        "type": "object",
        "properties": {"data": _ref("data"), **properties},
        "additionalProperties": False,
    }
    return {"anyOf": [{"type": "string"}, whole, NOTHING], "description": first_line(Shift)}


def _evaluation(defs: Definitions) -> dict[str, Any]:
    own = _properties(Evaluation, ("protocols", "labels", "restarts", "refit"), defs, "evaluation")
    own["protocols"] = {
        "type": "array",
        "items": {"enum": protocols.in_order},
        "description": "Ways to learn the task.",
    }
    shifts = [
        {"type": "array", "items": {"type": "string"}},
        {"type": "object", "additionalProperties": _ref("shift")},
    ]
    properties = {
        "data": {"anyOf": [_ref("data"), NOTHING]},
        "task": {"anyOf": [_ref("task"), NOTHING]},
        **own,
        "shifts": {"anyOf": [*shifts, NOTHING], "description": "Shifted test sets, by name."},
        **{name: _ref(f"protocol.{name}") for name in protocol_options()},
    }
    return {
        "type": "object",
        "description": first_line(Evaluation),
        "properties": properties,
        "required": ["protocols"],
        "additionalProperties": False,
    }


def _recipe(defs: Definitions) -> dict[str, Any]:
    properties = {
        **_properties(Recipe, ("name",), defs, "recipe"),
        "backbone": _ref("backbone"),
        "pretext": {"anyOf": [_ref("pretext"), NOTHING]},
        "data": _ref("data"),
        "pretrain": {"anyOf": [_ref("pretrain"), NOTHING]},
        "weights": _ref("weights"),
        "watch": _ref("watch"),
        "evaluate": {"type": "object", "additionalProperties": _ref("evaluation")},
        **{name: _ref(f"protocol.{name}") for name in protocol_options()},
    }
    return {
        "type": "object",
        "description": first_line(Recipe),
        "properties": properties,
        "required": ["name", "backbone", "data"],
        "additionalProperties": False,
    }


def _row(sections: dict[str, Any]) -> dict[str, Any]:
    """Build the schema of a sweep's row: sections, parts of sections, and dotted keys."""
    part = {"type": "object", "not": {"required": ["name"]}}  # options of the base's own component
    changes = {
        key: {"anyOf": [schema, NOTHING, *([part] if key in COMPONENTS else [])]}
        for key, schema in sections.items()
    }
    evaluation = {"anyOf": [_ref("evaluation.changes"), NOTHING]}
    changes["evaluate"] = {
        "anyOf": [{"type": "object", "additionalProperties": evaluation}, NOTHING]
    }
    dotted = f"^({'|'.join(sections)})\\..+$"
    return {
        "type": "object",
        "description": "Changes to the base recipe.",
        "properties": changes,
        "patternProperties": {dotted: {}},
        "additionalProperties": False,
    }


def _sweep(defs: Definitions) -> dict[str, Any]:
    own = ("name", "seeds", "title", "jobs", *Axes.model_fields)
    properties = _properties(Sweep, own, defs, "sweep")
    against = _section("against", Against, defs)
    base = {**defs["recipe"], "required": ["backbone", "data"]}
    return {
        "type": "object",
        "description": first_line(Sweep),
        "properties": {
            **properties,
            "against": {
                "anyOf": [{"type": "string"}, against, NOTHING],
                "description": against["description"],
            },
            "base": {"anyOf": [{"type": "string", "description": "A recipe's file."}, base]},
            "rows": {"type": "object", "additionalProperties": {"anyOf": [_ref("row"), NOTHING]}},
        },
        "required": ["name", "base"],
        "additionalProperties": False,
    }
