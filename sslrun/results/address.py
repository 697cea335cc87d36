"""The address of a number in a table: its row and its column, as typed values.

`title` and `parts` are only for display. No code parses them, since a name may hold any character.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from sslrun.metric import MEAN_SHIFT, Metric

SEPARATOR = " · "
"""Separates the parts of a title."""


class MeanOverShifts(Enum):
    """The type of `MEAN`."""

    MEAN = MEAN_SHIFT


MEAN = MeanOverShifts.MEAN
"""The mean over a task's shifts, in place of a shift's name."""

UNKNOWN_METRIC = Metric("unknown", unit="")
"""The metric of cells that are planned but not computed."""

Shift = str | MeanOverShifts | None
"""A test set out of distribution, or the mean over them; None: the task's own test split."""


def join_titles(*titles: str) -> str:
    """Join titles for display; skip blank ones."""
    return SEPARATOR.join(filter(None, titles))


@dataclass(frozen=True)
class Row:
    """What was pretrained or measured, and the protocol of the evaluation."""

    name: str
    protocol: str = ""
    """Blank in tables without protocols; some measurements put another setting here."""

    @property
    def parts(self) -> tuple[str, ...]:
        """The nonblank parts of the title."""
        return tuple(filter(None, (self.name, self.protocol)))

    @property
    def title(self) -> str:
        """For display: "SimCLR · probe"."""
        return join_titles(*self.parts)


@dataclass(frozen=True)
class Labels:
    """The amount of labels that a task was learned from."""

    amount: float
    """A share of all labels, in (0, 1], or a number of labels per class."""
    per_class: bool = False

    @classmethod
    def of(cls, amount: float, per_class: bool = False) -> Labels:
        """Read a recipe's amount: a share, or per class if it is above 1 or `per_class` is set."""
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
    """What was measured: a task's metric for some labels, in or out of distribution.

    Measurements and costs have no labels; their metric names the column. The metric does not
    distinguish columns with labels, because a sweep plans its columns before it builds any task.
    """

    task: str = ""
    labels: Labels | None = None
    shift: Shift = None
    metric: Metric = UNKNOWN_METRIC

    @property
    def key(self) -> tuple[str, Labels | None, Shift, str]:
        """The values that distinguish columns."""
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
        """The parts of the title after the task: labels (or else the metric) and shift."""
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
        """Return the address as JSON values, one key per part; the metric by its name."""
        return {
            "task": self.task,
            "labels": None if self.labels is None else self.labels.amount,
            "per_class": None if self.labels is None else self.labels.per_class,
            "shift": self.shift.value if isinstance(self.shift, MeanOverShifts) else self.shift,
            "metric": self.metric.name,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], metric: Metric) -> Column:
        """Restore the column from the values of `as_dict`."""
        amount, shift = values["labels"], values["shift"]
        labels = None if amount is None else Labels(amount, values["per_class"])
        return cls(values["task"], labels, MEAN if shift == MEAN_SHIFT else shift, metric)


Place = tuple[Row, Column]
"""The row and column of a cell."""


def place_parts(place: Place) -> tuple[str, ...]:
    """List the nonblank names that lead to a cell, rows first: claims name cells by them."""
    row, column = place
    return (*row.parts, *filter(None, (column.task,)), *column.parts)


def place_title(place: Place) -> str:
    """For display: "SimCLR · probe · digits · 10 %"."""
    return join_titles(*place_parts(place))
