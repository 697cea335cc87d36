"""A claim's verdict from the values of each seed, with its interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Literal

import numpy as np

from sslrun.results.address import Place, place_title
from sslrun.results.table import Cell, Table

Word = Literal["supported", "contradicted", "inconclusive"]

CONFIDENCE = 0.95
BOOTSTRAP_FROM = 10
"""The fewest paired seeds for which the interval is a bootstrap's."""
RESAMPLES = 10_000


@dataclass(frozen=True)
class Verdict:
    """What the seeds say about one inequality, a > b + margin."""

    word: Word
    seeds: int
    """Number of independent seeds that both sides have."""
    margin: float = 0.0
    difference: float | None = None
    """Mean over seeds of a - b."""
    interval: tuple[float, float] | None = None
    """95 % interval of that mean."""
    method: str = ""
    reason: str = ""
    """Why there is no interval."""
    restarts: int = 0
    """Number of restarts that the interval is over, where all rest on one pretraining; else 0."""

    def text(self, format_spec: str = ".2f") -> str:
        """For display; `format_spec` formats a difference."""
        if self.interval is None or self.difference is None:
            return f"{self.word}: {self.reason}"
        beyond = f", margin {self.margin:g}" if self.margin else ""
        seeds = f"{self.seeds} seed" + ("s" if self.seeds > 1 else "")
        over = f"{self.restarts} restarts of one pretraining" if self.restarts else seeds
        low, high = (f"{end:+{format_spec}}" for end in self.interval)
        difference = f"{self.difference:+{format_spec}} [{low}, {high}]"
        return f"{self.word}: {difference} over {over} ({self.method}{beyond})"


def judge(a: Mapping[str, float], b: Mapping[str, float], margin: float = 0.0) -> Verdict:
    """Judge whether a > b + margin from independent values by seed, paired over the seeds of both.

    `supported` if the 95 % interval of the mean difference lies above the margin, `contradicted` if
    it lies below, otherwise `inconclusive`. The interval is over seeds:

    - Two to nine seeds: Student's t of the paired differences. A percentile bootstrap of n values
      is too narrow, by sqrt((n - 1) / n) and by the normal quantile in place of t's: on normal
      draws of three seeds its 95 % are 75 % (Hesterberg, "What Teachers Should Know About the
      Bootstrap", American Statistician 2015). The t interval assumes that differences are about
      normal, and it is wide: with two seeds the quantile is 12.7, so that only differences many
      times their spread are found.
    - Ten seeds or more: percentile bootstrap, 10 000 resamples of the paired differences from a
      seeded generator, with levels widened for n as Hesterberg does (the "expanded percentile"
      interval), so that n = 10 is not too narrow.
    - One seed, or seeds that all give exactly the same difference (nothing random between them): no
      interval, and inconclusive.

    Restarts of one pretraining are not independent: average them first (`Cell.by_pretraining`).
    All of this is about other seeds on the same test examples; what other examples would give is
    not covered.
    """
    seeds = sorted(a.keys() & b.keys())
    differences = np.array([a[seed] - b[seed] for seed in seeds], dtype=float)
    if not seeds:
        return Verdict("inconclusive", 0, margin, reason="no seed has both")
    if not np.isfinite(differences).all():
        pairs = zip(seeds, differences, strict=True)
        lost = ", ".join(str(seed) for seed, value in pairs if not math.isfinite(value))
        return Verdict("inconclusive", len(seeds), margin, reason=f"not a number at seed {lost}")
    mean = float(differences.mean())
    if len(seeds) == 1 or np.ptp(differences) == 0:
        why = "one seed alone" if len(seeds) == 1 else "the seeds all give the same difference"
        return Verdict("inconclusive", len(seeds), margin, mean, reason=f"{why} ({mean:+.2f})")
    (below, above), method = _interval(differences, np.random.default_rng(0))
    low, high = mean - below, mean + above
    word: Word = (
        "supported" if low > margin else "contradicted" if high < margin else "inconclusive"
    )
    return Verdict(word, len(seeds), margin, mean, (low, high), method)


def judge_restarts(a: Mapping[str, float], b: Mapping[str, float], margin: float = 0.0) -> Verdict:
    """Describe the difference over restarts that rest on one pretraining, paired by restart.

    The interval covers other restarts of these weights. What another pretraining would give is
    unknown, so that the verdict is always `inconclusive`.
    """
    verdict = judge(a, b, margin)
    if verdict.interval is None:
        return verdict
    return replace(verdict, word="inconclusive", seeds=1, restarts=verdict.seeds)


def _interval(
    differences: np.ndarray, generator: np.random.Generator
) -> tuple[tuple[float, float], str]:
    """How far the interval reaches below and above the mean of differences (N,), and its method."""
    from scipy.stats import t  # takes a second to import

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


# ---------------------------------------------------------------- inequalities


@dataclass(frozen=True)
class Gain:
    """The difference of a cell over another; in an inequality `by_metric`, the improvement."""

    cell: Place
    over: Place


Term = Place | Gain | float
"""What an inequality compares: a cell, the gain of a cell over another, or a number."""

Reader = Callable[[Cell], dict[str, float]]
"""The values of a cell to compare: averaged by pretraining, or those of every restart."""


