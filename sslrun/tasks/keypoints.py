"""Points, such as a person's joints, that are followed through films, given those of frame 1."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sslrun.data.video.films import Films, Shot
from sslrun.metric import Metric
from sslrun.tasks.base import tasks
from sslrun.tasks.following import FollowingTask

BOX_SHARE = 0.6
"""Share of the diagonal of the person's box that distances are divided by."""
SIGMA = 0.5
"""Standard deviation of a point's label in the first frame, in cells of the grid."""
PEAKS = 3
"""Number of the strongest cells of a map whose mean place is the predicted point."""


@tasks.register("keypoints")
class Keypoints(FollowingTask):
    """Follow the points of a film's first frame, such as joints, by label propagation.

    As the contrastive random walk does on J-HMDB (Jabri et al., NeurIPS 2020, arXiv:2006.14613, and
    its code). PCK@a is the share of points within a * 0.6 * the diagonal of the box around all
    points of the frame: over the frames of all films after the first, then over points. Points that
    are absent in the first frame, or in the frame to score, do not count. All metrics are in
    percent.

    Deviations from the code: coordinates are those of the centers of cells, and a point whose label
    has vanished is wrong, where the code leaves it out.
    """

    labeled_by = "points"
    shortest = 2, "the first is not scored"
    metrics = (Metric("PCK@0.1"), Metric("PCK@0.2"))

    @staticmethod
    def has_places(films: Films) -> bool:
        return films.has_points

    def places(self, shot: Shot, part: slice) -> Tensor:
        return shot.points(part)

    def has_start(self, place: Tensor) -> bool:
        return not bool(place.isnan().any(dim=-1).all())

    def to_soft(self, place: Tensor, size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
        """Gaussians around the nearest cell of each point, cut off at three deviations.

        The background is 1 where no point is. A point that is absent has no label.
        """
        centers = ((place.flip(-1) + 0.5) * _scale(place, grid, size) - 0.5).round()
        maps = [_gaussian(torch.arange(side, device=place.device), centers[:, axis, None])
                for axis, side in enumerate(grid)]  # fmt: skip
        points = (maps[0][:, :, None] * maps[1][:, None, :]).nan_to_num(0)
        background = (points.sum(dim=0, keepdim=True) == 0).to(points.dtype)
        return torch.cat([background, points])

    def to_place(self, labels: Tensor, first: Tensor, size: tuple[int, int]) -> Tensor:
        """The weighted mean place (J, 2) of the strongest cells of each map; NaN if all are 0."""
        _, height, width = labels.shape
        strongest = labels[1:].flatten(1).topk(min(PEAKS, height * width), dim=1)
        weights = strongest.values / strongest.values.sum(dim=1, keepdim=True)
        columns, rows = strongest.indices % width, strongest.indices // width
        cells = torch.stack([(rows * weights).sum(dim=1), (columns * weights).sum(dim=1)], dim=1)
        return ((cells + 0.5) * _scale(labels, size, (height, width)) - 0.5).flip(-1)

    def measure_shot(self, predicted: Tensor, truth: Tensor) -> list[Tensor]:
        """Distances (T - 1, J) of predicted from true points (T, J, 2), in parts of the box.

        NaN where a point is not scored, and infinite where none is predicted.
        """
        later = truth[1:]
        low = later.nan_to_num(torch.inf).amin(dim=1)
        high = later.nan_to_num(-torch.inf).amax(dim=1)
        box = BOX_SHARE * (high - low).norm(dim=1, keepdim=True)
        distance = (predicted[1:] - later).norm(dim=2).nan_to_num(torch.inf) / box
        scored = ~(later.isnan() | truth[:1].isnan()).any(dim=2)
        return [torch.where(scored, distance.nan_to_num(0), torch.nan)]

    def summarize(self, scores: Sequence[Tensor]) -> dict[str, float]:
        """Share of the distances within the limits, over frames, then over points."""
        distances = torch.cat(list(scores))
        counts = (~distances.isnan()).sum(dim=0)
        values = {}
        for limit in (0.1, 0.2):
            shares = (distances <= limit).sum(dim=0) / counts
            values[f"PCK@{limit}"] = 100 * shares.nanmean().item()
        return values


def _scale(like: Tensor, new: tuple[int, int], old: tuple[int, int]) -> Tensor:
    """The factors of rows and columns from a grid of the `old` sides to one of the `new`."""
    return like.new_tensor([new[0] / old[0], new[1] / old[1]])


def _gaussian(cells: Tensor, center: Tensor) -> Tensor:
    """The weights (J, n) of `cells` (n,) around each `center` (J, 1); 0 from 3 deviations on."""
    distance = (cells - center).abs()
    return torch.exp(-(distance**2) / (2 * SIGMA**2)) * (distance < 3 * SIGMA)
