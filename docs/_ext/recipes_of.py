"""Find the shipped recipes that name a component."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml


@cache
def _read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def naming(section: str, name: str) -> dict[str, Path]:
    """Find the recipes whose `section` ("pretext") is `name`; sweeps come last."""
    from sslrun.shipped import names

    recipes = {
        recipe: path
        for recipe, path in names().items()
        if name in set(_names(_read(path), section))
    }
    return dict(sorted(recipes.items(), key=lambda item: "rows" in _read(item[1])))


def _names(value: Any, section: str) -> Iterator[str]:
    """Yield the component that each `section` names, at any depth of a recipe."""
    if isinstance(value, list):
        for item in value:
            yield from _names(item, section)
    if not isinstance(value, dict):
        return
    for key, item in value.items():
        if key == section:
            name = item.get("name") if isinstance(item, dict) else item
            if isinstance(name, str):
                yield name.partition(":")[0]
        else:
            yield from _names(item, section)
