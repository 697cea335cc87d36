"""Detect collapsed representations from features alone, without labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

COMPLETE = 0.01
"""Threshold on `feature_std`, as a share of 1/sqrt(D). Below it, the mean cosine similarity of two
examples is above 0.9999."""
DIMENSIONAL = 0.01
"""Threshold on `rankme`, as a share of the largest possible rank; at least 2. Features that are
only the means of ten classes have rank 9 or 10, and pass up to D = 900."""

FIRST_RANK, LAST_RANK, LEAST_RANKS = 4, 100, 8
"""Ranks of the eigenvalues that `alpha_req` fits, as in its authors' code (arange(3, 100), from 0);
and our smallest number of them."""
LEAST_WIDTH = FIRST_RANK - 1 + LEAST_RANKS
"""Smallest number of features and of examples from which `alpha_req` can be computed."""
NOISE = 1e-10
"""Eigenvalues below this share of the largest one are rounding errors of float32 features."""

Diagnostic = Literal["rankme", "lidar", "alpha_req", "knn", "held_out_loss"]
"""The results of feature checks by which a pretraining can choose the weights to keep."""
COSTS: dict[Diagnostic, Callable[[float], float]] = {
    "rankme": lambda rank: -rank,
    "lidar": lambda rank: -rank,
    "alpha_req": lambda exponent: abs(exponent - 1),
    "knn": lambda accuracy: -accuracy,
    "held_out_loss": lambda loss: loss,
}
"""Diagnostic -> its value as a cost, which is lower the better the features are."""


def rankme(features: Tensor, epsilon: float = 1e-7) -> float:
    """Effective rank of features (N, D), in [1, min(N, D)].

    It is exp of the entropy of the normalized singular values (RankMe, Garrido et al., ICML 2023,
    who use N = 25,600). The features are not centered.
    """
    return _effective_rank(torch.linalg.svdvals(features.float()), epsilon)


def lidar(views: Tensor, delta: float = 1e-4, epsilon: float = 1e-7) -> float:
    """Effective rank of the features' linear discriminants, of Q views of N images (N, Q, D).

    Each image is a class, and its views are its members (LiDAR, Thilak et al., ICLR 2024,
    arXiv:2312.04000): exp of the entropy of the normalized eigenvalues of W^-1/2 B W^-1/2. B is the
    covariance of the images' means, and W that of the views around their own image's mean, plus
    `delta` times the identity. Directions in which views differ as much as images do not count,
    unlike in `rankme`. The result is in [1, min(N, D)], grows with Q, and compares only features of
    equal width. The paper's delta is "a small constant": 1e-4 is our choice, and `epsilon` is
    RankMe's.
    """
    count, members, width = views.shape
    views = views.cpu().double()  # float64 does not exist on every device
    means = views.mean(dim=1)
    inner = (views - means[:, None]).reshape(-1, width)
    within = inner.T @ inner / (count * members) + delta * torch.eye(width, dtype=views.dtype)
    between = (means - means.mean(dim=0)) / count**0.5
    # With W = L L', the eigenvalues of W^-1/2 B W^-1/2 are the squared singular values of
    # L^-1 times the centered means.
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(within), between.T, upper=False)
    return _effective_rank(torch.linalg.svdvals(whitened).square(), epsilon)


def alpha_req(features: Tensor) -> float | None:
    """Exponent of the power law rank^-alpha that the eigenvalues of the covariance follow.

    Features (N, D) are best near alpha = 1; a larger one means that few directions dominate
    (alpha-ReQ, Agrawal et al., NeurIPS 2022). As in the authors' code, it is the slope of log
    eigenvalue over log rank, by least squares with weights 1/rank, over the ranks 4 to 100. None if
    fewer than `LEAST_RANKS` of these eigenvalues are above rounding errors.
    """
    centered = (features - features.mean(dim=0)).cpu().double()
    values = torch.linalg.svdvals(centered).square()
    values = values[values > NOISE * values[0]][FIRST_RANK - 1 : LAST_RANK]
    if len(values) < LEAST_RANKS:
        return None
    ranks = torch.arange(FIRST_RANK, FIRST_RANK + len(values), dtype=values.dtype)
    x, y, weights = ranks.log(), values.log(), 1 / ranks
    x = x - (weights * x).sum() / weights.sum()
    return -((weights * x * y).sum() / (weights * x * x).sum()).item()


def _effective_rank(values: Tensor, epsilon: float) -> float:
    """exp of the entropy of nonnegative values (R,), normalized to shares."""
    shares = values / values.sum().clamp_min(epsilon) + epsilon
    return (-(shares * shares.log()).sum()).exp().item()


def feature_std(features: Tensor) -> float:
    """Standard deviation of L2-normalized features (N, D), averaged over dimensions.

    It is 1/sqrt(D) if directions are spread evenly, and 0 if all directions are the same (SimSiam,
    Chen & He, CVPR 2021).
    """
    return F.normalize(features.float(), dim=1).std(dim=0, correction=0).mean().item()


def collapse(features: Tensor) -> str | None:
    """Describe the collapse of features (N, D), with its measure; None if there is none.

    complete: all examples have the same direction (see `COMPLETE`). dimensional: they span very few
    directions (see `DIMENSIONAL`; Jing et al., ICLR 2022).
    """
    count, width = features.shape
    std, healthy = feature_std(features), width**-0.5
    if std < COMPLETE * healthy:
        return f"complete collapse (deviation {std:.2g}, healthy {healthy:.2g})"
    rank = rankme(features)
    if rank < max(2.0, DIMENSIONAL * min(count, width)):
        return f"dimensional collapse (effective rank {rank:.1f} of {min(count, width)})"
    return None
