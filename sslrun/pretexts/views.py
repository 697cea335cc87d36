"""What the pretext tasks of two views share: the views, and a teacher that follows slowly."""

from __future__ import annotations

import copy

import torch
from pydantic import Field
from torch import Tensor, nn

from sslrun.backbones.base import Backbone
from sslrun.data.examples import Batch
from sslrun.data.image.augment import Augmentation
from sslrun.data.specs import ImageSpec
from sslrun.pretexts.base import Pretext, PretextOptions


class TwoViewOptions(PretextOptions):
    """Settings of every task of two views."""

    augmentation: Augmentation = Augmentation.simclr()
    """How a view is made of an image."""
    second: Augmentation | None = None
    """How the second view is made; default: as the first."""
    size: int | None = Field(default=None, ge=4)
    """Side of a view, in pixels; default: the image's."""


class TwoViews(Pretext):
    """A pretext task that compares two random views of each image."""

    reads = ImageSpec

    options: TwoViewOptions

    def views(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Two views of every image, each (B, 3, size, size)."""
        size = self.options.size or batch.inputs.shape[-1]
        policies = (self.options.augmentation, self.options.second or self.options.augmentation)
        first, second = (policy(batch.inputs, size, generator) for policy in policies)
        return first, second


class Teacher(nn.Module):
    """A copy of a backbone and its head that learns nothing by gradient."""

    def __init__(self, backbone: Backbone, head: nn.Module) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(backbone)
        self.head = copy.deepcopy(head)
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """The head's output (B, D); batch norms as in the mode the teacher is in, which is the student's."""
        return self.head(self.backbone(images).pooled)

    def follow(self, backbone: Backbone, head: nn.Module, momentum: float) -> None:
        """Move towards the student: momentum * own + (1 - momentum) * its, parameter by parameter."""
        follow(self.backbone, backbone, momentum)
        follow(self.head, head, momentum)


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, parameter by parameter.

    Buffers are left alone: the teacher's batch norms keep statistics of what the teacher sees.
    """
    mine: list[Tensor] = list(teacher.parameters())
    if mine:
        torch._foreach_lerp_(mine, list(student.parameters()), 1 - momentum)
