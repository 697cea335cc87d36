"""Weighted nearest neighbors on frozen features (Wu et al., CVPR 2018, arXiv:1805.01978)."""

from __future__ import annotations

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
    bank = F.normalize(train_x, dim=1).T
    scores = test_x.new_zeros(len(test_x), classes)
    rows = max(256, CHUNK // bank.shape[1])
    for queries, votes in zip(test_x.split(rows), scores.split(rows), strict=True):
        similarity = F.normalize(queries, dim=1) @ bank
        nearest = similarity.topk(min(k, bank.shape[1]), dim=1)
        weights = (nearest.values / temperature).softmax(dim=1)
        votes.scatter_add_(1, train_y[nearest.indices], weights)
    return scores
