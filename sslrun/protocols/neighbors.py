"""Weighted nearest neighbors on frozen features (Wu et al., CVPR 2018, arXiv:1805.01978)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from sslrun.protocols.features import CHUNK
from sslrun.protocols.layers import LayerOptions


class KnnOptions(LayerOptions):
    """Weighted nearest neighbors on frozen features (Wu et al. 2018)."""

    k: int = Field(default=20, ge=1)
    """Number of neighbors that vote; 200 in Wu et al., 20 in DINO (Caron et al. 2021)."""
    temperature: float = Field(default=0.07, gt=0)
    """A neighbor of cosine similarity s votes with weight exp(s / temperature)."""


def weighted_knn(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, k: int, temperature: float, classes: int
) -> Tensor:
    """Score test features (M, D) by the votes of their `k` nearest training features (N, D).

    `train_y` (N,) are class ids. Returns (M, C): each class's share of the votes. If `k` is larger
    than N, all N neighbors vote.
    """
    scores = [
        weights.new_zeros(len(weights), classes).scatter_add_(1, train_y[indices], weights)
        for indices, weights in _neighbors(train_x, test_x, k, temperature)
    ]
    return torch.cat(scores)


def knn_regression(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, k: int, temperature: float
) -> Tensor:
    """Predict numbers (M, t) as weighted means over the neighbors, with the weights of the votes.

    `train_y` (N, t) are numbers. A neighbor whose number is NaN does not count; if none of the
    neighbors has one, the prediction is the mean of all.
    """
    means = train_y.nanmean(dim=0)
    predictions = []
    for indices, weights in _neighbors(train_x, test_x, k, temperature):
        values = train_y[indices]
        shares = weights[..., None] * ~values.isnan()
        total = shares.sum(dim=1)
        weighted = (shares * values.nan_to_num()).sum(dim=1) / total.clamp_min(1e-30)
        predictions.append(torch.where(total > 0, weighted, means))
    return torch.cat(predictions)


def _neighbors(
    train_x: Tensor, test_x: Tensor, k: int, temperature: float
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the nearest training examples (m, k) of parts of the test, and their weights."""
    bank = F.normalize(train_x, dim=1).T
    for queries in test_x.split(max(256, CHUNK // bank.shape[1])):
        similarity = F.normalize(queries, dim=1) @ bank
        nearest = similarity.topk(min(k, bank.shape[1]), dim=1)
        yield nearest.indices, (nearest.values / temperature).softmax(dim=1)
