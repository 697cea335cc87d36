"""Masks of objects that are followed through films, given those of the first frame."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Literal

from torch import Tensor

from sslrun.backbones.base import Backbone
from sslrun.data.examples import Batch, Examples
from sslrun.data.image.augment import to_float
from sslrun.data.image.lab import LightnessExamples, lightness
from sslrun.data.specs import ImageSpec, VideoSpec
from sslrun.data.video.films import VOID, ClipExamples, Shot
from sslrun.errors import UserError
from sslrun.metric import Metric
from sslrun.tasks.base import Task, TaskOptions, tasks
from sslrun.tasks.segmentation import contour_accuracy, region_similarity, summarize


class MasksOptions(TaskOptions):
    """Options of a task without a head."""

    color: Literal["rgb", "lightness"] = "rgb"
    """What the backbone sees. lightness: L / 100 of CIE Lab in three equal channels, as in
    pretraining by `recolor`."""

    @property
    def linear(self) -> bool:
        return False


@tasks.register("masks")
class Masks(Task):
    """Follow the objects of a film's first frame, as in DAVIS 2017's semi-supervised track.

    Pont-Tuset et al. 2017 (arXiv:1704.00675). J is the intersection over union of masks, F the
    accuracy of their contours, and J&F the mean of both: over frames, then over the objects of all
    films. The first and the last frame are not scored, and void pixels do not count in J. All
    metrics are in percent.
    """

    Options = MasksOptions
    reads, gives = VideoSpec, ImageSpec
    has_head = False
    metrics = (
        Metric("J&F"),
        Metric("J"),
        Metric("F"),
        Metric("J_recall"),
        Metric("F_recall"),
        Metric("J_decay", better="lower"),
        Metric("F_decay", better="lower"),
    )
    options: MasksOptions
    spec: VideoSpec

    @property
    def backbone_spec(self) -> ImageSpec:
        return self.spec.frame

    def inputs(self, batch: Batch) -> Tensor:
        """All frames (B * T, C, H, W) of clips."""
        return self.prepare(batch.inputs.flatten(0, 1))

    def prepare(self, frames: Tensor) -> Tensor:
        """Convert frames (n, C, H, W) uint8 to what the backbone sees; see the option `color`."""
        images = to_float(frames)
        return lightness(images) if self.options.color == "lightness" else images

    def fit_inputs(self, backbone: Backbone, examples: Examples) -> None:
        """Fit the normalization to frames as the backbone sees them, in color or in lightness."""
        seen = LightnessExamples(examples) if self.options.color == "lightness" else examples
        backbone.fit_inputs(seen)

    def vector(self, features: object) -> Tensor:
        """The mean feature of a clip's frames (B, D)."""
        pooled: Tensor = features.pooled  # type: ignore[attr-defined]
        return pooled.unflatten(0, (-1, self.spec.frames)).mean(dim=1)

    def shots(self, examples: Examples) -> Iterator[Shot]:
        """The films to follow objects in.

        Raises UserError if they have no masks, or if one is too short or begins without an object.
        """
        if not isinstance(examples, ClipExamples) or not examples.films.has_masks:
            raise UserError(
                f"the task '{self.name}' needs films with masks of objects: choose such data, as "
                "in data: moving-digits"
            )
        for index in range(len(examples)):
            shot = examples.shot(index)
            if len(shot) < 3:
                raise UserError(
                    f"{shot.name}: has {len(shot)} frames, but needs at least 3, because the first "
                    "and the last are not scored"
                )
            yield shot

    def score(self, outputs: Tensor, examples: Examples) -> dict[str, float]:
        """Compute the metrics of predicted masks (N, T, H, W) uint8 of clips of equal length."""
        scores: list[tuple[Tensor, Tensor]] = []
        for predicted, shot in zip(outputs, self.shots(examples), strict=True):
            scores += self.measure_shot(predicted.cpu(), shot.masks(slice(None)))
        return self.summarize(scores)

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

    def summarize(self, objects: Sequence[tuple[Tensor, Tensor]]) -> dict[str, float]:
        """Average J and F over frames, then over objects."""
        regions = [summarize(region) for region, _ in objects]
        contours = [summarize(contour) for _, contour in objects]
        values: dict[str, float] = {}
        for name, rows in (("J", regions), ("F", contours)):
            mean, recall, decay = (fmean(column) for column in zip(*rows, strict=True))
            values |= {name: mean, f"{name}_recall": recall, f"{name}_decay": decay}
        return {"J&F": (values["J"] + values["F"]) / 2, **values}


def objects_of(mask: Tensor) -> list[int]:
    """The numbers of the objects in a mask (H, W) uint8."""
    return [number for number in mask.unique().tolist() if number not in (0, VOID)]
