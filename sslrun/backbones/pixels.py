"""No network at all: the baseline that learning from raw pixels is."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sslrun.backbones.base import Features, backbones
from sslrun.backbones.images import ImageBackbone


@backbones.register("pixels", modality="image")
class Pixels(ImageBackbone):
    """Features are the pixels themselves, normalised; it has no parameters."""

    def __init__(self, options: Any, spec: Any) -> None:
        super().__init__(options, spec)
        self.width = 3 * spec.size**2

    def forward(self, inputs: Tensor) -> Features:
        """Images (B, 3, size, size) in [0, 1]."""
        return Features(self.normalize(inputs).flatten(1))
