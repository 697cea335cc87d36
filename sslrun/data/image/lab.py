"""CIE Lab: lightness L in 0 to 100, and the color axes a (green to red) and b (blue to yellow).

Conversions of sRGB images, with the white point D65. They use no matrix product, which autocast
would compute in bf16: colors would then be wrong by whole units.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sslrun.data.examples import Batch, Examples
from sslrun.data.image.whole import WholeImages

TO_XYZ = (
    (0.4124564, 0.3575761, 0.1804375),
    (0.2126729, 0.7151522, 0.0721750),
    (0.0193339, 0.1191920, 0.9503041),
)
"""Weights of linear red, green and blue in X, Y and Z (IEC 61966-2-1)."""
WHITE = tuple(sum(row) for row in TO_XYZ)
"""X, Y and Z of white, so that white is exactly (100, 0, 0) in Lab."""
LINEAR_UP_TO, SLOPE, OFFSET, GAMMA = 0.04045, 12.92, 0.055, 2.4
"""sRGB's transfer function: linear up to a value, then a power."""
DELTA = 6 / 29
"""Lab's transfer function is a cube root above the cube of this value, and linear below."""


def rgb_to_lab(images: Tensor) -> Tensor:
    """Convert sRGB images (B, 3, H, W) in [0, 1] to Lab (B, 3, H, W): L, a and b."""
    light = _expand(images).unbind(1)
    x, y, z = (
        _compress(_weigh(light, row) / white) for row, white in zip(TO_XYZ, WHITE, strict=True)
    )
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)


def lab_to_rgb(images: Tensor) -> Tensor:
    """Convert Lab images (B, 3, H, W) to sRGB in [0, 1]; colors that sRGB lacks are clamped."""
    lightness, a, b = images.unbind(1)
    y = (lightness + 16) / 116
    curves = (y + a / 500, y, y - b / 200)
    xyz = [_decompress(curve) * white for curve, white in zip(curves, WHITE, strict=True)]
    inverse = torch.tensor(TO_XYZ, dtype=torch.float64).inverse().tolist()
    light = torch.stack([_weigh(xyz, row) for row in inverse], dim=1).clamp(0, 1)
    power = (1 + OFFSET) * light.clamp(min=LINEAR_UP_TO / SLOPE) ** (1 / GAMMA) - OFFSET
    return torch.where(light <= LINEAR_UP_TO / SLOPE, SLOPE * light, power).clamp(0, 1)


def lightness(images: Tensor) -> Tensor:
    """Replace sRGB images (B, 3, H, W) in [0, 1] by their lightness L / 100 in three channels."""
    light = _expand(images).unbind(1)
    y = _compress(_weigh(light, TO_XYZ[1]) / WHITE[1])
    return (1.16 * y - 0.16)[:, None].expand(-1, 3, -1, -1).contiguous()


def _expand(images: Tensor) -> Tensor:
    """Linear light of sRGB values."""
    power = ((images + OFFSET) / (1 + OFFSET)).clamp(min=0) ** GAMMA
    return torch.where(images <= LINEAR_UP_TO, images / SLOPE, power)


def _compress(light: Tensor) -> Tensor:
    """Lab's transfer function."""
    root = light.clamp(min=DELTA**3) ** (1 / 3)
    return torch.where(light > DELTA**3, root, light / (3 * DELTA**2) + 4 / 29)


def _decompress(curve: Tensor) -> Tensor:
    """The inverse of `_compress`."""
    return torch.where(curve > DELTA, curve**3, 3 * DELTA**2 * (curve - 4 / 29))


def _weigh(channels: Iterable[Tensor], weights: Iterable[float]) -> Tensor:
    """The weighted sum (B, H, W) of channels (B, H, W)."""
    parts = [channel * weight for channel, weight in zip(channels, weights, strict=True)]
    return torch.stack(parts).sum(dim=0)


@dataclass(frozen=True)
class LightnessExamples(Examples):
    """Images as their lightness in three equal channels, uint8: to fit normalization to."""

    images: Examples

    def __post_init__(self) -> None:
        object.__setattr__(self, "spec", self.images.spec)
        object.__setattr__(self, "labels", self.images.labels)
        object.__setattr__(self, "classes", self.images.classes)

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, indices: Tensor) -> LightnessExamples:
        return LightnessExamples(self.images.subset(indices))

    def batches(self, indices: Iterable[Tensor], device: torch.device) -> Iterator[Batch]:
        for batch in self.images.batches(indices, device):
            yield batch._replace(inputs=_lightness_bytes(batch.inputs))


def _lightness_bytes(images: Tensor | WholeImages) -> Tensor | WholeImages:
    """The lightness of uint8 images, rounded to uint8."""
    if isinstance(images, WholeImages):
        flat = images.pixels.T[None, :, :, None]
        return replace(images, pixels=_to_bytes(flat)[0, :, :, 0].T)
    return _to_bytes(images.flatten(0, -4)).view(images.shape)


def _to_bytes(images: Tensor) -> Tensor:
    return (lightness(images.float() / 255) * 255).round().byte()
