"""Masked autoencoders (He et al., CVPR 2022, arXiv:2111.06377).

Shape legend: B images, N patches of an image, K of them visible, D the encoder's width, d the
decoder's, and p the side of a patch in pixels.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from sslrun.backbones.image import ImageBackbone
from sslrun.backbones.transformer import Block, Stack
from sslrun.backbones.vit import sincos
from sslrun.data.examples import Batch, Examples
from sslrun.data.image.augment import Augmentation, side_of, to_float
from sslrun.data.specs import ImageSpec
from sslrun.errors import UserError
from sslrun.pretexts.base import Pretext, PretextOptions, pretexts
from sslrun.pretexts.heads import check_width
from sslrun.training.learner import Output

EPSILON = 1e-6
"""Added to the variance of a patch's pixels, as in the authors' code."""
FLOOR_IMAGES = 1024
"""Largest number of images that the floor is computed from."""


@pretexts.register("mae")
class MAE(Pretext):
    """Predict the pixels of hidden patches from the few visible ones.

    He et al., CVPR 2022 (arXiv:2111.06377). The encoder reads the visible patches alone, and a
    small decoder, which is dropped after pretraining, reads their features and mask tokens. [CLS]
    goes through both. Registers of the backbone help the encoder and do not enter the decoder. The
    loss is the mean squared error of the hidden patches.

    The decoder's linear maps are Xavier-uniform, and its positions are fixed sines and cosines, as
    in the authors' code (github.com/facebookresearch/mae). Set `positions: sincos` of the backbone
    for the encoder's. The paper fine-tunes with `pool: mean`, and probes [CLS].

    Deviations: the decoder reads patches in their shuffled order with the positions of that order,
    and computes no prediction of visible patches, which is the same function and costs less. The
    encoder keeps the backbone's own initialization (truncated normal), because it may start from
    weights; the authors' code uses Xavier-uniform. Crops are resized bilinearly; the authors' code
    resizes them bicubically.
    """

    reads = ImageSpec
    needs_square = True
    needs = ("encode",)

    class Options(PretextOptions):
        augmentation: Augmentation = Augmentation(crop=(0.2, 1.0), flip=0.5)
        """Augmentation of the images; default: crops and mirroring alone, as in the paper, where
        color jitter hurts (Table 1e)."""
        ratio: float = Field(default=0.75, gt=0, lt=1)
        """Share of the patches that are hidden."""
        norm_pixels: bool = True
        """Predict pixels that are normalized by the mean and the deviation of their patch."""
        depth: int = Field(default=8, ge=1)
        """Number of the decoder's blocks."""
        width: int = Field(default=512, ge=4)
        """Width of the decoder's tokens; a multiple of 4 and of `heads`."""
        heads: int = Field(default=16, ge=1)
        """Number of the decoder's attention heads."""
        mask_tokens: Literal["decoder", "encoder"] = "decoder"
        """Where mask tokens stand for the hidden patches. encoder: the encoder reads them, too,
        which costs more and hurts the probe (Table 1c of the paper: 59.6 in place of 73.5 %)."""

        @model_validator(mode="after")
        def _divides(self) -> MAE.Options:
            check_width(self.width, self.heads)
            return self

    options: Options
    backbone: ImageBackbone

    def __init__(self, options: Options, backbone: ImageBackbone) -> None:
        """Raises UserError if no patch, or every patch, would be visible."""
        super().__init__(options, backbone)
        self.side = backbone.spec.size // backbone.patch
        count = self.side**2
        if not 1 <= self._visible_count(count) < count:
            raise UserError(
                f"pretext.ratio: {options.ratio:g} of {count} patches leaves "
                f"{self._visible_count(count)} visible: change ratio, or take a smaller "
                "backbone.patch"
            )
        self.encoder_mask: nn.Parameter | None = None
        if options.mask_tokens == "encoder":
            self.encoder_mask = nn.Parameter(torch.empty(1, 1, backbone.width))
            nn.init.normal_(self.encoder_mask, std=0.02)
        self.decoder = Decoder(
            backbone.width,
            self.side,
            backbone.spec.channels * backbone.patch**2,
            options,
        )

    def views(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Augmented images (B, 3, H, H), and a random order (B, N) of their patches.

        The first patches of the order are visible.
        """
        images = self.options.augmentation(batch.inputs, side_of(batch.inputs), generator)
        return images, self._draw_order(images, generator)

    def forward(self, views: tuple[Tensor, Tensor]) -> Output:
        images, order = views
        target, _, _ = self.targets(images, order)
        return Output(F.mse_loss(self.predict(images, order).float(), target))

    def encode(self, images: Tensor, order: Tensor) -> Tensor:
        """Encode the visible patches of images to [CLS] and K tokens (B, 1 + K, D).

        With `mask_tokens: encoder`, mask tokens in place of the N - K hidden patches follow them.
        """
        visible, hidden = self._split(order)
        patches = take(self.backbone.embed(images), visible)
        if self.encoder_mask is not None:
            positions = self.backbone.positions(self.side, self.side)[0]
            patches = torch.cat([patches, self.encoder_mask + positions[hidden]], dim=1)
        tokens = self.backbone.encode(patches)
        return torch.cat([tokens[:, :1], tokens[:, -patches.shape[1] :]], dim=1)

    def predict(self, images: Tensor, order: Tensor) -> Tensor:
        """Predict the hidden patches (B, N - K, 3 p^2), in the order's order."""
        first_hidden = self._visible_count(order.shape[1])
        return self.decoder(self.encode(images, order), order, first_hidden)

    def targets(self, images: Tensor, order: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The hidden patches as the decoder should predict them, (B, N - K, 3 p^2).

        Also returns the mean and the deviation (B, N - K, 1) that they are normalized by; 0 and 1
        without `norm_pixels`.
        """
        _, hidden = self._split(order)
        patches = patchify(self.backbone.normalize(images), self.backbone.patch)
        return self._normalize(take(patches, hidden))

    def held_out(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """The loss of images that are not augmented."""
        images = to_float(batch.inputs)
        return {"held_out_loss": self((images, self._draw_order(images, generator))).loss}

    def floor(self, examples: Examples) -> float:
        """The loss of always predicting the mean patch.

        With `norm_pixels` it is close to 1 - 1 / (3 p^2), because the deviation is unbiased, and
        smaller if there are flat patches.
        """
        stride = -(-len(examples) // FLOOR_IMAGES)
        indices = torch.arange(0, len(examples), stride).split(64)
        values = self.backbone.spec.channels * self.backbone.patch**2
        device = self.backbone.mean.device
        count, total, squares = 0, torch.zeros(values), torch.zeros(values)
        for batch in examples.batches(indices, device):
            images = self.backbone.normalize(to_float(batch.inputs))
            patches, _, _ = self._normalize(patchify(images, self.backbone.patch))
            patches = patches.flatten(0, 1).cpu()
            count += len(patches)
            total += patches.sum(dim=0)
            squares += patches.square().sum(dim=0)
        return (squares / count - (total / count).square()).mean().item()

    def pictures(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Images, their visible patches, and the reconstruction.

        With `norm_pixels` the mean and the deviation of each hidden patch are put back into its
        prediction. They are part of the answer, and the title says so.
        """
        images = to_float(batch.inputs)
        order = self._draw_order(images, generator)
        _, mean, deviation = self.targets(images, order)
        predicted = self.predict(images, order).float() * deviation + mean
        patches = patchify(self.backbone.normalize(images), self.backbone.patch)
        places = self._split(order)[1][:, :, None].expand_as(predicted)
        given = " with true mean and deviation of each patch" if self.options.norm_pixels else ""
        return {
            "image": images,
            "visible": self._draw(patches.scatter(1, places, 0.0)),
            f"reconstruction{given}": self._draw(patches.scatter(1, places, predicted)),
        }

    def _draw(self, patches: Tensor) -> Tensor:
        """Turn normalized patches (B, N, 3 p^2) into images (B, 3, H, H) in [0, 1]."""
        images = unpatchify(patches, self.backbone.patch)
        std, mean = (part[:, None, None] for part in (self.backbone.std, self.backbone.mean))
        return (images * std + mean).clamp(0, 1)

    def _draw_order(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Draw a random order (B, N) of each image's patches."""
        noise = torch.rand(len(images), self.side**2, generator=generator, device=images.device)
        return noise.argsort(dim=1)

    def _visible_count(self, count: int) -> int:
        """K, the number of visible patches of `count`; as in the authors' code."""
        return int(count * (1 - self.options.ratio))

    def _split(self, order: Tensor) -> tuple[Tensor, Tensor]:
        """The visible (B, K) and the hidden patches (B, N - K) of an order (B, N)."""
        visible = self._visible_count(order.shape[1])
        return order[:, :visible], order[:, visible:]

    def _normalize(self, patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalize each patch (B, M, 3 p^2) if `norm_pixels`; see `targets`."""
        if not self.options.norm_pixels:
            zero = patches.new_zeros(*patches.shape[:2], 1)
            return patches, zero, zero + 1
        variance, mean = torch.var_mean(patches, dim=2, keepdim=True)
        deviation = (variance + EPSILON).sqrt()
        return (patches - mean) / deviation, mean, deviation


class Decoder(nn.Module):
    """A small Transformer that predicts the pixels of patches from the encoder's tokens."""

    positions: Tensor
    """(1 + N, d): 0 for [CLS], then those of the patches row by row."""

    def __init__(self, encoder_width: int, side: int, values: int, options: MAE.Options) -> None:
        super().__init__()
        width = options.width
        self.embed = nn.Linear(encoder_width, width)
        self.mask_token: nn.Parameter | None = None
        if options.mask_tokens == "decoder":
            self.mask_token = nn.Parameter(torch.empty(1, 1, width))
            nn.init.normal_(self.mask_token, std=0.02)
        self.register_buffer("positions", F.pad(sincos(side, width)[0], (0, 0, 1, 0)))
        self.blocks = Stack(Block(width, options.heads) for _ in range(options.depth))
        self.norm = nn.LayerNorm(width, eps=EPSILON)
        self.head = nn.Linear(width, values)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tensor, order: Tensor, first: int) -> Tensor:
        """Predict the patches from the `first` of the order on, (B, N - first, values).

        `tokens` (B, 1 + M, D) are [CLS] and the first M patches of the order (B, N). Mask tokens
        stand for the others. Example: N = 4, order 2 0 3 1 and M = 1. The decoder reads [CLS],
        patch 2, and three mask tokens with the positions of the patches 0, 3 and 1.
        """
        x = self.embed(tokens)
        if self.mask_token is not None:
            missing = 1 + order.shape[1] - x.shape[1]
            x = torch.cat([x, self.mask_token.expand(len(x), missing, -1)], dim=1)
        x = self.blocks(x + self.positions[F.pad(order + 1, (1, 0))])
        return self.head(self.norm(x[:, 1 + first :]))


def take(patches: Tensor, indices: Tensor) -> Tensor:
    """Select the patches `indices` (B, K) of each image's `patches` (B, N, D): (B, K, D)."""
    return patches.gather(1, indices[:, :, None].expand(-1, -1, patches.shape[2]))


def patchify(images: Tensor, patch: int) -> Tensor:
    """Cut images (B, C, H, W) into patches (B, N, p * p * C), row by row.

    The values of a patch are in the order row, column, channel.
    """
    cells = images.unflatten(2, (-1, patch)).unflatten(4, (-1, patch))  # (B, C, h, p, w, p)
    return cells.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, patch: int) -> Tensor:
    """Put the patches (B, N, p * p * C) of square images together: the inverse of `patchify`."""
    side = round(patches.shape[1] ** 0.5)
    cells = patches.unflatten(1, (side, side)).unflatten(3, (patch, patch, -1))
    return cells.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)  # from (B, h, w, p, p, C)
