"""The baseline without a network: raw pixels as features."""

from __future__ import annotations

import math

from torch import Tensor

from sslrun.backbones.base import Features, backbones
from sslrun.backbones.image import ImageBackbone
from sslrun.data.specs import ImageSpec
from sslrun.registry import Options


@backbones.register("pixels")
class Pixels(ImageBackbone):
    """Return the normalized pixels as features, without any parameters.

    Images are resized to the size that the backbone was built for.
    """

    def __init__(self, options: Options, spec: ImageSpec) -> None:
        super().__init__(options, spec)
        self.width = spec.channels * math.prod(spec.shape)

    def forward(self, inputs: Tensor) -> Features:
        """Images (B, C, H, W) in [0, 1]; pooled features (B, C * H * W)."""
        return Features(self.normalize(self.at_size(inputs)).flatten(1))
