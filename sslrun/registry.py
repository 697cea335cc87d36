"""Components that a recipe can name: one `Registry` for each kind, and `Options`, their typed settings."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import BaseModel, ConfigDict

from sslrun.errors import UserError

T = TypeVar("T")


class Options(BaseModel):
    """Settings that a recipe may give: typed, with defaults, frozen, and closed to keys that nothing reads."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    def choices(self) -> list[str]:
        """Describe what these settings choose where the paper is silent: printed under the tables of sweeps."""
        return []

    def non_defaults(self, exclude: set[str] | None = None) -> dict[str, Any]:
        """The settings that differ from their defaults, as JSON values: what a run's hash is made from.

        So a new setting with a default renames no run. Nested settings are compared with the
        defaults of their own class, unless they equal the default of the field that holds them:
        then they are left out whole.
        """
        return self.model_dump(mode="json", exclude_defaults=True, exclude=exclude)

    def files(self) -> list[Path]:
        """List the files and folders that these settings name: their content is part of a run's identity."""
        values = [getattr(self, name) for name in type(self).model_fields]
        nested = [path for value in values if isinstance(value, Options) for path in value.files()]
        return [value for value in values if isinstance(value, Path)] + nested


def first_line(thing: Any) -> str:
    """The first line of a docstring, which says what a component does; empty if there is none."""
    return (inspect.getdoc(thing) or "").partition("\n")[0]


def did_you_mean(name: str, known: list[str]) -> str:
    """A hint to append to "no such ...": the nearest known name, or all of them when none is near."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if near:
        return f" Did you mean '{near[0]}'?"
    return f" There is: {', '.join(sorted(known))}." if known else ""


class Registry(Generic[T]):
    """The components of one kind by name.

    Every component is a class with `Options` (its settings), `name` (set here), and `version`,
    which is raised when the same options come to mean another result.
    """

    kinds: ClassVar[dict[str, Registry[Any]]] = {}
    """Every registry by the word that `sslrun show` knows it by."""

    def __init__(self, kind: str, key: str | None = None) -> None:
        """`kind` is the word in messages; `key` the one that `sslrun show` takes, if it is another."""
        self.kind = kind
        self._classes: dict[str, type[T]] = {}
        Registry.kinds[key or kind] = self

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator: make the class known under `name`.

        A class that has a name already keeps it; the second name gets a subclass of its own.
        Raises ValueError for a name that is taken.
        """

        def decorate(cls: type[T]) -> type[T]:
            if name in self._classes:
                taken = self._classes[name].__module__
                raise ValueError(
                    f"the {self.kind} '{name}' is defined already, in {taken}; choose another name"
                )
            component = cls
            if cls in self._classes.values():
                body = {"__doc__": cls.__doc__, "__module__": cls.__module__}
                component = type(cls.__name__, (cls,), body)
            component.name = name  # type: ignore[attr-defined]
            self._classes[name] = component
            return cls

        return decorate

    def __getitem__(self, name: str) -> type[T]:
        try:
            return self._classes[name]
        except KeyError:
            hint = did_you_mean(name, list(self._classes))
            raise UserError(f"no such {self.kind}: '{name}'.{hint}") from None

    def __contains__(self, name: object) -> bool:
        return name in self._classes

    def __iter__(self) -> Iterator[str]:
        """Names in alphabetical order."""
        return iter(sorted(self._classes))

    def __len__(self) -> int:
        return len(self._classes)

    @property
    def in_order(self) -> list[str]:
        """Names in the order of registration."""
        return list(self._classes)
