"""Sources: every data set that a recipe can name, and how its splits are loaded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from sslrun.data.examples import Batch, Examples
from sslrun.data.specs import InputSpec
from sslrun.data.stores import HubStore, Split
from sslrun.errors import UserError
from sslrun.hub import hub_or_offline
from sslrun.registry import Options, Registry

Progress = Callable[[str, int, int], None]
"""(name of what is read, how much is done, how much there is; 0: unknown) -> None."""


class Source(ABC):
    """A data set: it knows its splits, and loads each when asked."""

    Options: ClassVar[type[Options]] = Options
    name: ClassVar[str]
    version: ClassVar[int] = 1
    """Raised when the same options come to mean other data."""
    gives: ClassVar[type[InputSpec]]
    """The class of its inputs' spec."""
    shorthand: ClassVar[str | None] = None
    """The option that a recipe may give behind a colon, as in `hub:OWNER/NAME`."""
    task: ClassVar[str] = "classification"
    """The task that its labels are for, where a recipe names none."""
    suite: ClassVar[tuple[str, int] | None] = None
    """The benchmark whose score is the mean over so many sets, of which this is one."""

    def __init__(self, options: Any, progress: Progress | None = None) -> None:
        self.options = options
        self.progress = progress

    @property
    @abstractmethod
    def splits(self) -> tuple[Split, ...]:
        """Those that the set itself has: always `train`. `sslrun.data.splits` carves what it lacks."""

    @abstractmethod
    def load(self, split: Split) -> Examples:
        """One of `splits`. UserError: it can't be found or read, each with what to do."""

    def find(self) -> None:
        """UserError: it can be told at once, without asking the hub for it, that the set can't be had."""
        splits = self.splits  # of a folder or a file that isn't there there are none
        if isinstance(getattr(self, "store", None), HubStore) and not hub_or_offline():
            self.load(splits[0])  # from what is kept of it here

    @classmethod
    def describe(cls) -> dict[str, str]:
        """What a user may want to know before naming it."""
        return {}

    @classmethod
    def count(cls) -> int | None:
        """Examples there are to pretrain on, about; None where only loading would tell."""
        return None

    @classmethod
    def shared_with(cls, data: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """Options that an evaluation on such a set takes from the recipe's `data` (of the same kind), where those
        `given` leave them open; they stand in place of those."""
        return {}

    @abstractmethod
    def sketch(self, count: int) -> tuple[InputSpec, Batch]:
        """The set's inputs as far as can be told without loading it, and so many random ones: to estimate costs."""


sources: Registry[Source] = Registry("data set", "data")


def lacking(name: str, options: Any, progress: Progress | None = None) -> str | None:
    """Why a data set can't be had, where that can be told at once; else None."""
    try:
        sources[name](options, progress).find()
    except UserError as error:
        return str(error)
    return None
