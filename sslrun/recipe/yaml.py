"""Read YAML that people write: YAML 1.2's core schema, within limits.

YAML 1.1, which PyYAML reads, takes `1:30` for 90, `010` for 8, `1e-3` for text and `2020-02-31` for
a date. Limits keep a hostile file from filling memory.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar, cast

import yaml

MOST_CHARACTERS = 2**20
"""Largest size of a file."""
DEEPEST = 50
"""Largest number of collections inside each other."""
MOST_NODES = 100_000
"""Largest number of values in a file, where those that an alias repeats count again."""
MAPPING, SEQUENCE = "tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"


class Loader(yaml.SafeLoader):
    """A safe loader whose plain scalars are null, booleans, numbers or text, as in YAML 1.2."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]
    yaml_constructors: ClassVar[dict[str | None, Any]] = {}

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Replace merges (`<<`) in a mapping by the keys that they bring.

        Raises:
            MarkedYAMLError: It becomes too large.
        """
        super().flatten_mapping(node)
        if len(node.value) > MOST_NODES:
            raise _error(node, f"merges of more than {MOST_NODES:,} keys")


def _error(node: yaml.Node, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def _construct_text(loader: Loader, node: yaml.ScalarNode) -> str:
    return str(loader.construct_scalar(node))


def _construct_null(loader: Loader, node: yaml.ScalarNode) -> None:
    return None


def _construct_bool(loader: Loader, node: yaml.ScalarNode) -> bool:
    return str(node.value).lower() == "true"


def _construct_int(loader: Loader, node: yaml.ScalarNode) -> int:
    return int(node.value, 0 if node.value[:2] in ("0x", "0o") else 10)


def _construct_float(loader: Loader, node: yaml.ScalarNode) -> float:
    return float(node.value.replace(".inf", "inf").replace(".nan", "nan"))


_SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""], _construct_null),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF", _construct_bool),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789", _construct_int),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan",
        "-+.0123456789",
        _construct_float,
    ),
}
_PATTERNS = {}
for _name, (_pattern, _first, _construct) in _SCALARS.items():
    _tag = f"tag:yaml.org,2002:{_name}"
    _PATTERNS[_tag] = re.compile(f"(?:{_pattern})$")
    Loader.add_implicit_resolver(_tag, _PATTERNS[_tag], [*_first])
    Loader.add_constructor(_tag, _construct)
Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"<<$"), ["<"])
Loader.add_constructor("tag:yaml.org,2002:str", _construct_text)
# Any other tag is refused.
Loader.add_constructor(None, Loader.construct_undefined)  # type: ignore[type-var]


def read_nodes(text: str) -> tuple[Loader, yaml.Node | None]:
    """Parse YAML into nodes, and return them with the loader that can construct their values.

    Raises:
        YAMLError: The text is not valid, too large, or too deep.
    """
    if len(text) > MOST_CHARACTERS:
        raise yaml.YAMLError(f"larger than {MOST_CHARACTERS:,} characters")
    depth = 0
    for event in yaml.parse(text, Loader):  # before nodes are built, which takes recursion
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise yaml.MarkedYAMLError(
                problem=f"more than {DEEPEST} collections inside each other",
                problem_mark=cast(yaml.Mark, event.start_mark),
            )
    loader = Loader(text)
    try:
        return loader, loader.get_single_node()
    finally:
        loader.dispose()


def construct_scalar(loader: Loader, node: yaml.Node) -> Any:
    """Construct the value of a scalar.

    Raises:
        MarkedYAMLError: It is of a tag outside the core schema, or not what its tag says.
    """
    pattern = _PATTERNS.get(node.tag)
    if not isinstance(node, yaml.ScalarNode) or (pattern and not pattern.match(node.value)):
        raise _error(node, f"not a value of {node.tag}: {str(node.value)[:40]!r}")
    return loader.construct_object(node, deep=True)
