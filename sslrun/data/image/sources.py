"""Image data sets: published ones, and those of the user."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import AfterValidator, Field, model_validator

from sslrun.data.examples import Batch, Examples, TensorExamples
from sslrun.data.image.augment import Size, height_and_width
from sslrun.data.image.images import MAX_CHANNELS, Pixels, Whole, convert_arrays, load_images
from sslrun.data.image.parquet import StreamedParquet, list_hub_files, load_arriving
from sslrun.data.source import Source, SourceOptions, sources
from sslrun.data.specs import ImageSpec
from sslrun.data.stores import (
    CsvImageStore,
    FolderStore,
    Hub,
    HubStore,
    ParquetStore,
    Split,
    Store,
    describe_local_folders,
    explain_download,
    find_local_folder,
    list_local_folders,
    open_local_store,
)
from sslrun.errors import UserError
from sslrun.files import require_file
from sslrun.hub import NAME as HUB_NAME

UNKNOWN_SIDE = 32
"""Side of images that is assumed if neither the recipe nor the data set's card states it."""
HASHED_BYTES = 2**30
"""Listed images of this many bytes or more are not part of a run's identity; the list always is."""


def _check_range(bounds: tuple[float, float]) -> tuple[float, float]:
    if bounds[0] >= bounds[1]:
        raise ValueError("give the lower value first, then the higher")
    return bounds


Side = Annotated[int, Field(ge=4, le=1024)]
Channels = Annotated[int, Field(ge=1, le=MAX_CHANNELS)]
ValueRange = Annotated[tuple[float, float], AfterValidator(_check_range)]


def _sketch_images(size: Size, count: int, channels: int = 3) -> tuple[ImageSpec, Batch]:
    shape = (channels, *height_and_width(size))
    images = torch.randint(0, 256, (count, *shape), dtype=torch.uint8)
    return ImageSpec.of(shape), Batch(images, None)


class ImageOptions(SourceOptions):
    """The options that all sets of encoded images share."""

    size: Side | tuple[Side, Side] | None = None
    """Side of the stored square images, in pixels, or their height and width, as in [48, 64]: they
    are resized to cover it and the center is cropped. Default: the images' own size, if they are
    all squares of one size."""
    skip_corrupt: bool = False
    """Skip images that cannot be decoded and report their number, instead of ending the run."""


class StoredOptions(ImageOptions):
    """The options of sets whose images may be stored whole."""

    whole: int | None = Field(None, ge=4, le=1024)
    """Shorter side of whole images, in pixels: they are stored with their aspect ratio, and random
    crops reach all of an image. size is then the side of views and of the central square that
    evaluation sees: whole: 256 and size: 224 as usual for ImageNet. Default: only the central
    square of size pixels is stored."""

    channels: Channels = 3
    """Channels of the stored images. 3: all images become RGB. 1: they should be gray. Images of
    more channels are TIFF files."""
    dtype: Literal["uint8", "uint16", "float32"] = "uint8"
    """Type of the stored values. 16 bits and floats are not reduced to 8 bits; all images should
    have the type."""
    range: ValueRange | None = None
    """Values of the images that stand for 0 and 1, as in [0, 4095]; values outside are clipped.
    Default: the full range of integers; floats should be in [0, 1]."""

    @property
    def form(self) -> Whole | Pixels | None:
        """The form of the stored images; None if they are 8-bit RGB of one size."""
        if self.whole is not None:
            return Whole(self.whole)
        if (self.channels, self.dtype, self.range) == (3, "uint8", None):
            return None
        return Pixels(self.channels, self.dtype, self.range)

    @model_validator(mode="after")
    def _check_whole(self) -> StoredOptions:
        if self.whole is None:
            return self
        if not isinstance(self.size, int) or self.size > self.whole:
            raise ValueError("whole needs a size of at most its own side, as in size: 224")
        if (self.channels, self.dtype, self.range) != (3, "uint8", None):
            raise ValueError("whole is for 8-bit RGB: remove channels, dtype and range, or whole")
        return self


