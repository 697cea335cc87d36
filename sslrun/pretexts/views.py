"""Views of images for pretext tasks that compare them, and a momentum teacher."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sslrun.backbones.base import Backbone
from sslrun.data.examples import Batch
from sslrun.data.image.augment import Augmentation, side_of
from sslrun.data.image.whole import WholeImages
from sslrun.data.specs import ImageSpec
from sslrun.errors import UserError
from sslrun.pretexts.base import NormOptions, Pretext, is_random_or_unsynchronized
from sslrun.registry import Options

Share = Annotated[float, Field(gt=0, le=1)]


class Crops(Options):
    """Small local views of each image in addition to the global ones: multi-crop.

    Caron et al., SwAV, NeurIPS 2020 (arXiv:2006.09882).
    """

    count: int = Field(ge=1)
    """Number of local views of each image."""
    size: int | None = Field(default=None, ge=4)
    """Side of a local view, in pixels; default: half of a global view's. It must be a multiple of
    the backbone's patch."""
    scale: tuple[Share, Share] = (0.05, 0.4)
    """Smallest and largest share of the image's area in a local view; DINO's (Caron et al. 2021) by
    default."""
    augmentation: Augmentation | None = None
    """Augmentation of a local view; default: the first global view's, with `scale` as its crop."""


class ViewOptions(NormOptions):
    """Options that all pretext tasks on views share."""

    augmentation: Augmentation = Augmentation.simclr()
    """Augmentation that makes a view from an image; of the odd views if `second` is set."""
    second: Augmentation | None = None
    """Augmentation of the second view, the fourth and so on; default: the same as the first's."""
    size: int | None = Field(default=None, ge=4)
    """Side of a view, in pixels; default: the shorter side of the images."""
    views: int = Field(default=2, ge=2)
    """Number of global views of each image."""
    crops: Crops | None = None
    """Local views, such as {count: 4, size: 16}, in addition to the global ones; default: none."""


class MultiView(Pretext):
    """A pretext task that compares random views of each image.

    Its loss covers the batches of all devices: either it is a mean over examples, or it gathers the
    vectors of all. If a subclass's does not, its `depends_on_devices` must always be true.
    """

    reads = ImageSpec
    most_views: ClassVar[int | None] = 2
    """The largest number of global views that the task can compare; None: any number."""
    takes_crops: ClassVar[bool] = False
    """Whether the task can compare local views with the global ones."""

    options: ViewOptions

    def __init__(self, options: Any, backbone: Backbone) -> None:
        """Raises UserError for views that the task does not compare, or that do not fit."""
        super().__init__(options, backbone)
        if self.most_views is not None and options.views > self.most_views:
            raise UserError(
                f"pretext.views: '{self.name}' compares {self.most_views} views: "
                f"set views: {self.most_views}"
            )
        if options.crops is not None:
            if not self.takes_crops:
                raise UserError(
                    f"pretext.crops: '{self.name}' does not compare local views: leave it out"
                )
            self._check_crop_size(options.crops)

    @classmethod
    def depends_on_devices(
        cls, options: ViewOptions, backbone: type[Backbone], backbone_options: Any
    ) -> bool:
        """True if views or the network are random, or if each device has its own batch norm."""
        policies = (options.augmentation, options.second or options.augmentation)
        return options.crops is not None or is_random_or_unsynchronized(
            options, policies, backbone, backbone_options
        )

    def views(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Random views of every image: the global ones (B, C, size, size), then the local ones."""
        size = self.options.size or side_of(batch.inputs)
        global_views = self.positives(batch, generator)
        return (*global_views, *self._local_views(batch.inputs, size, generator))

    def positives(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Random global views of every image, each (B, C, size, size)."""
        size = self.options.size or side_of(batch.inputs)
        policies = (self.options.augmentation, self.options.second or self.options.augmentation)
        chosen = itertools.islice(itertools.cycle(policies), self.options.views)
        return tuple(policy(batch.inputs, size, generator) for policy in chosen)

    def local_augmentation(self, crops: Crops) -> Augmentation:
        """The augmentation of local views."""
        return crops.augmentation or self.options.augmentation.model_copy(
            update={"crop": crops.scale}
        )

    def _local_views(
        self, images: Tensor | WholeImages, size: int, generator: torch.Generator
    ) -> list[Tensor]:
        """Random local views, each (B, C, s, s)."""
        crops = self.options.crops
        if crops is None:
            return []
        policy = self.local_augmentation(crops)
        local_size = crops.size or size // 2
        return [policy(images, local_size, generator) for _ in range(crops.count)]

    def _check_crop_size(self, crops: Crops) -> None:
        """Raise UserError if local views do not divide into the backbone's patches."""
        spec = self.backbone.spec
        assert isinstance(spec, ImageSpec)
        size = crops.size or (self.options.size or min(spec.shape)) // 2
        patch = self.backbone.patch
        if size % patch:
            near = max(patch, round(size / patch) * patch)
            raise UserError(
                f"pretext.crops.size: local views of {size} pixels do not divide into patches of "
                f"{patch}: set size: {near}"
            )


def encode_by_size(
    network: Callable[[Tensor], Tensor], views: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Apply `network` to views (B, C, S, S) of one or more sizes, in one pass for each size.

    Returns its output for each view. Views of one size must follow one another.
    """
    outputs: list[Tensor] = []
    for _, group in itertools.groupby(views, key=lambda view: view.shape[-2:]):
        members = list(group)
        outputs.extend(network(torch.cat(members)).chunk(len(members)))
    return tuple(outputs)


def cross_pairs(targets: int, views: int) -> list[tuple[int, int]]:
    """Pairs (view, target) of all `views` with each of the first `targets`, except with itself.

    The first `targets` are the global views. For two global views alone: (0, 1) and (1, 0).
    """
    pairs = itertools.product(range(views), range(targets))
    return [(view, target) for view, target in pairs if view != target]


def symmetric_pairs(targets: int, views: int) -> list[tuple[int, int, int]]:
    """The `cross_pairs` of a symmetric loss: (target, view, weight) with target < view.

    A pair of global views counts once, with weight 2, instead of once in each order.
    """
    pairs = cross_pairs(targets, views)
    return [(target, view, 2 if view < targets else 1) for view, target in pairs if target < view]


class Teacher(nn.Module):
    """A moving average of a backbone and its head, without gradients.

    Without `drops`, it never drops units or paths, although its batch norms follow the mode.
    """

    def __init__(self, backbone: Backbone, head: nn.Module, *, drops: bool = True) -> None:
        super().__init__()
        self.drops = drops
        self.backbone = copy.deepcopy(backbone)
        self.head = copy.deepcopy(head)
        self.requires_grad_(False)

    def train(self, mode: bool = True) -> Teacher:
        """Set training or eval mode; without `drops`, training mode is that of batch norms only."""
        super().train(mode and self.drops)
        for part in self.modules():
            if isinstance(part, _BatchNorm):
                part.train(mode)
        return self

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
