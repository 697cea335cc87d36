"""Image GPT (Chen et al., ICML 2020): a GPT-2 over pixels, whose colors come from a palette."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from sslrun.backbones.base import Features, backbones
from sslrun.backbones.image import SAMPLE, ImageBackbone
from sslrun.backbones.transformer import STD, Block, BlockStyle, Stack, layers_of
from sslrun.data.examples import Batch, Examples
from sslrun.data.image.augment import resize, to_float
from sslrun.data.image.clusters import find_clusters
from sslrun.data.specs import ImageSpec
from sslrun.errors import UserError
from sslrun.registry import Options


def sigmoid_gelu(x: Tensor) -> Tensor:
    """The authors' approximation of GELU."""
    return x * torch.sigmoid(1.702 * x)


IGPT_STYLE = BlockStyle(kind="rms", eps=1e-5, bias=False, activation=sigmoid_gelu)
"""The block of the authors' code: no biases anywhere, and norms that neither center nor shift."""
CLUSTERED = 2**16
"""Largest number of pixels that k-means sees."""
UNUSED = 8.0
"""Value of the palette's rows that no color needs, farther from every color than any other row."""


class IGpt(ImageBackbone):
    """GPT-2 over the pixels of a small image, row by row, one token per pixel.

    Chen et al., "Generative Pretraining from Pixels", ICML 2020; the block, its initialization and
    the order of operations follow the authors' code (github.com/openai/image-gpt). Images are
    resized to `side`, and each pixel becomes the id of the nearest color of a palette. A causal
    model reads a learned start token and then all pixels except the last, so that the features at a
    pixel depend on earlier pixels only.

    Layer 0 is the normed input of the first block, and layer `depth` the normed output of the last
    one. Pooled features are the mean over the pixels of layer `read`; tokens are those of the last
    layer.

    Deviation: the palette is computed from the training images, not from ImageNet: all distinct
    colors if there are at most `colors`, else k-means.
    """

    class Options(Options):
        colors: int = Field(default=512, ge=2)
        """Number of colors in the palette; 512 in the paper."""
        side: int = Field(default=32, ge=2)
        """Side to resize images to, in pixels. Attention takes side^4 operations."""
        positions: int = Field(default=1024, ge=4)
        """Number of position embeddings: the largest number of pixels."""
        causal: bool = True
        """Whether a pixel attends to earlier pixels only. `order: masked` of the pretext task
        `pixels` needs false."""
        read: int | None = Field(default=None, ge=0)
        """Layer of the pooled features, from 0 (embedded pixels) to the number of blocks; default:
        the middle one, where the paper found the best features. Fine-tuning trains only the blocks
        before it."""
        depth: int | None = Field(default=None, ge=1)
        """Number of blocks; default: the named model's."""
        width: int | None = Field(default=None, ge=1)
        """Width of a token; default: the named model's."""
        heads: int | None = Field(default=None, ge=1)
        """Number of attention heads; default: the named model's."""

        @model_validator(mode="after")
        def _fits(self) -> IGpt.Options:
            if self.side**2 > self.positions:
                raise ValueError(
                    f"side {self.side} makes {self.side**2} pixels, more than the {self.positions} "
                    f"positions: set side to {int(self.positions**0.5)} at most, or raise positions"
                )
            return self

    offers = frozenset({"tokens", "grid", "layers", "palette"})
    shape: ClassVar[tuple[int, int, int]]
    """Width, depth and heads of the named model."""
    options: Options
    palette: Tensor
    """(colors, 3): red, green and blue in [0, 1]; `UNUSED` in rows that no color needs."""

    def __init__(self, options: Options, spec: ImageSpec) -> None:
        super().__init__(options, spec)
        width, depth, heads = self.shape
        width, depth = options.width or width, options.depth or depth
        heads = options.heads or heads
        if width % heads:
            raise UserError(f"{self.name}: width {width} is not a multiple of heads {heads}")
        if spec.channels != 3:
            raise UserError(
                f"{self.name}: its palette is of colors, but images have {spec.channels} channels: "
                "set data.channels: 3"
            )
        self.read = depth // 2 if options.read is None else options.read
        if self.read > depth:
            raise UserError(
                f"{self.name}: backbone.read is {self.read}, but the last layer is {depth}"
            )
        self.width = width
        self.layer_widths = (width,) * (depth + 1)
        # Gray levels, until `fit_inputs` replaces them.
        gray = torch.linspace(0, 1, options.colors)[:, None].repeat(1, 3)
        self.register_buffer("palette", gray)
        self.color_embed = nn.Embedding(options.colors, width)
        self.pos_embed = nn.Parameter(torch.empty(options.positions, width))
        self.start = nn.Parameter(torch.empty(width)) if options.causal else None
        self.blocks = Stack(Block(width, heads, IGPT_STYLE) for _ in range(depth))
        self.norm = IGPT_STYLE.make_norm(width)
        self._initialize()

    def _initialize(self) -> None:
        """Initialize all matrices as the authors' code does."""
        nn.init.normal_(self.color_embed.weight, std=STD)
        nn.init.normal_(self.pos_embed, std=0.01)
        if self.start is not None:
            nn.init.normal_(self.start, std=STD)
        for block in self.blocks:
            assert isinstance(block, Block)
            nn.init.normal_(block.attn.qkv.weight, std=self.width**-0.5)
            nn.init.normal_(block.attn.proj.weight, std=(self.width * len(self.blocks)) ** -0.5)
            for linear in (block.mlp.fc1, block.mlp.fc2):
                nn.init.normal_(linear.weight, std=STD)

    # ------------------------------------------------------------ colors

    def fit_inputs(self, examples: Examples) -> None:
        """Compute the palette from at most `SAMPLE` images, which are evenly spaced in the set.

        It holds all distinct colors of the resized images if there are at most `colors`, with 8
        bits per channel. Else it is found by k-means on at most `CLUSTERED` pixels. The same images
        give the same palette.
        """
        stride = -(-len(examples) // SAMPLE)
        indices = torch.arange(0, len(examples), stride).split(512)
        batches = examples.batches(indices, torch.device("cpu"))
        codes = torch.cat([self._color_codes(batch) for batch in batches])
        distinct = codes.unique()
        count = self.options.colors
        colors = _unpack(distinct) if len(distinct) <= count else _cluster(codes, count)
        self.palette.fill_(UNUSED)
        self.palette[: len(colors)] = colors

    def _color_codes(self, batch: Batch) -> Tensor:
        """The colors (P,) of all pixels of a raw batch, each packed into one int64 of 24 bits."""
        images = to_float(batch.inputs)
        if images.ndim > 4:  # the frames of clips (B, T, 3, H, W) are images, too
            images = images.flatten(0, -4)
        levels = (resize(images, self.options.side) * 255).round().long()
        red, green, blue = levels.transpose(0, 1).flatten(1)
        return (red << 16) | (green << 8) | blue

    def color_ids(self, images: Tensor) -> Tensor:
        """Palette ids (B, T) of the pixels of images (B, 3, H, W) in [0, 1], row by row."""
        channels = resize(images, self.options.side).flatten(2).unbind(dim=1)
        # A sum over channels, not a matrix product, which TF32 would round to other colors.
        distance = images.new_zeros(())
        for channel, levels in zip(channels, self.palette.unbind(dim=1), strict=True):
            distance = distance + (channel[..., None] - levels).square()
        return distance.argmin(dim=-1)

    def decode(self, ids: Tensor) -> Tensor:
        """Images (B, 3, side, side) in [0, 1] from palette ids (B, T)."""
        side = self.options.side
        return self.palette[ids].clamp(0, 1).transpose(1, 2).unflatten(2, (side, side))

    # ------------------------------------------------------------ features

    def encode_ids(self, ids: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Tokens (B, T, D) of the last layer, from palette ids (B, T).

        T may be smaller than the number of pixels. `hidden` (B, T) is True at pixels whose
        embedding is set to zero.
        """
        for layer in self._layers_of(ids, hidden):
            norm, state = layer
        return norm(state)

    def forward(self, inputs: Tensor) -> Features:
        """Images (B, 3, H, W) in [0, 1] of any size."""
        side = self.options.side
        for layer, (norm, state) in enumerate(self._layers_of(self.color_ids(inputs))):
            tokens = norm(state)
            if layer == self.read:
                pooled = tokens.mean(dim=1)
        return Features(pooled, tokens, tokens.transpose(1, 2).unflatten(2, (side, side)))

    def pooled_layers(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """The mean (B, D) over the pixels of each layer."""
        layers = self._layers_of(self.color_ids(inputs))
        return tuple(norm(state).mean(dim=1) for norm, state in layers)

    def _layers_of(
        self, ids: Tensor, hidden: Tensor | None = None
    ) -> Iterator[tuple[nn.Module, Tensor]]:
        """Yield the input (B, T, D) of each block with its first norm, then the last output.

        The norm of a block may be used only where its parameters are not sharded.
        """
        x = self.color_embed(ids)
        if hidden is not None:
            x = x.masked_fill(hidden[..., None], 0)
        if self.start is not None:
            x = torch.cat([self.start.expand(len(x), 1, -1), x[:, :-1]], dim=1)
        x = x + self.pos_embed[: x.shape[1]]
        for block in self.blocks:
            assert isinstance(block, Block)
            yield block.norm1, x
            x = self.blocks.through(block, x, None, self.options.causal)
        yield self.norm, x

    def layers(self) -> list[list[nn.Parameter]]:
        return layers_of(self, self.blocks, self.norm)


def _unpack(codes: Tensor) -> Tensor:
    """Colors (N, 3) in [0, 1] from codes (N,) of 24 bits."""
    return torch.stack([codes >> 16, (codes >> 8) & 255, codes & 255], dim=1).float() / 255


def _cluster(codes: Tensor, count: int) -> Tensor:
    """Find `count` colors (count, 3) by k-means on packed colors (P,)."""
    order = torch.randperm(len(codes), generator=torch.Generator().manual_seed(0))
    distinct, weights = codes[order[:CLUSTERED]].unique(return_counts=True)
    return find_clusters(_unpack(distinct), count, weights)


@backbones.register("igpt-tiny")
class IGptTiny(IGpt):
    """Image GPT of 4 blocks, 128 wide, with 4 heads: a size of our own for small images."""

    shape = (128, 4, 4)


@backbones.register("igpt-small")
class IGptSmall(IGpt):
    """iGPT-S (Chen et al. 2020): 24 blocks, 512 wide, 8 heads."""

    shape = (512, 24, 8)
