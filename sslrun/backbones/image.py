"""The base class of image backbones.

They take images in [0, 1] and normalize them by buffers, which are saved with the weights.
"""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor

from sslrun.backbones.base import Backbone
from sslrun.data.examples import Examples
from sslrun.data.image.whole import WholeImages
from sslrun.data.specs import ImageSpec

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SAMPLE = 8192
"""Largest number of images that mean and standard deviation are computed from."""


class ImageBackbone(Backbone):
    """A backbone for images (B, 3, H, W), float in [0, 1]."""

    takes = ImageSpec
    spec: ImageSpec
    mean: Tensor
    std: Tensor

    def __init__(self, options: object, spec: ImageSpec) -> None:
        super().__init__(options, spec)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN))
        self.register_buffer("std", torch.tensor(IMAGENET_STD))

    def fit_inputs(self, examples: Examples) -> None:
        """Set the channels' mean and standard deviation from at most `SAMPLE` images.

        The images are evenly spaced in the set.
        """
        stride = -(-len(examples) // SAMPLE)
        indices = torch.arange(0, len(examples), stride).split(512)
        counts = torch.zeros(3, 256, dtype=torch.float64)
        for batch in examples.batches(indices, torch.device("cpu")):
            if isinstance(batch.inputs, WholeImages):
                channels = batch.inputs.pixels.T
            else:  # the frames of clips (B, T, 3, H, W) are images, too
                channels = batch.inputs.flatten(0, -4).transpose(0, 1).flatten(1)
            for channel in range(3):
                counts[channel] += channels[channel].bincount(minlength=256)
        levels = torch.arange(256, dtype=torch.float64) / 255
        shares = counts / counts.sum(dim=1, keepdim=True)
        mean = shares @ levels
        variance = (shares * (levels - mean[:, None]) ** 2).sum(dim=1)
        self.mean.copy_(mean)
        # A constant channel is centered but not scaled up.
        self.std.copy_(variance.clamp_min(1e-6).sqrt())

    def own_names(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Drop the classifier; parameters of torchvision's ResNet and timm's ViT have our names.

        These networks normalize images by ImageNet's statistics, as a new backbone does.
        """
        classifier = re.compile(r"(fc|head|pre_logits)\.")
        kept = {name: tensor for name, tensor in tensors.items() if not classifier.match(name)}
        return kept | {"mean": self.mean, "std": self.std}

    def normalize(self, images: Tensor) -> Tensor:
        """Subtract `mean` and divide by `std`."""
        return (images - self.mean[:, None, None]) / self.std[:, None, None]

    def at_size(self, images: Tensor) -> Tensor:
        """Resize images to the size that the backbone was built for, if it takes no other."""
        size = (self.spec.size, self.spec.size)
        if images.shape[-2:] == size:
            return images
        return F.interpolate(images, size, mode="bilinear", antialias=True)
