"""The recipes that ship, by what they name: read from the YAML files alone."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"


@cache
def _read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def naming(section: str, name: str) -> list[Path]:
    """The recipes whose `section` ("pretext") is `name`; those of one experiment before sweeps."""
    paths = [path for path in sorted(RECIPES.rglob("*.yaml")) if path.parent.name != "claims"]
    found = [path for path in paths if name in set(_names(_read(path), section))]
    return sorted(found, key=lambda path: "rows" in _read(path))


def comment(path: Path) -> str:
    """The comment that a recipe opens with."""
    lines: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("#").strip())
    return " ".join(lines)


def short_name(path: Path) -> str:
    """The name by which commands take it: `image/simclr-cifar10`."""
    return path.relative_to(RECIPES).with_suffix("").as_posix()


def _names(value: Any, section: str) -> Iterator[str]:
    if isinstance(value, list):
        for item in value:
            yield from _names(item, section)
    if not isinstance(value, dict):
        return
    for key, item in value.items():
        if key == section:
            named = item.get("name") if isinstance(item, dict) else item
            if isinstance(named, str):
                yield named.partition(":")[0]
        else:
            yield from _names(item, section)
