"""Detect collapsed representations from features alone, without labels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

COMPLETE = 0.01
"""Threshold on `feature_std`, as a share of 1/sqrt(D). Below it, the mean cosine similarity of two
examples is above 0.9999."""
DIMENSIONAL = 0.01
"""Threshold on `rankme`, as a share of the largest possible rank; at least 2. Features that are
only the means of ten classes have rank 9 or 10, and pass up to D = 900."""


def rankme(features: Tensor, epsilon: float = 1e-7) -> float:
    """Effective rank of features (N, D), in [1, min(N, D)].

    It is exp of the entropy of the normalized singular values (RankMe, Garrido et al., ICML 2023,
    who use N = 25,600). The features are not centered.
    """
    values = torch.linalg.svdvals(features.float())
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
