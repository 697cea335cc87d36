"""A claim's verdict from the numbers of each seed: supported, contradicted, or inconclusive, with the interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np

from sslrun.results.table import Column, Row, Table

Word = Literal["supported", "contradicted", "inconclusive"]

CONFIDENCE = 0.95
BOOTSTRAP_FROM = 10
"""Paired seeds from which on the interval is a bootstrap's."""
RESAMPLES = 10_000


@dataclass(frozen=True)
class Verdict:
    """What the seeds say of one inequality, a > b + margin."""

    word: Word
    seeds: int
    """Seeds that both sides have."""
    margin: float = 0.0
    difference: float | None = None
    """Mean over seeds of a - b."""
    interval: tuple[float, float] | None = None
    """95 %, of that mean."""
    method: str = ""
    reason: str = ""
    """Why there is no interval."""

    def text(self, number: str = ".2f") -> str:
        """`number`: how a difference is printed."""
        if self.interval is None or self.difference is None:
            return f"{self.word}: {self.reason}"
        beyond = f", margin {self.margin:g}" if self.margin else ""
        seeds = f"{self.seeds} seed" + ("s" if self.seeds > 1 else "")
        low, high = (f"{end:+{number}}" for end in self.interval)
        return f"{self.word}: {self.difference:+{number}} [{low}, {high}] over {seeds} ({self.method}{beyond})"


def judge(a: Mapping[str, float], b: Mapping[str, float], margin: float = 0.0) -> Verdict:
    """Whether a > b + margin, from values by seed, paired over the seeds that both have.

    `supported` where the 95 % interval of the mean difference lies above the margin, `contradicted` where it lies below,
    else `inconclusive`. The interval is over seeds:

    - Two to nine: Student's t of the paired differences. A percentile bootstrap of n values is too narrow, by
      sqrt((n - 1) / n) and by the normal's quantile in place of t's, so that on normal draws of three its 95 % are 75 %
      (Hesterberg, "What Teachers Should Know About the Bootstrap", American Statistician 2015). t costs the assumption that differences are about normal, and is wide: with two
      seeds the quantile is 12.7, so that only differences many times their spread are told.
    - Ten and more: percentile bootstrap, 10 000 resamples of the paired differences, from a seeded generator, its
      levels widened for n as Hesterberg does (the "expanded percentile" interval), so that n = 10 isn't cut off either.
    - One, or seeds that all give the very same difference (nothing random between them): none, and inconclusive.

    All that is about other seeds on these very test examples; what other examples would give is not in it.
    """
    seeds = sorted(a.keys() & b.keys())
    differences = np.array([a[seed] - b[seed] for seed in seeds], dtype=float)
    if not seeds:
        return Verdict("inconclusive", 0, margin, reason="no seed has both")
    if not np.isfinite(differences).all():
        lost = ", ".join(str(seed) for seed, value in zip(seeds, differences, strict=True) if not math.isfinite(value))
        return Verdict("inconclusive", len(seeds), margin, reason=f"not a number at seed {lost}")
    mean = float(differences.mean())
    if len(seeds) == 1 or np.ptp(differences) == 0:
        why = "one seed alone" if len(seeds) == 1 else "the seeds all give the same difference"
        return Verdict("inconclusive", len(seeds), margin, mean, reason=f"{why} ({mean:+.2f})")
    (below, above), method = _over_seeds(differences, np.random.default_rng(0))
    low, high = mean - below, mean + above
    word: Word = "supported" if low > margin else "contradicted" if high < margin else "inconclusive"
    return Verdict(word, len(seeds), margin, mean, (low, high), method)


def _over_seeds(differences: np.ndarray, generator: np.random.Generator) -> tuple[tuple[float, float], str]:
    """How far the interval reaches below and above the mean of differences (N,), and what it is."""
    from scipy.stats import t  # a second to import

    count = len(differences)
    quantile = float(t.ppf((1 + CONFIDENCE) / 2, count - 1))
    if count < BOOTSTRAP_FROM:
        reach = quantile * float(differences.std(ddof=1)) / math.sqrt(count)
        return (reach, reach), "t interval"
    tail = NormalDist().cdf(-quantile * math.sqrt(count / (count - 1)))
    means = differences[generator.integers(count, size=(RESAMPLES, count))].mean(axis=1)
    low, high = np.quantile(means, [tail, 1 - tail])
    # A skewed bootstrap can put an end beyond the mean, by a hair.
    return (max(0.0, differences.mean() - low), max(0.0, high - differences.mean())), "bootstrap"


