"""Augmentation of image batches on their device; each image gets random parameters of its own.

Each augmentation has a deterministic part, which takes one parameter per image and equals
torchvision's function on that image, and a part that draws the parameters from a seeded generator.
Resampling and blur are products with small matrices, one per image, so that they cost one batched
matrix product on any device. No call waits for the device.

Images are float32 (B, C, H, W) in [0, 1] unless said otherwise. Only saturation, hue and conversion
to gray need three channels.
"""

from __future__ import annotations

import json
import math
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor

from sslrun.data.examples import to_device
from sslrun.data.image.whole import WholeImages
from sslrun.errors import UserError
from sslrun.registry import Options

CHUNK = 64
"""Images augmented at a time on the CPU, so that intermediate results fit into its cache."""
WHOLE_CHUNK = 256
"""Whole images cropped at a time on a GPU, to limit the memory for windows of them."""
LUMA = (0.2989, 0.587, 0.114)
"""Weights of red, green and blue in gray (ITU-R BT.601, as in torchvision)."""


Size = int | tuple[int, int]
"""The side of square images, or the height and width of others, in pixels."""


def height_and_width(size: Size) -> tuple[int, int]:
    """Return the height and width that `size` stands for."""
    return (size, size) if isinstance(size, int) else size


def side_of(images: Tensor | WholeImages) -> int:
    """Return the shorter side of images, or the side of the squares that stand for whole images."""
    return images.side if isinstance(images, WholeImages) else min(images.shape[-2:])


FULL_SCALE = {torch.uint8: 255, torch.uint16: 65535}
"""Type of integer images -> the value that stands for 1."""


def to_float(images: Tensor | WholeImages) -> Tensor:
    """Convert integer images to float32 in [0, 1]; float images are returned as they are.

    Whole images are cropped to their central squares.
    """
    if isinstance(images, WholeImages):
        images = images.centers()
    scale = FULL_SCALE.get(images.dtype)
    return images if scale is None else images.float().div_(scale)


def resize(images: Tensor, size: Size) -> Tensor:
    """Resize images to (B, C, size, size): bilinear, antialiased."""
    shape = height_and_width(size)
    if images.shape[-2:] == shape:
        return images
    return F.interpolate(images, shape, mode="bilinear", antialias=True)


# ---------------------------------------------------------------- geometry


def draw_crop_boxes(
    count: int,
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    generator: torch.Generator,
) -> Tensor:
    """Draw boxes (B, 4) int64 of (top, left, height, width) in images of one size."""
    heights = torch.full((count,), height, device=generator.device)
    widths = torch.full((count,), width, device=generator.device)
    return draw_boxes(heights, widths, scale, ratio, generator)


def draw_boxes(
    height: Tensor,
    width: Tensor,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    generator: torch.Generator,
) -> Tensor:
    """Draw boxes (B, 4) int64 of (top, left, height, width), as RandomResizedCrop does.

    `height` and `width` (B,) int64 are those of the images. The share of an image's area is uniform
    in `scale` and the aspect ratio log-uniform in `ratio` (Szegedy et al. 2015, arXiv:1409.4842).
    Of ten such boxes the first that fits into the image is taken; if none fits, the largest central
    box with a ratio within bounds.
    """
    # Ten candidates per image, (B, 10), and the first that fits, (B, 1).
    count = len(height)
    heights, widths = _draw_sizes((height * width)[:, None], scale, ratio, generator)
    fits = (widths >= 1) & (widths <= width[:, None])
    fits &= (heights >= 1) & (heights <= height[:, None])
    first = fits.to(torch.uint8).argmax(dim=1, keepdim=True)
    # One box per image, (B,).
    fitting = fits.gather(1, first)[:, 0]
    central_ratio = (width / height).clamp(*ratio)
    central_height = torch.minimum(height, (width / central_ratio).round())
    central_width = torch.minimum(width, (height * central_ratio).round())
    heights = torch.where(fitting, heights.gather(1, first)[:, 0], central_height)
    widths = torch.where(fitting, widths.gather(1, first)[:, 0], central_width)
    position = torch.rand(2, count, generator=generator, device=generator.device)
    top = _place_boxes(height - heights, position[0], fitting)
    left = _place_boxes(width - widths, position[1], fitting)
    return torch.stack([top, left, heights, widths], dim=1).long()


