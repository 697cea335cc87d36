"""Image data sets: published ones, and those of the user."""

from __future__ import annotations

import json
import os
import re
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field

from sslrun.data.examples import Batch, Examples, TensorExamples
from sslrun.data.image.images import from_arrays, load_images
from sslrun.data.source import Source, sources
from sslrun.data.specs import ImageSpec
from sslrun.data.stores import FolderStore, Hub, HubStore, ParquetStore, Split, Store, local_store
from sslrun.errors import UserError
from sslrun.registry import Options

UNKNOWN_SIDE = 32
"""Side of images assumed where neither the recipe nor the data set's card tells it."""


def _image_sketch(side: int, count: int) -> tuple[ImageSpec, Batch]:
    return ImageSpec(side), Batch(torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8), None)


class ImageOptions(Options):
    """What all sets of encoded images have in common."""

    size: int | None = Field(None, ge=4, le=1024)
    """Side of the stored square images, in pixels: the shorter side is resized to it, the centre cropped. None: as
    they are, where all are squares of one size."""
    skip_corrupt: bool = False
    """Leave out images that can't be decoded, and say how many; else the first one ends the run."""


class ImageSource(Source):
    """Images in a store: decoded once and kept, or streamed where they are too many."""

    gives = ImageSpec
    default_size: ClassVar[int | None] = None
    """The side where the recipe gives none."""

    @property
    @abstractmethod
    def store(self) -> Store:
        """Where the encoded images lie."""

    @property
    def title(self) -> str:
        """What errors and progress call the set."""
        return self.name

    @property
    def splits(self) -> tuple[Split, ...]:
        return self.store.splits

    def sketch(self, count: int) -> tuple[ImageSpec, Batch]:
        return _image_sketch(self.options.size or self.side() or UNKNOWN_SIDE, count)

    @classmethod
    def side(cls) -> int | None:
        """Side of the images as stored where the recipe gives none; None where only loading would tell."""
        return None

    def load(self, split: Split) -> Examples:
        if split not in self.splits:
            raise UserError(f"{self.title}: has no split '{split}', only {', '.join(self.splits)}")
        return load_images(
            f"{self.title}-{split}",
            {"split": split, **self.store.identity(split)},
            lambda: self.store.open(split),
            self.options.size or self.default_size,
            self.options.skip_corrupt,
            self.progress,
        )


# ---------------------------------------------------------------- published sets


@dataclass(frozen=True)
class Card:
    """A published set of images, as it lies on the hub."""

    about: str
    hub: Hub
    classes: int
    counts: Mapping[Split, int]
    homepage: str
    licence: str = "unknown"
    label: str | None = None
    """The label column, where there are several."""
    size: int | None = None
    """The side to store, where the images are of many sizes."""
    own: int = 32
    """The side of the images, where all have the same."""