class StreamingOptions(StoredOptions):
    """The options of sets that may be read while their files arrive."""

    streaming: bool = False
    """Copy each parquet file when an image of it is first read, instead of all before the first
    step. The first epoch then reads the files in their order, shuffled within 10,000 rows; later
    ones are shuffled exactly. Images are never stored decoded."""

    @model_validator(mode="after")
    def _check_streaming(self) -> StreamingOptions:
        if self.streaming and self.skip_corrupt:
            raise ValueError("streaming cannot know which images are corrupt: remove one of them")
        return self


class ImageSource(Source):
    """Images in a store: decoded once and cached, or streamed if they are too many."""

    gives = ImageSpec
    default_size: ClassVar[int | None] = None
    """The side to store if the recipe gives none; None: the size of the images."""

    @property
    @abstractmethod
    def store(self) -> Store:
        """The store of the encoded images."""

    @property
    def title(self) -> str:
        """The name of the set in messages and progress."""
        return self.name

    @property
    def splits(self) -> tuple[Split, ...]:
        return self.store.splits

    def sketch(self, count: int) -> tuple[ImageSpec, Batch]:
        size = self.options.size or self.expected_side() or UNKNOWN_SIDE
        channels = self.options.channels if isinstance(self.options, StoredOptions) else 3
        return _sketch_images(size, count, channels)

    @classmethod
    def expected_side(cls) -> int | None:
        """Return the side of the stored images without a `size` option; None if not known yet."""
        return None

    def load(self, split: Split) -> Examples:
        if split not in self.splits:
            raise UserError(f"{self.title}: has no split '{split}', only {', '.join(self.splits)}")
        form = self.options.form if isinstance(self.options, StoredOptions) else None
        size = self.options.size or self.default_size
        if isinstance(self.options, StreamingOptions) and self.options.streaming:
            return load_arriving(self.store.open(split), size, form)
        return load_images(
            f"{self.title}-{split}",
            {"split": split, **self.store.identity(split)},
            lambda: self.store.open(split),
            size,
            self.options.skip_corrupt,
            self.progress,
            form=form,
        )


# ---------------------------------------------------------------- published sets


@dataclass(frozen=True)
class Card:
    """Description of a published set of images on the hub."""

    summary: str
    hub: Hub
    classes: int
    counts: Mapping[Split, int]
    homepage: str
    license: str = "unknown"
    label: str | None = None
    """The column of labels if there are several."""
    size: int | None = None
    """The side to store if the images differ in size."""
    native_size: int = 32
    """The side of the images if they are all of one size."""


