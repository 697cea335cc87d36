"""Vision Transformer (Dosovitskiy et al., ICLR 2021, arXiv:2010.11929).

Parameters have timm's names, so that its weights can be loaded.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from sslrun.backbones import conversion
from sslrun.backbones.base import Exported, Features, backbones
from sslrun.backbones.image import ImageBackbone
from sslrun.backbones.transformer import Block, Stack, depth_rates, initialize, layers_of
from sslrun.data.image.augment import Size, height_and_width
from sslrun.data.specs import ImageSpec
from sslrun.errors import UserError
from sslrun.registry import Options


class PatchEmbed(nn.Module):
    """Map images (B, C, H, W) to one vector per patch (B, D, H/p, W/p)."""

    def __init__(self, width: int, patch: int, channels: int = 3) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)
        # Initialize as a linear map of the flattened patch (MAE's code).
        nn.init.xavier_uniform_(self.proj.weight.flatten(1))
        nn.init.constant_(self.proj.bias, 0)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images)


def patches_along(name: str, size: int, patch: int) -> int:
    """Number of patches along each side of an image.

    Raises:
        UserError: patches do not divide the image; the message begins with the backbone's name.
    """
    if size % patch:
        divisors = [side for side in range(1, size + 1) if size % side == 0]
        nearest = min(divisors, key=lambda side: abs(side - patch))
        raise UserError(
            f"{name}: patch {patch} does not divide images of {size} pixels: take {nearest}, "
            "or resize the images"
        )
    return size // patch


class ViT(ImageBackbone):
    """Pre-norm Transformer over patches (Dosovitskiy et al., ICLR 2021, arXiv:2010.11929).

    Tokens are [CLS], then registers if there are any, then patches row by row.
    """

    class Options(Options):
        patch: int = Field(default=16, ge=1)
        """Side of a patch, in pixels."""
        size: int | None = Field(default=None, ge=1)
        """Side of the images that position embeddings are made for, in pixels; default: the data's.
        They are interpolated for other sizes."""
        positions: Literal["learned", "sincos"] = "learned"
        """Position embeddings: learned, or fixed sines and cosines of row and column (MAE, He et
        al. 2022)."""
        pool: Literal["cls", "mean"] = "cls"
        """Pooled features: those of [CLS], or the mean over patches; both after the final norm."""
        registers: int = Field(default=0, ge=0)
        """Number of register tokens, which belong to no patch and are not part of the features
        (Darcet et al. 2024)."""
        depth: int | None = Field(default=None, ge=1)
        """Number of blocks; default: the named model's."""
        width: int | None = Field(default=None, ge=1)
        """Width of a token; default: the named model's."""
        heads: int | None = Field(default=None, ge=1)
        """Number of attention heads; default: the named model's."""
        dropout: float = Field(default=0.0, ge=0, lt=1)
        """Dropout rate on embeddings, attention weights and the output of each branch."""
        drop_path: float = Field(default=0.0, ge=0, lt=1)
        """Rate of stochastic depth at the last block; rises linearly from 0 at the first block."""

    shape: ClassVar[tuple[int, int, int]]
    """Width, depth and heads of the named model."""
    offers = frozenset({"tokens", "grid", "dense", "encode", "attention", "layers"})
    exports = ("transformers", "timm", "torchvision")
    options: Options
    pos_embed: Tensor
    """(1, 1 + rows * columns, D): positions of [CLS], then of the patches row by row."""

    def __init__(self, options: Options, spec: ImageSpec) -> None:
        super().__init__(options, spec)
        width, depth, heads = self.shape_of(options)
        if width % heads:
            raise UserError(f"{self.name}: width {width} is not a multiple of heads {heads}")
        self.width = width
        self.layer_widths = (width,) * depth
        self.patch = options.patch
        height, width_of_images = (options.size,) * 2 if options.size else spec.shape
        self.rows = patches_along(self.name, height, options.patch)
        self.columns = patches_along(self.name, width_of_images, options.patch)
        self.patch_embed = PatchEmbed(width, options.patch, spec.channels)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        if options.positions == "learned":
            self.pos_embed = nn.Parameter(torch.empty(1, 1 + self.rows * self.columns, width))
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        else:
            if width % 4:
                raise UserError(
                    f"{self.name}: width {width} is not a multiple of 4, as sincos positions need"
                )
            positions = sincos((self.rows, self.columns), width)
            self.register_buffer("pos_embed", F.pad(positions, (0, 0, 1, 0)))
        self.reg_token = (
            nn.Parameter(torch.empty(1, options.registers, width)) if options.registers else None
        )
        self.dropout = nn.Dropout(options.dropout)
        self.blocks = Stack(
            Block(width, heads, dropout=options.dropout, drop_path=rate)
            for rate in depth_rates(options.drop_path, depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        initialize(self.blocks)
        nn.init.normal_(self.cls_token, std=1e-6)
        if self.reg_token is not None:
            nn.init.normal_(self.reg_token, std=1e-6)

    @property
    def side(self) -> int:
        """Number of patches along each side of the images that positions are made for.

        Raises:
            UserError: the images are not square.
        """
        if self.rows != self.columns:
            raise UserError(
                f"{self.name}: a square grid of patches is needed here, and the images' is "
                f"{self.rows}x{self.columns}: set data.size to one number"
            )
        return self.rows

    @classmethod
    def shape_of(cls, options: ViT.Options) -> tuple[int, int, int]:
        """Width, depth and heads: those of the options, else the named model's."""
        width, depth, heads = cls.shape
        return options.width or width, options.depth or depth, options.heads or heads

    def embed(self, images: Tensor) -> Tensor:
        """Embed patches with their positions: (B, N, D), row by row, without special tokens.

        Raises:
            UserError: the sides of the images are not multiples of the patch.
        """
        height, width = images.shape[-2:]
        if height % self.options.patch or width % self.options.patch:
            raise UserError(
                f"{self.name}: images of {width}x{height} pixels do not divide into patches of "
                f"{self.options.patch}: choose a size that is a multiple of the patch"
            )
        grid = self.patch_embed(self.normalize(images))
        return grid.flatten(2).transpose(1, 2) + self.positions(*grid.shape[-2:])

    def encode(self, patches: Tensor, mask: Tensor | None = None) -> Tensor:
        """Encode embedded patches (B, N, D), all or a subset, to tokens (B, 1 + registers + N, D).

        Tokens are those after the final norm. No token attends to a patch where `mask` (B, N) bool
        is false, so that all other tokens are those without that patch.
        """
        x = self._with_special(patches)
        if mask is None:
            return self.norm(self.blocks(x))
        seen = F.pad(mask, (1 + self.options.registers, 0), value=True)  # [CLS] and registers too
        return self.norm(self.blocks(x, seen[:, None, None]))

    def forward(self, inputs: Tensor) -> Features:
        """Images (B, C, H, W) in [0, 1]; H and W multiples of the patch."""
        tokens = self.encode(self.embed(inputs))
        patches = tokens[:, 1 + self.options.registers :]
        side = inputs.shape[-2] // self.options.patch
        grid = patches.transpose(1, 2).unflatten(2, (side, -1))
        return Features(self._pool(tokens), patches, grid)

    def pooled_layers(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """The pooled features (B, D) of each block's tokens, after the final norm.

        Linear evaluation of DINO (Caron et al. 2021) concatenates those of the last four blocks.
        """
        pooled = []
        for state in self.blocks.states(self._with_special(self.embed(inputs)))[1:]:
            pooled.append(self._pool(self.norm(state)))
        return tuple(pooled)

    def _pool(self, tokens: Tensor) -> Tensor:
        """Pool all tokens (B, special + N, D) to (B, D)."""
        if self.options.pool == "cls":
            return tokens[:, 0]
        return tokens[:, 1 + self.options.registers :].mean(dim=1)

    def attention(self, inputs: Tensor) -> Tensor:
        """Attention weights (B, heads, T, T) of the last block.

        Row and column 0 belong to [CLS], the last N to patches.
        """
        return self.blocks.attention(self._with_special(self.embed(inputs)))

    def export(self, library: str) -> Exported:
        converters = {
            "timm": conversion.vit_to_timm,
            "torchvision": conversion.vit_to_torchvision,
            "transformers": conversion.vit_to_transformers,
        }
        return converters[library](self)

    def own_names(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Adapt the weights of timm's ViT to this network.

        Some of timm's registers have positions; they are added to the registers, which have none
        here. If timm's [CLS] has no position, its position is 0 here.
        """
        renamed = super().own_names(tensors)
        positions, registers = renamed.get("pos_embed"), renamed.get("reg_token")
        if positions is None or registers is None or positions.ndim != 3:
            return renamed
        if (positions.shape[1] ** 0.5).is_integer():  # positions of patches alone
            cls_position = torch.zeros_like(positions[:, :1])
            return renamed | {"pos_embed": torch.cat([cls_position, positions], dim=1)}
        count = registers.shape[1]
        sizes = [1, count, positions.shape[1] - 1 - count]
        cls_position, register_positions, patch_positions = positions.split(sizes, dim=1)
        return renamed | {
            "reg_token": registers + register_positions,
            "pos_embed": torch.cat([cls_position, patch_positions], dim=1),
        }

    def fit_weights(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Interpolate the position embeddings of another grid to this network's."""
        positions = tensors.get("pos_embed")
        if positions is None or positions.shape == self.pos_embed.shape or positions.ndim != 3:
            return tensors
        side = round((positions.shape[1] - 1) ** 0.5)
        if side**2 != positions.shape[1] - 1:
            return tensors
        grid = interpolate_positions(positions[:, 1:], side, self.rows, self.columns)
        return tensors | {"pos_embed": torch.cat([positions[:, :1], grid], dim=1)}

    def positions(self, rows: int, columns: int) -> Tensor:
        """Position embeddings (1, rows * columns, D) of patches, interpolated for other grids."""
        positions = self.pos_embed[:, 1:]
        if (rows, columns) == (self.rows, self.columns):
            return positions
        return interpolate_positions(positions, (self.rows, self.columns), rows, columns)

    def patch_projection(self) -> list[nn.Parameter]:
        return list(self.patch_embed.parameters())

    def layers(self) -> list[list[nn.Parameter]]:
        return layers_of(self, self.blocks, self.norm)

    def _with_special(self, patches: Tensor) -> Tensor:
        """Prepend [CLS] and the registers to embedded patches (B, N, D), and apply dropout."""
        special = [self.cls_token + self.pos_embed[:, :1]]
        if self.reg_token is not None:
            special.append(self.reg_token)
        expanded = [token.expand(patches.shape[0], -1, -1) for token in special]
        return self.dropout(torch.cat([*expanded, patches], dim=1))


def interpolate_positions(positions: Tensor, side: Size, rows: int, columns: int) -> Tensor:
    """Interpolate position embeddings (1, side * side, D) to (1, rows * columns, D): bicubic."""
    grid = positions.unflatten(1, height_and_width(side)).permute(0, 3, 1, 2).float()
    grid = F.interpolate(grid, (rows, columns), mode="bicubic", antialias=True)
    return grid.flatten(2).transpose(1, 2).to(positions.dtype)


def sincos(side: Size, width: int) -> Tensor:
    """Fixed position embeddings (1, side * side, D), as in MAE's code.

    The first half holds sines and cosines of the column, the second half those of the row.
    """
    frequencies = 10000 ** -(torch.arange(width // 4, dtype=torch.float64) * 4 / width)
    rows, columns = height_and_width(side)
    angles = torch.arange(max(rows, columns), dtype=torch.float64)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    across, down = axis[:columns].repeat(rows, 1), axis[:rows].repeat_interleave(columns, dim=0)
    grid = torch.cat([across, down], dim=1)
    return grid.float()[None]


@backbones.register("vit-tiny")
class ViTTiny(ViT):
    """ViT-Ti (Touvron et al., DeiT, 2021): width 192, 12 blocks, 3 heads."""

    shape = (192, 12, 3)


@backbones.register("vit-small")
class ViTSmall(ViT):
    """ViT-S (Touvron et al., DeiT, 2021): width 384, 12 blocks, 6 heads."""

    shape = (384, 12, 6)


@backbones.register("vit-base")
class ViTBase(ViT):
    """ViT-B (Dosovitskiy et al. 2021): width 768, 12 blocks, 12 heads."""

    shape = (768, 12, 12)


@backbones.register("vit-large")
class ViTLarge(ViT):
    """ViT-L (Dosovitskiy et al. 2021): width 1024, 24 blocks, 16 heads."""

    shape = (1024, 24, 16)


@backbones.register("vit-huge")
class ViTHuge(ViT):
    """ViT-H (Dosovitskiy et al. 2021): width 1280, 32 blocks, 16 heads; its paper's patch is 14."""

    shape = (1280, 32, 16)
