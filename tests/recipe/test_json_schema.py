"""The JSON schema of recipes: it accepts shipped recipes and rejects misspellings."""

import json
import re
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from sslrun import cli
from sslrun.pretexts.base import Pretext, PretextOptions, pretexts
from sslrun.recipe.json_schema import SECTIONS, recipe_schema
from sslrun.recipe.places import read_yaml
from sslrun.stages.show import describe

RECIPES = Path(__file__).parents[2] / "recipes"
FILES = sorted(path for path in RECIPES.rglob("*.yaml") if path.parent.name != "claims")
TYPES = {"object": dict, "array": list, "string": str, "null": type(None), "boolean": bool}


def accepts(schema, value, root):
    """Return whether a value is valid.

    Supports the keywords of JSON Schema that pydantic and `recipe_schema` write, except ranges.
    """
    if "$ref" in schema:
        target = root
        for part in schema["$ref"].removeprefix("#/").split("/"):
            target = target[part]
        return accepts(target, value, root) and accepts(
            {k: v for k, v in schema.items() if k != "$ref"}, value, root
        )
    checks = [
        "type" not in schema or _is(schema["type"], value),
        "const" not in schema or value == schema["const"],
        "enum" not in schema or value in schema["enum"],
        "pattern" not in schema
        or not isinstance(value, str)
        or re.search(schema["pattern"], value),
        "not" not in schema or not accepts(schema["not"], value, root),
        "anyOf" not in schema or any(accepts(option, value, root) for option in schema["anyOf"]),
        "oneOf" not in schema
        or sum(accepts(option, value, root) for option in schema["oneOf"]) == 1,
    ]
    if "if" in schema:
        checks.append(
            accepts(schema["then" if accepts(schema["if"], value, root) else "else"], value, root)
        )
    if isinstance(value, dict):
        checks.append(set(schema.get("required", ())) <= value.keys())
        checks += [_accepts_key(schema, key, inner, root) for key, inner in value.items()]
    if isinstance(value, list):
        first = schema.get("prefixItems", [])
        checks += [
            accepts(option, inner, root) for option, inner in zip(first, value, strict=False)
        ]
        checks += [
            accepts(schema.get("items", {}) or {}, inner, root) for inner in value[len(first) :]
        ]
    return all(checks)


def _is(name, value):
    if name in ("number", "integer"):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, TYPES[name])


def _accepts_key(schema, key, value, root):
    if key in schema.get("properties", {}):
        return accepts(schema["properties"][key], value, root)
    for pattern, inner in schema.get("patternProperties", {}).items():
        if re.search(pattern, key):
            return accepts(inner, value, root)
    rest = schema.get("additionalProperties", True)
    return rest if isinstance(rest, bool) else accepts(rest, value, root)


@pytest.fixture(scope="module")
def schema():
    """The schema as `sslrun show schema` prints it."""
    printed = StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setattr(sys, "argv", ["sslrun", "show", "schema"])
        with pytest.raises(SystemExit):
            cli.main()
    return json.loads(printed.getvalue())


def test_the_printed_schema_is_one(schema):
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(schema)


def test_every_reference_resolves(schema):
    references = re.findall(r'"\$ref": "#/\$defs/([^"]+)"', json.dumps(schema))
    assert set(references) <= schema["$defs"].keys()
    assert len(schema["$defs"]) > 100


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_recipe_that_ships_is_valid(schema, path):
    assert accepts(schema, read_yaml(path).value, schema)


RECIPE = {
    "name": "mine",
    "backbone": {"name": "resnet18", "stem": "small"},
    "data": "digits",
    "pretext": "simclr",
    "pretrain": {"epochs": 2},
    "evaluate": {"digits": {"protocols": ["knn"]}},
}


@pytest.mark.parametrize(
    ("changes", "valid"),
    [
        ({}, True),
        ({"pretext": None}, True),
        ({"backbone": "hf:bert-base-uncased"}, True),
        ({"backbone": "resnet19"}, False),
        ({"backbone": {"name": "resnet18", "stems": "small"}}, False),
        ({"backbone": {"name": "resnet18", "stem": "tiny"}}, False),
        ({"pretrain": {"epochs": "two"}}, False),
        ({"pretrane": {"epochs": 2}}, False),
        ({"evaluate": {"digits": {"protocols": ["knnn"]}}}, False),
        (
            {
                "evaluate": {
                    "digits": {"protocols": ["knn"], "task": {"augmentation": {"flip": 0.5}}}
                }
            },
            True,
        ),
        ({"knn": {"k": 10}}, True),
        ({"knn": {"kk": 10}}, False),
    ],
)
def test_misspellings_are_rejected(schema, changes, valid):
    assert bool(accepts(schema, RECIPE | changes, schema)) is valid
    sweep = {"name": "sweep", "base": RECIPE, "rows": {"a": changes, "b": {"pretrain.epochs": 3}}}
    assert bool(accepts(schema, sweep, schema)) is valid


def test_the_schema_includes_plug_ins():
    @pretexts.register("of-a-schema-test")
    class Mine(Pretext):
        """Nothing is learned."""

        class Options(PretextOptions):
            speed: float = 1.0
            """How fast nothing is learned."""

    try:
        schema = recipe_schema()
        assert (
            schema["$defs"]["pretext.of-a-schema-test"]["properties"]["speed"]["description"]
            == "How fast nothing is learned."
        )
        assert {"$ref": "#/$defs/pretext.of-a-schema-test"} in schema["$defs"]["pretext"]["anyOf"][
            -1
        ]["oneOf"]
    finally:
        del pretexts._classes["of-a-schema-test"]


@pytest.mark.parametrize("name", SECTIONS)
def test_show_knows_every_section(name):
    described = describe("section", name)
    assert described["about"]
    assert all(option["about"] for option in described["options"])
