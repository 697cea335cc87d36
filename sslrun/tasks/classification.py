"""Image classification with one label per image."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from sslrun.data.examples import Batch, Examples
from sslrun.data.image.augment import Augmentation
from sslrun.errors import UserError
from sslrun.metric import Metric
from sslrun.tasks import metrics as measures
from sslrun.tasks.base import tasks
from sslrun.tasks.image import ImageTask, ImageTaskOptions

NAMES = ("accuracy", "mean_class_accuracy", "macro_f1", "top5_accuracy", "real_accuracy")
"""Metrics of classification, in percent."""
TOP5_CLASSES = 10
"""Number of classes from which top-5 accuracy is reported."""


@tasks.register("classification")
class Classification(ImageTask):
    """Classify images with a linear head and cross-entropy. All metrics are in percent."""

    class Options(ImageTaskOptions):
        augmentation: Augmentation = Augmentation(crop=(0.08, 1.0), flip=0.5)
        """Augmentation of training images. Default: SimCLR's for linear evaluation and fine-tuning
        (Chen et al. 2020, B.6 and B.8). A value replaces the default as a whole."""
        label_smoothing: float = Field(default=0.0, ge=0, lt=1)
        """Share of the target that is spread evenly over the classes (Szegedy et al. 2016)."""
        mixup: float = Field(default=0.0, ge=0)
        """Parameter alpha of mixup's Beta(alpha, alpha) (Zhang et al. 2018); 0: off."""
        cutmix: float = Field(default=0.0, ge=0)
        """Parameter alpha of CutMix's Beta(alpha, alpha) (Yun et al. 2019); 0: off. If mixup is on,
        too, each image gets one of them at random, with equal chances."""
        init: Literal["zeros", "random"] = "zeros"
        """Initial weights of the head: zeros as in ViT's fine-tuning (Dosovitskiy et al. 2021), or
        PyTorch's default."""
        metric: Literal["accuracy", "mean_class_accuracy", "macro_f1"] = "accuracy"
        """Metric for model selection and tables."""

        @property
        def recoloring(self) -> tuple[str, ...]:
            return ("mixup",) * bool(self.mixup) + super().recoloring

    conditional = frozenset({"real_accuracy"})
    options: Classification.Options

    def __init__(
        self, options: Classification.Options, spec: Any, classes: tuple[str, ...]
    ) -> None:
        super().__init__(options, spec, classes)
        names = dict.fromkeys((options.metric, *NAMES))
        if len(classes) < TOP5_CLASSES:
            del names["top5_accuracy"]
        self.metrics = tuple(Metric(name) for name in names)

    def head(self, width: int, depth: int = 0) -> nn.Linear:
        linear = nn.Linear(width, len(self.classes))
        if self.options.init == "zeros":
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        return linear

    def views(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Augmented images, and labels (B,); with mixup or CutMix class probabilities (B, C)."""
        images, labels = super().views(batch, generator)
        if not (self.options.mixup or self.options.cutmix):
            return images, labels
        shares = F.one_hot(labels, len(self.classes)).float()
        return mix(images, shares, self.options.mixup, self.options.cutmix, generator)

    def targets(self, examples: Examples) -> Tensor:
        """Labels. Raises UserError if they are numbers."""
        labels = super().targets(examples)
        if labels.is_floating_point():
            raise UserError(
                f"the task '{self.name}' needs labels that are classes, but these are numbers: "
                "take task: numbers"
            )
        return labels

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, label_smoothing=self.options.label_smoothing)

    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """Compute the metrics, in percent; top-5 accuracy if there are at least ten classes.

        Targets are labels (N,), or (N, 1 + K): a label, then up to K reassessed labels for
        real_accuracy, padded with -1.
        """
        reassessed = targets[:, 1:] if targets.ndim == 2 else None
        if reassessed is not None:
            targets = targets[:, 0]
        values = {
            "accuracy": measures.accuracy(outputs, targets),
            "mean_class_accuracy": measures.mean_class_accuracy(outputs, targets),
            "macro_f1": measures.macro_f1(outputs, targets),
        }
        if len(self.classes) >= TOP5_CLASSES:
            values["top5_accuracy"] = measures.top_k_accuracy(outputs, targets, 5)
        if reassessed is not None:
            values["real_accuracy"] = measures.multi_label_accuracy(outputs, reassessed)
        return values


def mix(
    images: Tensor, shares: Tensor, mixup: float, cutmix: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Mix each image (B, 3, H, W) and its class probabilities (B, C) with another of the batch.

    mixup blends the two images; CutMix pastes a box of the other one. Deviation: the share of an
    image is drawn from Beta(alpha, alpha) for each image, where the papers' code draws one share
    per batch. This reduces the variance of the gradient, and the device need not wait for the CPU
    to draw the box.
    """
    other = torch.randperm(len(images), generator=generator, device=images.device)
    if mixup and cutmix:
        coin = torch.rand(len(images), 1, 1, 1, generator=generator, device=images.device) < 0.5
        own = torch.where(
            coin, _blend(images, mixup, generator), _outside_box(images, cutmix, generator)
        )
    elif mixup:
        own = _blend(images, mixup, generator)
    else:
        own = _outside_box(images, cutmix, generator)
    share = own.mean(dim=(1, 2, 3))[:, None]
    return images[other].lerp(images, own), shares[other].lerp(shares, share)


def _beta(count: int, alpha: float, generator: torch.Generator) -> Tensor:
    """Draw (count,) numbers from Beta(alpha, alpha); torch.distributions takes no generator."""
    concentration = torch.full((count, 2), alpha, device=generator.device)
    return torch._sample_dirichlet(concentration, generator)[:, 0]


def _blend(images: Tensor, alpha: float, generator: torch.Generator) -> Tensor:
    """Draw mixup's weights (B, 1, 1, 1) of each image's own pixels."""
    return _beta(len(images), alpha, generator)[:, None, None, None]


def _outside_box(images: Tensor, alpha: float, generator: torch.Generator) -> Tensor:
    """Draw CutMix's weights (B, 1, H, W) of each image's own pixels: 0 in a box, else 1.

    The center of the box is uniform, and the box is clipped at the border.
    """
    count, (height, width) = len(images), images.shape[-2:]
    half = (1 - _beta(count, alpha, generator)).sqrt()[:, None] / 2
    center = torch.rand(2, count, 1, generator=generator, device=images.device)

    def inside(side: int, middle: Tensor) -> Tensor:
        pixels = (torch.arange(side, device=images.device) + 0.5) / side
        return (pixels - middle).abs() < half

    box = inside(height, center[0])[:, None, :, None] & inside(width, center[1])[:, None, None, :]
    return (~box).float()