def _draw_sizes(
    area: Tensor,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Draw the heights and widths (B, 10) of ten boxes per image, whole numbers as floats.

    `area` (B, 1) int64 is that of the images.
    """

    def uniform(low: float, high: float) -> Tensor:
        draws = torch.rand(len(area), 10, generator=generator, device=generator.device)
        return draws * (high - low) + low

    areas = area * uniform(*scale)
    aspects = uniform(math.log(ratio[0]), math.log(ratio[1])).exp()
    return (areas / aspects).sqrt().round(), (areas * aspects).sqrt().round()


def _place_boxes(spare: Tensor, position: Tensor, fitting: Tensor) -> Tensor:
    """Return the first pixel (B,) of each box along one axis.

    `spare` (B,) is the number of pixels outside the box. A `fitting` (B,) box is placed by its
    `position` (B,) in [0, 1); any other box is centered.
    """
    return torch.where(fitting, (position * (spare + 1)).floor(), (spare / 2).floor())


def crop_resize(images: Tensor, boxes: Tensor, size: Size, flipped: Tensor | None = None) -> Tensor:
    """Crop each image to its box (B, 4) and resize it to (B, C, size, size): bilinear, antialiased.

    Equals torchvision's `resized_crop` within 1e-5. Images where `flipped` (B,) bool is true are
    also mirrored left to right, at no further cost.
    """
    height, width = height_and_width(size)
    rows = _resampling_weights(boxes[:, 0], boxes[:, 2], images.shape[-2], height)
    columns = _resampling_weights(boxes[:, 1], boxes[:, 3], images.shape[-1], width)
    if flipped is not None:
        columns = torch.where(flipped[:, None, None], columns.flip(1), columns)
    return _resample(rows, images, columns)


def crop_resize_whole(
    images: WholeImages, boxes: Tensor, size: int, ratio: tuple[float, float]
) -> Tensor:
    """Crop whole images to boxes (B, 4) of `draw_boxes`, and resize them, as `crop_resize` does.

    On a CPU each image is resized by itself, which touches only the pixels of its box. On a GPU
    windows that hold the largest possible box are cut from all images at once.
    """
    if images.device.type == "cpu":
        return _crop_resize_each(images, boxes, size)
    parts = zip(images.split(WHOLE_CHUNK), boxes.split(WHOLE_CHUNK), strict=True)
    return torch.cat([_crop_resize_windows(*part, size, ratio) for part in parts])


def _crop_resize_windows(
    images: WholeImages, boxes: Tensor, size: int, ratio: tuple[float, float]
) -> Tensor:
    """Crop and resize images at once, without a loop over them and without a wait."""
    area = images.sizes.prod(dim=1)
    largest = torch.stack([area / ratio[0], area * ratio[1]], dim=1).sqrt().ceil()
    height, width = torch.minimum(images.sizes, largest).amax(dim=0).long().tolist()
    corners, lengths = boxes.split(2, dim=1)
    windows = to_float(images.windows(corners, height, width))
    return crop_resize(windows, torch.cat([torch.zeros_like(corners), lengths], dim=1), size)


def _crop_resize_each(images: WholeImages, boxes: Tensor, size: int) -> Tensor:
    """Crop and resize images on the CPU, one after the other."""
    views = torch.empty(len(images), 3, size, size)
    places = zip(images.places.tolist(), boxes.tolist(), strict=True)
    for view, ((start, height, width), (top, left, rows, columns)) in zip(
        views, places, strict=True
    ):
        image = images.pixels[start : start + height * width].view(height, width, 3)
        cut = image[top : top + rows, left : left + columns].permute(2, 0, 1)
        view.copy_(resize(to_float(cut)[None], size)[0])
    return views


def _resampling_weights(start: Tensor, length: Tensor, side: int, size: int) -> Tensor:
    """Return the weights (B, size, side) of the input pixels in each output pixel, along one axis.

    The `size` output pixels cover the input pixels in [start, start + length). The weights form a
    triangle around the center of the output pixel, whose half-width is one input pixel, or one
    output pixel if that is wider (antialiasing). They sum to 1.

    Example: start 0, length 4, side 4 and size 2. The output pixels are 2 input pixels wide and
    have their centers at 1 and 3; the input pixels have theirs at 0.5, 1.5, 2.5 and 3.5. Before
    they are normalized, the weights in the first output pixel are 0.75, 0.75, 0.25 and 0.
    """
    pixels = torch.arange(side, device=start.device) + 0.5
    start, length = start[:, None].float(), length[:, None].float()
    step = length / size
    centers = start + step * (torch.arange(size, device=start.device) + 0.5)
    half_width = step.clamp(min=1.0)[:, :, None]
    weights = (1 - (pixels - centers[:, :, None]).abs_().div_(half_width)).clamp_(min=0)
    inside = (pixels > start) & (pixels < start + length)
    weights.mul_(inside[:, None, :])
    return weights.div_(weights.sum(dim=2, keepdim=True))


def _resample(rows: Tensor, images: Tensor, columns: Tensor) -> Tensor:
    """Return rows @ channel @ columns.T for each channel of each image.

    Shapes: rows (B, R, H), images (B, C, H, W) and columns (B, S, W) give (B, C, R, S).
    """
    count, channels, height, _ = images.shape
    wide = torch.bmm(images.reshape(count, channels * height, -1), columns.transpose(1, 2))
    return rows[:, None] @ wide.view(count, channels, height, -1)


def flip(images: Tensor, mask: Tensor) -> Tensor:
    """Mirror images left to right where `mask` (B,) is true."""
    return torch.where(mask[:, None, None, None], images.flip(3), images)


def quarter_turns(images: Tensor, turns: Tensor) -> Tensor:
    """Rotate square images counterclockwise by `turns` (B,) of 0 to 3 quarters, exactly.

    Equals `torch.rot90`. 90 degrees: transpose, then flip vertically. 180: flip both ways. 270:
    flip vertically, then transpose.
    """
    turns = turns[:, None, None, None]
    turned = torch.where(turns % 2 == 1, images.transpose(2, 3), images)
    turned = torch.where((turns == 1) | (turns == 2), turned.flip(2), turned)
    return torch.where((turns == 2) | (turns == 3), turned.flip(3), turned)


def patches(images: Tensor, corners: Tensor, size: Size) -> Tensor:
    """Cut a part (B, C, size, size) from each image of any dtype.

    `corners` (B, 2) holds the row and column of its top left pixel.
    """
    # The four index tensors broadcast to (B, C, height, width).
    height, width = height_and_width(size)
    rows = (corners[:, :1] + torch.arange(height, device=images.device))[:, None, :, None]
    columns = (corners[:, 1:] + torch.arange(width, device=images.device))[:, None, None, :]
    batch = torch.arange(len(images), device=images.device)[:, None, None, None]
    channels = torch.arange(images.shape[1], device=images.device)[:, None, None]
    return images[batch, channels, rows, columns]


def pad_crop(images: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """Pad all sides with zeros, then crop randomly to the original size.

    He et al. 2016 (arXiv:1512.03385), for CIFAR.
    """
    shape, device = (len(images), 2), images.device
    corners = torch.randint(0, 2 * padding + 1, shape, generator=generator, device=device)
    height, width = images.shape[-2:]
    return patches(F.pad(images, (padding,) * 4), corners, (height, width))


def cutout(images: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Set a square of side `size` around a random pixel to zero, clipped at the border.

    DeVries and Taylor 2017 (arXiv:1708.04552).
    """
    zero = images.new_zeros(())
    centers = torch.rand(len(images), 2, generator=generator, device=images.device)
    inside = []
    for axis, side in enumerate(images.shape[-2:]):
        start = (centers[:, axis] * side).floor()[:, None] - size // 2
        pixels = torch.arange(side, device=images.device)
        inside.append((pixels >= start) & (pixels < start + size))
    square = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    return torch.where(square, zero, images)


# ---------------------------------------------------------------- color


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Multiply each image by its `factor` (B,) and clamp."""
    return (images * factor[:, None, None, None]).clamp_(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blend each image with its mean gray, which has the weight 1 - `factor` (B,)."""
    zero = torch.zeros_like(factor)
    return _blend_(images.clone(), factor, zero, 1 - factor)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Blend each image with its gray version, which has the weight 1 - `factor` (B,)."""
    return _blend_(images.clone(), factor, 1 - factor, torch.zeros_like(factor))


def _blend_(images: Tensor, own: Tensor, gray: Tensor, mean: Tensor) -> Tensor:
    """Compute own * image + gray * gray version + mean * mean gray in place, and clamp.

    The weights `own`, `gray` and `mean` are (B,).
    """
    luma = _luma(images)
    average = luma.mean(dim=(1, 2, 3), keepdim=True)
    luma.mul_(gray[:, None, None, None]).add_(average * mean[:, None, None, None])
    return images.mul_(own[:, None, None, None]).add_(luma).clamp_(0, 1)


def _luma(images: Tensor) -> Tensor:
    """Return the gray version (B, 1, H, W); the mean if there are not three channels."""
    if images.shape[1] != 3:
        return images.mean(dim=1, keepdim=True)
    red, green, blue = images.split(1, dim=1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Rotate the hue of each image by its `shift` (B,) in [-0.5, 0.5] of the color circle."""
    red, green, blue = images.split(1, dim=1)
    value, low = images.amax(dim=1, keepdim=True), images.amin(dim=1, keepdim=True)
    chroma = value - low
    # The hue is in sixths of the circle. It does not matter where chroma is 0, but must be finite.
    scale = 1 / chroma.clamp(min=torch.finfo(images.dtype).tiny ** 0.5)
    hue = torch.where(
        value == red,
        (green - blue) * scale,
        torch.where(value == green, 2 + (blue - red) * scale, 4 + (red - green) * scale),
    )
    hue.add_(6 * shift[:, None, None, None])
    # HSV to RGB: channel n = value - chroma * clamp(min(k, 4 - k), 0, 1), where k = (n + hue) mod 6
    # and n is 5 for red, 3 for green and 1 for blue.
    offset = torch.tensor([5.0, 3.0, 1.0], dtype=images.dtype)
    offset = to_device(offset, images.device)[:, None, None]
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
    """Jitter brightness, contrast, saturation and hue in random order, with probability `p`.

    For a strength s the factors are uniform in [max(0, 1 - s), 1 + s]; the shift of the hue is
    uniform in [-s, s]. All 24 orders are equally likely. The hue costs most and is computed once
    per image: a random quarter of the batch has it at each of the four positions of the order.
    """
    count, device = len(images), images.device
    factors, order = draw_jitter(count, strengths, generator)
    selected = torch.rand(count, generator=generator, device=device) < p
    shuffled = torch.rand(count, generator=generator, device=device).argsort()
    jittered = apply_jitter(images[shuffled], factors, order)
    inverse = torch.empty_like(shuffled)
    inverse[shuffled] = torch.arange(count, device=device)
    return torch.where(selected[:, None, None, None], jittered[inverse], images)


def draw_jitter(
    count: int, strengths: tuple[float, float, float, float], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw the parameters of `apply_jitter`.

    Returns factors (B, 4) of brightness, contrast and saturation with the shift of the hue, and the
    order (B, 3) of the first three, as the numbers 0, 1 and 2.
    """
    device = generator.device
    *factor_strengths, hue = strengths
    highest = [1 + strength for strength in factor_strengths]
    lowest = [max(0.0, 1 - strength) for strength in factor_strengths]
    bounds = torch.tensor([[*lowest, -hue], [*highest, hue]])
    low, high = to_device(bounds, device)
    factors = torch.rand(count, 4, generator=generator, device=device) * (high - low) + low
    return factors, torch.rand(count, 3, generator=generator, device=device).argsort(dim=1)


def apply_jitter(images: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Jitter images with the parameters of `draw_jitter`.

    The hue of the first quarter of the batch is changed first, that of the second quarter second,
    and so on. Example: an image of the second quarter with the order 2 0 1 gets saturation, hue,
    brightness, contrast.
    """
    quarter = -(-len(images) // 4)
    jittered = []
    for hue_position, start in enumerate(range(0, len(images), quarter)):
        part = slice(start, start + quarter)
        images_part = images[part].clone()
        operations = iter(order[part].T)
        for position in range(4):
            if position == hue_position:
                if images.shape[1] == 3:
                    images_part = adjust_hue(images_part, factors[part, 3])
            else:
                # (B / 4,): 0 is brightness, 1 contrast, 2 saturation; all three are blends.
                operation = next(operations)
                factor = factors[part].gather(1, operation[:, None])[:, 0]
                gray = torch.where(operation == 2, 1 - factor, 0.0)
                mean = torch.where(operation == 1, 1 - factor, 0.0)
                _blend_(images_part, factor, gray, mean)
        jittered.append(images_part)
    return torch.cat(jittered)


def grayscale(images: Tensor, mask: Tensor) -> Tensor:
    """Replace all three channels by gray where `mask` (B,) is true."""
    return torch.where(mask[:, None, None, None], _luma(images), images)


def solarize(images: Tensor, threshold: float, mask: Tensor) -> Tensor:
    """Invert the pixels at or above `threshold` where `mask` (B,) is true."""
    return torch.where((images >= threshold) & mask[:, None, None, None], 1 - images, images)


def gaussian_blur(images: Tensor, sigma: Tensor, kernel: int, mask: Tensor | None = None) -> Tensor:
    """Blur each image by its `sigma` (B,) where `mask` (B,) is true; all images without a mask.

    `kernel` is the odd width of the kernel, in pixels. Borders are reflected.
    """
    rows, columns = (_blur_weights(sigma, kernel, side, mask) for side in images.shape[-2:])
    return _resample(rows, images, columns)


def _blur_weights(sigma: Tensor, kernel: int, side: int, mask: Tensor | None) -> Tensor:
    """Return the weights (B, side, side) of the input pixels in each output pixel, along one axis.

    Example: side 4 and kernel 3. `source` lists, for each output pixel, the input pixel at each
    offset: 1 0 1, 0 1 2, 1 2 3, 2 3 2, where -1 is reflected to 1 and 4 to 2. `spread` (kernel,
    side * side) is its one-hot encoding. The product with the kernel's weights (B, kernel) adds up
    reflected pixels.
    """
    device, radius = sigma.device, kernel // 2
    offsets = torch.arange(-radius, radius + 1, device=device)
    weights = torch.exp(-0.5 * (offsets / sigma[:, None]) ** 2)
    weights = weights / weights.sum(dim=1, keepdim=True)
    pixels = torch.arange(side, device=device)
    source = (pixels[:, None] + offsets).abs()
    source = torch.where(source >= side, 2 * (side - 1) - source, source)
    one_hot = (source[:, :, None] == pixels).to(weights.dtype)  # (side, kernel, side)
    spread = one_hot.transpose(0, 1).reshape(kernel, side * side)
    matrices = (weights @ spread).view(-1, side, side)
    if mask is None:
        return matrices
    return torch.where(mask[:, None, None], matrices, torch.eye(side, device=device))


# ---------------------------------------------------------------- policies


Share = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Strength = Annotated[float, Field(ge=0)]
HueStrength = Annotated[float, Field(ge=0, le=0.5)]


class Augmentation(Options):
    """An augmentation policy: its operations in the order in which they are applied.

    Call it with images to get views. Example:

        views = Augmentation.simclr()(images, size=32, generator=generator)  # (B, 3, 32, 32)
    """

    crop: tuple[Share, Share] | None = None
    """Smallest and largest share of the image's area in a random resized crop; null: no crop."""
    ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)
    """Smallest and largest aspect ratio of the random resized crop."""
    padding: int = Field(default=0, ge=0)
    """Pixels of zero padding before a random crop to the original size; only without `crop`."""
    flip: float = Field(default=0.0, ge=0, le=1)
    """Probability of mirroring left to right."""
    jitter: tuple[Strength, Strength, Strength, HueStrength] | None = None
    """Color jitter: strengths s of brightness, contrast and saturation (factors from 1 - s to 1 +
    s) and of hue (shifts from -s to s of the color circle); null: no color jitter."""
    jitter_p: float = Field(default=0.8, ge=0, le=1)
    """Probability of color jitter."""
    gray: float = Field(default=0.0, ge=0, le=1)
    """Probability of conversion to gray."""
    blur: float = Field(default=0.0, ge=0, le=1)
    """Probability of Gaussian blur; its kernel is a tenth of the side."""
    sigma: tuple[Positive, Positive] = (0.1, 2.0)
    """Smallest and largest standard deviation of the blur, in pixels."""
    solarize: float = Field(default=0.0, ge=0, le=1)
    """Probability of inverting the pixels at or above half brightness."""
    cutout: int = Field(default=0, ge=0)
    """Side of a square that is set to zero, in pixels; 0: no cutout."""

    @field_validator("crop", "ratio", "sigma")
    @classmethod
    def _check_order(cls, bounds: tuple[float, float] | None) -> tuple[float, float] | None:
        if bounds is not None and bounds[0] > bounds[1]:
            raise ValueError("give the smallest value first, then the largest")
        return bounds

    @property
    def is_random(self) -> bool:
        """Whether views of the same images differ from call to call."""
        always = (self.crop, self.padding, self.jitter, self.blur, self.cutout)
        shares = (self.flip, self.gray, self.solarize)
        return any(always) or any(0 < share < 1 for share in shares)

    @classmethod
    def simclr(cls, strength: float = 1.0, blur: float = 0.5) -> Augmentation:
        """Return SimCLR's policy (Chen et al. 2020, arXiv:2002.05709, appendix A).

        For CIFAR-10 (appendix B.9) the strength is 0.5, without blur.
        """
        s = 0.8 * strength
        return cls(crop=(0.08, 1.0), flip=0.5, jitter=(s, s, s, s / 4), gray=0.2, blur=blur)

    @classmethod
    def byol_first(cls) -> Augmentation:
        """Return the policy of BYOL's first view (Grill et al. 2020, arXiv:2006.07733, appendix B).

        It always blurs.
        """
        return cls(crop=(0.08, 1.0), flip=0.5, jitter=(0.4, 0.4, 0.2, 0.1), gray=0.2, blur=1.0)

    @classmethod
    def byol_second(cls) -> Augmentation:
        """Return the policy of BYOL's second view: it rarely blurs, and sometimes solarizes."""
        return cls.byol_first().model_copy(update={"blur": 0.1, "solarize": 0.2})

    def without_color(self) -> Augmentation:
        """Return the policy without the operations that need color, which the others do not."""
        jitter = None if self.jitter is None else (*self.jitter[:2], 0.0, 0.0)
        return self.model_copy(update={"jitter": jitter, "gray": 0.0})

    def __call__(
        self, images: Tensor | WholeImages, size: Size, generator: torch.Generator
    ) -> Tensor:
        """Augment images (B, C, H, W) of any type, or whole images, on the generator's device.

        Returns views (B, C, size, size) float32 in [0, 1].
        """
        if images.device.type == "cpu" and len(images) > CHUNK:
            chunks = [self._augment(chunk, size, generator) for chunk in images.split(CHUNK)]
            return torch.cat(chunks)
        return self._augment(images, size, generator)

    def _augment(
        self, images: Tensor | WholeImages, size: Size, generator: torch.Generator
    ) -> Tensor:
        if self.crop is not None and isinstance(images, WholeImages):
            assert isinstance(size, int)  # views of whole images are square
            images = self._crop_whole(images, self.crop, size, generator)
        else:
            images = self._change_geometry(to_float(images), size, generator)
        images = self._change_color(images, size, generator)
        if self.cutout:
            images = cutout(images, self.cutout, generator)
        return images

    def _change_geometry(self, images: Tensor, size: Size, generator: torch.Generator) -> Tensor:
        """Crop, resize and mirror."""
        if self.crop is not None:
            height, width = images.shape[-2:]
            boxes = draw_crop_boxes(len(images), height, width, self.crop, self.ratio, generator)
            flipped = _draw_mask(images, self.flip, generator) if self.flip else None
            return crop_resize(images, boxes, size, flipped)
        images = resize(images, size)
        if self.padding:
            images = pad_crop(images, self.padding, generator)
        if self.flip:
            images = flip(images, _draw_mask(images, self.flip, generator))
        return images

    def _crop_whole(
        self,
        images: WholeImages,
        crop: tuple[float, float],
        size: int,
        generator: torch.Generator,
    ) -> Tensor:
        """Crop, resize and mirror whole images, with the draws of `_change_geometry`."""
        _, height, width = images.places.T
        boxes = draw_boxes(height, width, crop, self.ratio, generator)
        views = crop_resize_whole(images, boxes, size, self.ratio)
        return flip(views, _draw_mask(views, self.flip, generator)) if self.flip else views

    def _change_color(self, images: Tensor, size: Size, generator: torch.Generator) -> Tensor:
        """Jitter, convert to gray, blur and solarize."""
        if self.jitter is not None:
            images = color_jitter(images, self.jitter, self.jitter_p, generator)
        if self.gray:
            images = grayscale(images, _draw_mask(images, self.gray, generator))
        if self.blur:
            low, high = self.sigma
            uniform = torch.rand(len(images), generator=generator, device=images.device)
            sigma = uniform * (high - low) + low
            mask = _draw_mask(images, self.blur, generator)
            images = gaussian_blur(
                images, sigma, max(3, min(height_and_width(size)) // 10 | 1), mask
            )
        if self.solarize:
            images = solarize(images, 0.5, _draw_mask(images, self.solarize, generator))
        return images


def check_colors(options: Options, channels: int, place: str) -> None:
    """Check that no augmentation in `options` needs color if images do not have three channels.

    `place` is where a recipe writes the options, such as "pretext".

    Raises:
        UserError: One does; the message has the policy to write instead.
    """
    if channels == 3:
        return
    for name in type(options).model_fields:
        value, key = getattr(options, name), f"{place}.{name}"
        if isinstance(value, Augmentation):
            plain = value.without_color()
            if plain != value:
                policy = json.dumps(plain.non_defaults()).replace('"', "")
                raise UserError(
                    f"{key}: saturation, hue and gray need color images of 3 channels, and these "
                    f"have {channels}: write {key}: {policy}"
                )
        elif isinstance(value, Options):
            check_colors(value, channels, key)


def _draw_mask(images: Tensor, p: float, generator: torch.Generator) -> Tensor:
    """Draw a mask (B,) that is true with probability `p`."""
    return torch.rand(len(images), generator=generator, device=images.device) < p