CARDS = {
    "mnist": Card(
        "Handwritten digits, 28x28, grey. LeCun et al., Proceedings of the IEEE 1998.",
        Hub("ylecun/mnist", {"train": "train", "test": "test"}),
        10, {"train": 60_000, "test": 10_000}, "http://yann.lecun.com/exdb/mnist", "MIT", own=28,
    ),
    "fashion-mnist": Card(
        "Articles of clothing, 28x28, grey. Xiao et al. 2017.",
        Hub("zalando-datasets/fashion_mnist", {"train": "train", "test": "test"}),
        10, {"train": 60_000, "test": 10_000}, "https://github.com/zalandoresearch/fashion-mnist", "MIT",
        own=28,
    ),
    "cifar10": Card(
        "Animals and vehicles, 32x32. Krizhevsky 2009.",
        Hub("uoft-cs/cifar10", {"train": "train", "test": "test"}),
        10, {"train": 50_000, "test": 10_000}, "https://www.cs.toronto.edu/~kriz/cifar.html",
    ),
    "cifar100": Card(
        "A hundred classes of things, 32x32. Krizhevsky 2009.",
        Hub("uoft-cs/cifar100", {"train": "train", "test": "test"}),
        100, {"train": 50_000, "test": 10_000}, "https://www.cs.toronto.edu/~kriz/cifar.html", label="fine_label",
    ),
    "stl10": Card(
        "Ten classes, 96x96, with 100,000 unlabelled images to pretrain on. Coates et al., AISTATS 2011.",
        Hub("jxie/stl10", {"train": "train", "test": "test", "unlabeled": "unlabeled"}),
        10, {"train": 5_000, "test": 8_000, "unlabeled": 100_000}, "https://cs.stanford.edu/~acoates/stl10",
        own=96,
    ),
    "svhn": Card(
        "House numbers, cropped to one digit, 32x32, without the extra split. Netzer et al. 2011.",
        Hub("ufldl-stanford/svhn", {"train": "train", "test": "test"}, config="cropped_digits"),
        10, {"train": 73_257, "test": 26_032}, "http://ufldl.stanford.edu/housenumbers", "non-commercial use",
    ),
    "imagenette": Card(
        "Ten easy classes of ImageNet, the shorter side 160. Howard 2019.",
        Hub(
            "frgfm/imagenette", {"train": "train", "test": "validation"}, revision="refs/convert/parquet",
            files={"train": "160px/train/*.parquet", "validation": "160px/validation/*.parquet"},
        ),
        10, {"train": 9_469, "test": 3_925}, "https://github.com/fastai/imagenette", "Apache 2.0", size=160,
    ),
    "tiny-imagenet": Card(
        "200 classes of ImageNet, 64x64; tested on its validation split. Le and Yang 2015.",
        Hub("zh-plus/tiny-imagenet", {"train": "train", "test": "valid"}),
        200, {"train": 100_000, "test": 10_000}, "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
        own=64,
    ),
    "imagenet-1k": Card(
        "ILSVRC 2012; tested on its validation split. Russakovsky et al., IJCV 2015.",
        Hub("ILSVRC/imagenet-1k", {"train": "train", "test": "validation"}),
        1_000, {"train": 1_281_167, "test": 50_000}, "https://image-net.org", "non-commercial, terms to accept",
        size=256,
    ),
    "oxford-pets": Card(
        "37 breeds of cats and dogs. Parkhi et al., CVPR 2012.",
        Hub("timm/oxford-iiit-pet", {"train": "train", "test": "test"}),
        37, {"train": 3_680, "test": 3_669}, "https://www.robots.ox.ac.uk/~vgg/data/pets", "CC BY-SA 4.0",
        label="label", size=256,
    ),
    "flowers-102": Card(
        "102 kinds of flowers, with its own validation split. Nilsback and Zisserman, ICVGIP 2008.",
        Hub("dpdl-benchmark/oxford_flowers102", {"train": "train", "val": "validation", "test": "test"}),
        102, {"train": 1_020, "val": 1_020, "test": 6_149}, "https://www.robots.ox.ac.uk/~vgg/data/flowers/102",
        size=256,
    ),
}  # fmt: skip


class Published(ImageSource):
    """A published set: in SSLRUN_DATA/<name> or data/<name> (parquet files or folders of images), or on the hub."""

    Options = ImageOptions
    card: ClassVar[Card]

    @cached_property
    def store(self) -> Store:
        card = self.card
        for folder in self._folders():
            if folder.is_dir():
                return local_store(folder, card.label, test_on_val=card.hub.splits["test"] in ("validation", "valid"))
        remedy = f"Put it at data/{self.name}, or set SSLRUN_DATA; see `sslrun show data {self.name}`"
        return HubStore(self.name, card.hub, remedy, label=card.label)

    @classmethod
    def count(cls) -> int | None:
        return sum(cls.card.counts.get(split, 0) for split in ("train", "unlabeled"))

    @classmethod
    def side(cls) -> int | None:
        return cls.card.size or cls.card.own

    @classmethod
    def _folders(cls) -> list[Path]:
        roots = [os.environ.get("SSLRUN_DATA"), "data"]
        return [Path(root).expanduser() / cls.name for root in roots if root]

    @classmethod
    def describe(cls) -> dict[str, str]:
        card, hub = cls.card, cls.card.hub
        places = ", ".join(f"{'found' if each.is_dir() else 'not found'} at {each}" for each in cls._folders())
        stored = {"stored at": f"{card.size}x{card.size}, unless size says otherwise"} if card.size else {}
        return {
            "hub": f"https://huggingface.co/datasets/{hub.repository}" + (f" ({hub.config})" if hub.config else ""),
            "splits": ", ".join(f"{split} {count:,}" for split, count in card.counts.items()),
            "classes": str(card.classes),
            **stored,
            "homepage": card.homepage,
            "licence": card.licence,
            "looked for": f"{places}; then on the hub. A folder holds train.parquet and test.parquet, "
            "or train/<class>/ and test/<class>/",
        }


