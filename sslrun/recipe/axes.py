"""Axes of a sweep: recipe keys and the values that they take, which make rows or a search."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Values = Annotated[tuple[Any, ...], Field(min_length=1, max_length=1000)]
"""The values that a key takes."""
Point = dict[str, Any]
"""Key of the recipe -> its value."""
DIGITS = 4
"""Significant digits of drawn numbers, so that the name of a row shows them whole."""
TRIES = 50
"""Draws for each point that is asked for, since small spaces repeat themselves."""


class Range(BaseModel):
    """Numbers between two ends, which are included: `{log: [0.0001, 0.1]}`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
    uniform: tuple[float, float] | None = None
    """Lower and upper end; every number between them is equally likely."""
    log: tuple[float, float] | None = None
    """Lower and upper end; every order of magnitude between them is equally likely."""
    integer: bool = False
    """Draw whole numbers only."""

    @model_validator(mode="after")
    def _check_ends(self) -> Range:
        if (self.uniform is None) == (self.log is None):
            raise ValueError("give either uniform: [low, high] or log: [low, high]")
        low, high = self.ends
        if not (low < high and math.isfinite(low) and math.isfinite(high)):
            raise ValueError(f"the ends should be finite and increase, not [{low:g}, {high:g}]")
        if self.log is not None and low <= 0:
            raise ValueError(f"the ends of log should be above 0, not {low:g}")
        if self.integer and (low != int(low) or high != int(high)):
            raise ValueError("with integer: true the ends should be whole numbers")
        return self

    @property
    def ends(self) -> tuple[float, float]:
        ends = self.uniform if self.log is None else self.log
        assert ends is not None
        return ends

    def draw(self, share: float) -> float | int:
        """Return the number at a share, in [0, 1), of the range."""
        low, high = self.ends
        if self.integer:  # each whole number has an interval of its own
            low, high = low - 0.5, high + 0.5
        if self.log is None:
            return self.round(low + share * (high - low))
        return self.round(math.exp(math.log(low) + share * math.log(high / low)))

    def round(self, number: float) -> float | int:
        """Round to a number of the range with few digits."""
        low, high = self.ends
        number = round(number) if self.integer else float(f"{number:.{DIGITS}g}")
        number = min(max(number, low), high)
        return int(number) if self.integer else number


Space = Annotated[dict[str, Range | Values], Field(min_length=1)]


class Random(BaseModel):
    """Rows at random points of a space, always the same ones."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
    draws: int = Field(ge=1, le=1000)
    """Number of points; fewer if the space does not have as many."""
    seed: int = Field(0, ge=0)
    """Seed of the draws. More draws keep the earlier ones, as do further keys."""
    space: Space
    """Key of the recipe -> a list of values, or a range: `{uniform: [low, high]}`, `{log: [low,
    high]}`, with `integer: true` for whole numbers."""

    def points(self) -> list[Point]:
        points: dict[str, Point] = {}
        for number in range(TRIES * self.draws):
            point = {
                key: _draw(values, random.Random(f"{self.seed} {key} {number}").random())
                for key, values in self.space.items()
            }
            points.setdefault(json.dumps(point), point)
            if len(points) == self.draws:
                break
        return list(points.values())


def _draw(values: Range | Values, share: float) -> Any:
    """Return the value at a share, in [0, 1)."""
    if isinstance(values, Range):
        return values.draw(share)
    return values[int(share * len(values))]


class Objective(BaseModel):
    """The cell whose validation score a search improves."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
    task: str
    """Entry of `evaluate`; its data need a validation split."""
    protocol: str
    """One of its protocols."""
    labels: float | None = None
    """One of its amounts of labels; default: the last."""


class Search(BaseModel):
    """A search for the best values in each row by Optuna's TPE (Bergstra et al., NeurIPS 2011).

    Trials are compared on validation data. Only the best trial of a row is tested, and its values
    become the row's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
    trials: int = Field(ge=1, le=1000)
    """Number of trials of each row. Raising it later continues the search."""
    objective: Objective
    """The cell that is compared: `{task: ..., protocol: ...}`, learned with the first seed."""
    space: Space
    """Key of the recipe -> a list of values, or a range, as in `random`."""
    seed: int = Field(0, ge=0)
    """Seed of the proposals."""
    prune: Literal["knn", "rankme"] | None = None
    """Stop pretraining early by asynchronous successive halving (Li et al., arXiv:1810.05934) of
    this number of the feature checks; knn needs labels, rankme does not. Of the trials at check 1,
    3, 9, ... the best third goes on. null: every trial is trained to its end."""


class Axes(BaseModel):
    """What makes rows in addition to those that are written."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
    grid: dict[str, Values] = {}
    """Key of the recipe -> its values; every combination is a row."""
    zip: dict[str, Values] = {}
    """Key of the recipe -> its values, as many for each key; the first values make a row, the
    second another."""
    random: Random | None = None
    """Rows at random points: `{draws: 8, space: {pretrain.lr: {log: [0.0001, 0.1]}}}`."""
    search: Search | None = None
    """The best values of each row, by trials that are compared on validation data: `{trials: 20,
    objective: {task: ..., protocol: ...}, space: {...}}`."""

    @field_validator("zip")
    @classmethod
    def _check_zip(cls, values: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
        if len({len(column) for column in values.values()}) > 1:
            counts = ", ".join(f"{key}: {len(column)}" for key, column in values.items())
            raise ValueError(f"every key should have as many values as the others ({counts})")
        return values

    def keys(self) -> dict[tuple[str, ...], str]:
        """Place in the sweep -> the key of the recipe that is varied there."""
        spaces: list[tuple[tuple[str, ...], Mapping[str, Any]]] = [
            (("grid",), self.grid),
            (("zip",), self.zip),
            (("random", "space"), self.random.space if self.random else {}),
            (("search", "space"), self.search.space if self.search else {}),
        ]
        return {(*place, key): key for place, space in spaces for key in space}

    def points(self) -> list[Point]:
        """List the points of all axes but the search: each is a row for each written one."""
        combined = itertools.product(*self.grid.values())
        grid = [dict(zip(self.grid, values, strict=True)) for values in combined]
        columns = zip(*self.zip.values(), strict=True)
        zipped = [dict(zip(self.zip, values, strict=True)) for values in columns] or [{}]
        drawn = self.random.points() if self.random else [{}]
        return [a | b | c for a, b, c in itertools.product(grid, zipped, drawn)]


def name_point(point: Point) -> str:
    """Name a point by the last parts of its keys: "lr=0.01, epochs=5"."""
    last = [key.rpartition(".")[2] for key in point]
    parts = []
    for key, short in zip(point, last, strict=True):
        name = short if last.count(short) == 1 else key
        parts.append(f"{name}={_name_value(point[key])}")
    return ", ".join(parts)


def _name_value(value: Any) -> str:
    if isinstance(value, dict) and "name" in value:
        return str(value["name"])
    return value if isinstance(value, str) else json.dumps(value)
