"""Decode images once into a tensor that is cached on disk, or stream a large set."""

from __future__ import annotations

import io
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from sslrun.data.cache import cache_root, digest_key, locked, write_tensors
from sslrun.data.examples import Batch, Examples, ProgressCallback, TensorExamples
from sslrun.data.image.augment import FULL_SCALE, Size, height_and_width
from sslrun.data.image.whole import WholeImageExamples, WholeImages, locate, pack
from sslrun.data.specs import ImageSpec
from sslrun.errors import UserError
from sslrun.files import read_tensors, require_file

MAX_TENSOR_BYTES = 8 * 2**30
"""A split that takes more bytes than this as one tensor is streamed instead."""

CACHE_FORMAT = 1
"""Part of every cache key. Raise it when decoding changes."""

CHUNK = 256
"""Images that a decoding thread takes at a time."""

log = logging.getLogger(__name__)


# ---------------------------------------------------------------- encoded images


class EncodedImages(Protocol):
    """Images as they are stored, in a format that Pillow reads. Picklable, for decoding workers."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> bytes: ...

    def name(self, index: int) -> str:
        """Return the name of the image in messages."""

    def files(self) -> Sequence[str | None]:
        """Return each image's file name, with or without its folder; None if unknown."""


@dataclass(frozen=True)
class EncodedFiles:
    """Encoded images in files."""

    paths: Sequence[str]

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> bytes:
        require_file(self.paths[index])
        return Path(self.paths[index]).read_bytes()

    def name(self, index: int) -> str:
        return self.paths[index]

    def files(self) -> Sequence[str | None]:
        return self.paths


@dataclass(frozen=True)
class EncodedSubset:
    """A selection of other encoded images, by index."""

    images: EncodedImages
    indices: Sequence[int]

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> bytes:
        return self.images.read(self.indices[index])

    def name(self, index: int) -> str:
        return self.images.name(self.indices[index])

    def files(self) -> Sequence[str | None]:
        files = self.images.files()
        return [files[index] for index in self.indices]


@dataclass(frozen=True)
class EncodedSplit:
    """A split before its images are decoded."""

    images: EncodedImages
    labels: Tensor | None
    """(N,) int64."""
    classes: tuple[str, ...]


# ---------------------------------------------------------------- pixels


class ImageDecoder(Protocol):
    """How every image of a split is decoded. Picklable, for decoding workers."""

    @property
    def spec(self) -> ImageSpec:
        """The spec of the images, or of the squares that stand for whole ones."""

    @property
    def dtype(self) -> torch.dtype:
        """The type of the values."""

    def __call__(self, images: EncodedImages, index: int) -> np.ndarray:
        """Return the image as (H, W, C).

        Raises:
            UserError: It cannot be decoded, or has another size and must not be resized.
        """

    def pack(self, images: Sequence[np.ndarray]) -> Tensor | WholeImages:
        """Return decoded images as a batch."""


@dataclass(frozen=True)
class WholeDecoder:
    """A decoder of whole images of any shape.

    The shorter side is resized to `side` (bilinear, antialiased), as torchvision's Resize does.
    `size` is the side of the central squares that stand for the images. Everything else is as in
    `Decoder`.
    """

    side: int
    size: int
    dtype: ClassVar[torch.dtype] = torch.uint8

    @property
    def spec(self) -> ImageSpec:
        return ImageSpec(self.size)

    def __call__(self, images: EncodedImages, index: int) -> np.ndarray:
        with _open_image(images, index) as image:
            return np.asarray(_resize_shorter(_to_upright(image, self.side), self.side))

    def pack(self, images: Sequence[np.ndarray]) -> WholeImages:
        return pack(images, self.size)


