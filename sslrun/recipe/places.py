"""YAML mappings that remember where each key was written, so that every mistake names its file and line."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sslrun.errors import UserError
from sslrun.registry import did_you_mean

Keys = tuple[str | int, ...]


@dataclass
class Located:
    """A nested mapping together with the place where each of its keys was written."""

    value: dict[str, Any]
    places: dict[Keys, str]
    """Keys, from the top of `value` -> "file:line", or the override that set them."""
    at: Keys = ()
    """Where in the recipe `value` lies."""

    def error(self, keys: Keys, message: str) -> UserError:
        """Make an error that begins with the place of `keys`, or of the nearest key around them."""
        place = next(
            self.places[keys[:end]] for end in range(len(keys), -1, -1) if keys[:end] in self.places
        )
        path = ".".join(map(str, self.at + keys))
        return UserError(f"{place}: {path}: {message}" if path else f"{place}: {message}")

    def section(self, *keys: str) -> Located:
        """The mapping under `keys` with its places; empty if there is none."""
        value: Any = self.value
        for depth, key in enumerate(keys, start=1):
            value = value.get(key)
            if value is None:
                value = {}
            if not isinstance(value, dict):
                raise self.error(keys[:depth], f"should be a mapping, not {value!r}")
        places = {
            path[len(keys) :]: place
            for path, place in self.places.items()
            if path[: len(keys)] == keys
        }
        places.setdefault((), self.places[()])
        return Located(value, places, self.at + keys)

    def copy(self) -> Located:
        return copy.deepcopy(self)

    def without(self, *names: str) -> Located:
        """The same mapping without some keys."""
        return Located(
            {key: value for key, value in self.value.items() if key not in names},
            self.places,
            self.at,
        )

    def change(self, path: str, value: Any, places: Mapping[Keys, str]) -> None:
        """Set the dotted `path` to `value`; `places` says where the value and what lies inside it were written."""
        self._change(tuple(path.split(".")), value, places)

    def _change(self, keys: tuple[str, ...], value: Any, places: Mapping[Keys, str]) -> None:
        """`change`, by keys, which may themselves have dots in them (CIFAR-10.1)."""
        *parents, last = keys
        at = self.value
        for depth, key in enumerate(parents, start=1):
            at[key] = {} if at.get(key) is None else _spelt_out(key, at[key])
            at = at[key]
            if not isinstance(at, dict):
                raise UserError(
                    f"{places[()]}: {'.'.join(keys)}: '{'.'.join(keys[:depth])}' holds a value, not a section"
                )
        old = _spelt_out(last, at.get(last))
        if (
            isinstance(old, dict)
            and isinstance(value, dict)
            and value.get("name", old.get("name")) == old.get("name")
        ):
            at[last] = old
            for inner, inner_value in value.items():
                inside = {deep[1:]: place for deep, place in places.items() if deep[:1] == (inner,)}
                self._change((*keys, inner), inner_value, {(): places[()], **inside})
            return
        at[last] = copy.deepcopy(value)
        self.places = {
            deep: place for deep, place in self.places.items() if deep[: len(keys)] != keys
        }
        self.places.update({keys + inner: place for inner, place in places.items()})


def _spelt_out(key: str, value: Any) -> Any:
    """Spell out `pretext: simclr` as {name: simclr}, so that options can be added."""
    return (
        {"name": value}
        if key in ("backbone", "data", "pretext", "task") and isinstance(value, str)
        else value
    )


class _Loader(yaml.SafeLoader):
    """Safe YAML in which `1e-3` is a number, as everywhere else."""


_COLLECTIONS = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")

_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*(?:\.[\d_]*)?|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def read_yaml(path: Path) -> Located:
    """Read a YAML file with the line of every key. UserError: missing, unreadable, not YAML, no mapping, a key twice."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file{_near_file(path)}") from None
    except IsADirectoryError:
        raise UserError(
            f"{path}: is a folder; name a recipe in it{_near_file(path / 'x')}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read: {error}") from None
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode):
            raise UserError(
                f"{path}: should be a mapping of keys such as 'name', 'backbone', 'data'"
            )
        places: dict[Keys, str] = {}
        value = _construct(loader, root, (), places, path)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    finally:
        loader.dispose()
    return Located(value, places)


def _near_file(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f" (nor a folder {folder})"
    return "." + did_you_mean(path.name, sorted(each.name for each in folder.glob("*.yaml")))


def _construct(
    loader: _Loader, node: yaml.Node, keys: Keys, places: dict[Keys, str], path: Path
) -> Any:
    places[keys] = f"{path}:{node.start_mark.line + 1}"
    if node.tag not in _COLLECTIONS:
        return loader.construct_object(
            node, deep=True
        )  # of any other tag than a scalar's, an error
    if isinstance(node, yaml.MappingNode):
        given: set[str] = set()
        for key_node, _ in node.value:
            if key_node.value in given:
                raise UserError(
                    f"{path}:{key_node.start_mark.line + 1}: '{key_node.value}' is given twice"
                )
            given.add(str(key_node.value))
        loader.flatten_mapping(node)  # merges (<<) come first, so that the mapping's own keys win
        value: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            value[key] = _construct(loader, value_node, (*keys, key), places, path)
            places[(*keys, key)] = f"{path}:{key_node.start_mark.line + 1}"
        return value
    assert isinstance(node, yaml.SequenceNode)
    return [
        _construct(loader, each, (*keys, index), places, path)
        for index, each in enumerate(node.value)
    ]


def override(source: Located, overrides: Sequence[str]) -> None:
    """Apply `key=value` strings; values are YAML. UserError: no '=', or a value that is not YAML."""
    for each in overrides:
        path, equals, text = each.partition("=")
        if not equals or not re.fullmatch(r"[^.=\s]+(\.[^.=\s]+)*", path):
            raise UserError(f"'{each}': an override is written key=value, as in pretrain.epochs=5")
        try:
            value = yaml.load(text, _Loader)
        except yaml.YAMLError:
            raise UserError(f"{each}: the value is not valid YAML") from None
        source.change(path, value, _same_place(value, f"override {each}"))


def _same_place(value: Any, place: str, at: Keys = ()) -> dict[Keys, str]:
    inner = value.items() if isinstance(value, dict) else ()
    return {
        at: place,
        **{k: v for key, each in inner for k, v in _same_place(each, place, (*at, key)).items()},
    }
