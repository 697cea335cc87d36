"""Decode images once into a uint8 tensor that is cached on disk, or stream a large set."""

from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from sslrun.data.cache import cache_error, cache_root, digest_key, locked
from sslrun.data.examples import Batch, Examples, ProgressCallback, TensorExamples
from sslrun.data.image.whole import WholeImageExamples, WholeImages, locate, pack
from sslrun.data.specs import ImageSpec
from sslrun.errors import UserError
from sslrun.files import replacing

MAX_TENSOR_BYTES = 8 * 2**30
"""A split that takes more bytes than this as one uint8 tensor is streamed instead."""

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
    def size(self) -> int:
        """Side of the square images, or of the squares that stand for whole ones."""

    def __call__(self, images: EncodedImages, index: int) -> np.ndarray:
        """Return the image as (H, W, 3) uint8.

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
    """A decoder of every image of a split to a square of one size.

    The shorter side is resized to `size` (bilinear, antialiased) and the center is cropped, as is
    usual for ImageNet. EXIF orientation is applied. Gray, palette, CMYK and transparent images
    become RGB.
    """

    size: int
    resize: bool = True
    """Whether to resize; if not, an image of another size is an error."""
    squash: bool = False
    """Whether to resize both sides to `size`, without a crop."""

    def __call__(self, images: EncodedImages, index: int) -> np.ndarray:
        """Return the image as (size, size, 3) uint8.

        Raises:
            UserError: It cannot be decoded, or has another size and must not be resized.
        """
        with _open_image(images, index) as image:
            if not self.resize and image.size != (self.size, self.size):
                width, height = image.size
                raise UserError(
                    f"{images.name(index)}: is {width}x{height}, but others are "
                    f"{self.size}x{self.size}: give the side to store them at, as in "
                    f"size: {self.size}"
                )
            return self.decode(image)

    def decode(self, image: Any) -> np.ndarray:
        """Return an image of Pillow as (size, size, 3) uint8; the image may be changed."""
        return np.asarray(self._make_square(image))

    def pack(self, images: Sequence[np.ndarray]) -> Tensor:
        pixels = np.empty((len(images), self.size, self.size, 3), dtype=np.uint8)
        for row, image in zip(pixels, images, strict=True):
            row[:] = image
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()

    def _make_square(self, image: Any) -> Any:
        from PIL import Image

        image = _to_upright(image, self.size)
        if image.size != (self.size, self.size):
            scale = self.size / min(image.size)
            sides = (0, 0) if self.squash else image.size
            width, height = (max(self.size, round(side * scale)) for side in sides)
            image = image.resize((width, height), Image.Resampling.BILINEAR)
            left, top = (width - self.size) // 2, (height - self.size) // 2
            image = image.crop((left, top, left + self.size, top + self.size))
        return image


class UnreadableError(UserError):
    """An image that cannot be decoded."""


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
                f"the images at, as in size: {1 << (min(width, height).bit_length() - 1)}"
            )
        return width
    raise UserError(
        f"{images.name(0)}: cannot be decoded, and neither can any other of the {len(images)} "
        "images"
    )


def convert_arrays(arrays: np.ndarray, size: int | None = None) -> Tensor:
    """Convert images (N, H, W), (N, H, W, 1) or (N, H, W, 3) uint8 to (N, 3, size, size) uint8.

    If `size` is None, the images keep their size.

    Raises:
        UserError: The type or shape is another, or the images are not square and `size` is None.
    """
    shape = arrays.shape
    is_image = arrays.ndim == 3 or (arrays.ndim == 4 and shape[3] in (1, 3))
    if arrays.dtype != np.uint8 or not is_image:
        raise UserError(
            f"images are {arrays.dtype} {shape}: they should be uint8 of shape (N, H, W) or "
            "(N, H, W, 3)"
        )
    images = torch.from_numpy(arrays.reshape(*shape[:3], -1)).permute(0, 3, 1, 2)
    height, width = images.shape[2:]
    if size is None and height != width:
        raise UserError(
            f"images are {width}x{height}, not square: give the side to store them at, as in "
            "size: 32"
        )
    if size is not None and (height, width) != (size, size):
        images = _resize_arrays(images, size)
    return images.expand(-1, 3, -1, -1).contiguous()


def _resize_arrays(images: Tensor, size: int) -> Tensor:
    """Resize the shorter side of images (N, C, H, W) uint8 to `size`, and crop the center."""
    height, width = images.shape[2:]
    scale = size / min(height, width)
    sides = [max(size, round(side * scale)) for side in (height, width)]
    top, left = ((side - size) // 2 for side in sides)
    resized = []
    for chunk in images.split(4096):
        floats = F.interpolate(chunk.float(), sides, mode="bilinear", antialias=True)
        resized.append(floats.round().clamp(0, 255).byte())
    return torch.cat(resized)[:, :, top : top + size, left : left + size]


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


def load_images(
    name: str,
    identity: Mapping[str, Any],
    open_split: Callable[[], EncodedSplit],
    size: int | None,
    skip_corrupt: bool = False,
    progress: ProgressCallback | None = None,
    squash: bool = False,
    whole: int | None = None,
) -> TensorExamples | WholeImageExamples | StreamedImages:
    """Load a split as one tensor, from the cache if possible; or stream a large one.

    `identity` holds the JSON values that determine what `open_split` returns. It is part of the
    cache key, with `size`, `skip_corrupt` and `squash` (see `Decoder`). `size` is the side to
    store; None keeps the size of the images, which must be equal squares. With `whole`, the images
    are stored as they are, the shorter side resized to `whole`, and `size` is the side of a view. A
    damaged cache entry is replaced.

    Raises:
        UserError: An image cannot be decoded (unless `skip_corrupt`), images differ in size without
            `size`, or the cache cannot be written.
    """
    key = {"format": CACHE_FORMAT, "size": size, "skip_corrupt": skip_corrupt, **identity}
    key |= {"squash": True} if squash else {}
    if whole is not None:
        assert size is not None
        key |= {"whole": whole, "size": None}  # the side of a view is not stored
    path = cache_root() / "images" / f"{name.replace('/', '--')}-{digest_key(key)}.safetensors"
    if cached := _load_cached(path, name, size):
        return cached
    split = open_split()
    decoder = _choose_decoder(split.images, size, skip_corrupt, squash, whole)
    if len(split.images) * 3 * (whole or decoder.size) ** 2 > MAX_TENSOR_BYTES:
        examples = StreamedImages(split.images, split.labels, split.classes, decoder)
        if not skip_corrupt:
            return examples
        return examples.subset(_find_decodable(split.images, decoder, path, name, progress))
    with locked(path):
        if cached := _load_cached(path, name, size):  # another process was first
            return cached
        decode = _decode_all if whole is None else _decode_whole
        tensors, decodable = decode(split.images, decoder, skip_corrupt, name, progress)
        labels = {} if split.labels is None else {"labels": split.labels[decodable]}
        metadata = {"classes": json.dumps(split.classes), "found": str(len(split.images))}
        _write_cache(path, {**tensors, **labels}, metadata)
    cached = _load_cached(path, name, size)
    if cached is None:
        raise UserError(
            f"{path}: was written, but cannot be read back: check the disk, or set SSLRUN_CACHE "
            "to another folder"
        )
    return cached


def _choose_decoder(
    images: EncodedImages, size: int | None, skip_corrupt: bool, squash: bool, whole: int | None
) -> ImageDecoder:
    """Return the decoder of a split; see `load_images`."""
    if whole is not None and size is not None:
        return WholeDecoder(whole, size)
    side = find_native_side(images, skip_corrupt) if size is None else size
    return Decoder(side, resize=size is not None, squash=squash)


def _load_cached(
    path: Path, name: str, size: int | None
) -> TensorExamples | WholeImageExamples | None:
    """Return the cached split, memory-mapped; None if it is missing or damaged.

    `size` is the side of a view of whole images.
    """
    content = _read_cache(path)
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
    if sizes is not None and size is not None:
        return WholeImageExamples(images, locate(sizes), labels, classes, ImageSpec(size))
    return TensorExamples(images, labels, classes, ImageSpec(images.shape[-1]))


def _read_cache(path: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Return the tensors and the metadata of a cache file; None if it is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError):
        return None


def _write_cache(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a cache file atomically."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata)
    except (OSError, SafetensorError) as error:
        raise cache_error(path.parent, error) from None


def _decode_all(
    images: EncodedImages,
    decoder: ImageDecoder,
    skip_corrupt: bool,
    name: str,
    progress: ProgressCallback | None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the "images" (N, 3, size, size) uint8, and which of all (N,) could be decoded."""
    pixels = torch.zeros(len(images), 3, decoder.size, decoder.size, dtype=torch.uint8)
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
    packed = pack([decoded[index] for index in sorted(decoded)], decoder.size)
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
        content = _read_cache(path)
        if content is None or "sound" not in content[0]:
            decodable = _decode_each(images, decoder, lambda *_: None, True, name, progress)
            indices = decodable.nonzero()[:, 0]
            _write_cache(path, {"sound": indices}, {})
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
        return ImageSpec(self.decoder.size)

    def __len__(self) -> int:
        return len(self.images) if self.indices is None else len(self.indices)

    def subset(self, indices: Tensor) -> StreamedImages:
        labels = None if self.labels is None else self.labels[indices]
        kept = indices if self.indices is None else self.indices[indices]
        return replace(self, labels=labels, indices=kept)

    def batches(self, indices: Iterable[Tensor], device: torch.device) -> Iterator[Batch]:
        loader = DataLoader(
            _BatchDecoder(self),
            batch_sampler=_IndexLists(indices),
            collate_fn=_identity,
            num_workers=count_workers(),
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # otherwise the loader draws from the global generator
        )
        for images, positions in loader:
            if isinstance(images, str):
                raise UserError(images)
            labels = None if self.labels is None else self.labels[positions]
            yield Batch(images, labels).to(device)


class _IndexLists:
    """An adapter that yields index tensors as lists, which a DataLoader needs."""

    def __init__(self, indices: Iterable[Tensor]) -> None:
        self.indices = indices

    def __iter__(self) -> Iterator[list[int]]:
        return (batch.tolist() for batch in self.indices)


class _BatchDecoder(Dataset[Any]):
    """Decodes batches in a worker; an item is (images or an error message, positions)."""

    def __init__(self, examples: StreamedImages) -> None:
        self.examples = examples

    def __getitems__(self, positions: list[int]) -> tuple[Tensor | WholeImages | str, Tensor]:
        images, decoder = self.examples.images, self.examples.decoder
        decoded = []
        batch = torch.tensor(positions, dtype=torch.int64)
        if self.examples.indices is not None:
            positions = self.examples.indices[batch].tolist()
        for index in positions:
            try:
                decoded.append(decoder(images, index))
            except UserError as error:  # raised here, it would carry the traceback of the worker
                return str(error), batch
        return decoder.pack(decoded), batch


def _identity(batch: Any) -> Any:
    return batch
