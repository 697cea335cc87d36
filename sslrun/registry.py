"""Registries of the components that a recipe can name, and `Options`, their typed settings."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, field_validator

from sslrun.errors import UserError
from sslrun.files import expand_home

T = TypeVar("T")


def expand_option(path: str | Path) -> Path:
    """Expand `~` as `expand_home` does. Raises ValueError, as validators do."""
    try:
        return expand_home(path)
    except UserError as error:
        raise ValueError(str(error)) from None


class Options(BaseModel):
    """Settings of a component: typed, frozen, and with an error for an unknown key."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @field_validator("*")
    @classmethod
    def _expand_home(cls, value: Any) -> Any:
        return expand_option(value) if isinstance(value, Path) else value

    def choices(self) -> list[str]:
        """Describe what these settings decide that the paper leaves open.

        The descriptions are printed under the tables of sweeps.
        """
        return []

    def non_defaults(self, exclude: set[str] | None = None) -> dict[str, Any]:
        """Return the settings that differ from their defaults, as JSON values.

        A run's hash covers these alone, so that a new setting with a default changes no hash.
        Nested settings are compared with the defaults of their own class; but they are left out
        entirely if they equal the default of the field that holds them.
        """
        return self.model_dump(mode="json", exclude_defaults=True, exclude=exclude)

    def files(self) -> list[Path]:
        """List the files and folders that these settings name.

        Their content is part of a run's identity.
        """
        values = [getattr(self, name) for name in type(self).model_fields]
        nested = [path for value in values if isinstance(value, Options) for path in value.files()]
        return [value for value in values if isinstance(value, Path)] + nested


def first_line(thing: Any) -> str:
    """Return the first line of a docstring, which says what a component does; "" if none."""
    return (inspect.getdoc(thing) or "").partition("\n")[0]


def did_you_mean(name: str, known: list[str]) -> str:
    """Return a hint to append to "no such ...": the nearest of the `known` names.

    If none is near, the hint lists all of them.
    """
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if near:
        return f" Did you mean '{near[0]}'?"
    return f" There is: {', '.join(sorted(known))}." if known else ""


class Registry(Generic[T]):
    """The components of one kind, by name.

    A component is a class with `Options` (its settings), `name` (set by the registry) and
    `version`. The version is raised when the same options come to give another result.
    """

    kinds: ClassVar[dict[str, Registry[Any]]] = {}
    """Key for `sslrun show` -> registry."""

    def __init__(self, kind: str, key: str | None = None) -> None:
        """Create an empty registry.

        `kind` names the components in messages. `key` is the argument of `sslrun show`; default:
        the kind.
        """
        self.kind = kind
        self._classes: dict[str, type[T]] = {}
        Registry.kinds[key or kind] = self

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Return a class decorator that registers the class under `name`.

        If the class is registered already, it keeps its name, and a subclass is registered under
        the second one.

        Raises:
            ValueError: The name is taken.
        """

        def decorate(cls: type[T]) -> type[T]:
            if name in self._classes:
                module = self._classes[name].__module__
                raise ValueError(
                    f"the {self.kind} '{name}' is defined already, in {module}; choose another name"
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
        """Iterate over the names in alphabetical order."""
        return iter(sorted(self._classes))

    def __len__(self) -> int:
        return len(self._classes)

    @property
    def in_order(self) -> list[str]:
        """The names in the order of registration."""
        return list(self._classes)
