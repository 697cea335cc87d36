"""The baseline without a network: raw pixels as features."""

from __future__ import annotations

import math

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from sslrun import registry
from sslrun.backbones.base import Features, backbones
from sslrun.backbones.image import ImageBackbone
from sslrun.data.specs import ImageSpec
from sslrun.errors import UserError


@backbones.register("pixels")
class Pixels(ImageBackbone):
    """Return the normalized pixels as features, without any parameters.

    Pooled features are the pixels of the image, resized to the size that the backbone was built
    for. A place of the grid has the pixels of a patch, of images of any size.
    """

    offers = frozenset({"dense"})

    class Options(registry.Options):
        patch: int = Field(default=4, ge=1)
        """Side of the patches in the grid, in pixels."""

    options: Pixels.Options

    def __init__(self, options: Pixels.Options, spec: ImageSpec) -> None:
        super().__init__(options, spec)
        self.width = spec.channels * math.prod(spec.shape)

    def forward(self, inputs: Tensor) -> Features:
        """Images (B, C, H, W) in [0, 1]; pooled features (B, C * H * W)."""
        return Features(self.normalize(self.at_size(inputs)).flatten(1))

    def dense(self, inputs: Tensor, layer: int | None = None) -> Tensor:
        """The pixels (B, 3 * patch * patch, H / patch, W / patch) of patches."""
        if layer is not None:
            raise UserError(f"'{self.name}' has no layers: leave layer out")
        patch = self.options.patch
        height, width = (side // patch * patch for side in inputs.shape[-2:])
        return F.pixel_unshuffle(self.normalize(inputs)[..., :height, :width], patch)
