"""Multinomial logistic regression on frozen features, for many L2 strengths at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import log10
from typing import NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from sslrun.metric import Metric
from sslrun.protocols.features import CHUNK, FeatureOptions
from sslrun.tasks.metrics import accuracy

ACCURACY = Metric("accuracy")


class LogisticOptions(FeatureOptions):
    """L2-regularized multinomial logistic regression, with the strength chosen on validation.

    Minimizes mean cross-entropy + l2/2 ||W||^2 over features standardized by one mean and one
    deviation (Kumar et al., ICLR 2022, arXiv:2202.10054; their C is 1 / (l2 N)).
    """

    l2_min: float = Field(default=1e-6, gt=0)
    """Weakest L2 regularization to try."""
    l2_max: float = Field(default=10.0, gt=0)
    """Strongest L2 regularization to try."""
    l2_count: int = Field(default=15, ge=1)
    """Number of strengths to try, log-spaced; 45 in SimCLR's transfer (Chen et al. 2020), about 50
    in Kumar et al."""
    iterations: int = Field(default=200, ge=1)
    """Largest number of L-BFGS iterations."""
    tolerance: float = Field(default=1e-5, gt=0)
    """Stop when no element of the gradient is larger than this."""

    def strengths(self) -> list[float]:
        """List the L2 strengths to try, ascending."""
        ends = log10(self.l2_min), log10(self.l2_max)
        exponents = torch.linspace(*ends, self.l2_count, dtype=torch.float64)
        return [10**exponent for exponent in exponents.tolist()]

    @model_validator(mode="after")
    def _ordered(self) -> LogisticOptions:
        if self.l2_min > self.l2_max:
            raise ValueError(f"l2_min ({self.l2_min:g}) is above l2_max ({self.l2_max:g})")
        return self


class LinearFit(NamedTuple):
    """A linear map of unscaled features, and how it was chosen."""

    head: nn.Linear
    """Maps features (N, D) to scores (N, C)."""
    l2: float
    """The chosen strength."""
    scores: dict[float, float]
    """Strength -> validation score, in ascending order of strength."""


def choose_strength(scores: dict[float, float], metric: Metric) -> float:
    """The strength with the best score (ties: the last one)."""
    best, *others = scores
    for strength in others:
        if metric.is_as_good(scores[strength], scores[best]):
            best = strength
    return best


class LogisticRegression:
    """Logistic regression for all L2 strengths at once, on the features' device."""

    def __init__(self, options: LogisticOptions | None = None) -> None:
        self.options = options or LogisticOptions()

    def fit(
        self,
        train: tuple[Tensor, Tensor],
        val: tuple[Tensor, Tensor],
        classes: int,
        score: Callable[[Tensor, Tensor], float] = accuracy,
        metric: Metric = ACCURACY,
    ) -> LinearFit:
        """Fit the classifier with the best validation score (ties: the strongest regularization).

        `train` and `val` are features (N, D) and class ids (N,). `score` takes scores (N, C) and
        class ids; `metric` gives the better direction.
        """
        strengths = self.options.strengths()
        weights, biases = logistic(
            *train, classes, strengths, self.options.iterations, self.options.tolerance
        )
        val_x, val_y = val
        scores = [
            score(torch.addmm(bias, val_x, weight.T), val_y)
            for weight, bias in zip(weights, biases, strict=True)
        ]
        by_strength = dict(zip(strengths, scores, strict=True))
        best = choose_strength(by_strength, metric)
        index = strengths.index(best)
        return LinearFit(_as_head(weights[index], biases[index]), best, by_strength)

    def fit_one(self, train: tuple[Tensor, Tensor], classes: int, l2: float) -> nn.Linear:
        """Fit the classifier of one strength to features (N, D) and class ids (N,)."""
        options = self.options
        weights, biases = logistic(*train, classes, [l2], options.iterations, options.tolerance)
        return _as_head(weights[0], biases[0])


@torch.no_grad()
def _as_head(weight: Tensor, bias: Tensor) -> nn.Linear:
    """Make a linear layer of a weight (C, D) and a bias (C,)."""
    head = nn.Linear(weight.shape[1], len(weight), device=weight.device, dtype=weight.dtype)
    head.weight.copy_(weight)
    head.bias.copy_(bias)
    return head


