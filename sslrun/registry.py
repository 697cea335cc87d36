"""What a recipe can name: one `Registry` a kind, and `Options`, the typed settings of whatever is named."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict

from sslrun.errors import UserError

T = TypeVar("T")


class Options(BaseModel):
    """Settings that a recipe may give: typed, defaulted, frozen, and closed to keys that nothing reads."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    def choices(self) -> list[str]:
        """What these settings come to where the paper behind them is silent: told under the tables of sweeps."""
        return []

    def files(self) -> list[Path]:
        """Files and folders that these settings name: what is in them determines a result as much as the settings."""
        values = [getattr(self, name) for name in type(self).model_fields]
        nested = [path for each in values if isinstance(each, Options) for path in each.files()]
        return [each for each in values if isinstance(each, Path)] + nested


def did_you_mean(name: str, known: list[str]) -> str:
    """A hint to append to "no such ...": the nearest known name, or all of them when none is near."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if near:
        return f" Did you mean '{near[0]}'?"
    return f" There is: {', '.join(sorted(known))}." if known else ""


class Registry(Generic[T]):
    """Names of one kind of thing, each with its class.

    Every class carries `Options` (its settings) and what its decorator was given besides the name (its tags, such
    as `modality`), set as class attributes.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._classes: dict[str, type[T]] = {}

    def register(self, name: str, **tags: Any) -> Callable[[type[T]], type[T]]:
        """Class decorator: make the class known under `name`, and set `tags` on it."""

        def decorate(cls: type[T]) -> type[T]:
            if name in self._classes:
                raise ValueError(f"{self.kind} '{name}' is registered twice")
            for tag, value in {"name": name, **tags}.items():
                setattr(cls, tag, value)
            self._classes[name] = cls
            return cls

        return decorate

    def __getitem__(self, name: str) -> type[T]:
        try:
            return self._classes[name]
        except KeyError:
            raise UserError(f"no such {self.kind}: '{name}'.{did_you_mean(name, list(self))}") from None

    def __contains__(self, name: object) -> bool:
        return name in self._classes

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._classes))
