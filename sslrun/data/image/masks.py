"""Images with a mask of each object, and PASCAL VOC."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from sslrun.data.examples import Batch, TensorExamples
from sslrun.data.image.images import Decoder, EncodedFiles
from sslrun.data.source import Source, SourceOptions, sources
from sslrun.data.specs import ImageSpec
from sslrun.data.stores import Split, describe_local_folders, find_local_folder
from sslrun.errors import UserError

BACKGROUND = 0
"""Label of pixels that belong to no object."""
VOID = 255
"""Label of pixels that count neither as an object nor as background."""


@dataclass(frozen=True)
class MaskedImages(TensorExamples):
    """Images (N, 3, H, W) whose labels (N, H, W) uint8 say which object each pixel belongs to.

    Objects of an image are numbered from 1 to 254; see `BACKGROUND` and `VOID`.
    """

    @property
    def strata(self) -> Tensor | None:
        """None: masks are no classes that splits could balance."""
        return None


@sources.register("voc")
class Voc(Source):
    """PASCAL VOC 2012, images with a mask of each object. Everingham et al., IJCV 2015.

    Read from the folder VOC2012 of the development kit: JPEGImages, SegmentationObject and
    ImageSets/Segmentation. Its validation split is the test split, as in Figure 4 of DINO (Caron et
    al. 2021). Both sides of an image are resized to `size`, so that no object is cut off; masks are
    resized to the nearest pixel.
    """

    gives = ImageSpec
    task = "objects"

    class Options(SourceOptions):
        path: Path | None = None
        """Folder VOC2012, which holds JPEGImages; default: voc in SSLRUN_DATA or in data."""
        size: int = Field(default=480, ge=16, le=1024)
        """Side of the square images and masks, in pixels; a multiple of the backbone's patch. All
        images and masks are kept in memory: 2.7 GB for the default."""

    options: Options
    splits = ("train", "test")
    homepage = "http://host.robots.ox.ac.uk/pascal/VOC/voc2012"

    def load(self, split: Split) -> MaskedImages:
        if split not in self.splits:
            raise UserError(f"{self.name}: has no split '{split}', only {', '.join(self.splits)}")
        folder, size = self._find_folder(), self.options.size
        names = _read_names(folder / "ImageSets" / "Segmentation", split)
        files = [folder / "JPEGImages" / f"{name}.jpg" for name in names]
        encoded, decoder = EncodedFiles([str(file) for file in files]), Decoder(size, squash=True)
        images = torch.empty(len(names), 3, size, size, dtype=torch.uint8)
        labels = torch.empty(len(names), size, size, dtype=torch.uint8)
        for index, name in enumerate(names):
            if not files[index].is_file():
                raise UserError(
                    f"{files[index]}: no such file: get the whole set at {self.homepage}"
                )
            pixels = np.array(decoder(encoded, index))
            images[index] = torch.from_numpy(pixels).permute(2, 0, 1)
            labels[index] = read_mask(folder / "SegmentationObject" / f"{name}.png", size)
            if self.progress:
                self.progress(f"{self.name}-{split}", index + 1, len(names))
        return MaskedImages(images, labels, (), ImageSpec(size))

    def sketch(self, count: int) -> tuple[ImageSpec, Batch]:
        size = self.options.size
        images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
        return ImageSpec(size), Batch(images, None)

    def check_available(self) -> None:
        self._find_folder()

    def _find_folder(self) -> Path:
        folder = self.options.path or find_local_folder(self.name)
        if folder is None or not (folder / "JPEGImages").is_dir():
            where = "not on this machine" if folder is None else f"no JPEGImages in {folder}"
            raise UserError(
                f"{self.name}: {where}: put the folder VOC2012 (from {self.homepage}) at "
                "data/voc, or name it with path"
            )
        return folder

    @classmethod
    def count(cls) -> int | None:
        return 1_318

    @classmethod
    def describe(cls) -> dict[str, str]:
        return {
            "splits": "train 1,464, test 1,449 (the set's validation split)",
            "homepage": cls.homepage,
            "license": "Flickr's terms of use",
            "searched": describe_local_folders(cls.name),
        }


def _read_names(folder: Path, split: Split) -> list[str]:
    """Read the names of a split's images. Raises UserError if there is no list, or an empty one."""
    path = folder / ("val.txt" if split == "test" else "train.txt")
    try:
        names = path.read_text(encoding="utf-8").split()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if not names:
        raise UserError(f"{path}: is empty: it should list the images of the split")
    return names


def read_mask(path: Path, size: int | None = None) -> Tensor:
    """Read a mask whose pixels are numbers of objects, as (size, size) uint8; None: as it is.

    Raises UserError if it cannot be read, or holds colors instead of numbers.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as mask:
            if mask.mode not in ("P", "L"):
                raise UserError(
                    f"{path}: holds colors ({mask.mode}), but a mask's pixels should be numbers of "
                    "objects"
                )
            shape = mask.size if size is None else (size, size)
            resized = mask.resize(shape, Image.Resampling.NEAREST)
            return torch.from_numpy(np.array(resized))
    except (OSError, SyntaxError, ValueError) as error:
        known = isinstance(error, UnidentifiedImageError)
        reason = "not an image" if known else getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read: {reason}") from None
