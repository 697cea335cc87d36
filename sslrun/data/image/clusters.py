"""K-means, for palettes and clusters of colors."""

from __future__ import annotations

import torch
from torch import Tensor


def find_clusters(points: Tensor, count: int, weights: Tensor | None = None) -> Tensor:
    """Find the centers (K, D) float32 of at most `count` clusters of points (N, D).

    K-means starts from k-means++ (Arthur and Vassilvitskii 2007). `weights` (N,) count the points.
    The same points give the same centers.
    """
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    means = KMeans(min(count, len(points)), n_init=1, max_iter=100, random_state=0)
    with threadpool_limits(1):  # the order of a sum over threads would change its rounding
        means.fit(points.numpy(), sample_weight=None if weights is None else weights.numpy())
    return torch.from_numpy(means.cluster_centers_).float()