CARDS = {
    "mnist": Card(
        "Handwritten digits, 28x28, gray. LeCun et al., Proceedings of the IEEE 1998.",
        Hub("ylecun/mnist", {"train": "train", "test": "test"}),
        10, {"train": 60_000, "test": 10_000}, "http://yann.lecun.com/exdb/mnist", "MIT",
        native_size=28,
    ),
    "fashion-mnist": Card(
        "Articles of clothing, 28x28, gray. Xiao et al. 2017.",
        Hub("zalando-datasets/fashion_mnist", {"train": "train", "test": "test"}),
        10, {"train": 60_000, "test": 10_000}, "https://github.com/zalandoresearch/fashion-mnist",
        "MIT",
        native_size=28,
    ),
    "cifar10": Card(
        "Animals and vehicles, 32x32. Krizhevsky 2009.",
        Hub("uoft-cs/cifar10", {"train": "train", "test": "test"}),
        10, {"train": 50_000, "test": 10_000}, "https://www.cs.toronto.edu/~kriz/cifar.html",
    ),
    "cifar100": Card(
        "A hundred classes of things, 32x32. Krizhevsky 2009.",
        Hub("uoft-cs/cifar100", {"train": "train", "test": "test"}),
        100, {"train": 50_000, "test": 10_000}, "https://www.cs.toronto.edu/~kriz/cifar.html",
        label="fine_label",
    ),
    "stl10": Card(
        "Ten classes, 96x96, with 100,000 unlabeled images to pretrain on. "
        "Coates et al., AISTATS 2011.",
        Hub("jxie/stl10", {"train": "train", "test": "test", "unlabeled": "unlabeled"}),
        10, {"train": 5_000, "test": 8_000, "unlabeled": 100_000},
        "https://cs.stanford.edu/~acoates/stl10",
        native_size=96,
    ),
    "svhn": Card(
        "House numbers, cropped to one digit, 32x32, without the extra split. Netzer et al. 2011.",
        Hub("ufldl-stanford/svhn", {"train": "train", "test": "test"}, config="cropped_digits"),
        10, {"train": 73_257, "test": 26_032}, "http://ufldl.stanford.edu/housenumbers",
        "non-commercial use",
    ),
    "imagenette": Card(
        "Ten easy classes of ImageNet, the shorter side 160. Howard 2019.",
        Hub(
            "frgfm/imagenette", {"train": "train", "test": "validation"},
            revision="refs/convert/parquet",
            files={"train": "160px/train/*.parquet", "validation": "160px/validation/*.parquet"},
        ),
        10, {"train": 9_469, "test": 3_925}, "https://github.com/fastai/imagenette", "Apache 2.0",
        size=160,
    ),
    "tiny-imagenet": Card(
        "200 classes of ImageNet, 64x64; tested on its validation split. Le and Yang 2015.",
        Hub("zh-plus/tiny-imagenet", {"train": "train", "test": "valid"}),
        200, {"train": 100_000, "test": 10_000}, "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
        native_size=64,
    ),
    "imagenet-1k": Card(
        "ILSVRC 2012; tested on its validation split. Russakovsky et al., IJCV 2015.",
        Hub("ILSVRC/imagenet-1k", {"train": "train", "test": "validation"}),
        1_000, {"train": 1_281_167, "test": 50_000}, "https://image-net.org",
        "non-commercial, terms to accept",
        size=256,
    ),
    "oxford-pets": Card(
        "37 breeds of cats and dogs. Parkhi et al., CVPR 2012.",
        Hub("timm/oxford-iiit-pet", {"train": "train", "test": "test"}),
        37, {"train": 3_680, "test": 3_669}, "https://www.robots.ox.ac.uk/~vgg/data/pets",
        "CC BY-SA 4.0",
        label="label", size=256,
    ),
    "flowers-102": Card(
        "102 kinds of flowers, with its own validation split. Nilsback and Zisserman, ICVGIP 2008.",
        Hub(
            "dpdl-benchmark/oxford_flowers102",
            {"train": "train", "val": "validation", "test": "test"},
        ),
        102, {"train": 1_020, "val": 1_020, "test": 6_149},
        "https://www.robots.ox.ac.uk/~vgg/data/flowers/102",
        size=256,
    ),
}  # fmt: skip


class PublishedImages(ImageSource):
    """A published set: in SSLRUN_DATA/<name>, in data/<name>, or on the hub."""

    Options = StoredOptions
    card: ClassVar[Card]

    @cached_property
    def store(self) -> Store:
        card = self.card
        folder = find_local_folder(self.name)
        if folder is not None:
            test_on_val = card.hub.splits["test"] in ("validation", "valid")
            return open_local_store(folder, card.label, test_on_val)
        remedy = explain_download(self.name, self.name)
        return HubStore(self.name, card.hub, remedy, label=card.label)

    @classmethod
    def count(cls) -> int | None:
        return sum(cls.card.counts.get(split, 0) for split in ("train", "unlabeled"))

    @classmethod
    def expected_side(cls) -> int | None:
        return cls.card.size or cls.card.native_size

    @classmethod
    def describe(cls) -> dict[str, str]:
        card, hub = cls.card, cls.card.hub
        config = f" ({hub.config})" if hub.config else ""
        size = f"{card.size}x{card.size}, unless size says otherwise"
        return {
            "hub": f"https://huggingface.co/datasets/{hub.repository}{config}",
            "splits": ", ".join(f"{split} {count:,}" for split, count in card.counts.items()),
            "classes": str(card.classes),
            **({"stored at": size} if card.size else {}),
            "homepage": card.homepage,
            "license": card.license,
            "searched": f"{describe_local_folders(cls.name)}; then the hub. A folder holds "
            "train.parquet and test.parquet, or train/<class>/ and test/<class>/",
        }


