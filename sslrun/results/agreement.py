"""Rank agreement: whether two tables order their rows in the same way."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MIN_ROWS = 3
"""Minimum number of rows to compare ranks: two rows agree by chance half of the time."""

EXACT_TIES = 8
"""Maximum number of rows for an exact p-value with ties, by enumeration of all orders."""


@dataclass(frozen=True)
class Agreement:
    """Kendall's tau-b of the rows in one column, with its two-sided p-value.

    The null hypothesis is that the two orders are unrelated.
    """

    tau: float
    """NaN if all values of one side are equal."""
    p: float
    rows: int
    exact: bool


def agreement(ours: Sequence[float], published: Sequence[float]) -> Agreement | None:
    """Compute the rank agreement of two columns; None for fewer than three rows.

    Both columns must have the same direction: negate values if lower is better. Sources: Kendall,
    Biometrika 1938; with ties (tau-b), Biometrika 1945. Without ties, scipy gives the exact
    p-value. With ties and up to eight rows, all orders of one side are enumerated; with more rows,
    `exact` is False and p comes from the normal approximation.
    """
    rows = len(ours)
    if rows < MIN_ROWS:
        return None
    from scipy.stats import kendalltau  # takes a second to import

    ties = len(set(ours)) < rows or len(set(published)) < rows
    if not ties:
        exact = kendalltau(ours, published, method="exact")
        return Agreement(float(exact.statistic), float(exact.pvalue), rows, True)
    approximate = kendalltau(ours, published, method="asymptotic")
    tau = float(approximate.statistic)
    if rows > EXACT_TIES or math.isnan(tau):
        return Agreement(tau, float(approximate.pvalue), rows, False)
    return Agreement(tau, _permutation_p(ours, published), rows, True)


def _permutation_p(ours: Sequence[float], published: Sequence[float]) -> float:
    """Compute the share of orders of one side whose |tau-b| is at least as large.

    Ties scale tau-b by a constant, so that it is enough to count concordant pairs.

    Shapes for n rows: first, second (n (n - 1) / 2,), orders (n!, n), concordance (n!,).
    """
    first, second = np.triu_indices(len(ours), 1)
    a, b = np.asarray(ours), np.asarray(published)
    orders = np.array(list(itertools.permutations(range(len(a)))))
    signs = np.sign(a[first] - a[second])
    concordance = np.sign(b[orders[:, first]] - b[orders[:, second]]) @ signs
    return float(np.mean(np.abs(concordance) >= abs(concordance[0])))
