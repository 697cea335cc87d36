"""A backbone for images: three convolutions, with pooled features and a grid of features."""

from itertools import pairwise

from pydantic import Field
from torch import nn

from sslrun.backbones.base import Features, backbones
from sslrun.backbones.image import ImageBackbone
from sslrun.registry import Options


@backbones.register("convnet")
class ConvNet(ImageBackbone):
    """Three convolutions of stride 2 with batch norm and ReLU, then the mean over positions.

    Offers a grid of features (B, width, H / 8, W / 8) in addition to pooled ones (B, width).
    """

    offers = frozenset({"grid"})

    class Options(Options):
        width: int = Field(default=64, ge=4)
        """Channels of the last convolution; each convolution before it has half as many."""

    def __init__(self, options, spec):
        super().__init__(options, spec)
        self.width = options.width
        channels = [3, options.width // 4, options.width // 2, options.width]
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU()
            )
            for before, after in pairwise(channels)
        )

    def forward(self, inputs):
        """Map images (B, 3, H, W) in [0, 1] to features."""
        x = self.normalize(inputs)
        for block in self.blocks:
            x = block(x)
        return Features(pooled=x.mean(dim=(2, 3)), grid=x)

    def layers(self):
        return [list(block.parameters()) for block in self.blocks]
