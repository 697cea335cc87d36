"""Where a number stands in a table: its row and its column, as typed values.

`title` and `parts` are for people. Nothing reads an address back from them: a name may hold any
character.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from sslrun.data.shifts import MEAN_SHIFT
from sslrun.metric import Metric

SEPARATOR = " · "
"""Between the parts of a title."""


class MeanOverShifts(Enum):
    """The type of `MEAN`."""

    MEAN = MEAN_SHIFT


MEAN = MeanOverShifts.MEAN
"""The mean over a task's shifts, in place of a shift's name."""

UNKNOWN_METRIC = Metric("unknown", unit="")
"""The metric of cells that are planned and not computed."""

Shift = str | MeanOverShifts | None
"""A test set out of distribution, or the mean over them; None: the task's own test split."""


def join_titles(*titles: str) -> str:
    """Join titles for display; blank ones are left out."""
    return SEPARATOR.join(filter(None, titles))


@dataclass(frozen=True)
class Row:
    """What was pretrained or measured, and the protocol it was evaluated with."""

    name: str
    protocol: str = ""
    """Blank in tables that have none; some measurements put another kind of setting here."""

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the title that are not blank."""
        return tuple(filter(None, (self.name, self.protocol)))

    @property
    def title(self) -> str:
        """For display: "SimCLR · probe"."""
        return join_titles(*self.parts)


@dataclass(frozen=True)
class Labels:
    """How many labels were learned from."""

    amount: float
    """A share of all labels, in (0, 1], or a number of labels per class."""
    per_class: bool = False

    @classmethod
    def of(cls, amount: float, per_class: bool = False) -> Labels:
        """Labels as a recipe writes them: a share, or a whole number above 1 per class; always per class if `per_class`."""
        return cls(amount, per_class or amount > 1)

    @property
    def order(self) -> tuple[bool, float]:
        """Sort key: shares before numbers per class, few labels before many."""
        return self.per_class, self.amount

    @property
    def title(self) -> str:
        """For display: "10 %" or "5 a class"."""
        return f"{self.amount:g} a class" if self.per_class else f"{100 * self.amount:g} %"


@dataclass(frozen=True, eq=False)
class Column:
    """What was measured: a task's metric, learned from some labels, tested in or out of distribution.

    Measurements and costs have no labels, and their metric names the column. Columns with labels
    are equal whatever their metric: the plan of a sweep names its columns before any task is built.
    """

    task: str = ""
    labels: Labels | None = None
    shift: Shift = None
    metric: Metric = UNKNOWN_METRIC

    @property
    def key(self) -> tuple[str, Labels | None, Shift, str]:
        """What tells columns apart."""
        return self.task, self.labels, self.shift, self.metric.name if self.labels is None else ""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Column) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    @property
    def shift_title(self) -> str:
        """For display: the shift's name; blank in distribution."""
        return self.shift.value if isinstance(self.shift, MeanOverShifts) else self.shift or ""

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the title after the task: labels and shift, or the metric where there are no labels."""
        first = self.metric.name if self.labels is None else self.labels.title
        return tuple(filter(None, (first, self.shift_title)))

    @property
    def label(self) -> str:
        """For display, without the task: "10 % · fog"."""
        return join_titles(*self.parts)

    @property
    def title(self) -> str:
        """For display, with the task: "digits 10 % · fog"."""
        return " ".join(filter(None, (self.task, self.label)))

    def as_dict(self) -> dict[str, Any]:
        """The address as JSON values, each part under a key of its own; the metric by its name."""
        return {
            "task": self.task,
            "labels": None if self.labels is None else self.labels.amount,
            "per_class": None if self.labels is None else self.labels.per_class,
            "shift": self.shift.value if isinstance(self.shift, MeanOverShifts) else self.shift,
            "metric": self.metric.name,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], metric: Metric) -> Column:
        """The column that `as_dict` described."""
        amount, shift = values["labels"], values["shift"]
        labels = None if amount is None else Labels(amount, values["per_class"])
        return cls(values["task"], labels, MEAN if shift == MEAN_SHIFT else shift, metric)


Place = tuple[Row, Column]
"""The place of a cell."""


def place_parts(place: Place) -> tuple[str, ...]:
    """The names that lead to a cell, left to right and then downwards, without blank ones: how claims name it."""
    row, column = place
    return (*row.parts, *filter(None, (column.task,)), *column.parts)


def place_title(place: Place) -> str:
    """For display: "SimCLR · probe · digits · 10 %"."""
    return join_titles(*place_parts(place))
