"""Parts of pretext tasks that compare two views: the views, and a momentum teacher."""

from __future__ import annotations

import copy
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from sslrun.backbones.base import Backbone
from sslrun.data.examples import Batch
from sslrun.data.image.augment import Augmentation, side_of
from sslrun.data.specs import ImageSpec
from sslrun.pretexts.base import NormOptions, Pretext


class TwoViewOptions(NormOptions):
    """Options that all pretext tasks on two views share."""

    augmentation: Augmentation = Augmentation.simclr()
    """Augmentation that makes a view from an image; of the first view if `second` is set."""
    second: Augmentation | None = None
    """Augmentation of the second view; default: the same as the first view's."""
    size: int | None = Field(default=None, ge=4)
    """Side of a view, in pixels; default: the side of the images."""


class TwoViews(Pretext):
    """A pretext task that compares two random views of each image.

    Its loss covers the batches of all devices: either it is a mean over examples, or it gathers the
    vectors of all. If a subclass's does not, its `depends_on_devices` must always be true.
    """

    reads = ImageSpec

    options: TwoViewOptions

    @classmethod
    def depends_on_devices(
        cls, options: TwoViewOptions, backbone: type[Backbone], backbone_options: Any
    ) -> bool:
        """True if views or the network are random, or if each device has its own batch norm."""
        policies = (options.augmentation, options.second or options.augmentation)
        is_random = any(policy.is_random for policy in policies)
        return is_random or not options.sync_norm or backbone.draws(backbone_options)

    def views(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Two random views of every image, each (B, 3, size, size)."""
        size = self.options.size or side_of(batch.inputs)
        policies = (self.options.augmentation, self.options.second or self.options.augmentation)
        first, second = (policy(batch.inputs, size, generator) for policy in policies)
        return first, second


class Teacher(nn.Module):
    """A moving average of a backbone and its head, without gradients."""

    def __init__(self, backbone: Backbone, head: nn.Module) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(backbone)
        self.head = copy.deepcopy(head)
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """The head's output (B, D), in the same mode (train or eval) as the student's."""
        return self.head(self.backbone(images).pooled)

    def follow(self, backbone: Backbone, head: nn.Module, momentum: float) -> None:
        """Move the teacher toward the student's backbone and head; see the function `follow`."""
        follow(self.backbone, backbone, momentum)
        follow(self.head, head, momentum)


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Move the teacher's parameters: teacher <- momentum * teacher + (1 - momentum) * student.

    Buffers do not change: the teacher's batch norms keep statistics of its own activations.
    """
    weights: list[Tensor] = list(teacher.parameters())
    if weights:
        torch._foreach_lerp_(weights, list(student.parameters()), 1 - momentum)
