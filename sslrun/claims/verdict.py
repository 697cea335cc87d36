"""The inequalities of a claim, judged from the values of each seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from sslrun.results.address import Place, place_title
from sslrun.results.paired import Verdict, Word, judge, judge_restarts
from sslrun.results.table import Cell, Table


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