class ImageNet(Published):
    """ImageNet, of which the test images may have reassessed labels."""

    class Options(ImageOptions):
        real: Path | None = None
        """ReaL's labels (Beyer et al. 2020): real.json of google-research/reassessed-imagenet. Accuracy is then told by
        both, the second as real_accuracy: an answer is right if it is any of the image's labels, and images that
        have none are left out."""

    def load(self, split: Split) -> Examples:
        examples = super().load(split)
        if split != "test" or self.options.real is None:
            return examples
        return replace(examples, labels=self._reassessed(examples, self.options.real))  # type: ignore[type-var]

    def _reassessed(self, examples: Examples, path: Path) -> torch.Tensor:
        """(N, 1 + K) each image's label, and then ReaL's, as many as it has; -1 fills up. UserError: images without
        their names, or not the file."""
        sets = reassessed_labels(path, len(examples.classes))
        found = self.store.open("test").images.files()
        numbers = [VALIDATION_NAME.search(name) if name else None for name in found]
        if None in numbers:
            raise UserError(
                f"{self.name}: {path} tells labels by number, and the test images are not called "
                "ILSVRC2012_val_00000001.JPEG and so on: get them with their names, or go without real"
            )
        if len(numbers) != len(examples) or examples.labels is None:
            raise UserError(
                f"{self.name}: {len(examples)} of {len(numbers)} test images could be read: mend the others"
            )
        own = [sets[int(each[1]) - 1] if 0 < int(each[1]) <= len(sets) else () for each in numbers if each]
        labels = torch.full((len(own), 1 + max(1, *map(len, own))), -1)
        labels[:, 0] = examples.labels
        for row, each in zip(labels, own, strict=True):
            row[1 : 1 + len(each)] = torch.tensor(each, dtype=torch.int64)
        return labels


VALIDATION_NAME = re.compile(r"ILSVRC2012_val_(\d{8})")


def reassessed_labels(path: Path, classes: int) -> list[list[int]]:
    """The lists of labels in a ReaL file, one for each image by its number. UserError: there is none, or not such."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; it is real.json of github.com/google-research/reassessed-imagenet"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: can't be read: {error}") from None
    if not isinstance(found, list) or not all(isinstance(each, list) for each in found):
        raise UserError(f"{path}: should be a list of lists of labels, one for each image")
    wrong = next(
        (at for at, each in enumerate(found) if not all(isinstance(x, int) and 0 <= x < classes for x in each)), None
    )
    if wrong is not None:
        raise UserError(f"{path}: image {wrong + 1} has {found[wrong]}: should be classes, from 0 to {classes - 1}")
    return found


for _name, _card in CARDS.items():
    _tags = {"__doc__": _card.about, "__module__": __name__, "card": _card, "default_size": _card.size}
    sources.register(_name)(type(_name, (ImageNet if _name == "imagenet-1k" else Published,), _tags))


# ---------------------------------------------------------------- sets of the user's


@sources.register("hub")
class HubImages(ImageSource):
    """Any set of images on the Hugging Face hub, by its name there: `hub:OWNER/NAME`."""

    shorthand = "hub"

    class Options(ImageOptions):
        hub: str = Field(pattern=r"^[\w.-]+/[\w.-]+$")
        """The set's name, as in owner/name."""
        config: str | None = None
        """Which configuration (hub: subset), where the set has several."""
        image: str | None = None
        """The column of images; None: the only one."""
        label: str | None = None
        """The column of labels; None: the only one of classes, or the one called label."""
        train: str = "train"
        """What its training split is called."""
        val: str | None = None
        """What its validation split is called; None: carved from the training split."""
        test: str | None = "test"
        """What its test split is called; None: carved from the training split."""
        unlabeled: str | None = None
        """What its split of unlabelled images is called, if it has one."""

    @property
    def title(self) -> str:
        return str(self.options.hub)

    @cached_property
    def store(self) -> Store:
        given = self.options
        names: dict[Split, str | None] = {
            "train": given.train, "val": given.val, "test": given.test, "unlabeled": given.unlabeled
        }  # fmt: skip
        hub = Hub(given.hub, {split: name for split, name in names.items() if name}, given.config)
        remedy = "Download its files elsewhere, and read them with the data set 'parquet' or 'folder'"
        return HubStore(given.hub, hub, remedy, given.image, given.label)