def _resize_shorter(image: Any, side: int) -> Any:
    """Resize the shorter side of an image; the longer one is cut to a whole number of pixels."""
    from PIL import Image

    if min(image.size) == side:
        return image
    width, height = (max(side, side * length // min(image.size)) for length in image.size)
    return image.resize((width, height), Image.Resampling.BILINEAR)


def _to_upright(image: Any, side: int) -> Any:
    """Read an image as RGB, with its EXIF orientation applied.

    A large JPEG is decoded at 1/2, 1/4 or 1/8 scale, but never below twice the final side.
    """
    from PIL import ImageOps

    image.draft("RGB", (2 * side, 2 * side))
    ImageOps.exif_transpose(image, in_place=True)
    return _to_rgb(image)


@dataclass(frozen=True)
class Decoder:
    """A decoder of every image of a split to one size, in 8-bit RGB.

    The image is resized to cover `size` (bilinear, antialiased) and the center is cropped, as is
    usual for ImageNet. EXIF orientation is applied. Gray, palette, CMYK and transparent images
    become RGB.
    """

    size: Size
    resize: bool = True
    """Whether to resize; if not, an image of another size is an error."""
    squash: bool = False
    """Whether to resize both sides to `size`, without a crop."""
    dtype: ClassVar[torch.dtype] = torch.uint8

    @property
    def spec(self) -> ImageSpec:
        return ImageSpec.of((3, *height_and_width(self.size)))

    def __call__(self, images: EncodedImages, index: int) -> np.ndarray:
        """Return the image as (size, size, 3) uint8.

        Raises:
            UserError: It cannot be decoded, or has another size and must not be resized.
        """
        with _open_image(images, index) as image:
            if not self.resize:
                _check_shape(images.name(index), image.size, self.spec)
            return self.decode(image)

    def decode(self, image: Any) -> np.ndarray:
        """Return an image of Pillow as (height, width, 3) uint8; the image may be changed."""
        return np.asarray(self._fit(image))

    def pack(self, images: Sequence[np.ndarray]) -> Tensor:
        return _stack(images, self.spec, np.uint8)

    def _fit(self, image: Any) -> Any:
        """Resize and crop an image to `size`."""
        from PIL import Image

        height, width = height_and_width(self.size)
        image = _to_upright(image, max(height, width))
        if image.size != (width, height):
            scale = max(width / image.size[0], height / image.size[1])
            sides = (0, 0) if self.squash else image.size
            resized = (max(width, round(sides[0] * scale)), max(height, round(sides[1] * scale)))
            image = image.resize(resized, Image.Resampling.BILINEAR)
            left, top = (resized[0] - width) // 2, (resized[1] - height) // 2
            image = image.crop((left, top, left + width, top + height))
        return image


@dataclass(frozen=True)
class ArrayDecoder:
    """A decoder of every image of a split to one size, with its own channels and type of values.

    TIFF files may have any number of channels, 8 or 16 bits, or float32. Other formats have what
    Pillow reads: gray of 8 or 16 bits, RGB and RGBA of 8 bits. Values are scaled as `value_range`
    says, see `scale_values`; the rest is as in `Decoder`.
    """

    size: Size
    channels: int
    dtype: torch.dtype
    value_range: tuple[float, float] | None = None
    resize: bool = True

    @property
    def spec(self) -> ImageSpec:
        return ImageSpec.of((self.channels, *height_and_width(self.size)))

    def __call__(self, images: EncodedImages, index: int) -> np.ndarray:
        array = read_array(images, index, self.channels)
        name = images.name(index)
        if DTYPES.get(array.dtype) != self.dtype:
            known = ", ".join(map(str, DTYPES))
            kind = array.dtype if array.dtype in DTYPES else f"one of {known}"
            raise UserError(
                f"{name}: holds {array.dtype} values, and data.dtype is "
                f"{str(self.dtype).removeprefix('torch.')}: set dtype: {kind}"
            )
        if not self.resize:
            _check_shape(name, array.shape[1::-1], self.spec)
        try:
            image = scale_values(torch.from_numpy(array).permute(2, 0, 1)[None], self.value_range)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        shape = height_and_width(self.size)
        if image.shape[2:] != shape:
            image = resize_and_crop(image, shape)
        return image[0].permute(1, 2, 0).numpy()

    def pack(self, images: Sequence[np.ndarray]) -> Tensor:
        types = {dtype: name for name, dtype in DTYPES.items()}
        return _stack(images, self.spec, types[self.dtype])


def read_array(images: EncodedImages, index: int, channels: int) -> np.ndarray:
    """Read an image as an array (H, W, C) of its own type.

    Raises:
        UserError: It cannot be read, or has another number of channels.
    """
    content, name = images.read(index), images.name(index)
    array = _read_tiff(content, name) if content[:4] in TIFF else None
    if array is None:
        with _open_image(images, index) as image:
            array = np.array(image)
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim == 3 and array.shape[2] != channels and array.shape[0] == channels:
        array = array.transpose(1, 2, 0)  # one plane after the other
    if array.ndim != 3 or array.shape[2] != channels:
        raise UserError(
            f"{name}: is an array {array.shape}, which is no image of {channels} channels: set "
            "data.channels"
        )
    native = array.dtype.newbyteorder("=")
    return np.ascontiguousarray(array, dtype=native)


TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""First bytes of TIFF files, little and big endian, and of those above 4 GB."""


def _read_tiff(content: bytes, name: str) -> np.ndarray | None:
    """Read a TIFF file with tifffile; None if it is not installed: Pillow reads simple ones."""
    try:
        import tifffile
    except ImportError:
        return None
    try:
        return np.asarray(tifffile.imread(io.BytesIO(content)))
    except Exception as error:  # each codec raises errors of its own
        cause = " ".join(str(error).split())[:200]
        raise UnreadableError(
            f"{name}: cannot be decoded ({cause}): repair or remove it, or give skip_corrupt: true"
        ) from None


def _check_shape(name: str, size: Sequence[int], spec: ImageSpec) -> None:
    """Raise UserError if an image of another width and height must not be resized."""
    height, width = spec.shape
    if tuple(size) != (width, height):
        raise UserError(
            f"{name}: is {size[0]}x{size[1]}, but others are {width}x{height}: give the side to "
            f"store them at, as in size: {height}"
        )


def _stack(images: Sequence[np.ndarray], spec: ImageSpec, dtype: Any) -> Tensor:
    """Stack images (H, W, C) into one tensor (N, C, H, W)."""
    pixels = np.empty((len(images), *spec.shape, spec.channels), dtype=dtype)
    for row, image in zip(pixels, images, strict=True):
        row[:] = image
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


class UnreadableError(UserError):
    """An image or a film that cannot be decoded."""

    @property
    def without_option(self) -> UserError:
        """The error without the remedy that only recipes have."""
        return UserError(str(self).removesuffix(", or give skip_corrupt: true"))


@contextmanager
def _open_image(images: EncodedImages, index: int) -> Iterator[Any]:
    """Open an image with Pillow.

    Raises:
        UnreadableError: Opening it, or the `with` body, fails as for a damaged file.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(images.read(index))) as image:
            yield image
    except UserError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else str(error)
        raise UnreadableError(
            f"{images.name(index)}: cannot be decoded ({reason}): repair or remove it, or give "
            "skip_corrupt: true"
        ) from None


def read_rgb(path: str) -> np.ndarray:
    """Read an image file of any mode as (H, W, 3) uint8.

    Raises:
        UnreadableError: It cannot be decoded.
    """
    with _open_image(EncodedFiles([path]), 0) as image:
        return np.asarray(_to_rgb(image))


def read_shape(path: str) -> tuple[int, int]:
    """Return the height and width of an image file, without decoding it.

    Raises:
        UnreadableError: It cannot be read.
    """
    with _open_image(EncodedFiles([path]), 0) as image:
        return image.height, image.width


def _to_rgb(image: Any) -> Any:
    """Convert an image of any mode to RGB; 16-bit gray keeps its high byte."""
    from PIL import Image

    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def find_native_side(images: EncodedImages, skip_corrupt: bool = False) -> int:
    """Return the side of the first image; with `skip_corrupt`, of the first that can be decoded.

    Raises:
        UserError: It is not square, so that a size must be given; or no image can be decoded.
    """
    for index in range(len(images)):
        try:
            with _open_image(images, index) as image:
                width, height = image.size
        except UnreadableError:
            if not skip_corrupt:
                raise
            continue
        if width != height:
            raise UserError(
                f"{images.name(index)}: is {width}x{height}, not square: give the side to store "
                f"the images at, as in size: {1 << (min(width, height).bit_length() - 1)}, or "
                f"height and width, as in size: [{height}, {width}]"
            )
        return width
    raise UserError(
        f"{images.name(0)}: cannot be decoded, and neither can any other of the {len(images)} "
        "images"
    )


# ---------------------------------------------------------------- arrays


def convert_arrays(
    arrays: np.ndarray,
    size: Size | None = None,
    channels: int | None = None,
    value_range: tuple[float, float] | None = None,
) -> Tensor:
    """Convert images (N, H, W) or (N, H, W, C) to (N, channels, height, width) of the same type.

    Types are uint8, uint16 and float32. If `size` is None, the images keep their size. One channel
    becomes three equal ones unless `channels` is 1. For `value_range` see `scale_values`.

    Raises:
        UserError: The type or shape is another, the images are not square and `size` is None, or
            values are not in [0, 1] without a range.
    """
    shape = arrays.shape
    own_channels = shape[3] if arrays.ndim == 4 else 1
    if arrays.dtype not in DTYPES or arrays.ndim not in (3, 4) or own_channels > MAX_CHANNELS:
        raise UserError(
            f"images are {arrays.dtype} {shape}: they should be uint8, uint16 or float32 of shape "
            f"(N, H, W) or (N, H, W, C), with at most {MAX_CHANNELS} channels C"
        )
    if not arrays.size:
        raise UserError(f"images are {shape}: there is none: give at least one")
    if channels is None:
        channels = 3 if own_channels == 1 else own_channels
    if own_channels not in (1, channels) or (own_channels == 1 and channels not in (1, 3)):
        raise UserError(f"images have {own_channels} channels: set channels: {own_channels}")
    images = torch.from_numpy(arrays.reshape(*shape[:3], -1)).permute(0, 3, 1, 2)
    images = scale_values(images, value_range)
    height, width = images.shape[2:]
    if size is None and height != width:
        raise UserError(
            f"images are {width}x{height}, not square: give the side to store them at, as in "
            f"size: 32, or height and width, as in size: [{height}, {width}]"
        )
    if size is not None and (height, width) != height_and_width(size):
        images = resize_and_crop(images, height_and_width(size))
    return images.expand(-1, channels, -1, -1).contiguous()


MAX_CHANNELS = 16
"""Largest number of channels of an image."""
DTYPES = {
    np.dtype(np.uint8): torch.uint8,
    np.dtype(np.uint16): torch.uint16,
    np.dtype(np.float32): torch.float32,
}
"""Types of images that can be stored."""


def scale_values(images: Tensor, value_range: tuple[float, float] | None) -> Tensor:
    """Scale the values of images from `value_range` to their type's full scale, and clip them.

    The full scale is 255, 65535, or 1 for floats. Without a range they keep their values.

    Raises:
        UserError: A value is not finite; or floats are not in [0, 1], and there is no range.
    """
    if images.is_floating_point():
        if not images.isfinite().all():
            raise UserError("images have values that are not finite (NaN or infinite): remove them")
        smallest, largest = (images.min().item(), images.max().item()) if len(images) else (0, 0)
        if value_range is None and (smallest < 0 or largest > 1):
            raise UserError(
                f"images have values from {smallest:.4g} to {largest:.4g}: give the values that "
                f"stand for black and white, as in range: [{smallest:.4g}, {largest:.4g}]"
            )
    if value_range is None:
        return images
    low, high = value_range
    full = FULL_SCALE.get(images.dtype, 1)
    values = ((images.float() - low) / (high - low)).clamp_(0, 1).mul_(full)
    return _to_type(values, images.dtype)


def resize_and_crop(images: Tensor, shape: tuple[int, int], squash: bool = False) -> Tensor:
    """Resize images (N, C, H, W) to cover `shape`, and crop the center (bilinear, antialiased).

    With `squash`, both sides are resized to `shape`, without a crop.
    """
    height, width = shape
    scale = max(height / images.shape[2], width / images.shape[3])
    sides = [height, width]
    if not squash:
        sides[0] = max(height, round(images.shape[2] * scale))
        sides[1] = max(width, round(images.shape[3] * scale))
    top, left = (sides[0] - height) // 2, (sides[1] - width) // 2
    resized = []
    for chunk in images.split(4096):
        floats = F.interpolate(chunk.float(), sides, mode="bilinear", antialias=True)
        resized.append(_to_type(floats, images.dtype))
    return torch.cat(resized)[:, :, top : top + height, left : left + width]


def _to_type(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Round and clip values to an integer type; floats are returned as they are."""
    full = FULL_SCALE.get(dtype)
    return values if full is None else values.round().clamp(0, full).to(dtype)


# ---------------------------------------------------------------- in memory, cached on disk


def count_workers() -> int:
    """Return the number of threads or processes that decode images.

    It is SSLRUN_WORKERS, or one per core that this process may use, at most 16.
    """
    setting = os.environ.get("SSLRUN_WORKERS")
    if setting is None:
        has_affinity = hasattr(os, "sched_getaffinity")
        cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
        return max(1, min(16, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    if not setting.isdecimal():
        raise UserError(
            f"SSLRUN_WORKERS={setting}: should be a number of decoding workers, as in "
            "SSLRUN_WORKERS=4"
        )
    return int(setting)


@dataclass(frozen=True)
class Whole:
    """The form of images that are stored with their aspect ratio."""

    side: int
    """Shorter side, in pixels."""


@dataclass(frozen=True)
class Pixels:
    """The form of images that are not 8-bit RGB."""

    channels: int
    dtype: str
    value_range: tuple[float, float] | None = None

    def identity(self) -> list[Any]:
        """Return what distinguishes the stored images, as JSON values."""
        return [self.channels, self.dtype, self.value_range]


def load_images(
    name: str,
    identity: Mapping[str, Any],
    open_split: Callable[[], EncodedSplit],
    size: Size | None,
    skip_corrupt: bool = False,
    progress: ProgressCallback | None = None,
    squash: bool = False,
    form: Whole | Pixels | None = None,
) -> TensorExamples | WholeImageExamples | StreamedImages:
    """Load a split as one tensor, from the cache if possible; or stream a large one.

    `identity` holds the JSON values that determine what `open_split` returns. It is part of the
    cache key, with `size`, `skip_corrupt` and `squash` (see `Decoder`). `size` is the side to
    store; None keeps the size of the images, which must be equal squares. A `form` means that they
    are not 8-bit RGB of one size; with `Whole`, `size` is the side of a view. A damaged cache entry
    is replaced.

    Raises:
        UserError: An image cannot be decoded (unless `skip_corrupt`), images differ in size without
            `size`, or the cache cannot be written.
    """
    key = {"format": CACHE_FORMAT, "size": size, "skip_corrupt": skip_corrupt, **identity}
    key |= {"squash": True} if squash else {}
    if isinstance(form, Whole):
        assert size is not None
        key |= {"whole": form.side, "size": None}  # the side of a view is not stored
    elif form is not None:
        key |= {"pixels": form.identity()}
    path = cache_root() / "images" / f"{name.replace('/', '--')}-{digest_key(key)}.safetensors"
    if cached := _load_cached(path, name, size):
        return cached
    split = open_split()
    decoder = choose_decoder(split.images, size, skip_corrupt, squash, form)
    spec = decoder.spec
    area = form.side**2 if isinstance(form, Whole) else math.prod(spec.shape)
    if len(split.images) * spec.channels * area * decoder.dtype.itemsize > MAX_TENSOR_BYTES:
        examples = StreamedImages(split.images, split.labels, split.classes, decoder)
        if not skip_corrupt:
            return examples
        return examples.subset(_find_decodable(split.images, decoder, path, name, progress))
    with locked(path):
        if cached := _load_cached(path, name, size):  # another process was first
            return cached
        decode = _decode_whole if isinstance(form, Whole) else _decode_all
        tensors, decodable = decode(split.images, decoder, skip_corrupt, name, progress)
        labels = {} if split.labels is None else {"labels": split.labels[decodable]}
        metadata = {"classes": json.dumps(split.classes), "found": str(len(split.images))}
        write_tensors(path, {**tensors, **labels}, metadata)
    cached = _load_cached(path, name, size)
    if cached is None:
        raise UserError(
            f"{path}: was written, but cannot be read back: check the disk, or set SSLRUN_CACHE "
            "to another folder"
        )
    return cached


def choose_decoder(
    images: EncodedImages,
    size: Size | None,
    skip_corrupt: bool,
    squash: bool,
    form: Whole | Pixels | None,
) -> ImageDecoder:
    """Return the decoder of a split; see `load_images`."""
    if isinstance(form, Whole):
        assert isinstance(size, int)
        return WholeDecoder(form.side, size)
    if form is not None:
        native = _find_native_array_side(images, skip_corrupt, form) if size is None else size
        dtype = getattr(torch, form.dtype)
        return ArrayDecoder(native, form.channels, dtype, form.value_range, resize=size is not None)
    side = find_native_side(images, skip_corrupt) if size is None else size
    return Decoder(side, resize=size is not None, squash=squash)


def _find_native_array_side(images: EncodedImages, skip_corrupt: bool, pixels: Pixels) -> int:
    """Return the side of the first image, or with `skip_corrupt` the first that can be decoded.

    Raises:
        UserError: It is not square, so that a size must be given; or no image can be decoded.
    """
    for index in range(len(images)):
        try:
            height, width = read_array(images, index, pixels.channels).shape[:2]
        except UnreadableError:
            if not skip_corrupt:
                raise
            continue
        if height != width:
            raise UserError(
                f"{images.name(index)}: is {width}x{height}, not square: give the side to store "
                f"the images at, as in size: {min(height, width)}, or height and width, as in "
                f"size: [{height}, {width}]"
            )
        return height
    raise UserError(f"{images.name(0)}: cannot be decoded, and neither can any other image")


def _load_cached(
    path: Path, name: str, size: Size | None
) -> TensorExamples | WholeImageExamples | None:
    """Return the cached split, memory-mapped; None if it is missing or damaged.

    `size` is the side of a view of whole images.
    """
    content = read_tensors(path)
    if content is None:
        return None
    tensors, metadata = content
    try:
        sizes, labels = tensors.get("sizes"), tensors.get("labels")
        images = tensors["images"] if sizes is None else tensors["pixels"]
        classes = tuple(json.loads(metadata["classes"]))
        _warn_skipped(name, int(metadata["found"]) - len(images if sizes is None else sizes))
    except (KeyError, ValueError):
        return None
    if sizes is not None and isinstance(size, int):
        return WholeImageExamples(images, locate(sizes), labels, classes, ImageSpec(size))
    return TensorExamples(images, labels, classes, ImageSpec.of(images.shape))


def _decode_all(
    images: EncodedImages,
    decoder: ImageDecoder,
    skip_corrupt: bool,
    name: str,
    progress: ProgressCallback | None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the "images" (N, C, H, W), and which of all (N,) could be decoded."""
    spec = decoder.spec
    pixels = torch.zeros(len(images), spec.channels, *spec.shape, dtype=decoder.dtype)
    rows = pixels.numpy()

    def store(index: int, image: np.ndarray) -> None:
        rows[index] = image.transpose(2, 0, 1)

    decodable = _decode_each(images, decoder, store, skip_corrupt, name, progress)
    return {"images": pixels if decodable.all() else pixels[decodable]}, decodable


def _decode_whole(
    images: EncodedImages,
    decoder: ImageDecoder,
    skip_corrupt: bool,
    name: str,
    progress: ProgressCallback | None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the "pixels" (P, 3) uint8 of all images one after the other, and their "sizes" (N, 2).

    Returns also which of all images could be decoded, (N,) bool.
    """
    decoded: dict[int, np.ndarray] = {}
    decodable = _decode_each(images, decoder, decoded.__setitem__, skip_corrupt, name, progress)
    packed = pack([decoded[index] for index in sorted(decoded)], decoder.spec.size)
    return {"pixels": packed.pixels, "sizes": packed.sizes}, decodable


def _decode_each(
    images: EncodedImages,
    decoder: ImageDecoder,
    use: Callable[[int, np.ndarray], None],
    skip_corrupt: bool,
    name: str,
    progress: ProgressCallback | None,
) -> Tensor:
    """Call `use(index, image)` with every image, from several threads.

    Returns which images could be decoded, (N,) bool.

    Raises:
        UserError: An image cannot be decoded and must not be skipped, or none can be decoded.
    """
    decodable = torch.ones(len(images), dtype=torch.bool)

    def decode(chunk: range) -> None:
        for index in chunk:
            try:
                use(index, decoder(images, index))
            except UnreadableError:
                if not skip_corrupt:
                    raise
                decodable[index] = False

    starts = range(0, len(images), CHUNK)
    chunks = [range(start, min(start + CHUNK, len(images))) for start in starts]
    # Threads suffice, because Pillow releases the interpreter's lock while it decodes and resizes.
    with ThreadPoolExecutor(max(1, count_workers())) as executor:
        try:
            for chunk, _ in zip(chunks, executor.map(decode, chunks), strict=True):
                if progress:
                    progress(name, chunk.stop, len(images))
        except BaseException:
            executor.shutdown(cancel_futures=True)
            raise
    if not decodable.any():
        raise UserError(
            f"{name}: none of its {len(images)} images can be decoded; the first is "
            f"{images.name(0)}"
        )
    return decodable


def _find_decodable(
    images: EncodedImages,
    decoder: ImageDecoder,
    path: Path,
    name: str,
    progress: ProgressCallback | None,
) -> Tensor:
    """Return the indices of the images that can be decoded, and cache them at `path`."""
    with locked(path):
        content = read_tensors(path)
        if content is None or "sound" not in content[0]:
            decodable = _decode_each(images, decoder, lambda *_: None, True, name, progress)
            indices = decodable.nonzero()[:, 0]
            write_tensors(path, {"sound": indices}, {})
        else:
            indices = content[0]["sound"]
    _warn_skipped(name, len(images) - len(indices))
    return indices


def _warn_skipped(name: str, count: int) -> None:
    if count:
        log.warning("%s: skipped %d images that cannot be decoded", name, count)


# ---------------------------------------------------------------- streamed


@dataclass(frozen=True)
class StreamedImages(Examples):
    """A set that is too large for memory: worker processes read and decode each batch on request.

    Batches come in the order of their indices for any number of workers, and starting late in that
    order costs nothing. Images are squares or whole, as the decoder says; augmentation stays on the
    device.
    """

    images: EncodedImages
    labels: Tensor | None
    classes: tuple[str, ...]
    decoder: ImageDecoder
    indices: Tensor | None = None
    """(M,) int64: which of `images` belong to this set; None: all."""

    @property
    def spec(self) -> ImageSpec:  # type: ignore[override]
        return self.decoder.spec

    def __len__(self) -> int:
        return len(self.images) if self.indices is None else len(self.indices)

    def subset(self, indices: Tensor) -> StreamedImages:
        labels = None if self.labels is None else self.labels[indices]
        kept = indices if self.indices is None else self.indices[indices]
        return replace(self, labels=labels, indices=kept)

    def batches(self, indices: Iterable[Tensor], device: torch.device) -> Iterator[Batch]:
        for images, positions in prefetch(self._decode, indices, device):
            labels = None if self.labels is None else self.labels[positions]
            yield Batch(images, labels).to(device)

    def _decode(self, positions: Tensor) -> Tensor | WholeImages:
        chosen = positions if self.indices is None else self.indices[positions]
        return self.decoder.pack([self.decoder(self.images, index) for index in chosen.tolist()])


def prefetch(
    decode: Callable[[Tensor], Any], indices: Iterable[Tensor], device: torch.device
) -> Iterator[tuple[Any, Tensor]]:
    """Yield (decode(batch), batch) for each batch (B,) of indices, from worker processes.

    Batches come in order, and are decoded ahead of their use. `decode` is called in the workers.

    Raises:
        UserError: `decode` raised it.
    """
    loader = DataLoader(
        _BatchDecoder(decode),
        batch_sampler=_IndexLists(indices),
        collate_fn=_identity,
        num_workers=count_workers(),
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # otherwise the loader draws from the global generator
    )
    for decoded, positions in loader:
        if isinstance(decoded, str):
            raise UserError(decoded)
        yield decoded, positions


class _IndexLists:
    """An adapter that yields index tensors as lists, which a DataLoader needs."""

    def __init__(self, indices: Iterable[Tensor]) -> None:
        self.indices = indices

    def __iter__(self) -> Iterator[list[int]]:
        return (batch.tolist() for batch in self.indices)


class _BatchDecoder(Dataset[Any]):
    """Decodes batches in a worker; an item is (a batch or an error message, positions)."""

    def __init__(self, decode: Callable[[Tensor], Any]) -> None:
        self.decode = decode

    def __getitems__(self, positions: list[int]) -> tuple[Any, Tensor]:
        batch = torch.tensor(positions, dtype=torch.int64)
        try:
            return self.decode(batch), batch
        except UserError as error:  # raised here, it would carry the traceback of the worker
            return str(error), batch


def _identity(batch: Any) -> Any:
    return batch