class ImageNet(PublishedImages):
    """ImageNet, whose test images may have reassessed labels."""

    class Options(StoredOptions):
        real: Path | None = None
        """File of the ReaL labels (Beyer et al. 2020, arXiv:2006.07159): real.json of
        google-research/reassessed-imagenet. The accuracy by these labels is reported as
        real_accuracy, in addition to the original accuracy. An answer is right if it is any of the
        image's labels; images without a label are left out. Default: only the original accuracy."""

    def load(self, split: Split) -> Examples:
        examples = super().load(split)
        if split != "test" or self.options.real is None:
            return examples
        labels = self._reassess(examples, self.options.real)
        return replace(examples, labels=labels)  # type: ignore[type-var]

    def _reassess(self, examples: Examples, path: Path) -> torch.Tensor:
        """Return (N, 1 + K) labels: the image's own, then those of ReaL, padded with -1.

        Example: an image of class 3 with the ReaL labels 3 and 5 has the row 3 3 5 if K is 2.

        Raises:
            UserError: The images have no names with their numbers, or `path` is no ReaL file.
        """
        labels_by_number = read_real_labels(path, len(examples.classes))
        files = self.store.open("test").images.files()
        numbers = [number for file in files if (number := _image_number(file)) is not None]
        if len(numbers) < len(files):
            raise UserError(
                f"{self.name}: {path} lists labels by number, but the test images are not named "
                "ILSVRC2012_val_00000001.JPEG and so on: get them with their names, or remove real"
            )
        if len(numbers) != len(examples) or examples.labels is None:
            raise UserError(
                f"{self.name}: only {len(examples)} of {len(numbers)} test images could be read: "
                "repair the others"
            )
        known = range(1, 1 + len(labels_by_number))
        rows = [labels_by_number[number - 1] if number in known else [] for number in numbers]
        labels = torch.full((len(rows), 1 + max(1, *map(len, rows))), -1)
        labels[:, 0] = examples.labels
        for row, real in zip(labels, rows, strict=True):
            row[1 : 1 + len(real)] = torch.tensor(real, dtype=torch.int64)
        return labels


VALIDATION_NAME = re.compile(r"ILSVRC2012_val_(\d{8})")


def _image_number(file: str | None) -> int | None:
    """Return the number (from 1) in the name of an ImageNet validation image, or None."""
    match = VALIDATION_NAME.search(file) if file else None
    return int(match[1]) if match else None


def read_real_labels(path: Path, classes: int) -> list[list[int]]:
    """Read a ReaL file: the list of labels of each image, in the order of the images' numbers.

    Raises:
        UserError: The file is missing, or is not a list of lists of class ids below `classes`.
    """
    try:
        images = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; it is real.json of "
            "github.com/google-research/reassessed-imagenet"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not isinstance(images, list) or not all(isinstance(labels, list) for labels in images):
        raise UserError(f"{path}: should be a list of lists of labels, one for each image")
    for number, labels in enumerate(images, start=1):
        if not all(isinstance(label, int) and 0 <= label < classes for label in labels):
            raise UserError(
                f"{path}: image {number} has {labels}: should be classes, from 0 to {classes - 1}"
            )
    return images


for _name, _card in CARDS.items():
    _body = {
        "__doc__": _card.summary,
        "__module__": __name__,
        "card": _card,
        "default_size": _card.size,
    }
    _base = ImageNet if _name == "imagenet-1k" else PublishedImages
    sources.register(_name)(type(_name, (_base,), _body))


# ---------------------------------------------------------------- sets of the user


