"""Masks of objects that are followed through films, given those of the first frame."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor

from sslrun.data.video.films import VOID, Films, Shot
from sslrun.errors import UserError
from sslrun.metric import Metric
from sslrun.tasks.base import tasks
from sslrun.tasks.following import FollowingTask
from sslrun.tasks.segmentation import contour_accuracy, region_similarity, summarize


@tasks.register("masks")
class Masks(FollowingTask):
    """Follow the objects of a film's first frame, as in DAVIS 2017's semi-supervised track.

    Pont-Tuset et al. 2017 (arXiv:1704.00675). J is the intersection over union of masks, F the
    accuracy of their contours, and J&F the mean of both: over frames, then over the objects of all
    films. The first and the last frame are not scored, and void pixels do not count in J. All
    metrics are in percent.
    """

    labeled_by = "masks of objects"
    shortest = 3, "the first and the last are not scored"
    metrics = (
        Metric("J&F"),
        Metric("J"),
        Metric("F"),
        Metric("J_recall"),
        Metric("F_recall"),
        Metric("J_decay", better="lower"),
        Metric("F_decay", better="lower"),
    )

    @staticmethod
    def has_places(films: Films) -> bool:
        return films.has_masks

    def places(self, shot: Shot, part: slice) -> Tensor:
        return shot.masks(part)

    def has_start(self, place: Tensor) -> bool:
        return bool(objects_of(place))

    def to_soft(self, place: Tensor, size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
        """The share of each cell that the background and each object cover."""
        one_hot = torch.stack([place == number for number in (0, *objects_of(place))]).float()
        return F.interpolate(one_hot[None], grid, mode="area")[0]

    def to_place(self, labels: Tensor, first: Tensor, size: tuple[int, int]) -> Tensor:
        """The most likely object of each pixel (H, W) uint8."""
        enlarged = F.interpolate(labels[None], size, mode="bilinear", align_corners=False)[0]
        numbers = torch.tensor([0, *objects_of(first)], dtype=torch.uint8, device=labels.device)
        return numbers[enlarged.argmax(dim=0)]

    def measure_shot(self, predicted: Tensor, truth: Tensor) -> list[tuple[Tensor, Tensor]]:
        """J and F (T - 2,) of each object of a film, from masks (T, H, W) uint8.

        The objects are those of the true first frame. Raises UserError if others appear later.
        """
        objects = objects_of(truth[0])
        later = sorted(set(truth.unique().tolist()) - {0, VOID, *objects})
        if later:
            raise UserError(
                f"object {later[0]} is not in the first frame but appears later: remove it from "
                "the masks, or mark it void (255)"
            )
        real = truth[1:-1] != VOID
        scores = []
        for number in objects:
            ours, theirs = predicted[1:-1] == number, truth[1:-1] == number
            scores.append((region_similarity(ours, theirs, real), contour_accuracy(ours, theirs)))
        return scores

    def summarize(self, scores: Sequence[tuple[Tensor, Tensor]]) -> dict[str, float]:
        """Average J and F over frames, then over objects."""
        regions = [summarize(region) for region, _ in scores]
        contours = [summarize(contour) for _, contour in scores]
        values: dict[str, float] = {}
        for name, rows in (("J", regions), ("F", contours)):
            mean, recall, decay = (fmean(column) for column in zip(*rows, strict=True))
            values |= {name: mean, f"{name}_recall": recall, f"{name}_decay": decay}
        return {"J&F": (values["J"] + values["F"]) / 2, **values}


def objects_of(mask: Tensor) -> list[int]:
    """The numbers of the objects in a mask (H, W) uint8."""
    return [number for number in mask.unique().tolist() if number not in (0, VOID)]
