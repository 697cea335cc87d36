"""What tasks with one label per image share: the size, the colors and the augmentation."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from sslrun.backbones.base import Backbone
from sslrun.data.examples import Batch, Examples
from sslrun.data.image.augment import (
    Augmentation,
    Size,
    check_colors,
    height_and_width,
    resize,
    to_float,
)
from sslrun.data.image.lab import LightnessExamples, lightness
from sslrun.data.specs import ImageSpec, InputSpec
from sslrun.tasks.base import Task, TaskOptions


class ImageTaskOptions(TaskOptions):
    """Options of tasks with one label per image."""

    size: int | None = Field(default=None, ge=1)
    """Side of the backbone's input images, in pixels; default: that of the data's images."""
    color: Literal["rgb", "lightness"] = "rgb"
    """What the backbone sees. lightness: L / 100 of CIE Lab in three equal channels, as in
    pretraining by `colorize` (the columns "gray" of Zhang et al. 2016)."""
    augmentation: Augmentation = Augmentation()
    """Augmentation of training images; default: none."""

    @property
    def recoloring(self) -> tuple[str, ...]:
        augmentation = self.augmentation
        changes = {
            "augmentation.cutout": augmentation.cutout,
            "augmentation.jitter": augmentation.jitter,
            "augmentation.blur": augmentation.blur,
        }
        return tuple(name for name, value in changes.items() if value)


class ImageTask(Task):
    """Base class of tasks with one label per image."""

    reads: ClassVar[type[InputSpec]] = ImageSpec
    options: Any

    def __init__(self, options: Any, spec: Any, classes: tuple[str, ...]) -> None:
        super().__init__(options, spec, classes)
        self.size: Size = options.size or spec.shape
        self.channels: int = spec.channels
        check_colors(options, self.channels, "task")

    @property
    def backbone_spec(self) -> ImageSpec:
        return ImageSpec.of((self.channels, *height_and_width(self.size)))

    def views(self, batch: Batch, generator: Any) -> tuple[Tensor, Any]:
        """Augmented images, and labels."""
        images = self.options.augmentation(batch.inputs, self.size, generator)
        return self._to_color(images), batch.labels

    def inputs(self, batch: Batch) -> Tensor:
        return self._to_color(resize(to_float(batch.inputs), self.size))

    def fit_inputs(self, backbone: Backbone, examples: Examples) -> None:
        """Fit the normalization to images as the backbone sees them, in color or in lightness."""
        seen = LightnessExamples(examples) if self.options.color == "lightness" else examples
        backbone.fit_inputs(seen)

    def _to_color(self, images: Tensor) -> Tensor:
        """Convert images as the option `color` says."""
        return lightness(images) if self.options.color == "lightness" else images
