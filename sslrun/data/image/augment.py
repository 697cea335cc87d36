"""Augmentation of image batches on their device, every image with random parameters of its own.

Each augmentation has a deterministic part, which takes one parameter an image and equals torchvision's function on it,
and a draw of those parameters from a seeded generator. Resampling and blur are products with small matrices made for
each image, so that they cost what a batched matrix product costs, on any device. No call waits for the device.

Images are float32 (B, 3, H, W) in [0, 1] unless said otherwise.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor

from sslrun.registry import Options

CHUNK = 64
"""Images augmented at a time on the CPU: what their intermediate results take stays in the cache."""
LUMA = (0.2989, 0.587, 0.114)
"""Weights of red, green and blue in grey (ITU-R 601, as torchvision's)."""


def to_float(images: Tensor) -> Tensor:
    """uint8 as float32 in [0, 1]; float images as they are."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images


def resize(images: Tensor, size: int) -> Tensor:
    """To (B, 3, size, size): bilinear, antialiased."""
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)


# ---------------------------------------------------------------- geometry


def crop_boxes(
    count: int,
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    generator: torch.Generator,
) -> Tensor:
    """Boxes (B, 4) int64 of top, left, height, width, as RandomResizedCrop draws them (Szegedy et al. 2015).

    Areas are a uniform share in `scale` of the image's, aspect ratios log-uniform in `ratio`; of ten such boxes the
    first that fits is taken, else the largest central one of a ratio within bounds.
    """
    device = generator.device

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=device) * (high - low) + low

    area = height * width * uniform(*scale, count, 10)
    aspect = uniform(math.log(ratio[0]), math.log(ratio[1]), count, 10).exp()
    widths, heights = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (widths >= 1) & (widths <= width) & (heights >= 1) & (heights <= height)
    first = fits.to(torch.uint8).argmax(dim=1, keepdim=True)
    central = min(max(width / height, ratio[0]), ratio[1])
    fallback = (min(height, round(width / central)), min(width, round(height * central)))
    fitted = fits.gather(1, first)
    heights = torch.where(fitted, heights.gather(1, first), fallback[0])[:, 0]
    widths = torch.where(fitted, widths.gather(1, first), fallback[1])[:, 0]
    corner = uniform(0, 1, 2, count)
    top, left = (corner[0] * (height - heights + 1)).floor(), (corner[1] * (width - widths + 1)).floor()
    middle = ((height - heights) / 2).round(), ((width - widths) / 2).round()
    top, left = (torch.where(fitted[:, 0], *pair) for pair in zip((top, left), middle, strict=True))
    return torch.stack([top, left, heights, widths], dim=1).long()


def crop_resize(images: Tensor, boxes: Tensor, size: int, flipped: Tensor | None = None) -> Tensor:
    """Each image's box, resized to (B, 3, size, size): bilinear, antialiased, within 1e-5 of `resized_crop`.

    `flipped` (B,) bool: images to mirror left to right, at no further cost.
    """
    rows = _resampling(boxes[:, 0], boxes[:, 2], images.shape[-2], size)
    columns = _resampling(boxes[:, 1], boxes[:, 3], images.shape[-1], size)
    if flipped is not None:
        columns = torch.where(flipped[:, None, None], columns.flip(1), columns)
    return _product(rows, images, columns)


def _resampling(start: Tensor, length: Tensor, side: int, size: int) -> Tensor:
    """(B, size, side): weights of the pixels of [start, start + length) in each of `size` output pixels.

    A triangle around the output pixel's centre, one input pixel wide to each side, or one output pixel where that is
    more (antialiasing); weights sum to 1.
    """
    pixels = torch.arange(side, device=start.device) + 0.5
    start, length = start[:, None].float(), length[:, None].float()
    step = length / size
    centres = start + step * (torch.arange(size, device=start.device) + 0.5)
    reach = step.clamp(min=1.0)[:, :, None]
    weights = (1 - (pixels - centres[:, :, None]).abs_().div_(reach)).clamp_(min=0)
    inside = (pixels > start) & (pixels < start + length)
    weights.mul_(inside[:, None, :])
    return weights.div_(weights.sum(dim=2, keepdim=True))


def _product(rows: Tensor, images: Tensor, columns: Tensor) -> Tensor:
    """rows @ image @ columns' for each channel of each image: (B, R, H), (B, C, H, W), (B, S, W) -> (B, C, R, S)."""
    count, channels, height, _ = images.shape
    wide = torch.bmm(images.reshape(count, channels * height, -1), columns.transpose(1, 2))
    return rows[:, None] @ wide.view(count, channels, height, -1)


def flip(images: Tensor, mask: Tensor) -> Tensor:
    """Mirror left to right where `mask` (B,)."""
    return torch.where(mask[:, None, None, None], images.flip(3), images)


def quarter_turns(images: Tensor, turns: Tensor) -> Tensor:
    """Turn square images by `turns` (B,) of 0 to 3 quarters, counter-clockwise as `rot90`; exact, of any dtype.

    90 degrees: transpose, then flip vertically; 180: flip both ways; 270: flip vertically, then transpose.
    """
    which = turns[:, None, None, None]
    turned = torch.where(which % 2 == 1, images.transpose(2, 3), images)
    turned = torch.where((which == 1) | (which == 2), turned.flip(2), turned)
    return torch.where((which == 2) | (which == 3), turned.flip(3), turned)


def patches(images: Tensor, corners: Tensor, size: int) -> Tensor:
    """The square (B, C, size, size) of each image whose top left pixel is `corners` (B, 2), of any dtype."""
    steps = torch.arange(size, device=images.device)
    rows = (corners[:, :1] + steps)[:, None, :, None]
    columns = (corners[:, 1:] + steps)[:, None, None, :]
    which = torch.arange(len(images), device=images.device)[:, None, None, None]
    channels = torch.arange(images.shape[1], device=images.device)[:, None, None]
    return images[which, channels, rows, columns]


def pad_crop(images: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """Pad with zeros on all sides, then crop to the old size at random (He et al. 2016, for CIFAR)."""
    corners = torch.randint(0, 2 * padding + 1, (len(images), 2), generator=generator, device=images.device)
    return patches(F.pad(images, (padding,) * 4), corners, images.shape[-1])


def cutout(images: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Blank a square of `size` around a random pixel, cut off at the border (DeVries & Taylor 2017)."""
    kept = images.new_zeros(())
    centres = torch.rand(len(images), 2, generator=generator, device=images.device)
    inside = []
    for axis, side in enumerate(images.shape[-2:]):
        start = (centres[:, axis] * side).floor()[:, None] - size // 2
        pixels = torch.arange(side, device=images.device)
        inside.append((pixels >= start) & (pixels < start + size))
    box = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    return torch.where(box, kept, images)


# ---------------------------------------------------------------- colour


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Each image times its `factor` (B,), clamped."""
    return (images * factor[:, None, None, None]).clamp_(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Each image blended with the mean of its grey, which has weight 1 - `factor` (B,)."""
    none = torch.zeros_like(factor)
    return _blend_(images.clone(), factor, none, 1 - factor)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Each image blended with its grey, which has weight 1 - `factor` (B,)."""
    return _blend_(images.clone(), factor, 1 - factor, torch.zeros_like(factor))


def _blend_(images: Tensor, own: Tensor, grey: Tensor, mean: Tensor) -> Tensor:
    """In place: own * image + grey * its grey + mean * its mean grey, clamped; weights (B,)."""
    luma = _luma(images)
    average = luma.mean(dim=(1, 2, 3), keepdim=True)
    luma.mul_(grey[:, None, None, None]).add_(average * mean[:, None, None, None])
    return images.mul_(own[:, None, None, None]).add_(luma).clamp_(0, 1)


def _luma(images: Tensor) -> Tensor:
    """Grey (B, 1, H, W)."""
    red, green, blue = images.split(1, dim=1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Each image's hue turned by its `shift` (B,) in [-0.5, 0.5] of the colour circle."""
    red, green, blue = images.split(1, dim=1)
    value, low = images.amax(dim=1, keepdim=True), images.amin(dim=1, keepdim=True)
    chroma = value - low
    # Sixths of the circle. Where there is no chroma the hue is of no consequence, but must be finite.
    scale = 1 / chroma.clamp(min=torch.finfo(images.dtype).tiny ** 0.5)
    hue = torch.where(
        value == red,
        (green - blue) * scale,
        torch.where(value == green, 2 + (blue - red) * scale, 4 + (red - green) * scale),
    )
    hue.add_(6 * shift[:, None, None, None])
    # channel(n) = value - chroma * clamp(min(k, 4 - k), 0, 1), k = (n + hue) mod 6, n = 5, 3, 1.
    offset = images.new_tensor([5.0, 3.0, 1.0])[:, None, None]
    turned = hue + offset
    turned.sub_((turned / 6).floor_().mul_(6))
    turned = torch.minimum(turned, 4 - turned).clamp_(0, 1)
    return turned.mul_(chroma).neg_().add_(value)


def color_jitter(
    images: Tensor,
    strengths: tuple[float, float, float, float],
    p: float,
    generator: torch.Generator,
) -> Tensor:
    """Brightness, contrast, saturation and hue changed in a random order, image by image, each image with chance `p`.

    `strengths` s: factors are uniform in [max(0, 1 - s), 1 + s], the shift of hue in [-s, s]. All 24 orders are equally
    likely. To do hue, which costs most, once an image, a quarter of the batch, drawn at random, has it at each of the
    four places.
    """
    factors, order = jitter_parameters(len(images), strengths, generator)
    drawn = torch.rand(len(images), generator=generator, device=images.device) < p
    shuffled = torch.rand(len(images), generator=generator, device=images.device).argsort()
    jittered = apply_jitter(images[shuffled], factors, order)
    back = torch.empty_like(shuffled)
    back[shuffled] = torch.arange(len(images), device=images.device)
    return torch.where(drawn[:, None, None, None], jittered[back], images)


def jitter_parameters(
    count: int, strengths: tuple[float, float, float, float], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Factors (B, 4) of brightness, contrast and saturation and the shift of hue; and the order (B, 3) of the first
    three, as numbers 0, 1, 2."""
    device = generator.device
    high = torch.tensor([1 + each for each in strengths[:3]] + [strengths[3]], device=device)
    low = torch.tensor([max(0.0, 1 - each) for each in strengths[:3]] + [-strengths[3]], device=device)
    factors = torch.rand(count, 4, generator=generator, device=device) * (high - low) + low
    return factors, torch.rand(count, 3, generator=generator, device=device).argsort(dim=1)


def apply_jitter(images: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Jitter with the parameters of `jitter_parameters`: the first quarter of the images have their hue turned first,
    the second quarter second, and so on."""
    quarter = -(-len(images) // 4)
    jittered = []
    for hue_at, start in enumerate(range(0, len(images), quarter)):
        part = slice(start, start + quarter)
        some = images[part].clone()
        ops = iter(order[part].T)
        for at in range(4):
            if at == hue_at:
                some = adjust_hue(some, factors[part, 3])
            else:
                op = next(ops)
                factor = factors[part].gather(1, op[:, None])[:, 0]
                grey = torch.where(op == 2, 1 - factor, 0.0)
                mean = torch.where(op == 1, 1 - factor, 0.0)
                _blend_(some, factor, grey, mean)
        jittered.append(some)
    return torch.cat(jittered)


def grayscale(images: Tensor, mask: Tensor) -> Tensor:
    """Grey in all three channels where `mask` (B,)."""
    return torch.where(mask[:, None, None, None], _luma(images), images)


def solarize(images: Tensor, threshold: float, mask: Tensor) -> Tensor:
    """Invert pixels at or above `threshold` where `mask` (B,)."""
    return torch.where((images >= threshold) & mask[:, None, None, None], 1 - images, images)


def gaussian_blur(images: Tensor, sigma: Tensor, kernel: int, mask: Tensor | None = None) -> Tensor:
    """Blur each image by its `sigma` (B,), with an odd `kernel` and reflected borders, where `mask` (B,) or all."""
    rows, columns = (_blurring(sigma, kernel, side, mask) for side in images.shape[-2:])
    return _product(rows, images, columns)


def _blurring(sigma: Tensor, kernel: int, side: int, mask: Tensor | None) -> Tensor:
    """(B, side, side): weights of the input pixels in each output pixel."""
    device, radius = sigma.device, kernel // 2
    offsets = torch.arange(-radius, radius + 1, device=device)
    weights = torch.exp(-0.5 * (offsets / sigma[:, None]) ** 2)
    weights = weights / weights.sum(dim=1, keepdim=True)
    pixels = torch.arange(side, device=device)
    source = (pixels[:, None] + offsets).abs()
    source = torch.where(source >= side, 2 * (side - 1) - source, source)
    spread = (source[:, :, None] == pixels).to(weights.dtype).transpose(0, 1).reshape(kernel, side * side)
    matrices = (weights @ spread).view(-1, side, side)
    if mask is None:
        return matrices
    return torch.where(mask[:, None, None], matrices, torch.eye(side, device=device))


# ---------------------------------------------------------------- policies


Share = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Strength = Annotated[float, Field(ge=0)]


class Augmentation(Options):
    """A policy: what is done to an image, in this order. Called with images it gives views."""

    crop: tuple[Share, Share] | None = None
    """Random resized crop: least and greatest share of the image's area."""
    ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)
    """Least and greatest aspect ratio of that crop."""
    padding: int = Field(default=0, ge=0)
    """Crop to the image's size after padding it by so many pixels with zeros."""
    flip: float = Field(default=0.0, ge=0, le=1)
    """Chance to mirror left to right."""
    jitter: tuple[Strength, Strength, Strength, Annotated[float, Field(ge=0, le=0.5)]] | None = None
    """Colour jitter: strengths of brightness, contrast, saturation (factors of 1 - s to 1 + s) and hue (turns)."""
    jitter_p: float = Field(default=0.8, ge=0, le=1)
    """Chance of colour jitter."""
    gray: float = Field(default=0.0, ge=0, le=1)
    """Chance to lose all colour."""
    blur: float = Field(default=0.0, ge=0, le=1)
    """Chance of Gaussian blur, with a kernel of a tenth of the side."""
    sigma: tuple[Positive, Positive] = (0.1, 2.0)
    """Least and greatest deviation of the blur, in pixels."""
    solarize: float = Field(default=0.0, ge=0, le=1)
    """Chance to invert what is brighter than half."""
    cutout: int = Field(default=0, ge=0)
    """Side of a square that is blanked, in pixels."""

    @field_validator("crop", "ratio", "sigma")
    @classmethod
    def _ascending(cls, given: tuple[float, float] | None) -> tuple[float, float] | None:
        if given is not None and given[0] > given[1]:
            raise ValueError("should be the least, then the greatest")
        return given

    @classmethod
    def simclr(cls, strength: float = 1.0, blur: float = 0.5) -> Augmentation:
        """SimCLR's (Chen et al. 2020, A); for CIFAR-10 (B.9) strength 0.5 and no blur."""
        s = 0.8 * strength
        return cls(crop=(0.08, 1.0), flip=0.5, jitter=(s, s, s, s / 4), gray=0.2, blur=blur)

    @classmethod
    def byol_first(cls) -> Augmentation:
        """BYOL's first view (Grill et al. 2020, B): always blurred."""
        return cls(crop=(0.08, 1.0), flip=0.5, jitter=(0.4, 0.4, 0.2, 0.1), gray=0.2, blur=1.0)

    @classmethod
    def byol_second(cls) -> Augmentation:
        """BYOL's second view: seldom blurred, sometimes solarized."""
        return cls.byol_first().model_copy(update={"blur": 0.1, "solarize": 0.2})

    def __call__(self, images: Tensor, size: int, generator: torch.Generator) -> Tensor:
        """Views (B, 3, size, size) float32 in [0, 1] of images (B, 3, H, W), uint8 or float, on the generator's device."""
        if images.device.type == "cpu" and len(images) > CHUNK:
            return torch.cat([self._applied(part, size, generator) for part in images.split(CHUNK)])
        return self._applied(images, size, generator)

    def _applied(self, images: Tensor, size: int, generator: torch.Generator) -> Tensor:
        count, device = len(images), images.device

        def chance(p: float) -> Tensor:
            return torch.rand(count, generator=generator, device=device) < p

        images = to_float(images)
        if self.crop is not None:
            height, width = images.shape[-2:]
            boxes = crop_boxes(count, height, width, self.crop, self.ratio, generator)
            images = crop_resize(images, boxes, size, chance(self.flip) if self.flip else None)
        else:
            images = resize(images, size)
            if self.padding:
                images = pad_crop(images, self.padding, generator)
            if self.flip:
                images = flip(images, chance(self.flip))
        if self.jitter is not None:
            images = color_jitter(images, self.jitter, self.jitter_p, generator)
        if self.gray:
            images = grayscale(images, chance(self.gray))
        if self.blur:
            low, high = self.sigma
            sigma = torch.rand(count, generator=generator, device=device) * (high - low) + low
            images = gaussian_blur(images, sigma, max(3, size // 10 | 1), chance(self.blur))
        if self.solarize:
            images = solarize(images, 0.5, chance(self.solarize))
        if self.cutout:
            images = cutout(images, self.cutout, generator)
        return images