# ---------------------------------------------------------------- claims


Place = tuple[Row, Column]
"""Where a cell stands."""


@dataclass(frozen=True)
class Gain:
    """By how much one cell is above another."""

    cell: Place
    over: Place


Term = Place | Gain | float
"""What an inequality compares: a cell, what a cell gains over another, or a bound."""


@dataclass(frozen=True)
class Inequality:
    """One term is greater than another by more than a margin."""

    greater: Term
    lesser: Term
    margin: float = 0.0

    @property
    def places(self) -> list[Place]:
        """The cells that it reads."""
        return [place for term in (self.greater, self.lesser) for place in _places(term)]

    def judge(self, table: Table) -> Verdict:
        """On the table's values by seed.

        Where a term is a bound and every seed has the same value, nothing is random, and the inequality holds or not.
        """
        absent = [place for place in self.places if place not in table.cells]
        if absent:
            return Verdict("inconclusive", 0, self.margin, reason=f"not computed: {'; '.join(map(named, absent))}")
        a, b = (_values(term, table) for term in (self.greater, self.lesser))
        bounded = isinstance(a, float) or isinstance(b, float)
        if isinstance(a, float):
            a = dict.fromkeys(b, a) if not isinstance(b, float) else {}
        if isinstance(b, float):
            b = dict.fromkeys(a, b)
        found = judge(a, b, self.margin)
        if bounded and found.interval is None and found.seeds > 1 and found.difference is not None:
            word: Word = "supported" if found.difference > self.margin else "contradicted"
            same = (found.difference, found.difference)
            return Verdict(word, found.seeds, self.margin, found.difference, same, "the same at every seed")
        return found

    def means(self, table: Table) -> tuple[float, float] | None:
        """Of both sides, over their own seeds; None where a cell is not computed."""
        if any(place not in table.cells for place in self.places):
            return None
        left, right = (_values(term, table) for term in (self.greater, self.lesser))
        return _mean(left), _mean(right)

    def text(self) -> str:
        margin = f" {'+' if self.margin > 0 else '-'} {abs(self.margin):g}" if self.margin else ""
        return f"{_text(self.greater)} > {_text(self.lesser)}{margin}"


def named(place: Place) -> str:
    """A cell by what stands before its row and above its column."""
    row, column = place
    return " · ".join(filter(None, [*row, *column]))


def _places(term: Term) -> list[Place]:
    return [] if isinstance(term, int | float) else [term.cell, term.over] if isinstance(term, Gain) else [term]


def _values(term: Term, table: Table) -> dict[str, float] | float:
    """By seed; of a bound the bound."""
    if isinstance(term, Gain):
        cell, over = table.cells[term.cell].values, table.cells[term.over].values
        return {seed: cell[seed] - over[seed] for seed in cell.keys() & over.keys()}
    return float(term) if isinstance(term, int | float) else table.cells[term].values


def _mean(values: dict[str, float] | float) -> float:
    return values if isinstance(values, float) else float(np.mean(list(values.values()) or [math.nan]))


def _text(term: Term) -> str:
    if isinstance(term, Gain):
        return f"({named(term.cell)} - {named(term.over)})"
    return f"{term:g}" if isinstance(term, int | float) else named(term)


def together(verdicts: Sequence[Verdict]) -> Word:
    """Of a claim of several inequalities: supported if all are, contradicted if any is, else inconclusive.

    That all hold needs no correction for their number (an intersection-union test: Berger, Technometrics 1982); that one
    fails does: of k inequalities that hold with nothing to spare, 0.025 k are contradicted by chance.
    """
    words = {each.word for each in verdicts}
    if "contradicted" in words:
        return "contradicted"
    return "supported" if words == {"supported"} else "inconclusive"