@torch.no_grad()
def logistic(
    x: Tensor,
    y: Tensor,
    classes: int,
    l2: list[float],
    iterations: int = 200,
    tolerance: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Compute the weights (L, C, D) and biases (L, C) that minimize each of L objectives

        mean cross-entropy + l2/2 ||W||^2        (the bias is not regularized)

    where W acts on the features (N, D) minus their mean, divided by one deviation over all
    features. The returned weights act on unscaled features. The problem is solved in the principal
    components of the features: there the Hessian at W = 0 is diagonal for every l2, and L-BFGS
    starts from it.

    Shapes: P = C (D + 1) parameters of one problem; M of the L problems are still unsolved.
    """
    with _full_precision():
        mean, deviation = x.mean(dim=0), x.std()
        deviation = torch.where(deviation > 0, deviation, 1.0)
        centered = (x - mean) / deviation
        variances, axes = torch.linalg.eigh(centered.T @ centered / len(x))
        # Features are centered, and the last column of ones is the bias, which is not regularized.
        z = torch.cat([centered @ axes, x.new_ones(len(x), 1)], dim=1)
        variances = torch.cat([variances.clamp_min(0), x.new_ones(1)])
        penalty = x.new_tensor(l2)[:, None].repeat(1, z.shape[1])
        penalty[:, -1] = 0
        curvature = (variances / classes + penalty).repeat(1, classes)
        solution = _lbfgs(
            _Objective(z, y, classes, penalty),
            torch.zeros_like(curvature),
            1 / curvature,
            iterations,
            tolerance,
        )
        solved = solution.view(len(l2), classes, -1)
        weights = solved[..., :-1] @ axes.T / deviation
        return weights, solved[..., -1] - weights @ mean


@dataclass(frozen=True)
class _Objective:
    """The L regularized losses and their gradients."""

    z: Tensor
    """Features (N, D + 1); the last column is 1."""
    y: Tensor
    """Class ids (N,)."""
    classes: int
    penalty: Tensor
    """L2 strength (L, D + 1) of each weight; 0 for the bias."""

    def __call__(self, flat: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        """Compute losses (M,) and gradients (M, P) of the problems `which` (M,) at `flat` (M, P).

        Rows of features are processed in chunks of n. Shapes: weights (M, C, D + 1), log_p and
        error (n, M, C), index (n, M, 1).
        """
        count, total = len(which), len(self.z)
        weights = flat.view(count, self.classes, -1)
        shrink = weights * self.penalty[which, None]
        loss, gradient = (shrink * weights).sum(dim=(1, 2)) / 2, shrink
        rows = max(256, CHUNK // (count * self.classes))
        for part, labels in zip(self.z.split(rows), self.y.split(rows), strict=True):
            logits = (part @ weights.flatten(0, 1).T).view(len(part), count, self.classes)
            log_p = logits.log_softmax(dim=2)
            index = labels[:, None, None].expand(-1, count, 1)
            loss -= log_p.gather(2, index).sum(dim=(0, 2)) / total
            minus_one = log_p.new_full((1, 1, 1), -1.0).expand_as(index)
            error = log_p.exp_().scatter_add_(2, index, minus_one)
            gradient += (error.flatten(1).T @ part).view_as(weights) / total
        return loss, gradient.flatten(1)


_Values = tuple[Tensor, Tensor]
"""Values (M,) and gradients (M, P)."""
Objective = Callable[[Tensor, Tensor], _Values]
"""(points (M, P), which (M,)) -> values (M,) and gradients (M, P) of the functions `which`."""


def _lbfgs(
    objective: Objective,
    start: Tensor,
    inverse: Tensor,
    iterations: int,
    tolerance: float,
    memory: int = 10,
) -> Tensor:
    """Find the minima (L, P) of L smooth convex functions by L-BFGS (Liu & Nocedal 1989).

    `inverse` (L, P) is the diagonal of the first inverse Hessian. A function is solved when no
    element of its gradient is above `tolerance`, or when rounding hides any further decrease.
    Solved functions are dropped from all tensors; `which` (M,) holds the indices of the others.
    """
    eps = torch.finfo(start.dtype).eps
    minima = start.clone()
    which = torch.arange(len(start), device=start.device)
    point, pairs = start, deque[tuple[Tensor, Tensor, Tensor]](maxlen=memory)
    value, gradient = objective(point, which)
    decrease = torch.full_like(value, torch.inf)
    for _ in range(iterations):
        unsolved = (gradient.abs().amax(dim=1) > tolerance) & (decrease > eps * value.abs())
        if not unsolved.all():
            minima[which] = point
            if not unsolved.any():
                return minima
            which, point, value, gradient, inverse = (
                t[unsolved] for t in (which, point, value, gradient, inverse)
            )
            pairs = deque(
                [(s[unsolved], c[unsolved], w[unsolved]) for s, c, w in pairs], maxlen=memory
            )
        direction = _two_loops(gradient, pairs, inverse)
        slope = (direction * gradient).sum(dim=1)

        def evaluate(step: Tensor, point: Tensor = point, which: Tensor = which) -> _Values:
            return objective(point + step, which)

        step, next_value, next_gradient = _line_search(evaluate, direction, value, slope)
        change = next_gradient - gradient
        agreement = (step * change).sum(dim=1)
        # A pair whose curvature is lost in rounding gets weight 0.
        weight = torch.where(agreement > eps * (change * change).sum(dim=1), 1 / agreement, 0.0)
        pairs.append((step, change, weight))
        decrease = value - next_value
        # If no point along the direction is lower, the function is solved and its point stays.
        point = torch.where(decrease[:, None] > 0, point + step, point)
        value, gradient = next_value, next_gradient
    minima[which] = point
    return minima


def _line_search(
    evaluate: Callable[[Tensor], _Values], direction: Tensor, value: Tensor, slope: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Halve the step (M, P) along `direction` of each function until the Armijo condition holds.

    `evaluate` takes a step and returns values (M,) and gradients (M, P); `value` and `slope` (M,)
    belong to the start. Returns the step with its values and gradients; stops after 20 steps.
    """
    eps = torch.finfo(value.dtype).eps
    length = torch.ones_like(value)
    for _ in range(20):
        step = length[:, None] * direction
        next_value, next_gradient = evaluate(step)
        long = next_value > value + 1e-4 * length * slope + eps * value.abs()
        if not long.any():
            break
        length = torch.where(long, length / 2, length)
    return step, next_value, next_gradient


def _two_loops(
    gradient: Tensor, pairs: deque[tuple[Tensor, Tensor, Tensor]], inverse: Tensor
) -> Tensor:
    """Compute the quasi-Newton direction (M, P) from pairs (step, change of gradient, weight)."""
    direction = -gradient
    shares = []
    for step, change, weight in reversed(pairs):
        share = weight * (step * direction).sum(dim=1)
        direction = direction - share[:, None] * change
        shares.append(share)
    direction = direction * inverse
    for (step, change, weight), share in zip(pairs, reversed(shares), strict=True):
        direction = direction + (share - weight * (change * direction).sum(dim=1))[:, None] * step
    return direction


@contextmanager
def _full_precision() -> Iterator[None]:
    """Multiply float32 matrices in float32: TF32 would stop the line search early."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
