"""Rank agreement: whether two tables order their rows alike."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MIN_ROWS = 3
"""The fewest rows whose ranks are compared: with two, agreement is as likely as a coin's head."""

EXACT_TIES = 8
"""The most rows for which the p-value is exact in the presence of ties: every order is
enumerated."""


@dataclass(frozen=True)
class Agreement:
    """Kendall's tau-b of the rows in one column, and its two-sided p-value if the two orders were unrelated."""

    tau: float
    """NaN if all rows of one side are equal."""
    p: float
    rows: int
    exact: bool


def agreement(ours: Sequence[float], published: Sequence[float]) -> Agreement | None:
    """Compute the rank agreement of two columns; None for fewer than three rows.

    Both must have the same direction: negate values for which lower is better. Kendall, Biometrika
    1938; with ties (tau-b), Biometrika 1945. Without ties, the exact null distribution is scipy's.
    With ties and up to eight rows, every order of one side is enumerated; beyond that, `exact` is
    False and p is the normal approximation's.
    """
    rows = len(ours)
    if rows < MIN_ROWS:
        return None
    from scipy.stats import kendalltau  # takes a second to import

    ties = len(set(ours)) < rows or len(set(published)) < rows
    if not ties:
        found = kendalltau(ours, published, method="exact")
        return Agreement(float(found.statistic), float(found.pvalue), rows, True)
    found = kendalltau(ours, published, method="asymptotic")
    if rows > EXACT_TIES or math.isnan(found.statistic):
        return Agreement(float(found.statistic), float(found.pvalue), rows, False)
    return Agreement(float(found.statistic), _permutation_p(ours, published), rows, True)


def _permutation_p(ours: Sequence[float], published: Sequence[float]) -> float:
    """The share of orders of one side that agree, or disagree, at least as much.

    Ties scale tau-b by a constant, so that counting concordant pairs is enough.
    """
    first, second = np.triu_indices(len(ours), 1)
    a, b = np.asarray(ours), np.asarray(published)
    orders = np.array(list(itertools.permutations(range(len(a)))))
    signs = np.sign(a[first] - a[second])
    concordance = np.sign(b[orders[:, first]] - b[orders[:, second]]) @ signs
    return float(np.mean(np.abs(concordance) >= abs(concordance[0])))
