"""YAML mappings with the place of each key, so that every error names its file and line."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sslrun.errors import UserError
from sslrun.recipe.yaml import (
    DEEPEST,
    MAPPING,
    MOST_NODES,
    SEQUENCE,
    Loader,
    construct_scalar,
    read_nodes,
)
from sslrun.registry import did_you_mean

Keys = tuple[str | int, ...]


@dataclass
class Located:
    """A nested mapping with the place where each key was written."""

    value: dict[str, Any]
    places: dict[Keys, str]
    """Keys from the top of `value` -> "file:line", or the override that set them."""
    path: Keys = ()
    """The position of `value` in the recipe."""

    def error(self, keys: Keys, message: str) -> UserError:
        """Create an error that begins with the place of `keys`, or of the nearest outer key."""
        place = next(
            self.places[keys[:end]] for end in range(len(keys), -1, -1) if keys[:end] in self.places
        )
        dotted = ".".join(map(str, self.path + keys))
        text = f"{place}: {dotted}: {message}" if dotted else f"{place}: {message}"
        return UserError(text.replace("\n", "\\n"))  # of a key or a value

    def section(self, *keys: str) -> Located:
        """Return the mapping under `keys` with its places; empty if there is none."""
        value: Any = self.value
        for depth, key in enumerate(keys, start=1):
            value = value.get(key)
            if value is None:
                value = {}
            if not isinstance(value, dict):
                raise self.error(keys[:depth], f"should be a mapping, not {value!r}")
        places = {
            full[len(keys) :]: place
            for full, place in self.places.items()
            if full[: len(keys)] == keys
        }
        places.setdefault((), self.places[()])
        return Located(value, places, self.path + keys)

    def copy(self) -> Located:
        return copy.deepcopy(self)

    def without(self, *names: str) -> Located:
        """Return the same mapping without some keys."""
        value = {key: value for key, value in self.value.items() if key not in names}
        return Located(value, self.places, self.path)

    def change(self, path: str, value: Any, places: Mapping[Keys, str]) -> None:
        """Set the dotted `path` to `value`.

        `places` holds the places of the value and of the keys inside it, from the top of `value`.
        """
        self._change(tuple(path.split(".")), value, places)

    def _change(self, keys: tuple[str, ...], value: Any, places: Mapping[Keys, str]) -> None:
        """Set the value under `keys`, which may contain dots themselves (CIFAR-10.1)."""
        *parents, last = keys
        section = self.value
        for depth, key in enumerate(parents, start=1):
            section[key] = {} if section.get(key) is None else _spell_out(key, section[key])
            section = section[key]
            if not isinstance(section, dict):
                outer = ".".join(keys[:depth])
                raise UserError(
                    f"{places[()]}: {'.'.join(keys)}: '{outer}' holds a value, not a section"
                )
        old = _spell_out(last, section.get(last))
        if _can_merge(old, value):
            section[last] = old
            for inner, inner_value in value.items():
                inside = {(): places[()], **places_under(places, inner)}
                self._change((*keys, inner), inner_value, inside)
            return
        section[last] = copy.deepcopy(value)
        self.places = {
            full: place for full, place in self.places.items() if full[: len(keys)] != keys
        }
        self.places.update({keys + inner: place for inner, place in places.items()})


def places_under(places: Mapping[Keys, str], key: str) -> dict[Keys, str]:
    """Return the places of `key` and of the keys inside it, from the value of `key`."""
    return {keys[1:]: place for keys, place in places.items() if keys[:1] == (key,)}


def _can_merge(old: Any, new: Any) -> bool:
    """Return whether both are mappings, and `new` does not name another component."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return False
    return bool(new.get("name", old.get("name")) == old.get("name"))


def _spell_out(key: str, value: Any) -> Any:
    """Spell out `pretext: simclr` as {name: simclr}, so that options can be added."""
    if key in ("backbone", "data", "pretext", "task") and isinstance(value, str):
        return {"name": value}
    return value


def read_yaml(path: Path) -> Located:
    """Read a YAML file with the line of every key.

    Raises UserError if the file is missing, unreadable, not YAML or not a mapping, or if it has the
    same key twice.
    """
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
    try:
        loader, root = read_nodes(text)
        if not isinstance(root, yaml.MappingNode):
            raise UserError(
                f"{path}: should be a mapping of keys such as 'name', 'backbone', 'data'"
            )
        reader = _Reader(loader, str(path), {})
        value = reader.read(root, ())
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    return Located(value, reader.places)


def _near_file(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f" (nor a folder {folder})"
    return "." + did_you_mean(path.name, sorted(file.name for file in folder.glob("*.yaml")))


@dataclass
class _Reader:
    """Constructs values from YAML nodes, and remembers where each key was written."""

    loader: Loader
    path: str
    places: dict[Keys, str]

    def read(self, node: yaml.Node, keys: Keys) -> Any:
        """Construct the value of a node at `keys`, with their places."""
        self.places[keys] = self._place(node)
        if len(self.places) > MOST_NODES or len(keys) > DEEPEST:
            raise yaml.MarkedYAMLError(
                problem="too large, or nested too deeply, when aliases are replaced",
                problem_mark=node.start_mark,
            )
        if node.tag == SEQUENCE and isinstance(node, yaml.SequenceNode):
            return [self.read(item, (*keys, index)) for index, item in enumerate(node.value)]
        if node.tag != MAPPING or not isinstance(node, yaml.MappingNode):
            return construct_scalar(self.loader, node)
        written = set()
        for key_node, _ in node.value:
            if (key := self._key(key_node)) in written:
                raise UserError(f"{self._place(key_node)}: '{key}' is given twice")
            written.add(key)
        self.loader.flatten_mapping(node)  # merges (<<) come first, so that its own keys win
        value: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self._key(key_node)
            value[key] = self.read(value_node, (*keys, key))
            self.places[(*keys, key)] = self._place(key_node)
        return value

    def _key(self, node: yaml.Node) -> str:
        if not isinstance(node, yaml.ScalarNode):
            raise UserError(f"{self._place(node)}: a key should be a word, not a collection")
        return str(node.value)

    def _place(self, node: yaml.Node) -> str:
        return f"{self.path}:{node.start_mark.line + 1}"


def override(source: Located, overrides: Sequence[str]) -> None:
    """Apply `key=value` strings, whose values are YAML.

    Raises UserError if one has no '=', or if its value is not valid YAML.
    """
    for text in overrides:
        path, equals, value_text = text.partition("=")
        if not equals or not re.fullmatch(r"[^.=\s]+(\.[^.=\s]+)*", path):
            raise UserError(f"'{text}': an override is written key=value, as in pretrain.epochs=5")
        try:
            loader, node = read_nodes(value_text)
            value = None if node is None else _Reader(loader, "", {}).read(node, ())
        except (yaml.YAMLError, UserError):
            raise UserError(f"{text}: the value is not valid YAML") from None
        source.change(path, value, same_place(value, f"override {text}"))


def same_place(value: Any, place: str, keys: Keys = ()) -> dict[Keys, str]:
    """Give a value and all keys inside it the same place."""
    places = {keys: place}
    if isinstance(value, dict):
        for key, inner in value.items():
            places |= same_place(inner, place, (*keys, key))
    return places
