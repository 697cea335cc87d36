"""Sources: every data set that a recipe can name, and how its splits are loaded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator

from sslrun.data.examples import Batch, Examples, ProgressCallback
from sslrun.data.specs import InputSpec
from sslrun.data.stores import HubStore, Split, find_local_folder
from sslrun.errors import UserError
from sslrun.hub import reach_hub
from sslrun.registry import Options, Registry


def _check_validation(amount: float | Literal["split"] | None) -> float | str | None:
    """Accept a share below 1, or a whole number; store a whole number as an int."""
    if amount is None or isinstance(amount, str):
        return amount
    if amount < 0 or (amount >= 1 and amount != int(amount)):
        raise ValueError("should be a share below 1, a whole number of examples, 0 or split")
    return int(amount) if amount == int(amount) else amount


Validation = Annotated[int | float | Literal["split"] | None, AfterValidator(_check_validation)]
"""What to validate on; see `SourceOptions.validation`."""


class SourceOptions(Options):
    """Options of every data set."""

    validation: Validation = None
    """Examples to validate on. A share below 1, or a number of examples: carved from the training
    split, balanced over classes, always the same ones. 0: none, so that all of the training split
    is learned from. split: the set's own validation split. Default: the set's own split if it has
    one, else 0.1."""
    pretrain_on: Literal["train", "all"] = "train"
    """Examples to pretrain on, always without labels. train: the training split without what is
    carved from it. all: also the validation split."""


class Source(ABC):
    """A data set that loads each of its splits on request."""

    Options: ClassVar[type[Options]] = SourceOptions
    name: ClassVar[str]
    version: ClassVar[int] = 1
    """Raise it when the same options come to mean other data."""
    gives: ClassVar[type[InputSpec]]
    """The class of the spec of its inputs."""
    shorthand: ClassVar[str | None] = None
    """The option that a recipe may give after a colon, as in `hub:OWNER/NAME`."""
    task: ClassVar[str] = "classification"
    """The task for its labels if a recipe names none."""
    suite: ClassVar[tuple[str, int] | None] = None
    """The benchmark that this set belongs to, and its number of sets: its score is their mean."""

    def __init__(self, options: Any, progress: ProgressCallback | None = None) -> None:
        self.options = options
        self.progress = progress

    @property
    @abstractmethod
    def splits(self) -> tuple[Split, ...]:
        """The splits of the set itself, always with `train`.

        `sslrun.data.splits` carves the missing ones.
        """

    @abstractmethod
    def load(self, split: Split) -> Examples:
        """Load one of `splits`.

        Raises:
            UserError: The split cannot be found or read; the message says what to do.
        """

    def check_available(self) -> None:
        """Check, without a download, that the set is available.

        Raises:
            UserError: The set is not on this machine and the hub cannot be reached.
        """
        splits = self.splits  # raises if a local folder or file is missing
        if isinstance(getattr(self, "store", None), HubStore) and not reach_hub():
            self.load(splits[0])  # succeeds if the set is in a cache

    @classmethod
    def found(cls, options: Any) -> Path | None:
        """Return the local copy that the set is read from although no option names it, if any."""
        return None if getattr(options, "path", None) else find_local_folder(cls.name)

    @classmethod
    def describe(cls) -> dict[str, str]:
        """Describe the set for `sslrun show data`: heading -> text."""
        return {}

    @classmethod
    def count(cls) -> int | None:
        """Return the approximate number of examples to pretrain on; None if not known yet."""
        return None

    @classmethod
    def default_task(cls, options: Any) -> str:
        """The task for the labels that the options choose, if a recipe names none."""
        return cls.task

    @classmethod
    def inherit_options(cls, data: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options that an evaluation on this set takes from the recipe's `data`.

        `data` holds the options of the recipe's data set, of the same kind; `options` those that
        the evaluation gives itself. The result overrides `options`, so it must respect them.
        """
        return {}

    @abstractmethod
    def sketch(self, count: int) -> tuple[InputSpec, Batch]:
        """Return the spec, as far as it is known without loading, and `count` random inputs.

        They serve to estimate costs.
        """


sources: Registry[Source] = Registry("data set", "data")


def explain_missing(
    name: str, options: Any, progress: ProgressCallback | None = None
) -> str | None:
    """Return why a data set is unavailable; None if it may be available.

    Nothing is downloaded to find out.
    """
    try:
        sources[name](options, progress).check_available()
    except UserError as error:
        return str(error)
    return None