@dataclass(frozen=True)
class Inequality:
    """One term exceeds another by more than a margin, as a number or by the metric's direction."""

    greater: Term
    lesser: Term
    margin: float = 0.0
    by_metric: bool = False
    """Compare by the metric's direction: for errors, the lower one is better and comes first."""

    @property
    def places(self) -> list[Place]:
        """The cells that it reads."""
        return [place for term in (self.greater, self.lesser) for place in _places(term)]

    def judge(self, table: Table) -> Verdict:
        """Judge by the table's values, over independent pretrainings.

        Restarts of a pretraining are averaged. If all values of a cell rest on one pretraining, the
        interval is over its restarts and the verdict `inconclusive`. If one term is a number and
        every seed has the same value, nothing is random: the inequality holds or not.
        """
        missing = [place for place in self.places if place not in table.cells]
        if missing:
            names = "; ".join(map(place_title, missing))
            return Verdict("inconclusive", 0, self.margin, reason=f"not computed: {names}")
        shared = any(_rests_on_one_pretraining(table.cells[place]) for place in self.places)
        read = _by_restart if shared else Cell.by_pretraining
        a, b = (self._directed(term, table, read) for term in (self.greater, self.lesser))
        bounded = isinstance(a, float) or isinstance(b, float)
        if isinstance(a, float):
            a = dict.fromkeys(b, a) if not isinstance(b, float) else {}
        if isinstance(b, float):
            b = dict.fromkeys(a, b)
        verdict = (judge_restarts if shared else judge)(a, b, self.margin)
        if bounded and not shared and verdict.interval is None:
            return _judge_constant(verdict)
        return verdict

    def _directed(self, term: Term, table: Table, read: Reader) -> dict[str, float] | float:
        """A term's values by seed (a number: itself), negated if better means lower.

        A number beside a gain is an improvement already.
        """
        values = _values(term, table, read)
        metric = table.metric_of(self.places[0][1])
        gains = isinstance(self.greater, Gain) or isinstance(self.lesser, Gain)
        if not self.by_metric or metric.better == "higher" or (isinstance(values, float) and gains):
            return values
        if isinstance(values, float):
            return -values
        return {seed: -value for seed, value in values.items()}

    def means(self, table: Table) -> tuple[float, float] | None:
        """The mean of each side over its own seeds, as numbers; None if a cell is not computed."""
        if any(place not in table.cells for place in self.places):
            return None
        left, right = (_values(term, table, _by_restart) for term in (self.greater, self.lesser))
        return _mean(left), _mean(right)

    def text(self) -> str:
        """For display: "a > b + 1", or "a is better than b by 1"."""
        if self.by_metric:
            margin = f" by {self.margin:g}" if self.margin else ""
            return f"{_text(self.greater)} is better than {_text(self.lesser)}{margin}"
        margin = f" {'+' if self.margin > 0 else '-'} {abs(self.margin):g}" if self.margin else ""
        return f"{_text(self.greater)} > {_text(self.lesser)}{margin}"


def _judge_constant(verdict: Verdict) -> Verdict:
    """Decide an inequality with a number if every seed gives the same: nothing is random."""
    if verdict.seeds < 2 or verdict.difference is None:
        return verdict
    return replace(
        verdict,
        word="supported" if verdict.difference > verdict.margin else "contradicted",
        interval=(verdict.difference, verdict.difference),
        method="the same at every seed",
        reason="",
    )


def _rests_on_one_pretraining(cell: Cell) -> bool:
    return len(cell.values) > 1 and len(cell.by_pretraining()) == 1


def _places(term: Term) -> list[Place]:
    if isinstance(term, Gain):
        return [term.cell, term.over]
    return [] if isinstance(term, int | float) else [term]


def _by_restart(cell: Cell) -> dict[str, float]:
    return cell.values


def _values(term: Term, table: Table, read: Reader) -> dict[str, float] | float:
    """Values by seed; a number is itself."""
    if isinstance(term, Gain):
        cell, over = read(table.cells[term.cell]), read(table.cells[term.over])
        return {seed: cell[seed] - over[seed] for seed in cell.keys() & over.keys()}
    return float(term) if isinstance(term, int | float) else read(table.cells[term])


def _mean(values: dict[str, float] | float) -> float:
    return (
        values if isinstance(values, float) else float(np.mean(list(values.values()) or [math.nan]))
    )


def _text(term: Term) -> str:
    if isinstance(term, Gain):
        return f"({place_title(term.cell)} - {place_title(term.over)})"
    return f"{term:g}" if isinstance(term, int | float) else place_title(term)


def combine(verdicts: Sequence[Verdict]) -> Word:
    """Combine the verdicts on a claim's inequalities.

    Supported if all are, contradicted if any is, else inconclusive. Supporting all needs no
    correction for their number (an intersection-union test: Berger, Technometrics 1982).
    Contradicting one does: of k inequalities that hold with nothing to spare, 0.025 k are
    contradicted by chance.
    """
    words = {verdict.word for verdict in verdicts}
    if "contradicted" in words:
        return "contradicted"
    return "supported" if words == {"supported"} else "inconclusive"
