"""Detect collapsed representations from features alone, without labels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

COMPLETE = 0.01
"""`feature_std` below this share of 1/sqrt(D): the mean cosine similarity of two examples is above
0.9999."""
DIMENSIONAL = 0.01
"""`rankme` below this share of the rank that is possible, or below 2. Features that are nothing but
the means of ten classes have rank 9 or 10, and pass up to D = 900."""


def rankme(features: Tensor, epsilon: float = 1e-7) -> float:
    """Effective rank of features (N, D), in [1, min(N, D)]: exp of the entropy of the singular values' shares.

    Garrido et al., RankMe, ICML 2023 (who take N = 25,600); the features are not centred.
    """
    values = torch.linalg.svdvals(features.float())
    shares = values / values.sum().clamp_min(epsilon) + epsilon
    return (-(shares * shares.log()).sum()).exp().item()


def feature_std(features: Tensor) -> float:
    """Mean over dimensions of the deviation of L2-normalised features (N, D).

    1/sqrt(D) where directions are spread evenly, 0 where all are one (Chen & He, SimSiam, CVPR
    2021).
    """
    return F.normalize(features.float(), dim=1).std(dim=0, correction=0).mean().item()


def collapse(features: Tensor) -> str | None:
    """Name the kind of collapse that features (N, D) show, with its number; None if there is none.

    complete: all examples have one direction (`COMPLETE`). dimensional: they span very few
    directions (`DIMENSIONAL`; Jing et al., ICLR 2022).
    """
    count, width = features.shape
    std, healthy = feature_std(features), width**-0.5
    if std < COMPLETE * healthy:
        return f"complete collapse (deviation {std:.2g}, healthy {healthy:.2g})"
    rank = rankme(features)
    if rank < max(2.0, DIMENSIONAL * min(count, width)):
        return f"dimensional collapse (effective rank {rank:.1f} of {min(count, width)})"
    return None
