"""The image-based joint-embedding predictive architecture (Assran et al., CVPR 2023).

Shape legend: B images, N patches of an image, T target blocks of an image, A patches of the largest
possible target block, D the backbone's width, d the predictor's.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from sslrun.backbones.base import Backbone
from sslrun.backbones.image import ImageBackbone
from sslrun.backbones.transformer import Block, Stack, initialize
from sslrun.backbones.vit import sincos
from sslrun.data.examples import Batch
from sslrun.data.image.augment import Augmentation, side_of, to_float
from sslrun.data.specs import ImageSpec
from sslrun.errors import UserError
from sslrun.pretexts.base import Pretext, PretextOptions, pretexts
from sslrun.pretexts.heads import check_width
from sslrun.pretexts.views import follow
from sslrun.training.learner import Output

TRIES = 8
"""Number of random places of an image's blocks; the first with enough context is taken."""
COLLAPSED = 0.05
"""Deviation of targets over images below which they say almost nothing about the image."""

Share = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0)]


@pretexts.register("ijepa")
class IJEPA(Pretext):
    """Predict a teacher's features of blocks of patches from a context block.

    I-JEPA: Assran et al., CVPR 2023 (arXiv:2301.08243). The teacher, a moving average of the
    backbone, encodes the whole image. Its features, normalized by a layer norm without scale and
    shift, are the targets. The backbone encodes the context: one large block without the patches of
    any target block. A predictor gets the context and the positions of one target block at a time.
    The loss is the smooth L1 distance. The teacher is saved and evaluated, as in the paper.

    Blocks have the same sizes in all images of a batch and other places in each. All shapes are
    static: the backbone runs on all N patches, and an attention mask hides what is no context.

    It needs long training. On CIFAR-10, a ViT of 4 layers after 400 steps of 128 images (momentum
    0.99) is below the same network untrained: an attentive probe of a tenth of the labels has 38.1
    and 43.8 %. Student and teacher first agree on targets that are easy to predict: the loss falls
    from 0.455 to 0.051, while the targets' deviation over images falls from 0.70 to 0.46, and
    RankMe ends at 4.5.

    Deviations from the authors' code (github.com/facebookresearch/ijepa):

    - The backbone's [CLS] takes part as a token that belongs to no patch, like a register, in the
      backbone and in the teacher; the paper's ViT has none. No loss reads it: set `pool: mean` of
      the backbone, which averages patches, as the paper evaluates.
    - All context patches are kept. The authors' code cuts the context of all images to the shortest
      of the batch, and so drops the patches at the bottom.
    - Blocks also lie at the last row and column, which the authors' code never draws.
    - A context with fewer than `least` patches leads to other places, in at most 8 tries; the
      authors' code draws again and then lets blocks overlap.
    """

    reads = ImageSpec
    needs_square = True
    needs = ("encode",)

    class Options(PretextOptions):
        augmentation: Augmentation = Augmentation(crop=(0.3, 1.0))
        """Augmentation of the images; default: crops alone, as in the authors' code."""
        targets: int = Field(default=4, ge=1)
        """Number of target blocks of each image."""
        target_scale: tuple[Share, Share] = (0.15, 0.2)
        """Smallest and largest share of the image in a target block."""
        target_aspect: tuple[Positive, Positive] = (0.75, 1.5)
        """Smallest and largest ratio of a target block's height to its width."""
        context_scale: tuple[Share, Share] = (0.85, 1.0)
        """Smallest and largest share of the image in the context block, which is square; the target
        blocks are then cut out of it."""
        least: int = Field(default=10, ge=1)
        """Number of context patches that an image should have at least."""
        depth: int = Field(default=6, ge=1)
        """Number of the predictor's blocks; 6 for ViT-B and 12 for ViT-H in the paper."""
        width: int = Field(default=384, ge=4)
        """Width of the predictor's tokens; a multiple of 4 and of `heads`."""
        heads: int = Field(default=12, ge=1)
        """Number of the predictor's attention heads."""
        momentum: float = Field(default=0.996, ge=0, le=1)
        """Initial momentum of the teacher; it rises linearly to 1."""

        @field_validator("target_scale", "target_aspect", "context_scale")
        @classmethod
        def _check_order(cls, bounds: tuple[float, float]) -> tuple[float, float]:
            if bounds[0] > bounds[1]:
                raise ValueError("give the smallest value first, then the largest")
            return bounds

        @model_validator(mode="after")
        def _divides(self) -> IJEPA.Options:
            check_width(self.width, self.heads)
            return self

    options: Options
    backbone: ImageBackbone

    def __init__(self, options: Options, backbone: ImageBackbone) -> None:
        """Raises UserError if blocks of these sizes leave too little context."""
        super().__init__(options, backbone)
        self.side = backbone.spec.size // backbone.patch
        self.largest = largest_area(self.side, options.target_scale, options.target_aspect)
        smallest_context = smallest_side(self.side, options.context_scale[0]) ** 2
        if smallest_context - self.largest < options.least:
            raise UserError(
                f"pretext.least: a target block of {self.largest} patches in a context block of "
                f"{smallest_context} leaves fewer than {options.least}: lower least or "
                "target_scale, or take a smaller backbone.patch"
            )
        self.teacher = copy.deepcopy(backbone).requires_grad_(False)
        self.predictor = Predictor(backbone.width, self.side, options)

    @property
    def kept(self) -> Backbone:
        """The teacher, which the paper evaluates."""
        return self.teacher

    def views(
        self, batch: Batch, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Augmented images (B, 3, H, H) and their blocks; see `draw_blocks`."""
        images = self.options.augmentation(batch.inputs, side_of(batch.inputs), generator)
        return (images, *self._draw(len(images), generator))

    def forward(self, views: tuple[Tensor, Tensor, Tensor, Tensor]) -> Output:
        images, context, blocks, real = views
        targets = self.targets(images)
        deviation = targets.std(dim=0, correction=0).mean()
        tokens = self.backbone.encode(self.backbone.embed(images), context)
        predicted = self.predictor(tokens[:, -context.shape[1] :], context, blocks, real)
        wanted = take_blocks(targets, blocks)
        return Output(block_loss(predicted, wanted, real), {"target_deviation": deviation})

    @torch.no_grad()
    def targets(self, images: Tensor) -> Tensor:
        """The teacher's normalized features (B, N, D) of all patches, in float32."""
        tokens = self.teacher.encode(self.teacher.embed(images))
        patches = tokens[:, -(self.side**2) :].float()
        return F.layer_norm(patches, patches.shape[-1:])

    def after_step(self, progress: float) -> None:
        """Move the teacher toward the backbone; the momentum is m0 + (1 - m0) progress."""
        momentum = self.options.momentum + (1 - self.options.momentum) * progress
        follow(self.teacher, self.backbone, momentum)

    def diagnose(self, metrics: Mapping[str, float]) -> str | None:
        """Name the collapse in which the targets depend on the position alone."""
        deviation = metrics.get("target_deviation")
        if deviation is None or deviation >= COLLAPSED:
            return None
        return (
            f"collapse of the targets (deviation over images {deviation:.2g}, healthy above "
            f"{COLLAPSED:g}): features of a patch no longer depend on the image. Raise "
            "pretext.momentum, or lower lr"
        )

    def pictures(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Images, the patches of their context, and those of their target blocks."""
        images = to_float(batch.inputs)
        context, blocks, real = self._draw(len(images), generator)
        covered = torch.zeros_like(context)
        covered = covered.scatter(1, blocks[:, :, real].flatten(1), True)
        patch = self.backbone.patch

        def show(patches: Tensor) -> Tensor:
            mask = patches.view(-1, 1, self.side, self.side)
            pixels = mask.repeat_interleave(patch, 2).repeat_interleave(patch, 3)
            return torch.where(pixels, images, 0.5)

        return {"image": images, "context": show(context), "targets": show(covered)}

    def _draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        return draw_blocks(count, self.side, self.largest, self.options, generator)


class Predictor(nn.Module):
    """A narrow Transformer that predicts the features of a target block from the context."""

    positions: Tensor
    """(N, d): those of the patches row by row."""

    def __init__(self, backbone_width: int, side: int, options: IJEPA.Options) -> None:
        super().__init__()
        width = options.width
        self.embed = nn.Linear(backbone_width, width)
        self.mask_token = nn.Parameter(torch.empty(1, width))
        self.register_buffer("positions", sincos(side, width)[0])
        self.blocks = Stack(Block(width, options.heads) for _ in range(options.depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, backbone_width)
        initialize(self)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, tokens: Tensor, context: Tensor, blocks: Tensor, real: Tensor) -> Tensor:
        """Predict the features (B, T, A, D) of each target block, apart from the others.

        `tokens` (B, N, D) are the backbone's; those in `context` (B, N) are read. For
        `blocks` (B, T, A) and `real` (A,) see `draw_blocks`. Predictions where `real` is false have
        no meaning.
        """
        count, size = blocks.shape[1], tokens.shape[1]
        known = (self.embed(tokens) + self.positions).repeat_interleave(count, dim=0)
        asked = (self.mask_token + self.positions[blocks]).flatten(0, 1)  # (B T, A, d)
        seen = torch.cat(
            [context.repeat_interleave(count, dim=0), real.expand(len(asked), -1)], dim=1
        )
        x = self.blocks(torch.cat([known, asked], dim=1), seen[:, None, None])
        return self.head(self.norm(x[:, size:])).unflatten(0, (-1, count))


def take_blocks(patches: Tensor, blocks: Tensor) -> Tensor:
    """Select the features (B, T, A, D) of the patches `blocks` (B, T, A) from (B, N, D)."""
    indices = blocks.flatten(1)[:, :, None].expand(-1, -1, patches.shape[2])
    return patches.gather(1, indices).unflatten(1, blocks.shape[1:])


def block_loss(predicted: Tensor, targets: Tensor, real: Tensor) -> Tensor:
    """Smooth L1 distance (beta 1), averaged over all patches of blocks (B, T, A, D), 0-d.

    Patches where `real` (A,) is false do not count. The targets get no gradient.
    """
    distances = F.smooth_l1_loss(
        predicted.float(), targets.detach().float(), reduction="none"
    ).mean(dim=(0, 1, 3))
    return (distances * real).sum() / real.sum()


def draw_blocks(
    count: int, side: int, largest: int, options: IJEPA.Options, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw the context and the target blocks of `count` images, on the generator's device.

    Returns the patches of the context (B, N) bool, the patches of each target block (B, T, A)
    int64, and which of these A are part of a block (A,) bool, which is the same for all blocks. The
    others repeat the block's first patch.
    """
    device = generator.device
    height, width = _draw_size(side, options.target_scale, options.target_aspect, generator)
    context_side, _ = _draw_size(side, options.context_scale, (1.0, 1.0), generator)
    shape = (count, TRIES, options.targets)
    top, left = (_draw_place(side - extent, shape, generator) for extent in (height, width))
    context_top, context_left = (
        _draw_place(side - context_side, shape[:2], generator) for _ in range(2)
    )
    covered = _cover(top, left, height, width, side).any(dim=2)
    context = _cover(context_top, context_left, context_side, context_side, side) & ~covered
    # Of the tries (B, TRIES), take the first with enough context, else the one with the most.
    sizes = context.sum(dim=2)
    taken = sizes.clamp(max=options.least).argmax(dim=1)
    rows = torch.arange(count, device=device)
    # The patches of a block, row by row. Example: a block of 2 x 3 has the offsets 0 1 2 in its
    # first row and `side` + 0 1 2 in its second.
    number = torch.arange(largest, device=device)
    real = number < height * width
    offsets = torch.where(real, number // width * side + number % width, 0)
    first = top[rows, taken] * side + left[rows, taken]
    return context[rows, taken], first[:, :, None] + offsets, real


def _draw_size(
    side: int,
    scale: tuple[float, float],
    aspect: tuple[float, float],
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Draw the height and width of a block in patches, 0-d int64, for images of `side` patches."""
    share, ratio = torch.rand(2, generator=generator, device=generator.device).unbind()
    area = (side**2 * (scale[0] + share * (scale[1] - scale[0]))).floor()
    ratio = aspect[0] + ratio * (aspect[1] - aspect[0])
    height, width = ((area * factor).sqrt().round() for factor in (ratio, 1 / ratio))
    return height.clamp(1, side).long(), width.clamp(1, side).long()


def _draw_place(spare: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw the first row or column of blocks, int64 in [0, `spare`], where `spare` is 0-d."""
    uniform = torch.rand(shape, generator=generator, device=generator.device)
    return torch.minimum((uniform * (spare + 1)).long(), spare)  # a product may round up


def _cover(top: Tensor, left: Tensor, height: Tensor, width: Tensor, side: int) -> Tensor:
    """Whether each patch lies in a block: (..., N) bool for corners (...)."""
    places = torch.arange(side, device=top.device)
    rows = (places >= top[..., None]) & (places < (top + height)[..., None])
    columns = (places >= left[..., None]) & (places < (left + width)[..., None])
    return (rows[..., :, None] & columns[..., None, :]).flatten(-2)


def smallest_side(side: int, scale: float) -> int:
    """Side of the smallest context block, in patches; see `_draw_size`."""
    return min(side, max(1, round(math.sqrt(math.floor(side**2 * scale)))))


def largest_area(side: int, scale: tuple[float, float], aspect: tuple[float, float]) -> int:
    """Number of patches of the largest block that `_draw_size` can draw.

    The ratio r of the largest block with height h is the lowest for which sqrt(area r) rounds to h.
    """
    area = max(1, math.floor(side**2 * scale[1]))
    largest = 1
    for height in range(1, math.ceil(math.sqrt(area * aspect[1])) + 1):
        low = max(aspect[0], (height - 0.5) ** 2 / area)
        if low <= min(aspect[1], (height + 0.5) ** 2 / area):
            width = math.floor(math.sqrt(area / low) + 0.5)
            largest = max(largest, min(height, side) * min(width, side))
    return largest
