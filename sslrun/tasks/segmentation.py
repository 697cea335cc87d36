"""Region similarity J and contour accuracy F of masks (Perazzi et al., CVPR 2016).

As DAVIS 2017 defines them (Pont-Tuset et al. 2017, arXiv:1704.00675).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

TOLERANCE = 0.008
"""Distance at which boundaries count as the same, as a share of the frame's diagonal."""
RECALLED = 0.5
"""A frame above this score counts as recalled."""


def region_similarity(predicted: Tensor, truth: Tensor, real: Tensor | None = None) -> Tensor:
    """J (...): intersection over union of masks (..., H, W) bool; 1 if both are empty.

    Pixels outside `real` (..., H, W) bool do not count.
    """
    if real is not None:
        predicted, truth = predicted & real, truth & real
    overlap = (predicted & truth).sum(dim=(-2, -1))
    union = (predicted | truth).sum(dim=(-2, -1))
    return torch.where(union == 0, 1.0, overlap / union.clamp(min=1))


def boundary(masks: Tensor) -> Tensor:
    """Boundaries, one pixel wide, of masks (..., H, W) bool.

    A pixel is one if the pixel right of it, below it, or both, differs from it.
    """
    padded = F.pad(masks.float().unflatten(0, (1, -1)), (0, 1, 0, 1), mode="replicate")[0].bool()
    here = padded[..., :-1, :-1]
    right, below, diagonal = padded[..., :-1, 1:], padded[..., 1:, :-1], padded[..., 1:, 1:]
    return (here != right) | (here != below) | (here != diagonal)


def contour_accuracy(predicted: Tensor, truth: Tensor, tolerance: float = TOLERANCE) -> Tensor:
    """F (N,) of masks (N, H, W) bool: harmonic mean of the precision and recall of boundaries.

    A pixel of one boundary is matched if the other has one within `tolerance`: a share of the
    diagonal, rounded up, or a number of pixels from 1 on. Both empty: 1; only one of them: 0.
    """
    height, width = truth.shape[-2:]
    radius = (
        round(tolerance) if tolerance >= 1 else math.ceil(tolerance * math.hypot(height, width))
    )
    ours, theirs = boundary(predicted), boundary(truth)
    precision = _matched(ours, _dilate(theirs, radius))
    recall = _matched(theirs, _dilate(ours, radius))
    both = 2 * precision * recall / (precision + recall).clamp(min=1e-12)
    empty, absent = ~ours.any(dim=-1).any(dim=-1), ~theirs.any(dim=-1).any(dim=-1)
    return torch.where(empty & absent, 1.0, torch.where(empty | absent, 0.0, both))


def _matched(edges: Tensor, near: Tensor) -> Tensor:
    """Share of the pixels of `edges` (N, H, W) that lie in `near`."""
    count = edges.sum(dim=(-2, -1))
    return (edges & near).sum(dim=(-2, -1)) / count.clamp(min=1)


def _dilate(edges: Tensor, radius: int) -> Tensor:
    """Enlarge edges (N, H, W) by a disk."""
    steps = torch.arange(-radius, radius + 1, device=edges.device)
    disk = (steps[:, None] ** 2 + steps**2 <= radius**2).float()
    spread = F.conv2d(edges.float()[:, None], disk[None, None], padding=radius)
    return spread[:, 0] > 0.5


def summarize(scores: Tensor) -> tuple[float, float, float]:
    """Mean, recall and decay, in percent, of the scores (T,) of one object in its frames.

    Recall is the share of frames above `RECALLED`; decay the mean of the first quarter minus that
    of the last. Deviation from DAVIS' code: frames are not counted in 8 bits, which makes its decay
    wrong beyond 255 frames.
    """
    quarters = (torch.linspace(1, len(scores), 5).double() + 1e-10).round().long() - 1
    first = scores[quarters[0] : quarters[1] + 1].mean()
    last = scores[quarters[3] : quarters[4] + 1].mean()
    recall = (scores > RECALLED).double().mean()
    return 100 * scores.mean().item(), 100 * recall.item(), 100 * (first - last).item()
