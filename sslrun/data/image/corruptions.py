"""Corruptions of images that keep their label, at five severities, in the style of ImageNet-C and CIFAR-10-C.

Hendrycks and Dietterich, ICLR 2019. The noises, blurs, fog, brightness, contrast and JPEG take the constants of
CIFAR-10-C, with lengths in pixels of an image 32 wide: wider images are corrupted in proportion. Deviations: the fog
is a sum of octaves of smooth noise where theirs is plasma, and motion blur moves the image where theirs calls
ImageMagick. Pixelation is stronger, so that each severity is. Rotation, translation and inversion are ours, for sets whose
shift is one of style. What comes out is rounded to whole levels, as in the sets that they published.
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
"""Images (B, C, H, W) in [0, 1], a severity's constant, a generator -> images, possibly out of range."""


def corrupted(images: Tensor, name: str, severity: int, generator: Generator) -> Tensor:
    """Images (B, C, H, W) uint8, each corrupted by draws of its own from a generator on their device.

    UserError: no such corruption, or a severity that is not 1 to 5.
    """
    if name not in CORRUPTIONS:
        raise UserError(f"no such corruption: '{name}'.{did_you_mean(name, list(CORRUPTIONS))}")
    if not 1 <= severity <= 5:
        raise UserError(f"corruption '{name}': severity {severity} is not one of 1 to 5")
    corrupt, constants = CORRUPTIONS[name]
    made = corrupt(to_float(images), constants[severity - 1], generator)
    return made.clamp(0, 1).mul_(255).round_().to(torch.uint8)


@dataclass(frozen=True)
class Corrupted(Examples):
    """Images that are corrupted as they are drawn, on the device.

    A batch's draws depend on the corruption, the severity and the batch's first place, on nothing else: whatever is
    tested in the same batches, by whatever seed it was trained, sees the same images.
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

    def subset(self, indices: Tensor) -> Corrupted:
        return replace(self, images=self.images.subset(indices))

    def batches(self, indices: Iterable[Tensor], device: torch.device) -> Iterator[Batch]:
        generator = Generator(device)
        places, drawn = tee(indices)
        for place, batch in zip(places, self.images.batches(drawn, device), strict=True):
            key = hashlib.sha256(f"{self.corruption} {self.severity} {int(place[0])}".encode()).digest()
            generator.manual_seed(int.from_bytes(key[:8], "little") >> 1)
            yield batch._replace(inputs=corrupted(batch.inputs, self.corruption, self.severity, generator))


def _scale(images: Tensor) -> float:
    """How much wider than CIFAR's the images are."""
    return max(1.0, images.shape[-1] / 32)


def _uniform(images: Tensor, low: float, high: float, generator: Generator) -> Tensor:
    """(B,) one draw an image."""
    return low + (high - low) * torch.rand(len(images), generator=generator, device=images.device)


# ---------------------------------------------------------------- noise


def _gaussian_noise(images: Tensor, deviation: float, generator: Generator) -> Tensor:
    """Of this deviation."""
    return images + deviation * torch.randn(images.shape, generator=generator, device=images.device)


def _shot_noise(images: Tensor, photons: float, generator: Generator) -> Tensor:
    """Photons that make a white pixel."""
    return torch.poisson(images * photons, generator=generator) / photons


def _impulse_noise(images: Tensor, share: float, generator: Generator) -> Tensor:
    """Share of the values that become black or white."""
    hit, salt = torch.rand((2, *images.shape), generator=generator, device=images.device)
    return torch.where(hit < share, (salt < 0.5).float(), images)


# ---------------------------------------------------------------- blur


def _gaussian_blur(images: Tensor, sigma: float, generator: Generator) -> Tensor:
    """Sigma, in pixels."""
    sigma *= _scale(images)
    kernel = min(2 * math.ceil(4 * sigma) + 1, 2 * images.shape[-1] - 1)
    return gaussian_blur(images, torch.full((len(images),), sigma, device=images.device), kernel)


def _defocus_blur(images: Tensor, disk: tuple[float, float], generator: Generator) -> Tensor:
    """A disk: its radius, and the sigma that its edge is smoothed with, in pixels."""
    radius, edge = (each * _scale(images) for each in disk)
    reach = min(math.ceil(radius) + 1, images.shape[-1] - 1)
    at = torch.arange(-reach, reach + 1, device=images.device, dtype=torch.float32)
    kernel = (at[:, None] ** 2 + at**2 <= radius**2).float()
    near = torch.exp(-0.5 * (torch.arange(-1, 2, device=images.device) / edge) ** 2)
    smooth = (near[:, None] * near / near.sum() ** 2)[None, None]
    kernel = F.conv2d(kernel[None, None], smooth, padding=1)
    channels = images.shape[1]
    padded = F.pad(images, (reach,) * 4, mode="reflect")
    return F.conv2d(padded, (kernel / kernel.sum()).expand(channels, 1, -1, -1), groups=channels)