@sources.register("hub")
class HubImages(ImageSource):
    """Any set of images on the Hugging Face hub, by its name there: `hub:OWNER/NAME`."""

    shorthand = "hub"

    class Options(StreamingOptions):
        hub: str = Field(pattern=rf"^{HUB_NAME}/{HUB_NAME}$")
        """Name of the set on the hub, as in owner/name."""
        config: str | None = None
        """Configuration of the set (the hub calls it subset); required if it has several."""
        image: str | None = None
        """Column of the images; default: the only one that holds images."""
        label: str | None = None
        """Column of the labels; default: the only one of classes, or the one named label."""
        train: str = "train"
        """Name of the training split on the hub."""
        val: str | None = None
        """Name of the validation split on the hub; default: carved from the training split."""
        test: str | None = "test"
        """Name of the test split on the hub; null: carved from the training split."""
        unlabeled: str | None = None
        """Name of the split of unlabeled images on the hub; default: there is none."""

    @property
    def title(self) -> str:
        return str(self.options.hub)

    @cached_property
    def store(self) -> Store:
        options = self.options
        names: dict[Split, str | None] = {
            "train": options.train,
            "val": options.val,
            "test": options.test,
            "unlabeled": options.unlabeled,
        }
        splits = {split: name for split, name in names.items() if name}
        remedy = (
            "Download its files elsewhere, and read them with the data set 'parquet' or 'folder'"
        )
        hub = Hub(options.hub, splits, options.config)
        if options.streaming:
            files = list_hub_files(hub, self.title, remedy)
            return StreamedParquet(files, options.image, options.label)
        return HubStore(options.hub, hub, remedy, options.image, options.label)


class LocalOptions(StoredOptions):
    """The options that all sets of images on this machine share."""

    path: Path
    """Path of the set, relative to the folder that sslrun is called from."""


@sources.register("folder")
class FolderImages(ImageSource):
    """Images in folders: <path>/train/<class>/, val/, test/, unlabeled/; or <path>/<class>/.

    Without a test folder, the validation folder serves as the test split; without either, a test
    split is carved. Images directly in <path> or <path>/train, with no folders beside them, have no
    labels.
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
    """Images in parquet files: <path>/train.parquet, and test.parquet; or one file."""

    class Options(LocalOptions):
        image: str | None = None
        """Column of the images; default: the only one that holds images."""
        label: str | None = None
        """Column of the labels; default: the only one of classes, or the one named label."""

    @property
    def title(self) -> str:
        return str(self.options.path.stem)

    @cached_property
    def store(self) -> Store:
        return ParquetStore(self.options.path, self.options.image, self.options.label)


@sources.register("csv-images")
class CsvImages(ImageSource):
    """Images listed in a CSV file, one row each: columns path and label, and optionally split.

    <path> is the CSV file, or a folder with train.csv, and val.csv, test.csv, unlabeled.csv. The
    paths of the images are relative to the folder of the CSV file. Labels are classes, or with
    `numbers` the numbers in those columns; without a column of labels, the images have none.
    Without a test split, the validation split serves as one; without either, one is carved.
    """

    class Options(LocalOptions):
        image: str = "path"
        """Column of the images' paths."""
        label: str | None = None
        """Column of the labels; default: the column named label, if there is one."""
        numbers: tuple[str, ...] = ()
        """Columns of numbers that are the labels instead, as in [x, y]; an empty cell is an unknown
        number, which does not count. The task is then `numbers`."""
        split: str | None = None
        """Column of the splits (train, val, test, unlabeled); default: the column split, if any."""

        @model_validator(mode="after")
        def _one_kind_of_labels(self) -> CsvImages.Options:
            if self.label is not None and self.numbers:
                raise ValueError("label names classes and numbers names numbers: leave one out")
            return self

        @property
        def store(self) -> CsvImageStore:
            """The store of the listed images."""
            return CsvImageStore(self.path, self.image, self.label, self.split, self.numbers)

        def files(self) -> list[Path]:
            """Return the list, and its images if they have fewer than HASHED_BYTES in total."""
            try:
                store = self.store
                total = sum(os.stat(image).st_size for image in store.images)
            except (OSError, UserError):
                return super().files()  # reported when the set is loaded
            images = store.images if total < HASHED_BYTES else ()
            return [*super().files(), *map(Path, images)]

    @property
    def title(self) -> str:
        return str(self.options.path.stem)

    @cached_property
    def store(self) -> Store:
        store: CsvImageStore = self.options.store
        return store

    @classmethod
    def default_task(cls, options: Any) -> str:
        return "numbers" if options.numbers else cls.task

    def check_available(self) -> None:
        """Check that the list can be read and that its images exist."""
        for split in self.splits:
            self.store.identity(split)


