"""Label-preserving image corruptions at five severities, as in ImageNet-C and CIFAR-10-C.

Hendrycks and Dietterich, ICLR 2019 (arXiv:1903.12261). Noise, blur, fog, brightness, contrast and
JPEG use the constants of CIFAR-10-C. Lengths are in pixels of an image of width 32; wider images
are corrupted in proportion. Values are rounded to whole levels, as in the published sets.

Deviations:
- Fog is a sum of octaves of smooth noise instead of plasma noise, to draw a batch on its device.
- Motion blur averages shifted images instead of calling ImageMagick, for the same reason.
- Pixelation is stronger, so that each severity has an effect on small images.
- Rotation, translation and inversion are additions, for sets whose shift is one of style.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import tee
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Generator, Tensor

from sslrun.data.examples import Batch, Examples
from sslrun.data.image.augment import gaussian_blur, to_float
from sslrun.data.specs import InputSpec
from sslrun.errors import UserError
from sslrun.registry import did_you_mean

Corruption = Callable[[Tensor, Any, Generator], Tensor]
"""(images (B, C, H, W) in [0, 1], severity's constant, generator) -> images, not yet clamped."""


def corrupt(images: Tensor, name: str, severity: int, generator: Generator) -> Tensor:
    """Corrupt images (B, C, H, W) uint8, each by draws of its own from a generator on their device.

    Raises:
        UserError: There is no such corruption, or the severity is not from 1 to 5.
    """
    if name not in CORRUPTIONS:
        raise UserError(f"no such corruption: '{name}'.{did_you_mean(name, list(CORRUPTIONS))}")
    if not 1 <= severity <= 5:
        raise UserError(f"corruption '{name}': severity {severity} should be from 1 to 5")
    function, constants = CORRUPTIONS[name]
    result = function(to_float(images), constants[severity - 1], generator)
    return result.clamp(0, 1).mul_(255).round_().to(torch.uint8)


@dataclass(frozen=True)
class CorruptedExamples(Examples):
    """Images that are corrupted on the device as they are drawn.

    The draws of a batch depend only on the corruption, the severity and the first index of the
    batch. Runs that are tested in the same batches get the same images for any seed.
    """

    images: Examples
    corruption: str
    severity: int

    @property
    def spec(self) -> InputSpec:  # type: ignore[override]
        return self.images.spec

    @property
    def labels(self) -> Tensor | None:  # type: ignore[override]
        return self.images.labels

    @property
    def classes(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.images.classes

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, indices: Tensor) -> CorruptedExamples:
        return replace(self, images=self.images.subset(indices))

    def batches(self, indices: Iterable[Tensor], device: torch.device) -> Iterator[Batch]:
        generator = Generator(device)
        for_seeds, for_images = tee(indices)
        batches = self.images.batches(for_images, device)
        for batch_indices, batch in zip(for_seeds, batches, strict=True):
            key = f"{self.corruption} {self.severity} {int(batch_indices[0])}"
            digest = hashlib.sha256(key.encode()).digest()
            generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            images = corrupt(batch.inputs, self.corruption, self.severity, generator)
            yield batch._replace(inputs=images)


def _scale(images: Tensor) -> float:
    """Return the width of the images in units of CIFAR's 32 pixels, at least 1."""
    return max(1.0, images.shape[-1] / 32)


def _uniform(images: Tensor, low: float, high: float, generator: Generator) -> Tensor:
    """Draw one number per image, (B,)."""
    return low + (high - low) * torch.rand(len(images), generator=generator, device=images.device)


# `sslrun show corruption` prints the first line of each docstring below, before the constants.

# ---------------------------------------------------------------- noise


def _gaussian_noise(images: Tensor, deviation: float, generator: Generator) -> Tensor:
    """Gaussian noise, by its standard deviation."""
    noise = torch.randn(images.shape, generator=generator, device=images.device)
    return images + deviation * noise


def _shot_noise(images: Tensor, photons: float, generator: Generator) -> Tensor:
    """Poisson noise, by the number of photons of a white pixel."""
    return torch.poisson(images * photons, generator=generator) / photons


def _impulse_noise(images: Tensor, share: float, generator: Generator) -> Tensor:
    """Salt-and-pepper noise, by the share of values that become black or white."""
    draws = torch.rand((2, *images.shape), generator=generator, device=images.device)
    hit, salt = draws
    return torch.where(hit < share, (salt < 0.5).float(), images)


# ---------------------------------------------------------------- blur


def _gaussian_blur(images: Tensor, sigma: float, generator: Generator) -> Tensor:
    """Gaussian blur, by its standard deviation in pixels."""
    sigma *= _scale(images)
    kernel = min(2 * math.ceil(4 * sigma) + 1, 2 * images.shape[-1] - 1)
    sigmas = torch.full((len(images),), sigma, device=images.device)
    return gaussian_blur(images, sigmas, kernel)


def _defocus_blur(images: Tensor, disk: tuple[float, float], generator: Generator) -> Tensor:
    """Blur by a disk, by its radius and the standard deviation that smooths its edge, in pixels."""
    radius, edge = (length * _scale(images) for length in disk)
    reach = min(math.ceil(radius) + 1, images.shape[-1] - 1)
    offsets = torch.arange(-reach, reach + 1, device=images.device, dtype=torch.float32)
    sharp = (offsets[:, None] ** 2 + offsets**2 <= radius**2).float()
    # Smooth the disk with a 3 x 3 Gaussian kernel.
    gaussian = torch.exp(-0.5 * (torch.arange(-1, 2, device=images.device) / edge) ** 2)
    smoothing = (gaussian[:, None] * gaussian / gaussian.sum() ** 2)[None, None]
    kernel = F.conv2d(sharp[None, None], smoothing, padding=1)
    kernel = (kernel / kernel.sum()).expand(images.shape[1], 1, -1, -1)
    padded = F.pad(images, (reach,) * 4, mode="reflect")
    return F.conv2d(padded, kernel, groups=images.shape[1])


def _motion_blur(images: Tensor, motion: tuple[float, float], generator: Generator) -> Tensor:
    """Motion blur, by its length and the standard deviation of the weights along it, in pixels."""
    radius, sigma = (length * _scale(images) for length in motion)
    angle = _uniform(images, -math.pi / 4, math.pi / 4, generator)
    weights = torch.exp(-0.5 * (torch.arange(round(radius) + 1) / sigma) ** 2)
    blurred = torch.zeros_like(images)
    for step, weight in enumerate((weights / weights.sum()).tolist()):
        blurred += weight * _shift(images, x=step * angle.cos(), y=step * angle.sin())
    return blurred


# ---------------------------------------------------------------- weather and light


def _fog(images: Tensor, fog: tuple[float, float], generator: Generator) -> Tensor:
    """Fog, by its density and the factor by which each finer octave of its structure is weaker."""
    density, decay = fog
    side = images.shape[-2:]
    field = torch.zeros(len(images), 1, *side, device=images.device)
    weight, cells = 1.0, 2
    while cells <= max(side):
        shape = (len(images), 1, cells, cells)
        noise = torch.rand(shape, generator=generator, device=images.device)
        field += weight * F.interpolate(noise, side, mode="bilinear", align_corners=True)
        weight, cells = weight / decay, 2 * cells
    low = field.amin(dim=(1, 2, 3), keepdim=True)
    high = field.amax(dim=(1, 2, 3), keepdim=True)
    brightest = images.amax(dim=(1, 2, 3), keepdim=True)
    foggy = images + density * (field - low) / (high - low)
    return foggy * brightest / (brightest + density)


def _brightness(images: Tensor, increase: float, generator: Generator) -> Tensor:
    """Brightness, by the increase of the brightest channel; the others follow in proportion."""
    value = images.amax(dim=1, keepdim=True)
    raised = (value + increase).clamp(max=1)
    return torch.where(value > 0, images * raised / value.clamp(min=1e-6), raised)


def _contrast(images: Tensor, factor: float, generator: Generator) -> Tensor:
    """Lower contrast, by the factor on the distance from the image's mean."""
    mean = images.mean(dim=(2, 3), keepdim=True)
    return (images - mean) * factor + mean


def _inversion(images: Tensor, share: float, generator: Generator) -> Tensor:
    """Inversion, by the share of the way to the negative."""
    return images + share * (1 - 2 * images)


# ---------------------------------------------------------------- digital


def _pixelate(images: Tensor, share: float, generator: Generator) -> Tensor:
    """Pixelation, by the share of its side that the image is reduced to before it is enlarged."""
    side = images.shape[-2:]
    scale = _scale(images) ** 0.5
    small_side = [max(1, int(length * share / scale)) for length in side]
    small = F.interpolate(images, small_side, mode="area")
    return F.interpolate(small, side, mode="nearest-exact")


def _jpeg(images: Tensor, quality: int, generator: Generator) -> Tensor:
    """JPEG compression, by its quality."""
    # Imported here, because it takes longer than importing all of sslrun.
    from torchvision.transforms.functional import pil_to_tensor, to_pil_image

    decoded = []
    for image in (images * 255).round().to(torch.uint8).cpu():
        file = io.BytesIO()
        to_pil_image(image).save(file, "jpeg", quality=quality)
        decoded.append(pil_to_tensor(Image.open(file)))
    return to_float(torch.stack(decoded)).to(images.device)


# ---------------------------------------------------------------- geometry


def _rotation(images: Tensor, degrees: float, generator: Generator) -> Tensor:
    """Rotation to either side, by its degrees; the border is repeated beyond it."""
    angle = math.radians(degrees) * torch.sign(_uniform(images, -1, 1, generator))
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    matrices = torch.stack([cos, -sin, zero, sin, cos, zero], dim=1).view(-1, 2, 3)
    return _transform(images, matrices)


def _translation(images: Tensor, share: float, generator: Generator) -> Tensor:
    """Translation in a random direction, by the share of the side; the border is repeated."""
    angle = _uniform(images, 0, 2 * math.pi, generator)
    distance = share * images.shape[-1]
    return _shift(images, distance * angle.cos(), distance * angle.sin())


def _shift(images: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Shift each image by its own `x` and `y` (B,), in pixels."""
    one, zero = torch.ones_like(x), torch.zeros_like(x)
    height, width = images.shape[-2:]
    rows = [one, zero, -2 * x / width, zero, one, -2 * y / height]
    return _transform(images, torch.stack(rows, dim=1).view(-1, 2, 3))


def _transform(images: Tensor, matrices: Tensor) -> Tensor:
    """Apply an affine map (2, 3) per image; it takes output to input positions in [-1, 1]."""
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


CORRUPTIONS: dict[str, tuple[Corruption, tuple[Any, ...]]] = {
    "gaussian-noise": (_gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot-noise": (_shot_noise, (500, 250, 100, 75, 50)),
    "impulse-noise": (_impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "gaussian-blur": (_gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1.0)),
    "defocus-blur": (_defocus_blur, ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1))),
    "motion-blur": (_motion_blur, ((6, 1.0), (6, 1.5), (6, 2.0), (8, 2.0), (9, 2.5))),
    "fog": (_fog, ((0.2, 3.0), (0.5, 3.0), (0.75, 2.5), (1.0, 2.0), (1.5, 1.75))),
    "brightness": (_brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": (_contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "pixelate": (_pixelate, (0.8, 0.65, 0.5, 0.4, 0.3)),
    "jpeg": (_jpeg, (80, 65, 58, 50, 40)),
    "rotation": (_rotation, (5.0, 10.0, 15.0, 22.5, 30.0)),
    "translation": (_translation, (1 / 16, 1 / 8, 3 / 16, 1 / 4, 5 / 16)),
    "inversion": (_inversion, (0.2, 0.4, 0.6, 0.8, 1.0)),
}
"""Name -> (function, constant at each severity); the docstring explains the constant."""
