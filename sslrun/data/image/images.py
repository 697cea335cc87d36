"""Images: decoded once into one uint8 tensor that is kept on disk, or, where that would be too large, streamed."""

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

from sslrun.data.cache import cache_root, digest_of, locked, unwritable
from sslrun.data.examples import Batch, Examples, TensorExamples
from sslrun.data.specs import ImageSpec
from sslrun.errors import UserError
from sslrun.files import replacing

MAX_TENSOR_BYTES = 8 * 2**30
"""A split that would take more than this as one uint8 tensor is streamed instead."""

CACHE_FORMAT = 1
"""Part of every cache key; raised when decoding changes."""

Progress = Callable[[str, int, int], None]
"""Told, now and then, what is being read, how many images of it are done, and how many there are."""

log = logging.getLogger(__name__)


# ---------------------------------------------------------------- encoded images


class Encoded(Protocol):
    """Images as they are stored: JPEG, PNG, or whatever else Pillow reads. Picklable, for decoding workers."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> bytes: ...

    def name(self, index: int) -> str:
        """What an error calls the image."""

    def files(self) -> Sequence[str | None]:
        """What each image's file is or was called, with or without its folder; None where nobody wrote it down."""


@dataclass(frozen=True)
class EncodedFiles:
    """Images in files."""

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
    """EncodedSubset of the images of others."""

    images: Encoded
    chosen: Sequence[int]

    def __len__(self) -> int:
        return len(self.chosen)

    def read(self, index: int) -> bytes:
        return self.images.read(self.chosen[index])

    def name(self, index: int) -> str:
        return self.images.name(self.chosen[index])

    def files(self) -> Sequence[str | None]:
        every = self.images.files()
        return [every[index] for index in self.chosen]


@dataclass(frozen=True)
class EncodedSplit:
    """A split before it is decoded."""

    images: Encoded
    labels: Tensor | None
    """(N,) int64."""
    classes: tuple[str, ...]


# ---------------------------------------------------------------- pixels


@dataclass(frozen=True)
class Decoder:
    """Makes every image of a split one square of a given side.

    The shorter side is resized to `size` (bilinear, antialiased) and the centre cropped, as is customary for ImageNet.
    Orientation tags are applied; grey, palette, CMYK and transparent images become RGB.
    """

    size: int
    resize: bool = True
    """False: an image that isn't size x size already is an error, since nobody said what to make of it."""
    squash: bool = False
    """Both sides are resized to `size`, and nothing is cropped."""

    def __call__(self, images: Encoded, index: int) -> np.ndarray:
        """(size, size, 3) uint8. UserError: it can't be decoded, or has another size and may not be resized."""
        with _readable(images, index) as image:
            if not self.resize and image.size != (self.size, self.size):
                width, height = image.size
                raise UserError(
                    f"{images.name(index)}: is {width}x{height}, and others are {self.size}x{self.size}: "
                    f"say at which side to store them, as in size: {self.size}"
                )
            return np.asarray(self._square(image))

    def _square(self, image: Any) -> Any:
        from PIL import Image, ImageOps

        # Decodes large JPEGs at a half, a quarter or an eighth, never below twice the side.
        image.draft("RGB", (2 * self.size, 2 * self.size))
        ImageOps.exif_transpose(image, in_place=True)
        image = _rgb(image)
        if image.size != (self.size, self.size):
            scale = self.size / min(image.size)
            sides = (0, 0) if self.squash else image.size
            width, height = (max(self.size, round(side * scale)) for side in sides)
            image = image.resize((width, height), Image.Resampling.BILINEAR)
            left, top = (width - self.size) // 2, (height - self.size) // 2
            image = image.crop((left, top, left + self.size, top + self.size))
        return image


class UnreadableError(UserError):
    """An image that can't be decoded."""


@contextmanager
def _readable(images: Encoded, index: int) -> Iterator[Any]:
    """The opened image. UnreadableError: it, or what is done with it inside, fails as a damaged file does."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(images.read(index))) as image:
            yield image
    except UserError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else str(error)
        raise UnreadableError(
            f"{images.name(index)}: can't be decoded ({reason}): mend or remove it, or give skip_corrupt: true"
        ) from None


def _rgb(image: Any) -> Any:
    """As RGB, whatever the mode; 16-bit grey keeps its high byte."""
    from PIL import Image

    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def own_side(images: Encoded, skip_corrupt: bool = False) -> int:
    """The side of the first image, or of the first sound one. UserError: it isn't square, so that one must be given."""
    for index in range(len(images)):
        try:
            with _readable(images, index) as image:
                width, height = image.size
        except UnreadableError:
            if not skip_corrupt:
                raise
            continue
        if width != height:
            raise UserError(
                f"{images.name(index)}: is {width}x{height}, not square: say at which side to store the images, "
                f"as in size: {1 << (min(width, height).bit_length() - 1)}"
            )
        return width
    raise UserError(f"{images.name(0)}: can't be decoded, nor can any other of the {len(images)} images")


