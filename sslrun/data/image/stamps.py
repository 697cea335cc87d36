"""Photographed objects that are pasted on photographs, with a mask of each object."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from sslrun.data.examples import Batch, TensorExamples
from sslrun.data.image.masks import BACKGROUND, MaskedImages
from sslrun.data.source import Source, SourceOptions, sources
from sslrun.data.specs import ImageSpec
from sslrun.data.splits import TEST_FRACTION, carve
from sslrun.data.stores import (
    IMAGE_SUFFIXES,
    Split,
    describe_local_folders,
    find_files,
    require_local_folder,
)
from sslrun.errors import UserError

# Imported at run time only when pictures are opened, because naming a set must be fast.
if TYPE_CHECKING:
    from PIL import Image

OPAQUE = 128
"""Alpha, of 255, from which a pixel belongs to the object."""
CROP = (0.4, 1.0)
"""Smallest and largest side of a random square of a photograph, as a share of its shorter side."""
TRIES = 20
"""Places that are tried for another object before it is left out."""
HIDDEN = 0.1
"""Largest share of an object that another one may hide."""
BUILT_IN = {"train": "flower.jpg", "test": "china.jpg"}
"""Photographs that come with scikit-learn, by split."""


@dataclass(frozen=True)
class Stamp:
    """A photographed object: RGBA pixels, cut to the object."""

    image: Image.Image
    label: int
    """Index of the object's class."""
    opaque: int
    """Number of the object's pixels."""

    @property
    def largest_share(self) -> float:
        """The share of a square image that the object covers if its longer side is the image's."""
        return self.opaque / max(self.image.size) ** 2


@sources.register("stamps")
class Stamps(Source):
    """Photographed objects pasted on photographs, with a mask of each object.

    Objects are PNG files with alpha, in folders that are their classes, such as Tux Paint's stamps.
    Each image is composed at random, always in the same way for one `seed`: a random square of a
    photograph, and one or more objects at random places, mirrored or not. The test split has other
    objects and other photographs than the training split; a quarter of each, always the same. All
    settings are our choice.
    """

    gives = ImageSpec
    task = "objects"

    class Options(SourceOptions):
        path: Path | None = None
        """Folder of the objects; default: stamps in SSLRUN_DATA or in data."""
        backgrounds: Path | None = None
        """Folder of photographs to paste on; default: two photographs that come with scikit-learn,
        one for training and one for the test."""
        size: int = Field(default=96, ge=16, le=512)
        """Side of the images, in pixels."""
        train: int = Field(default=5000, ge=2)
        """Number of training images."""
        test: int = Field(default=500, ge=1)
        """Number of test images."""
        area: tuple[float, float] = (0.15, 0.4)
        """Smallest and largest share of the image that an object covers. Objects too thin for the
        smallest share are not used."""
        objects: int = Field(default=2, ge=1, le=8)
        """Largest number of objects in an image; one that finds no place is left out."""
        label: Literal["mask", "class"] = "mask"
        """Labels: mask for the task `objects`; class, the folder of an image's first object, for
        the task `classification`."""
        seed: int = Field(default=0, ge=0)
        """Seed of the composition."""

        @model_validator(mode="after")
        def _check_area(self) -> Stamps.Options:
            low, high = self.area
            if not 0 < low <= high <= 1:
                raise ValueError(f"area should be two ascending shares in (0, 1], not {self.area}")
            return self

    options: Options
    splits = ("train", "test")

    def load(self, split: Split) -> TensorExamples:
        if split not in self.splits:
            raise UserError(f"{self.name}: has no split '{split}', only {', '.join(self.splits)}")
        count = self.options.train if split == "train" else self.options.test
        size, stamps = self.options.size, self.stamps[split]
        photographs = self._load_photographs(split)
        images = np.empty((count, size, size, 3), np.uint8)
        masks = np.empty((count, size, size), np.uint8)
        classes = torch.empty(count, dtype=torch.int64)
        for index in range(count):
            random = np.random.default_rng([self.options.seed, self.splits.index(split), index])
            background = photographs[random.integers(len(photographs))]
            canvas = crop_square(background, size, random)
            chosen = self._paste_all(canvas, masks[index], stamps, random)
            images[index] = np.asarray(canvas)
            classes[index] = chosen
            if self.progress and (index + 1) % 100 == 0:
                self.progress(f"{self.name}-{split}", index + 1, count)
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        if self.options.label == "class":
            return TensorExamples(pixels, classes, self._class_names, ImageSpec(size))
        return MaskedImages(pixels, torch.from_numpy(masks), (), ImageSpec(size))

    def _paste_all(
        self,
        canvas: Image.Image,
        mask: np.ndarray,
        stamps: list[Stamp],
        random: np.random.Generator,
    ) -> int:
        """Paste a random number of objects, fill their `mask`, and return the first one's class."""
        mask[:] = BACKGROUND
        first = -1
        for number in range(1, 1 + int(random.integers(1, self.options.objects + 1))):
            stamp = stamps[random.integers(len(stamps))]
            share = min(random.uniform(*self.options.area), stamp.largest_share)
            if paste(canvas, mask, number, stamp, share, random) and first < 0:
                first = stamp.label
        return first

    def sketch(self, count: int) -> tuple[ImageSpec, Batch]:
        size = self.options.size
        images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
        return ImageSpec(size), Batch(images, None)

    def check_available(self) -> None:
        self._find_folder()

    def _find_folder(self) -> Path:
        remedy = (
            "put PNG files with alpha (such as those of Tux Paint's package of stamps) into "
            "folders under data/stamps, or name the folder with path"
        )
        return require_local_folder(self.name, self.options.path, remedy)

    @cached_property
    def _files(self) -> list[Path]:
        folder = self._find_folder()
        files = sorted(map(Path, find_files(folder, (".png",))))
        if len(files) < 2:
            raise UserError(
                f"{folder}: holds {len(files)} PNG files, but at least 2 are needed: one object to "
                "train on, and another to test on"
            )
        return files

    @cached_property
    def _class_names(self) -> tuple[str, ...]:
        """The folders of the objects."""
        return tuple(sorted({path.parent.name for path in self._files}))

    @cached_property
    def stamps(self) -> dict[str, list[Stamp]]:
        """The objects of each split that are not too thin."""
        labels = torch.tensor([self._class_names.index(path.parent.name) for path in self._files])
        if labels.bincount().max() < 2:  # one object a class: a split cannot be balanced
            labels = torch.zeros_like(labels)
        stamps = {}
        for split, indices in zip(self.splits, carve(labels, TEST_FRACTION), strict=True):
            read = [self._read(self._files[index]) for index in indices.tolist()]
            stamps[split] = [stamp for stamp in read if stamp.largest_share >= self.options.area[0]]
            if not stamps[split]:
                raise UserError(
                    f"{self.name}: all {len(read)} objects of the {split} split are too thin to "
                    f"cover {self.options.area[0]:.0%} of an image: lower data.area"
                )
        return stamps

    def _read(self, path: Path) -> Stamp:
        """Read an object. Raises UserError if its alpha does not cut it out."""
        rgba = open_image(path, "RGBA")
        opaque = np.asarray(rgba)[..., 3] >= OPAQUE
        if opaque.all() or not opaque.any():
            pixels = "transparent" if opaque.all() else "opaque"
            raise UserError(
                f"{path}: has no {pixels} pixel, but alpha should cut the object out: remove it"
            )
        rows, columns = (np.flatnonzero(opaque.any(axis=axis)) for axis in (1, 0))
        left, top, right, bottom = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
        label = self._class_names.index(path.parent.name)
        return Stamp(rgba.crop((left, top, right, bottom)), label, int(opaque.sum()))

    def _load_photographs(self, split: Split) -> list[Image.Image]:
        """Load the photographs to paste on."""
        folder = self.options.backgrounds
        if folder is None:
            return [open_image(_built_in_folder() / BUILT_IN[split], "RGB")]
        files = sorted(map(Path, find_files(folder, IMAGE_SUFFIXES)))
        if len(files) < 2:
            raise UserError(
                f"{folder}: holds {len(files)} images, but at least 2 are needed: one photograph "
                "to train on, and another to test on"
            )
        parts = dict(zip(self.splits, carve(len(files), TEST_FRACTION), strict=True))
        return [open_image(files[index], "RGB") for index in parts[split].tolist()]

    @classmethod
    def describe(cls) -> dict[str, str]:
        return {
            "splits": "train and test; a tenth of train is carved for validation",
            "homepage": "https://tuxpaint.org/stamps",
            "license": "that of your objects; Tux Paint's stamps: GPL-2",
            "searched": describe_local_folders(cls.name),
        }