def _motion_blur(images: Tensor, motion: tuple[float, float], generator: Generator) -> Tensor:
    """How many pixels an image moves, and the sigma of how long it stays at each."""
    radius, sigma = (each * _scale(images) for each in motion)
    angle = _uniform(images, -math.pi / 4, math.pi / 4, generator)
    weights = torch.exp(-0.5 * (torch.arange(round(radius) + 1) / sigma) ** 2)
    moved = torch.zeros_like(images)
    for step, weight in enumerate((weights / weights.sum()).tolist()):
        moved += weight * _moved(images, x=step * angle.cos(), y=step * angle.sin())
    return moved


# ---------------------------------------------------------------- weather and light


def _fog(images: Tensor, fog: tuple[float, float], generator: Generator) -> Tensor:
    """Its density, and by how much each octave of its structure is weaker than the coarser one before."""
    density, decay = fog
    side = images.shape[-2:]
    field, weight, cells = torch.zeros(len(images), 1, *side, device=images.device), 1.0, 2
    while cells <= max(side):
        noise = torch.rand((len(images), 1, cells, cells), generator=generator, device=images.device)
        field += weight * F.interpolate(noise, side, mode="bilinear", align_corners=True)
        weight, cells = weight / decay, 2 * cells
    low, high = field.amin(dim=(1, 2, 3), keepdim=True), field.amax(dim=(1, 2, 3), keepdim=True)
    brightest = images.amax(dim=(1, 2, 3), keepdim=True)
    return (images + density * (field - low) / (high - low)) * brightest / (brightest + density)


def _brightness(images: Tensor, more: float, generator: Generator) -> Tensor:
    """What HSV's value is raised by: the brightest channel, the others in proportion."""
    value = images.amax(dim=1, keepdim=True)
    raised = (value + more).clamp(max=1)
    return torch.where(value > 0, images * raised / value.clamp(min=1e-6), raised)


def _contrast(images: Tensor, factor: float, generator: Generator) -> Tensor:
    """Of the image's own, around its mean."""
    mean = images.mean(dim=(2, 3), keepdim=True)
    return (images - mean) * factor + mean


def _inversion(images: Tensor, share: float, generator: Generator) -> Tensor:
    """How much of the way to the negative, which is at 1."""
    return images + share * (1 - 2 * images)


# ---------------------------------------------------------------- digital


def _pixelate(images: Tensor, share: float, generator: Generator) -> Tensor:
    """Side of what the image is reduced to and enlarged from, as a share."""
    side = images.shape[-2:]
    small = F.interpolate(images, [max(1, int(each * share / _scale(images) ** 0.5)) for each in side], mode="area")
    return F.interpolate(small, side, mode="nearest-exact")


def _jpeg(images: Tensor, quality: int, generator: Generator) -> Tensor:
    """Quality of the file that it goes through, image by image."""
    from torchvision.transforms.functional import pil_to_tensor, to_pil_image  # takes longer than all of sslrun's

    decoded = []
    for image in (images * 255).round().to(torch.uint8).cpu():
        file = io.BytesIO()
        to_pil_image(image).save(file, "jpeg", quality=quality)
        decoded.append(pil_to_tensor(Image.open(file)))
    return to_float(torch.stack(decoded)).to(images.device)


# ---------------------------------------------------------------- geometry


def _rotation(images: Tensor, degrees: float, generator: Generator) -> Tensor:
    """Degrees, counter-clockwise or clockwise, the border's pixels repeated beyond it."""
    angle = math.radians(degrees) * torch.sign(_uniform(images, -1, 1, generator))
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    return _resampled(images, torch.stack([cos, -sin, zero, sin, cos, zero], dim=1).view(-1, 2, 3))


def _translation(images: Tensor, share: float, generator: Generator) -> Tensor:
    """Share of the side, in any direction."""
    angle, by = _uniform(images, 0, 2 * math.pi, generator), share * images.shape[-1]
    return _moved(images, by * angle.cos(), by * angle.sin())


def _moved(images: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Each image by its own `x` and `y` (B,), in pixels."""
    one, zero = torch.ones_like(x), torch.zeros_like(x)
    width, height = images.shape[-1], images.shape[-2]
    return _resampled(
        images, torch.stack([one, zero, -2 * x / width, zero, one, -2 * y / height], dim=1).view(-1, 2, 3)
    )


def _resampled(images: Tensor, matrices: Tensor) -> Tensor:
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
"""Name -> what does it, its docstring saying what its constant is, and that constant at each severity."""
