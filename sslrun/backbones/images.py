"""What image backbones share: they take images in [0, 1] and normalise them by buffers that travel with the weights."""

from __future__ import annotations

import torch
from torch import Tensor

from sslrun.backbones.base import Backbone
from sslrun.data.examples import Examples, InputSpec

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SAMPLE = 8192
"""Images that mean and deviation are taken from, at most."""


class ImageBackbone(Backbone):
    """A backbone for images (B, 3, H, W), float in [0, 1]."""

    mean: Tensor
    std: Tensor

    def __init__(self, options: object, spec: InputSpec) -> None:
        super().__init__(options, spec)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN))
        self.register_buffer("std", torch.tensor(IMAGENET_STD))

    @torch.no_grad()
    def fit_inputs(self, examples: Examples) -> None:
        """Take the channels' mean and deviation over at most `SAMPLE` images, evenly spaced in the set."""
        stride = max(1, len(examples) // SAMPLE)
        indices = torch.arange(0, len(examples), stride).split(512)
        sums = torch.zeros(2, 3, dtype=torch.float64)
        pixels = 0
        for batch in examples.batches(indices, torch.device("cpu")):
            values = batch.inputs.double() / 255
            sums[0] += values.sum(dim=(0, 2, 3))
            sums[1] += values.square().sum(dim=(0, 2, 3))
            pixels += values[:, 0].numel()
        mean, square = sums / pixels
        self.mean.copy_(mean)
        # A channel that never changes is left as it is, centred.
        self.std.copy_((square - mean**2).clamp_min(1e-6).sqrt())

    def normalize(self, images: Tensor) -> Tensor:
        return (images - self.mean[:, None, None]) / self.std[:, None, None]
