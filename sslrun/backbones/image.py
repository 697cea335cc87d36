"""The base class of image backbones.

They take images in [0, 1] and normalize them by buffers, which are saved with the weights.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from sslrun.backbones.base import Backbone
from sslrun.data.examples import Examples
from sslrun.data.image.augment import resize, to_float
from sslrun.data.image.whole import WholeImages
from sslrun.data.specs import ImageSpec
from sslrun.errors import UserError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MOST_SPECIAL = 16
"""Largest number of tokens that belong to no patch: [CLS] and registers."""
SAMPLE = 8192
"""Largest number of images that mean and standard deviation are computed from."""


class ImageBackbone(Backbone):
    """A backbone for images (B, C, H, W), float in [0, 1], of the spec's C channels."""

    takes = ImageSpec
    spec: ImageSpec
    mean: Tensor
    std: Tensor

    def __init__(self, options: object, spec: ImageSpec) -> None:
        super().__init__(options, spec)
        is_color = spec.channels == 3
        mean = IMAGENET_MEAN if is_color else (sum(IMAGENET_MEAN) / 3,) * spec.channels
        std = IMAGENET_STD if is_color else (sum(IMAGENET_STD) / 3,) * spec.channels
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))

    def fit_inputs(self, examples: Examples) -> None:
        """Set the channels' mean and standard deviation from at most `SAMPLE` images.

        The images are evenly spaced in the set.
        """
        stride = -(-len(examples) // SAMPLE)
        indices = torch.arange(0, len(examples), stride).split(512)
        parts = []
        for batch in examples.batches(indices, torch.device("cpu")):
            if isinstance(batch.inputs, WholeImages):
                channels = batch.inputs.pixels.T
            else:  # the frames of clips (B, T, C, H, W) are images, too
                channels = batch.inputs.flatten(0, -4).transpose(0, 1).flatten(1)
            parts.append(_moments(channels))
        counts, sums, squares = (
            torch.stack(column).sum(dim=0) for column in zip(*parts, strict=True)
        )
        mean = sums / counts
        variance = squares / counts - mean**2
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

    def obstacle(self, tensors: dict[str, Tensor]) -> str | None:
        mean = tensors.get("mean")
        loaded = self.spec.channels if mean is None else len(mean)
        # Files of other libraries have no mean, but a first convolution.
        for name, weight in self.named_parameters():
            if weight.ndim == 4 and name in tensors and tensors[name].ndim == 4:
                loaded = tensors[name].shape[1]
                break
        if loaded == self.spec.channels:
            return None
        return (
            f"its network takes images of {loaded} channels, and the data's have "
            f"{self.spec.channels}: pretrain on such images, or set data.channels: {loaded}"
        )

    def at_size(self, images: Tensor) -> Tensor:
        """Resize images to the size that the backbone was built for, if it takes no other."""
        return resize(images, self.spec.shape)


def _moments(channels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the number, the sums and the sums of squares of values (C, P), each (C,) float64.

    Values are scaled to [0, 1]. Bytes are counted by their 256 levels, which is faster.
    """
    count = torch.full((len(channels),), channels.shape[1], dtype=torch.float64)
    if channels.dtype != torch.uint8:
        values = to_float(channels).double()
        return count, values.sum(dim=1), values.square().sum(dim=1)
    levels = torch.arange(256, dtype=torch.float64) / 255
    counts = torch.stack([channel.bincount(minlength=256) for channel in channels]).double()
    return count, counts @ levels, counts @ levels**2


def patch_attention(backbone: Backbone, images: Tensor) -> Tensor:
    """Attention weights of [CLS] to patches in the last layer, (B, heads, rows, columns) float32.

    The weights of a head sum to 1 minus those of [CLS] and registers. Raises UserError if the
    backbone has no [CLS].
    """
    weights = backbone.attention(images)
    rows, columns = images.shape[-2] // backbone.patch, images.shape[-1] // backbone.patch
    if not 0 < weights.shape[-1] - rows * columns <= MOST_SPECIAL and "grid" in backbone.offers:
        grid = backbone(images).grid  # the backbone has resized the images
        rows, columns = (0, 0) if grid is None else grid.shape[-2:]
    if not 0 < weights.shape[-1] - rows * columns <= MOST_SPECIAL:
        raise UserError(
            f"'{backbone.name}' has no [CLS], whose attention could be read: choose a backbone "
            "that has one, such as vit-small"
        )
    patches = weights[:, :, 0, -rows * columns :]
    return patches.float().unflatten(-1, (rows, columns))