def _built_in_folder() -> Path:
    """Return the folder of scikit-learn's photographs, without importing scikit-learn."""
    package = importlib.util.find_spec("sklearn")
    assert package is not None
    assert package.origin is not None
    return Path(package.origin).parent / "datasets" / "images"


def open_image(path: Path, mode: str) -> Image.Image:
    """Decode an image file as RGB or RGBA. Raises UserError if it cannot be decoded."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return image.convert(mode)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else str(error)
        raise UserError(f"{path}: cannot be decoded ({reason}): repair or remove it") from None


def crop_square(photograph: Image.Image, size: int, random: np.random.Generator) -> Image.Image:
    """Cut a random square out of a photograph, mirror it or not, and resize it to `size`."""
    from PIL import Image

    side = max(1, round(random.uniform(*CROP) * min(photograph.size)))
    left, top = (int(random.integers(length - side + 1)) for length in photograph.size)
    square = photograph.resize(
        (size, size), Image.Resampling.BILINEAR, (left, top, left + side, top + side)
    )
    return mirror(square, random)


def mirror(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """Mirror an image left to right, or not."""
    from PIL import Image

    flipped = random.random() < 0.5
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flipped else image


def paste(
    canvas: Image.Image,
    mask: np.ndarray,
    number: int,
    stamp: Stamp,
    share: float,
    random: np.random.Generator,
) -> bool:
    """Paste an object at a random place, where it hides little of the objects before it.

    It covers `share` of the canvas; its pixels of `mask` (H, W) become `number`. Returns False, and
    changes nothing, if no such place is found.
    """
    from PIL import Image

    size = canvas.width
    scale = (share * size**2 / stamp.opaque) ** 0.5
    width, height = (min(size, max(1, round(side * scale))) for side in stamp.image.size)
    image = mirror(stamp.image.resize((width, height), Image.Resampling.BILINEAR), random)
    opaque = np.asarray(image)[..., 3] >= OPAQUE
    areas = np.bincount(mask.ravel(), minlength=256)
    for _ in range(TRIES):
        left, top = (int(random.integers(size - side + 1)) for side in (width, height))
        window = mask[top : top + height, left : left + width]
        hidden = np.bincount(window[opaque], minlength=256)
        if (hidden[1:] <= HIDDEN * areas[1:]).all():
            canvas.paste(image, (left, top), image)
            window[opaque] = number
            return True
    return False