@sources.register("npz")
class NpzImages(Source):
    """NumPy arrays in an .npz file: x_train, y_train, x_test, y_test; or images and labels.

    Images are uint8, uint16 or float32, (N, H, W) or (N, H, W, C) with up to 16 channels. Labels
    are whole numbers from 0; without them, the images are unlabeled. A missing test split is
    carved.
    """

    gives = ImageSpec

    class Options(SourceOptions):
        path: Path
        """Path of the file, relative to the folder that sslrun is called from."""
        size: Side | tuple[Side, Side] | None = None
        """Side to resize the images to, in pixels, or height and width, as in [48, 64]; default:
        their own size, if they are square."""
        channels: Channels | None = None
        """Number of channels; default: that of the arrays, except that gray images get three equal
        ones. 1: gray images keep one."""
        range: ValueRange | None = None
        """Values that stand for 0 and 1, as in [0, 4095]; values outside are clipped. Default: the
        full range of integers; floats should be in [0, 1]."""

    @property
    def splits(self) -> tuple[Split, ...]:
        return ("train", "test") if "x_test" in self._arrays else ("train",)

    def load(self, split: Split) -> TensorExamples:
        path, has_splits = self.options.path, "x_train" in self._arrays
        x, y = (f"x_{split}", f"y_{split}") if has_splits else ("images", "labels")
        if x not in self._arrays:
            names = ", ".join(self._arrays)
            raise UserError(
                f"{path}: holds {names}: should hold x_train (and y_train), or images (and labels)"
            )
        try:
            options = self.options
            images = convert_arrays(self._arrays[x], options.size, options.channels, options.range)
        except UserError as error:
            raise UserError(f"{path}: {x}: {error}") from None
        spec = ImageSpec.of(images.shape)
        if y not in self._arrays:
            return TensorExamples(images, None, (), spec)
        labels = self._labels(y, len(images))
        train_labels = self._labels("y_train" if has_splits else "labels")
        class_count = 1 + int(train_labels.max())
        if (largest := int(labels.max())) >= class_count:
            raise UserError(f"{path}: {y}: has class {largest}, which does not occur in training")
        if class_count < 2:
            raise UserError(
                f"{path}: {y}: has only one class: remove the labels, or give at least two classes"
            )
        return TensorExamples(images, labels, tuple(map(str, range(class_count))), spec)

    def sketch(self, count: int) -> tuple[ImageSpec, Batch]:
        try:
            shape = self.load("train").inputs.shape[1:]
        except UserError:  # reported when the set is loaded
            size, channels = self.options.size or UNKNOWN_SIDE, self.options.channels or 3
            return _sketch_images(size, count, channels)
        return _sketch_images((shape[1], shape[2]), count, shape[0])

    def _labels(self, name: str, count: int | None = None) -> torch.Tensor:
        """Return the array `name` as labels (N,) int64; N must be `count`, if given."""
        labels = self._arrays[name]
        if labels.dtype.kind not in "iu" or labels.size == 0 or labels.min() < 0:
            raise UserError(
                f"{self.options.path}: {name}: should be whole numbers from 0, not {labels.dtype}"
            )
        if count is not None and labels.size != count:
            raise UserError(
                f"{self.options.path}: {name}: has {labels.size} labels for {count} images"
            )
        return torch.from_numpy(labels.reshape(-1).astype(np.int64))

    @cached_property
    def _arrays(self) -> dict[str, np.ndarray]:
        path = self.options.path
        require_file(path)
        try:
            with np.load(path, allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
        except Exception as error:  # NumPy, zipfile and zlib each raise errors of their own
            cause = " ".join(str(error).split())[:200]
            raise UserError(f"{path}: cannot be read as .npz: {cause}") from None


@sources.register("cifar10.1")
class Cifar101(Source):
    """2,000 new images for CIFAR-10 (v6), a shifted test set. Recht et al., ICML 2019."""

    gives = ImageSpec

    class Options(SourceOptions):
        size: int | None = Field(None, ge=4, le=1024)
        """Side to resize the images to, in pixels; default: 32, their own size."""

    splits = ("test",)
    files = ("cifar10.1_v6_data.npy", "cifar10.1_v6_labels.npy")
    homepage = "https://github.com/modestyachts/CIFAR-10.1"
    classes = (
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    )

    def load(self, split: Split) -> TensorExamples:
        if split not in self.splits:
            raise UserError(
                f"{self.name}: has no split '{split}', only test: it is a shifted test set for "
                "cifar10"
            )
        folder = self._find_folder()
        try:
            images, labels = (np.load(folder / file, allow_pickle=False) for file in self.files)
        except (OSError, ValueError, EOFError) as error:
            cause = " ".join(str(error).split())[:200]
            raise UserError(f"{folder}: cannot be read as NumPy arrays: {cause}") from None
        return TensorExamples(
            convert_arrays(images, self.options.size),
            torch.from_numpy(labels.astype(np.int64)),
            self.classes,
            ImageSpec(self.options.size or 32),
        )

    def sketch(self, count: int) -> tuple[ImageSpec, Batch]:
        return _sketch_images(self.options.size or 32, count)

    def check_available(self) -> None:
        self._find_folder()

    def _find_folder(self) -> Path:
        for folder in list_local_folders(self.name):
            if (folder / self.files[0]).is_file():
                return folder
        raise UserError(
            f"{self.name}: not on this machine: put {' and '.join(self.files)} (from datasets/ of "
            f"{self.homepage}) into data/{self.name}, or set SSLRUN_DATA"
        )

    @classmethod
    def describe(cls) -> dict[str, str]:
        places = [f"{folder}/{cls.files[0]}" for folder in list_local_folders(cls.name)]
        return {
            "splits": "test 2,000",
            "classes": "10",
            "homepage": cls.homepage,
            "license": "MIT",
            "searched": " and ".join(places),
        }


def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """Read scikit-learn's digits: images (1797, 8, 8) with values 0 to 16, and labels (1797,).

    The file is read without importing scikit-learn, which takes three seconds.
    """
    package = importlib.util.find_spec("sklearn")
    assert package is not None
    assert package.origin is not None
    file = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    rows = np.loadtxt(file, delimiter=",", dtype=np.int64)  # 64 pixels and the label
    return rows[:, :-1].reshape(-1, 8, 8), rows[:, -1]


@sources.register("digits")
class Digits(Source):
    """1,797 handwritten digits, 8x8 with 17 gray levels, from scikit-learn: no download.

    They are the test images of Alpaydin and Kaynak's set (UCI 1998). The test split is a
    class-balanced quarter, always the same, carved as for every set without a test split.
    """

    gives = ImageSpec

    class Options(SourceOptions):
        size: int = Field(24, ge=8, le=128)
        """Side to enlarge the images to (bilinear), in pixels."""

    splits = ("train",)

    def load(self, split: Split) -> TensorExamples:
        pixels, labels = read_digits()
        images = (pixels * (255 / 16)).round().astype(np.uint8)
        return TensorExamples(
            convert_arrays(images, self.options.size),
            torch.from_numpy(labels),
            tuple("0123456789"),
            ImageSpec(self.options.size),
        )

    def sketch(self, count: int) -> tuple[ImageSpec, Batch]:
        return _sketch_images(self.options.size, count)

    @classmethod
    def count(cls) -> int | None:
        return 1_210

    @classmethod
    def describe(cls) -> dict[str, str]:
        return {
            "splits": "train 1,797; a quarter is carved for the test, and a tenth of the rest for "
            "validation",
            "classes": "10",
            "homepage": "https://archive.ics.uci.edu/dataset/80",
            "license": "CC BY 4.0",
            "searched": "scikit-learn",
        }