def from_arrays(arrays: np.ndarray, size: int | None = None) -> Tensor:
    """Images (N, H, W), (N, H, W, 1) or (N, H, W, 3) uint8 as (N, 3, size, size) uint8; size None: as they are.

    UserError: another type or shape, or not square without a size to be made square by.
    """
    if arrays.dtype != np.uint8 or arrays.ndim not in (3, 4) or (arrays.ndim == 4 and arrays.shape[3] not in (1, 3)):
        raise UserError(
            f"images are {arrays.dtype} {arrays.shape}: they should be uint8 of shape (N, H, W), or (N, H, W, 3)"
        )
    images = torch.from_numpy(arrays.reshape(*arrays.shape[:3], -1)).permute(0, 3, 1, 2)
    height, width = images.shape[2:]
    if size is None and height != width:
        raise UserError(f"images are {width}x{height}, not square: say at which side to store them, as in size: 32")
    if size is not None and (height, width) != (size, size):
        scale = size / min(height, width)
        sides = [max(size, round(side * scale)) for side in (height, width)]
        top, left = ((side - size) // 2 for side in sides)
        resized = [
            F.interpolate(part.float(), sides, mode="bilinear", antialias=True).round().clamp(0, 255).byte()
            for part in images.split(4096)
        ]
        images = torch.cat(resized)[:, :, top : top + size, left : left + size]
    return images.expand(-1, 3, -1, -1).contiguous()


# ---------------------------------------------------------------- in memory, kept on disk


def workers() -> int:
    """How many threads or processes decode: SSLRUN_WORKERS, or one a core that this process may use, 16 at most."""
    given = os.environ.get("SSLRUN_WORKERS")
    if given is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(1, min(16, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    if not given.isdecimal():
        raise UserError(f"SSLRUN_WORKERS={given}: should be a number of decoding workers, as in SSLRUN_WORKERS=4")
    return int(given)


def load_images(
    name: str,
    identity: Mapping[str, Any],
    open_split: Callable[[], EncodedSplit],
    size: int | None,
    skip_corrupt: bool = False,
    progress: Progress | None = None,
    squash: bool = False,
) -> TensorExamples | StreamedImages:
    """A split as `TensorExamples`, from the cache where it is there; or streamed, where it would be too large.

    `identity` (JSON values): what determines what `open_split` returns; with the other arguments it is the cache's
    key. `size`: the side to store; None: the images' own, if they are equal squares. `squash`: see `Decoder`. A damaged cache entry is made
    anew. UserError: an image that can't be decoded, unless `skip_corrupt`; images of different sizes without `size`;
    a cache that can't be written.
    """
    key = {"format": CACHE_FORMAT, "size": size, "skip_corrupt": skip_corrupt, **identity}
    key |= {"squash": True} if squash else {}
    path = cache_root() / "images" / f"{name.replace('/', '--')}-{digest_of(key)}.safetensors"
    if kept := _kept(path, name):
        return kept
    split = open_split()
    decoder = Decoder(
        own_side(split.images, skip_corrupt) if size is None else size, resize=size is not None, squash=squash
    )
    if len(split.images) * 3 * decoder.size**2 > MAX_TENSOR_BYTES:
        examples = StreamedImages(split.images, split.labels, split.classes, decoder)
        return examples.subset(_sound(split.images, decoder, path, name, progress)) if skip_corrupt else examples
    with locked(path):
        if kept := _kept(path, name):  # by another process, meanwhile
            return kept
        pixels, sound = _decoded(split.images, decoder, skip_corrupt, name, progress)
        labels = {} if split.labels is None else {"labels": split.labels[sound]}
        about = {"classes": json.dumps(split.classes), "found": str(len(split.images))}
        _write(path, {"images": pixels if sound.all() else pixels[sound], **labels}, about)
    kept = _kept(path, name)
    if kept is None:
        raise UserError(f"{path}: was written, but can't be read back: is the disk sound? Set SSLRUN_CACHE to another")
    return kept


def _kept(path: Path, name: str) -> TensorExamples | None:
    """What lies in the cache, memory-mapped; None where nothing does, or nothing sound."""
    found = _read(path)
    if found is None:
        return None
    tensors, about = found
    try:
        images, labels = tensors["images"], tensors.get("labels")
        classes = tuple(json.loads(about["classes"]))
        _warn_skipped(name, int(about["found"]) - len(images))
    except (KeyError, ValueError):
        return None
    return TensorExamples(images, labels, classes, ImageSpec(images.shape[-1]))


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """A cache file's tensors and its metadata; None: missing, cut short or not of this format."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError):
        return None


def _write(path: Path, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
    """Write a cache file so that `path` is at every moment nothing, or whole."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        with replacing(path) as temporary:
            save_file(tensors, temporary, about)
    except (OSError, SafetensorError) as error:
        raise unwritable(path.parent, error) from None


def _decoded(
    images: Encoded, decoder: Decoder, skip_corrupt: bool, name: str, progress: Progress | None
) -> tuple[Tensor, Tensor]:
    """All images (N, 3, size, size), and which of them (N,) are sound; the others are left black."""
    pixels = torch.zeros(len(images), 3, decoder.size, decoder.size, dtype=torch.uint8)

    rows = pixels.numpy()

    def keep(index: int, image: np.ndarray) -> None:
        rows[index] = image.transpose(2, 0, 1)

    return pixels, _each(images, decoder, keep, skip_corrupt, name, progress)


def _each(
    images: Encoded,
    decoder: Decoder,
    use: Callable[[int, np.ndarray], None],
    skip_corrupt: bool,
    name: str,
    progress: Progress | None,
) -> Tensor:
    """Call `use` with every image, from many threads; returns which could be decoded (N,) bool.

    UserError: one can't be, and is not to be skipped, or none can be.
    """
    sound = torch.ones(len(images), dtype=torch.bool)

    def some(part: range) -> None:
        for index in part:
            try:
                use(index, decoder(images, index))
            except UnreadableError:
                if not skip_corrupt:
                    raise
                sound[index] = False

    parts = [range(start, min(start + 256, len(images))) for start in range(0, len(images), 256)]
    with ThreadPoolExecutor(max(1, workers())) as pool:  # Pillow decodes and resizes outside the interpreter's lock
        try:
            for part, _ in zip(parts, pool.map(some, parts), strict=True):
                if progress:
                    progress(name, part.stop, len(images))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if not sound.any():
        raise UserError(f"{name}: none of its {len(images)} images can be decoded; the first is {images.name(0)}")
    return sound


def _sound(images: Encoded, decoder: Decoder, path: Path, name: str, progress: Progress | None) -> Tensor:
    """Indices of the images that can be decoded: each is tried once, and the outcome kept at `path`."""
    with locked(path):
        found = _read(path)
        if found is None or "sound" not in found[0]:
            sound = _each(images, decoder, lambda index, image: None, True, name, progress).nonzero()[:, 0]
            _write(path, {"sound": sound}, {})
        else:
            sound = found[0]["sound"]
    _warn_skipped(name, len(images) - len(sound))
    return sound


def _warn_skipped(name: str, count: int) -> None:
    if count:
        log.warning("%s: skipped %d images that can't be decoded", name, count)


# ---------------------------------------------------------------- streamed


@dataclass(frozen=True)
class StreamedImages(Examples):
    """A set too large for memory: worker processes read and decode each batch as it is asked for.

    Batches come in the order of their indices whatever the number of workers, and starting late in that order costs
    nothing. Images are stored squares, as in `TensorExamples`; augmentation stays on the device.
    """

    images: Encoded
    labels: Tensor | None
    classes: tuple[str, ...]
    decoder: Decoder
    chosen: Tensor | None = None
    """(M,) which of `images` belong to this set; None: all."""

    @property
    def spec(self) -> ImageSpec:  # type: ignore[override]
        return ImageSpec(self.decoder.size)

    def __len__(self) -> int:
        return len(self.images) if self.chosen is None else len(self.chosen)

    def subset(self, indices: Tensor) -> StreamedImages:
        labels = self.labels if self.labels is None else self.labels[indices]
        return replace(self, labels=labels, chosen=indices if self.chosen is None else self.chosen[indices])

    def batches(self, indices: Iterable[Tensor], device: torch.device) -> Iterator[Batch]:
        count = workers()
        loader = DataLoader(
            _Decoding(self),
            batch_sampler=_Lists(indices),
            collate_fn=_as_it_is,
            num_workers=count,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # else the loader draws from the global one
        )
        for images, places in loader:
            if isinstance(images, str):
                raise UserError(images)
            yield Batch(images, None if self.labels is None else self.labels[places]).to(device)


class _Lists:
    """Index tensors as the lists that a DataLoader draws batches by."""

    def __init__(self, indices: Iterable[Tensor]) -> None:
        self.indices = indices

    def __iter__(self) -> Iterator[list[int]]:
        return (each.tolist() for each in self.indices)


class _Decoding(Dataset[Any]):
    """In a worker: the images and the places of a batch; in place of the images a user's mistake, in words."""

    def __init__(self, examples: StreamedImages) -> None:
        self.examples = examples

    def __getitems__(self, places: list[int]) -> tuple[Tensor | str, Tensor]:
        images, chosen, decoder = self.examples.images, self.examples.chosen, self.examples.decoder
        pixels = torch.empty(len(places), decoder.size, decoder.size, 3, dtype=torch.uint8)
        where = torch.tensor(places, dtype=torch.int64)
        for row, index in zip(pixels.numpy(), places if chosen is None else chosen[where].tolist(), strict=True):
            try:
                row[:] = decoder(images, index)
            except UserError as error:  # raised in a worker it would reach the user with the worker's traceback
                return str(error), where
        return pixels.permute(0, 3, 1, 2).contiguous(), where


def _as_it_is(batch: Any) -> Any:
    return batch
