"""The base class of tasks that follow something through films, given where it is first."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor

from sslrun.backbones.base import Backbone, Features
from sslrun.data.examples import Batch, Examples
from sslrun.data.image.augment import to_float
from sslrun.data.image.lab import LightnessExamples, lightness
from sslrun.data.specs import ImageSpec, VideoSpec
from sslrun.data.video.films import ClipExamples, Films, Shot
from sslrun.errors import UserError
from sslrun.tasks.base import Task, TaskOptions


class FollowingOptions(TaskOptions):
    """Options of a task without a head."""

    color: Literal["rgb", "lightness"] = "rgb"
    """What the backbone sees. lightness: L / 100 of CIE Lab in three equal channels, as in
    pretraining by `recolor`."""

    @property
    def linear(self) -> bool:
        return False


class FollowingTask(Task):
    """Follow what a film's first frame shows, such as masks or points, through all its frames.

    A place is the label of one frame, such as a mask (H, W) or points (J, 2). Soft labels are what
    protocols follow from cell to cell: background first, then one map for each thing to follow.
    """

    Options = FollowingOptions
    reads, gives = VideoSpec, ImageSpec
    has_head = False
    labeled_by: ClassVar[str]
    """What a film needs, such as "masks of objects", for messages."""
    shortest: ClassVar[tuple[int, str]]
    """Number of frames that a film needs, and why, for messages."""
    options: FollowingOptions
    spec: VideoSpec

    @staticmethod
    @abstractmethod
    def has_places(films: Films) -> bool:
        """Whether films have the labels that the task needs."""

    @abstractmethod
    def places(self, shot: Shot, part: slice) -> Tensor:
        """Read the true places (n, ...) of frames."""

    @abstractmethod
    def has_start(self, place: Tensor) -> bool:
        """Whether the place in the first frame holds anything to follow."""

    @abstractmethod
    def to_soft(self, place: Tensor, size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
        """Convert a place in a frame of `size` to soft labels (K + 1, h, w) on a grid."""

    @abstractmethod
    def to_place(self, labels: Tensor, first: Tensor, size: tuple[int, int]) -> Tensor:
        """Convert soft labels (K + 1, h, w) back to a place; `first` is that of the first frame."""

    @abstractmethod
    def measure_shot(self, predicted: Tensor, truth: Tensor) -> list[Any]:
        """Compare predicted places (T, ...) of a film with the true ones, for `summarize`.

        Raises:
            UserError: the film's labels are not what the task needs.
        """

    @abstractmethod
    def summarize(self, scores: Sequence[Any]) -> dict[str, float]:
        """Compute the metrics from what `measure_shot` returned for all films."""

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

    def vector(self, features: Features) -> Tensor:
        """The mean feature of a clip's frames (B, D)."""
        return features.pooled.unflatten(0, (-1, self.spec.frames)).mean(dim=1)

    def shots(self, examples: Examples) -> Iterator[Shot]:
        """The films to follow things in.

        Raises UserError if they lack labels, or if one is too short or begins with nothing to
        follow.
        """
        if not isinstance(examples, ClipExamples) or not self.has_places(examples.films):
            raise UserError(
                f"the task '{self.name}' needs films with {self.labeled_by}: choose such data, as "
                f"in data: moving-digits"
            )
        fewest, reason = self.shortest
        for index in range(len(examples)):
            shot = examples.shot(index)
            if len(shot) < fewest:
                raise UserError(
                    f"{shot.name}: has {len(shot)} frames, but needs at least {fewest}, because "
                    f"{reason}"
                )
            if not self.has_start(self.places(shot, slice(0, 1))[0]):
                raise UserError(f"{shot.name}: its first frame has nothing to follow")
            yield shot

    def score(self, outputs: Tensor, examples: Examples) -> dict[str, float]:
        """Compute the metrics of predicted places (N, T, ...) of clips of equal length."""
        scores: list[Any] = []
        for predicted, shot in zip(outputs, self.shots(examples), strict=True):
            scores += self.measure_shot(predicted.cpu(), self.places(shot, slice(None)))
        return self.summarize(scores)