class LocalOptions(ImageOptions):
    path: Path
    """Where it lies, from where sslrun is called."""


@sources.register("folder")
class FolderImages(ImageSource):
    """Images in folders: <path>/train/<class>/, and val/, test/, unlabeled/; or <path>/<class>/ alone.

    Without a test folder (a validation folder stands in for it), a test split is carved. Images right in <path> or
    <path>/train, with no folders beside them, have no labels.
    """

    Options = LocalOptions

    @property
    def title(self) -> str:
        return str(self.options.path.name)

    @cached_property
    def store(self) -> Store:
        return FolderStore(self.options.path)


@sources.register("parquet")
class ParquetImages(ImageSource):
    """Images in parquet files, as `datasets` writes them: <path>/train.parquet, and test.parquet; or one file."""

    class Options(LocalOptions):
        image: str | None = None
        """The column of images; None: the only one."""
        label: str | None = None
        """The column of labels; None: the only one of classes, or the one called label."""

    @property
    def title(self) -> str:
        return str(self.options.path.stem)

    @cached_property
    def store(self) -> Store:
        return ParquetStore(self.options.path, self.options.image, self.options.label)


@sources.register("npz")
class NpzImages(Source):
    """NumPy arrays in an .npz file: x_train, y_train, x_test, y_test; or images and labels (or images alone).

    Images are uint8, (N, H, W) or (N, H, W, 3); labels are whole numbers from 0. Without a test split one is carved.
    """

    gives = ImageSpec

    class Options(Options):
        path: Path
        """The file, from where sslrun is called."""
        size: int | None = Field(None, ge=4, le=1024)
        """Side to resize to, in pixels; None: as they are."""

    @property
    def splits(self) -> tuple[Split, ...]:
        return ("train", "test") if "x_test" in self._arrays else ("train",)

    def load(self, split: Split) -> TensorExamples:
        train, path = "x_train" in self._arrays, self.options.path
        x, y = (f"x_{split}", f"y_{split}") if train else ("images", "labels")
        if x not in self._arrays:
            raise UserError(f"{path}: holds {', '.join(self._arrays)}: should hold x_train (and y_train), or images")
        try:
            images = from_arrays(self._arrays[x], self.options.size)
        except UserError as error:
            raise UserError(f"{path}: {x}: {error}") from None
        if y not in self._arrays:
            return TensorExamples(images, None, (), ImageSpec(images.shape[-1]))
        labels = self._labels(y, len(images))
        count = 1 + int(max(labels.max(), self._labels("y_train" if train else "labels").max()))
        if count < 2:
            raise UserError(f"{path}: {y}: has only one class: leave the labels out, or give those of two at least")
        return TensorExamples(images, labels, tuple(map(str, range(count))), ImageSpec(images.shape[-1]))

    def sketch(self, count: int) -> tuple[ImageSpec, Batch]:
        return _image_sketch(self.options.size or UNKNOWN_SIDE, count)

    def _labels(self, name: str, count: int | None = None) -> torch.Tensor:
        labels = self._arrays[name]
        if labels.dtype.kind not in "iu" or labels.size == 0 or labels.min() < 0:
            raise UserError(f"{self.options.path}: {name}: should be whole numbers from 0, not {labels.dtype}")
        if count is not None and labels.size != count:
            raise UserError(f"{self.options.path}: {name}: are {labels.size} labels for {count} images")
        return torch.from_numpy(labels.reshape(-1).astype(np.int64))

    @cached_property
    def _arrays(self) -> dict[str, np.ndarray]:
        path = self.options.path
        try:
            with np.load(path, allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
        except FileNotFoundError:
            raise UserError(f"{path}: no such file") from None
        except Exception as error:  # NumPy, zipfile and zlib each have their own for a damaged file
            raise UserError(f"{path}: can't be read as .npz: {' '.join(str(error).split())[:200]}") from None


@sources.register("cifar10.1")
class Cifar101(Source):
    """2,000 images gathered anew as CIFAR-10's were (v6): a shifted test set for it. Recht et al., ICML 2019."""

    gives = ImageSpec

    class Options(Options):
        size: int | None = Field(None, ge=4, le=1024)
        """Side to resize to, in pixels; None: 32, as they are."""

    splits = ("test",)
    files = ("cifar10.1_v6_data.npy", "cifar10.1_v6_labels.npy")
    homepage = "https://github.com/modestyachts/CIFAR-10.1"

    def load(self, split: Split) -> TensorExamples:
        if split not in self.splits:
            raise UserError(f"{self.name}: has no split '{split}', only test: it is a shifted test set for cifar10")
        folder = self._folder()
        try:
            images, labels = (np.load(folder / each, allow_pickle=False) for each in self.files)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(
                f"{folder}: can't be read as NumPy's arrays: {' '.join(str(error).split())[:200]}"
            ) from None
        return TensorExamples(
            from_arrays(images, self.options.size),
            torch.from_numpy(labels.astype(np.int64)),
            ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
            ImageSpec(self.options.size or 32),
        )

    def sketch(self, count: int) -> tuple[ImageSpec, Batch]:
        return _image_sketch(self.options.size or 32, count)

    def find(self) -> None:
        self._folder()

    def _folder(self) -> Path:
        for folder in self._folders():
            if (folder / self.files[0]).is_file():
                return folder
        raise UserError(
            f"{self.name}: not on this machine: put {' and '.join(self.files)} (at {self.homepage}, in datasets) into "
            f"data/{self.name}, or set SSLRUN_DATA"
        )

    @classmethod
    def _folders(cls) -> list[Path]:
        return [Path(root).expanduser() / cls.name for root in (os.environ.get("SSLRUN_DATA"), "data") if root]

    @classmethod
    def describe(cls) -> dict[str, str]:
        return {
            "splits": "test 2,000",
            "classes": "10",
            "homepage": cls.homepage,
            "licence": "MIT",
            "looked for": " and ".join(f"{each}/{cls.files[0]}" for each in cls._folders()),
        }


@sources.register("digits")
class Digits(Source):
    """1,797 scanned handwritten digits, 8x8 with 17 levels of grey, which come with scikit-learn: no download.

    The test images of Alpaydin and Kaynak's set (UCI 1998). As there are no splits, a class-balanced quarter is
    always the same test split (by the same rule as for every set without one).
    """

    gives = ImageSpec

    class Options(Options):
        size: int = Field(24, ge=8, le=128)
        """Side that they are enlarged to (bilinear), in pixels."""

    splits = ("train",)

    def load(self, split: Split) -> TensorExamples:
        from sklearn.datasets import load_digits

        digits = load_digits()
        levels = (digits.images * (255 / 16)).round().astype(np.uint8)
        labels = torch.from_numpy(digits.target.astype(np.int64))
        return TensorExamples(
            from_arrays(levels, self.options.size), labels, tuple("0123456789"), ImageSpec(self.options.size)
        )

    def sketch(self, count: int) -> tuple[ImageSpec, Batch]:
        return _image_sketch(self.options.size, count)

    @classmethod
    def count(cls) -> int | None:
        return 1_210

    @classmethod
    def describe(cls) -> dict[str, str]:
        return {
            "splits": "train 1,797, of which a quarter is carved for the test and a tenth of the rest for validation",
            "classes": "10",
            "homepage": "https://archive.ics.uci.edu/dataset/80",
            "licence": "CC BY 4.0",
            "looked for": "in scikit-learn",
        }
