"""Regularized least squares in closed form: classes from few examples, and numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from sslrun.metric import Metric
from sslrun.protocols.features import FeatureOptions
from sslrun.protocols.logistic import LinearFit, LogisticOptions, choose_strength


class FewshotOptions(FeatureOptions):
    """Linear classification by regularized least squares, from a few examples of each class.

    The few-shot accuracy of ViT (Dosovitskiy et al. 2021, section 4.1, arXiv:2010.11929), with the
    strength of the evaluator that its authors published (big_vision).
    """

    shots: tuple[Annotated[int, Field(ge=1)], ...] = Field((1, 5, 10, 25), min_length=1)
    """Labeled examples per class; replaces the task's `labels`. With the same seed, fewer shots are
    a subset of more."""
    l2: float = Field(1024.0, gt=0)
    """Strength of the L2 regularization, on features standardized one by one."""


def least_squares(x: Tensor, y: Tensor, classes: int, l2: float) -> nn.Linear:
    """Fit the linear map of features (N, D) to {-1, 1}^C, 1 at the class id (N,); see `ridge`."""
    return ridge(x, 2 * F.one_hot(y, classes).double() - 1, l2)


@torch.no_grad()
def ridge(x: Tensor, targets: Tensor, l2: float) -> nn.Linear:
    """Fit the linear map of features (N, D) to targets (N, C) that minimizes

        sum of squared errors + l2 ||W||^2        (the bias is not regularized)

    where W acts on the features minus their mean, each divided by its own deviation. Solved in
    float64 (on the CPU if the device has no float64), from the smaller of the D x D and the N x N
    product. Returns a head for unscaled features.

    Difference from big_vision: its bias is a feature of constant value 100 and thus almost
    unregularized. As in its code, 1e-5 is added to the deviation, so that a constant feature is
    ignored.
    """
    device, dtype = x.device, x.dtype
    if device.type == "mps":
        x, targets = x.cpu(), targets.cpu()
    x, targets = x.double(), targets.double()
    mean, deviation = x.mean(dim=0), x.std(dim=0, correction=0) + 1e-5
    z = (x - mean) / deviation
    offset = targets.mean(dim=0)
    wide = z.shape[1] > len(z)
    gram = z @ z.T if wide else z.T @ z
    gram.diagonal().add_(l2)
    factor = torch.linalg.cholesky(gram)
    weights = (
        z.T @ torch.cholesky_solve(targets, factor)
        if wide
        else torch.cholesky_solve(z.T @ targets, factor)
    )
    head = nn.Linear(x.shape[1], targets.shape[1], device=device, dtype=dtype)
    head.weight.copy_((weights / deviation[:, None]).T)
    head.bias.copy_(offset - (mean / deviation) @ weights)
    return head


class RidgeRegression:
    """Linear regression of numbers (N, t), in closed form, used as `LogisticRegression` is.

    Minimizes mean squared error / 2 + l2/2 ||W||^2 over features standardized one by one. Each
    column is fitted to the examples whose number is known. The number of classes is not read.
    """

    def __init__(self, options: LogisticOptions) -> None:
        self.options = options

    def fit(
        self,
        train: tuple[Tensor, Tensor],
        val: tuple[Tensor, Tensor],
        classes: int,
        score: Callable[[Tensor, Tensor], float],
        metric: Metric,
    ) -> LinearFit:
        """Fit the map with the best validation score (ties: the strongest regularization)."""
        heads = {l2: self.fit_one(train, classes, l2) for l2 in self.options.strengths()}
        with torch.no_grad():
            scores = {l2: score(head(val[0]), val[1]) for l2, head in heads.items()}
        best = choose_strength(scores, metric)
        return LinearFit(heads[best], best, scores)

    def fit_one(self, train: tuple[Tensor, Tensor], classes: int, l2: float) -> nn.Linear:
        """Fit the map of one strength to features (N, D) and numbers (N, t)."""
        x, y = train
        known = ~y.isnan()
        columns = [
            ridge(x[rows], y[rows, column : column + 1], l2 * int(rows.sum()))
            for column, rows in enumerate(known.T)
        ]
        head = nn.Linear(x.shape[1], y.shape[1], device=x.device, dtype=x.dtype)
        with torch.no_grad():
            head.weight.copy_(torch.cat([column.weight for column in columns]))
            head.bias.copy_(torch.cat([column.bias for column in columns]))
        return head
