"""Image networks without attention and convolution: a plain MLP, and the MLP-Mixer."""

from __future__ import annotations

import math
from itertools import pairwise

from pydantic import Field
from torch import Tensor, nn

from sslrun import registry
from sslrun.backbones.base import Features, backbones
from sslrun.backbones.image import ImageBackbone
from sslrun.backbones.transformer import Mlp
from sslrun.backbones.vit import PatchEmbed, patches_along
from sslrun.data.specs import ImageSpec


@backbones.register("mlp")
class MLP(ImageBackbone):
    """Multilayer perceptron on all pixels at once, which does not know their arrangement.

    Images are resized to the size that the network was built for. Each layer is a linear map, a
    batch norm and a ReLU.
    """

    class Options(registry.Options):
        width: int = Field(default=1024, ge=1)
        """Width of the hidden layers and of the features."""
        depth: int = Field(default=3, ge=1)
        """Number of hidden layers."""

    options: Options

    def __init__(self, options: Options, spec: ImageSpec) -> None:
        super().__init__(options, spec)
        self.width = options.width
        inputs = spec.channels * math.prod(spec.shape)
        widths = [inputs, *[options.width] * options.depth]
        self.hidden = nn.ModuleList(
            nn.Sequential(nn.Linear(before, after), nn.BatchNorm1d(after), nn.ReLU())
            for before, after in pairwise(widths)
        )

    def forward(self, inputs: Tensor) -> Features:
        """Images (B, C, H, W) in [0, 1]."""
        x = self.normalize(self.at_size(inputs)).flatten(1)
        for layer in self.hidden:
            x = layer(x)
        return Features(x)

    def layers(self) -> list[list[nn.Parameter]]:
        return [list(layer.parameters()) for layer in self.hidden]


class MixerBlock(nn.Module):
    """An MLP over patches, then one over channels, each with a pre-norm and a residual."""

    def __init__(self, patches: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.mlp_tokens, self.mlp_channels = Mlp(patches, width // 2), Mlp(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mlp_tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.mlp_channels(self.norm2(x))


@backbones.register("mixer")
class Mixer(ImageBackbone):
    """MLP-Mixer: patches as in a ViT, mixed by MLPs instead of attention.

    Tolstikhin et al., NeurIPS 2021 (arXiv:2105.01601); defaults are those of S/16. Images are
    resized to the size that the network was built for, because it mixes a fixed number of patches.
    Deviation: linear maps have PyTorch's default initialization, for simplicity.
    """

    offers = frozenset({"tokens", "grid"})

    class Options(registry.Options):
        patch: int = Field(default=16, ge=1)
        """Side of a patch, in pixels."""
        width: int = Field(default=512, ge=2)
        """Width of a token."""
        depth: int = Field(default=8, ge=1)
        """Number of blocks."""

    options: Options

    def __init__(self, options: Options, spec: ImageSpec) -> None:
        super().__init__(options, spec)
        patches = math.prod(patches_along("mixer", side, options.patch) for side in spec.shape)
        self.width = options.width
        self.patch_embed = PatchEmbed(options.width, options.patch, spec.channels)
        self.blocks = nn.ModuleList(
            MixerBlock(patches, options.width) for _ in range(options.depth)
        )
        self.norm = nn.LayerNorm(options.width, eps=1e-6)

    def forward(self, inputs: Tensor) -> Features:
        """Images (B, C, H, W) in [0, 1]."""
        grid = self.patch_embed(self.normalize(self.at_size(inputs)))
        x = grid.flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        tokens = self.norm(x)  # (B, patches, D)
        return Features(tokens.mean(dim=1), tokens, tokens.transpose(1, 2).reshape(grid.shape))

    def layers(self) -> list[list[nn.Parameter]]:
        blocks = [list(block.parameters()) for block in self.blocks]
        return [
            list(self.patch_embed.parameters()),
            *blocks[:-1],
            [*blocks[-1], *self.norm.parameters()],
        ]
