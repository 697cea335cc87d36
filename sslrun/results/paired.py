"""A verdict on a difference from paired values of each seed, with its interval."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Literal

import numpy as np

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


def half_width(differences: np.ndarray) -> float:
    """Half the width of Student's 95 % t interval of the mean of differences (N,), N > 1."""
    from scipy.special import stdtrit  # scipy.stats takes a second to import

    count = len(differences)
    quantile = float(stdtrit(count - 1, (1 + CONFIDENCE) / 2))
    return quantile * float(differences.std(ddof=1)) / math.sqrt(count)


def _interval(
    differences: np.ndarray, generator: np.random.Generator
) -> tuple[tuple[float, float], str]:
    """How far the interval reaches below and above the mean of differences (N,), and its method."""
    from scipy.special import stdtrit  # scipy.stats takes a second to import

    count = len(differences)
    quantile = float(stdtrit(count - 1, (1 + CONFIDENCE) / 2))
    if count < BOOTSTRAP_FROM:
        reach = half_width(differences)
        return (reach, reach), "t interval"
    tail = NormalDist().cdf(-quantile * math.sqrt(count / (count - 1)))
    means = differences[generator.integers(count, size=(RESAMPLES, count))].mean(axis=1)
    low, high = np.quantile(means, [tail, 1 - tail])
    # A skewed bootstrap can put an end beyond the mean, by a hair.
    return (max(0.0, differences.mean() - low), max(0.0, high - differences.mean())), "bootstrap"
