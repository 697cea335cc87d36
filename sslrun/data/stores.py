"""Stores of data sets: folders of images, tables, CSV lists, and the Hugging Face hub."""

from __future__ import annotations

import csv
import hashlib
import math
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from sslrun.data.cache import cache_root
from sslrun.data.image.images import EncodedFiles, EncodedImages, EncodedSplit
from sslrun.data.packed import PackedStrings
from sslrun.errors import UserError
from sslrun.files import expand_home, require_file, walk
from sslrun.hub import reach_hub
from sslrun.registry import did_you_mean

T = TypeVar("T")

Split = Literal["train", "val", "test", "unlabeled"]

SPELLINGS: Mapping[Split, tuple[str, ...]] = {
    "train": ("train",),
    "val": ("validation", "valid", "val", "dev"),
    "test": ("test",),
    "unlabeled": ("unlabeled", "unlabelled"),
}
"""Accepted names of the folder or file of a split."""
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""File endings of images."""


class Store(ABC):
    """Encoded images, by split."""

    @property
    @abstractmethod
    def splits(self) -> tuple[Split, ...]:
        """The splits that the store holds, always with `train`."""

    @abstractmethod
    def identity(self, split: Split) -> Mapping[str, Any]:
        """Return JSON values that change when the content of the split changes.

        For a set on the hub they change when its description changes.
        """

    @abstractmethod
    def open(self, split: Split) -> EncodedSplit:
        """Return the images and labels of the split.

        Raises:
            UserError: The split cannot be read, has no images, or has only one class.
        """


def open_local_store(root: Path, label: str | None = None, test_on_val: bool = False) -> Store:
    """Return the store of a folder that holds parquet files or images."""
    if any(root.glob("*.parquet")):
        return ParquetStore(root, label=label, test_on_val=test_on_val)
    return FolderStore(root, test_on_val)


def assign_roles(stored: Mapping[Split, T], test_on_val: bool) -> dict[Split, T]:
    """Use the validation split as the test split if there is no other, or if `test_on_val`."""
    splits = dict(stored)
    if "val" in splits and (test_on_val or "test" not in splits):
        splits["test"] = splits.pop("val")
    return splits


# ---------------------------------------------------------------- local copies of published sets


def list_local_folders(name: str) -> list[Path]:
    """Return the folders where a published set may be stored, in the order in which they are tried.

    `name` is the set's name, or a path such as "vtab/dtd".
    """
    roots = [root for root in (os.environ.get("SSLRUN_DATA"), "data") if root]
    return [expand_home(root) / name for root in roots]


def find_local_folder(name: str) -> Path | None:
    """Return the first of a set's local folders that exists; None if there is none."""
    return next((folder for folder in list_local_folders(name) if folder.is_dir()), None)


def require_local_folder(name: str, path: Path | None, remedy: str, inside: str = "") -> Path:
    """Return the folder `path`, or else the set's local folder; it should hold a folder `inside`.

    Raises:
        UserError: There is none; the message ends with `remedy`.
    """
    folder = path or find_local_folder(name)
    if folder is None:
        raise UserError(f"{name}: not on this machine: {remedy}")
    if not (folder / inside).is_dir():
        raise UserError(f"{name}: {folder / inside}: no such folder: {remedy}")
    return folder


def describe_local_folders(name: str) -> str:
    """Say which of a set's local folders exist: "found at A, not found at B"."""
    words = {True: "found", False: "not found"}
    return ", ".join(f"{words[folder.is_dir()]} at {folder}" for folder in list_local_folders(name))


def explain_download(folder: str, page: str) -> str:
    """Say what to do if a published set is missing; `page` is its name for `sslrun show data`."""
    return f"Put it at data/{folder}, or set SSLRUN_DATA; see `sslrun show data {page}`"


# ---------------------------------------------------------------- folders


@dataclass
class FolderStore(Store):
    """Images in folders: `root/<split>/<class>/*.png`, or `root/<class>/*.png` to train on.

    A class's folder may have subfolders. Images without a folder per class have no labels. With
    other `suffixes`, the files are of another kind, such as films.
    """

    root: Path
    test_on_val: bool = False
    """Test on the validation split even if there is a test split (which then has no labels)."""
    suffixes: tuple[str, ...] = IMAGE_SUFFIXES
    noun: str = "images"
    """What the files are, in messages."""

    @property
    def splits(self) -> tuple[Split, ...]:
        return tuple(self._split_folders)

    def identity(self, split: Split) -> Mapping[str, Any]:
        return {"files": fingerprint(self.list_files(split)), "classes": self._classes}

    def open(self, split: Split) -> EncodedSplit:
        files, folder = self.list_files(split), self._split_folders[split]
        classes = self._classes
        if not classes or split == "unlabeled":
            return EncodedSplit(EncodedFiles(files), None, classes)
        class_ids = {name: index for index, name in enumerate(classes)}
        labels = [class_ids.get(_top_folder(file, folder)) for file in files]
        if None in labels:
            known = ", ".join(classes[:10])
            raise UserError(
                f"{files[labels.index(None)]}: not in the folder of a class ({known}): move it"
            )
        return EncodedSplit(EncodedFiles(files), torch.tensor(labels), classes)

    @cached_property
    def _split_folders(self) -> dict[Split, Path]:
        if not self.root.is_dir():
            raise UserError(
                f"{self.root}: no such folder; it should hold train/<class>/ or <class>/ with "
                f"{self.noun}"
            )
        folders: dict[Split, Path] = {}
        for split, names in SPELLINGS.items():
            for name in names:
                if (self.root / name).is_dir():
                    folders[split] = self.root / name
        if "train" not in folders:
            return {"train": self.root}
        return assign_roles(folders, self.test_on_val)

    @cached_property
    def _classes(self) -> tuple[str, ...]:
        """The names of the training split's folders that hold files."""
        train = self._split_folders["train"]
        names = sorted({_top_folder(file, train) for file in self.list_files("train")} - {""})
        if len(names) == 1:
            raise UserError(
                f"{train}: has only one class, '{names[0]}': make a folder there for each class; "
                f"to go without labels, put the {self.noun} directly into {train}"
            )
        return tuple(names)

    def list_files(self, split: Split) -> PackedStrings:
        """List the files of a split in order. Raises UserError if there are none."""
        folder = self._split_folders[split]
        files = find_files(folder, self.suffixes)
        if not files:
            suffixes = ", ".join(self.suffixes)
            raise UserError(f"{folder}: holds no {self.noun} ({suffixes}): is it the right folder?")
        return PackedStrings.pack(sorted(files))


def find_files(folder: str | Path, suffixes: tuple[str, ...]) -> list[str]:
    """List the files in a folder and its subfolders that have such an ending, in no order.

    Hidden files are left out; links to folders are followed as `walk` does.
    """
    return [path for path in walk(folder) if is_of(suffixes, os.path.basename(path))]


def is_of(suffixes: tuple[str, ...], name: str) -> bool:
    """Return whether a file is not hidden and has one of these endings."""
    return name.lower().endswith(suffixes) and not name.startswith(".")


def _top_folder(file: str, folder: Path) -> str:
    """Return the first folder on the path from `folder` to `file`; "" if there is none."""
    first, *rest = os.path.relpath(file, folder).split(os.sep)
    return first if rest else ""


# ---------------------------------------------------------------- tables


class TableStore(Store):
    """Images in one column of a table that `datasets` can load, and labels in another."""

    def __init__(self, name: str, image: str | None, label: str | None) -> None:
        """Set the name of the store in messages, and its columns.

        A column that is None is found by its type; the label also by the names "label" and
        "labels".
        """
        self.name = name
        self.image = image
        self.label = label

    @abstractmethod
    def table(self, split: Split) -> Any:
        """Return the split as a `datasets.Dataset`.

        Raises:
            UserError: The split is missing, or cannot be read or downloaded.
        """

    def open(self, split: Split) -> EncodedSplit:
        table = self.table(split)
        if len(table) == 0:
            raise UserError(f"{self.name}: split '{split}' has no rows")
        image, label = self._image_column(table.features), self._label_column(table.features)
        images = self.images(table, image, split)
        if label is None or split == "unlabeled":
            return EncodedSplit(images, None, ())
        return EncodedSplit(images, *self.labels(table, label, split))

    def images(self, table: Any, column: str, split: Split) -> EncodedImages:
        """Return the images in a column of the split, which is `table`."""
        return TableImages(table.select_columns([column]), column, f"{self.name} {split}")

    def _image_column(self, features: Mapping[str, Any]) -> str:
        columns = [name for name, feature in features.items() if _holds_images(feature)]
        if self.image is not None:
            if self.image not in columns:
                hint = did_you_mean(self.image, columns)
                raise UserError(f"{self.name}: no image column '{self.image}'.{hint}")
            return self.image
        if not columns:
            raise UserError(
                f"{self.name}: holds no images in its columns ({', '.join(features)}): "
                "choose an image set"
            )
        if len(columns) > 1:
            raise UserError(
                f"{self.name}: holds images in {', '.join(columns)}: choose one, as in "
                f"image: {columns[0]}"
            )
        return columns[0]

    def _label_column(self, features: Mapping[str, Any]) -> str | None:
        import datasets

        if self.label is not None:
            if self.label not in features:
                hint = did_you_mean(self.label, list(features))
                raise UserError(f"{self.name}: no column '{self.label}'.{hint}")
            return self.label
        class_label = datasets.ClassLabel
        columns = [name for name, feature in features.items() if isinstance(feature, class_label)]
        columns = columns or [name for name in ("label", "labels") if name in features]
        if len(columns) > 1:
            raise UserError(
                f"{self.name}: has labels in {', '.join(columns)}: choose one, as in "
                f"label: {columns[0]}"
            )
        return columns[0] if columns else None

    def labels(self, table: Any, column: str, split: Split) -> tuple[Tensor, tuple[str, ...]]:
        """Return the labels (N,) int64 and the names of the classes.

        A column of plain numbers or words has the classes that occur in the training split.
        """
        values = _column_values(table, column)
        if None in values:
            raise UserError(
                f"{self.name}: split '{split}', row {values.index(None)}: has no {column}"
            )
        classes = getattr(table.features[column], "names", None)
        if classes is None:
            classes = self._find_classes(values, column, split)
            class_ids = {value: index for index, value in enumerate(classes)}
            values = [class_ids.get(value, -1) for value in values]
        if len(classes) < 2:
            raise UserError(
                f"{self.name}: column '{column}' has only one class, {classes[0]!r}: "
                "at least two are needed"
            )
        unknown = (row for row, value in enumerate(values) if not 0 <= value < len(classes))
        if (row := next(unknown, None)) is not None:
            raise UserError(
                f"{self.name}: split '{split}', row {row}: its {column} is no class of train"
            )
        return torch.tensor(values), tuple(map(str, classes))

    def _find_classes(self, values: list[Any], column: str, split: Split) -> list[Any]:
        """Return the sorted values that the column has in the training split."""
        if not isinstance(values[0], str | int):
            kind = type(values[0]).__name__
            raise UserError(f"{self.name}: column '{column}' holds {kind} values, not classes")
        reference: Split = "train" if "train" in self.splits else split
        if split != reference:
            values = _column_values(self.table(reference), column)
        return sorted(set(values))


def _holds_images(feature: Any) -> bool:
    """Return whether a column holds encoded images, by its declaration or as bytes."""
    import datasets

    if isinstance(feature, dict):
        return feature.keys() == {"bytes", "path"}
    is_bytes = getattr(feature, "dtype", None) in ("binary", "large_binary")
    return isinstance(feature, datasets.Image) or is_bytes


def _column_values(table: Any, column: str) -> list[Any]:
    return list(table.select_columns([column]).with_format("arrow")[:][column].to_pylist())


@dataclass(frozen=True)
class TableImages:
    """Encoded images in a column of a table."""

    table: Any
    column: str
    title: str

    def __len__(self) -> int:
        return len(self.table)

    def read(self, index: int) -> bytes:
        # Read from Arrow directly, because `datasets` would decode the image.
        cell = self.table.data.column(self.column)[index].as_py()
        if cell is None:
            raise OSError("it is empty")
        content: bytes | None = cell["bytes"] if isinstance(cell, dict) else cell
        return Path(cell["path"]).read_bytes() if content is None else content

    def name(self, index: int) -> str:
        return f"{self.title}, row {index}"

    def files(self) -> Sequence[str | None]:
        import pyarrow
        import pyarrow.compute

        column = self.table.data.column(self.column)
        if not pyarrow.types.is_struct(column.type):
            return [None] * len(self)
        # Select the paths in Arrow, without copying the bytes of the images.
        paths: list[str | None] = pyarrow.compute.struct_field(column, "path").to_pylist()
        return paths


class ParquetStore(TableStore):
    """Parquet files `root/train.parquet` or `root/train-*.parquet`; or one file to train on."""

    def __init__(
        self,
        root: Path,
        image: str | None = None,
        label: str | None = None,
        test_on_val: bool = False,
    ) -> None:
        super().__init__(str(root), image, label)
        self.root = root
        self.test_on_val = test_on_val

    @property
    def splits(self) -> tuple[Split, ...]:
        return tuple(self._files)

    def identity(self, split: Split) -> Mapping[str, Any]:
        splits = {split, "train"} & self._files.keys()  # train may determine the classes
        files = {name: fingerprint(self._files[name]) for name in sorted(splits)}
        return {"files": files, "image": self.image, "label": self.label}

    def table(self, split: Split) -> Any:
        import datasets

        files = self.list_files(split)
        try:
            with quiet_datasets():
                return datasets.load_dataset(
                    "parquet",
                    data_files={"split": files},
                    split="split",
                    cache_dir=str(cache_root() / "tables"),
                )
        except (datasets.exceptions.DatasetGenerationError, ValueError, OSError) as error:
            cause = _one_line(error.__cause__ or error)
            raise UserError(f"{files[0]}: cannot be read as parquet: {cause}") from None

    def list_files(self, split: Split) -> list[str]:
        """List the files of a split, which are on this machine."""
        return self._files[split]

    @cached_property
    def _files(self) -> dict[Split, list[str]]:
        if self.root.is_file():
            return {"train": [str(self.root)]}
        stored: dict[Split, list[str]] = {}
        for split, names in SPELLINGS.items():
            files: list[Path] = []
            for name in names:
                files += self.root.glob(f"{name}.parquet")
                files += self.root.glob(f"{name}-*.parquet")
            if files:
                stored[split] = sorted(map(str, files))
        if not stored:
            raise UserError(
                f"{self.root}: should hold train.parquet (and test.parquet), or be one parquet file"
            )
        return assign_roles(stored, self.test_on_val)


class FileStore(TableStore):
    """The files of a table of text: `<path>/train.parquet`, test and val; or one file.

    A file may also be .csv, .tsv, .json or .jsonl, and may come in parts, `train-*.parquet`.
    """

    FORMATS: ClassVar = {
        ".parquet": "parquet",
        ".csv": "csv",
        ".tsv": "csv",
        ".json": "json",
        ".jsonl": "json",
    }
    NAMES: ClassVar[Mapping[Split, tuple[str, ...]]] = {
        "train": ("train",),
        "val": ("validation", "val", "dev"),
        "test": ("test",),
    }

    def __init__(self, path: Path, label: str | None = None) -> None:
        super().__init__(str(path), None, label)
        self.path = path

    @property
    def splits(self) -> tuple[Split, ...]:
        return tuple(self._files)

    def identity(self, split: Split) -> Any:
        return fingerprint([str(file) for file in self._split_files(split)])

    def table(self, split: Split) -> Any:
        import datasets

        files = self._split_files(split)
        first = files[0]
        file_format = self.FORMATS[first.suffix]
        options: dict[str, Any] = {}
        if file_format == "csv":  # an empty cell is missing; "None", "NA" and "null" are words
            options = {"keep_default_na": False, "na_values": [""]}
        if first.suffix == ".tsv":  # GLUE has unbalanced quotes, which would join lines
            options |= {"sep": "\t", "quoting": csv.QUOTE_NONE}
        try:
            with quiet_datasets():
                return datasets.load_dataset(
                    file_format,
                    data_files=[str(file) for file in files],
                    split="train",
                    cache_dir=str(cache_root() / "tables"),
                    **options,
                )
        except Exception as error:  # pandas, Arrow and datasets each raise errors of their own
            cause = _one_line(error.__cause__ or error)[:200]
            if "corresponds to no data" in cause or not any(file.stat().st_size for file in files):
                raise UserError(f"{first}: holds no rows") from None
            raise UserError(f"{first}: cannot be read as {file_format}: {cause}") from None

    def _split_files(self, split: Split) -> list[Path]:
        if split not in self._files:
            present = ", ".join(files[0].name for files in self._files.values())
            purpose = "train on" if split == "train" else split
            raise UserError(f"{self.path}: holds only {present}, and nothing to {purpose}")
        return self._files[split]

    @cached_property
    def _files(self) -> dict[Split, list[Path]]:
        if self.path.is_file():
            if self.path.suffix not in self.FORMATS:
                raise UserError(f"{self.path}: should end with one of {', '.join(self.FORMATS)}")
            return {"train": [self.path]}
        stored: dict[Split, list[Path]] = {}
        for split, names in self.NAMES.items():
            for name in names:
                for suffix in self.FORMATS:
                    whole = list(self.path.glob(f"{name}{suffix}"))
                    if files := whole or sorted(self.path.glob(f"{name}-*{suffix}")):
                        stored[split] = files
        if not stored:
            raise UserError(
                f"{self.path}: should be a file, or a folder with train{{{','.join(self.FORMATS)}}}"
            )
        return assign_roles(stored, test_on_val=False)


@dataclass(frozen=True)
class Hub:
    """Where a set, or one of its configurations, is on the Hugging Face hub."""

    repository: str
    splits: Mapping[Split, str]
    """Split -> its name in the repository."""
    config: str | None = None
    revision: str | None = None
    files: Mapping[str, str] | None = None
    """Name of a split in the repository -> pattern of its files; None: as the repository says."""


class HubStore(TableStore):
    """A set that `datasets` downloads from the hub and caches."""

    def __init__(
        self,
        name: str,
        hub: Hub,
        remedy: str,
        image: str | None = None,
        label: str | None = None,
    ) -> None:
        """Set where the set is; `remedy` says what to do if the hub cannot be reached."""
        super().__init__(name, image, label)
        self.hub = hub
        self.remedy = remedy

    @property
    def splits(self) -> tuple[Split, ...]:
        return tuple(self.hub.splits)

    def identity(self, split: Split) -> Mapping[str, Any]:
        hub = self.hub
        place = [hub.repository, hub.config, hub.revision, hub.splits[split]]
        return {"hub": place, "image": self.image, "label": self.label}

    def table(self, split: Split) -> Any:
        name = self.hub.splits[split]
        if name not in self._tables:
            known = ", ".join(self._tables)
            raise UserError(
                f"{self.name}: no split '{name}' on the hub, only {known}: "
                f"name one of them under '{split}'"
            )
        return self._tables[name]

    @cached_property
    def _tables(self) -> Any:
        import datasets

        return open_on_hub(self.hub, self.name, self.remedy, datasets.load_dataset)


def open_on_hub(hub: Hub, name: str, remedy: str, load: Callable[..., T]) -> T:
    """Return what `load`, a function of `datasets`, gives for a set on the hub.

    `name` is the set's in messages, and `remedy` says what to do if the hub cannot be reached.

    Raises:
        UserError: The set is missing, or cannot be read or downloaded.
    """
    import datasets

    if Path(hub.repository).exists():  # which `datasets` would read in place of the hub's
        raise UserError(
            f"{name}: is also a folder here: name it as the path of the data set "
            "'parquet' or 'folder', or go to another folder to read that of the hub"
        )
    reach_hub()
    try:
        return load(hub.repository, hub.config, revision=hub.revision, data_files=hub.files)
    except datasets.exceptions.DatasetNotFoundError as error:
        page = f"{datasets.config.HF_ENDPOINT}/datasets/{hub.repository}"
        if "gated" in str(error):
            cause = f"accept its terms at {page} and log in with `hf auth login`"
        else:
            cause = f"there is no data set at {page}; if it is private, run `hf auth login`"
        raise UserError(f"{name}: {cause}") from None
    except ConnectionError:
        raise UserError(
            f"{name}: not on this machine and the hub cannot be reached. {remedy}"
        ) from None
    except (
        datasets.exceptions.DatasetGenerationError,
        ValueError,
        OSError,
        RuntimeError,
    ) as error:
        cause = _one_line(error.__cause__ or error)
        raise UserError(f"{name}: cannot be loaded from the hub: {cause}") from None


# ---------------------------------------------------------------- lists of images


class ListedImage(NamedTuple):
    """One row of a CSV list of images."""

    table: str
    """Path of the CSV file, for messages."""
    line: int
    """Line of the row, from 1."""
    path: str
    """Path of the image as the row has it."""
    label: str
    """The label, "" if it is missing."""
    numbers: tuple[float, ...] = ()
    """The numbers that are its labels instead, NaN where the cell is empty."""

    @property
    def file(self) -> str:
        """Path of the image, resolved against the folder of the CSV file."""
        return resolve(self.table, self.path)

    @property
    def place(self) -> str:
        """The row's place in messages."""
        return f"{self.table}:{self.line}"


@dataclass(frozen=True)
class ListedImages:
    """Encoded images in files that a CSV file lists."""

    table: str
    """Path of the CSV file."""
    lines: np.ndarray
    """(N,) int64: the line of each image."""
    paths: PackedStrings
    """The path of each image as the table has it."""

    @classmethod
    def of(cls, rows: Sequence[ListedImage]) -> ListedImages:
        lines = np.fromiter((row.line for row in rows), np.int64, len(rows))
        return cls(rows[0].table, lines, PackedStrings.pack(row.path for row in rows))

    def __len__(self) -> int:
        return len(self.lines)

    def read(self, index: int) -> bytes:
        file = resolve(self.table, self.paths[index])
        require_file(file)
        return Path(file).read_bytes()

    def name(self, index: int) -> str:
        return f"{self.table}:{self.lines[index]}: {self.paths[index]}"

    def files(self) -> Sequence[str | None]:
        return [resolve(self.table, path) for path in self.paths]


def resolve(table: str, path: str) -> str:
    """Return a path that a CSV file holds, relative to the folder of the file."""
    return os.path.join(os.path.dirname(table), os.path.expanduser(path))


@dataclass
class CsvImageStore(Store):
    """Images listed in CSV files: one row per image, with its path and its label.

    `path` is one CSV file, or a folder with `train.csv` and others. Paths of images are relative to
    the folder of the CSV file. A `.tsv` file is separated by tabs.
    """

    path: Path
    image: str = "path"
    """Column of the images' paths."""
    label: str | None = None
    """Column of the labels; None: the column "label" if there is one, otherwise no labels."""
    split: str | None = None
    """Column of the splits; None: the column "split" if there is one. Only for one file."""
    numbers: tuple[str, ...] = ()
    """Columns of the numbers that are the labels, in place of `label`."""

    @property
    def splits(self) -> tuple[Split, ...]:
        return tuple(self._rows)

    @property
    def images(self) -> Iterator[str]:
        """The files of all images.

        Raises:
            UserError: A CSV file cannot be read.
        """
        return (row.file for rows in self._rows.values() for row in rows)

    def identity(self, split: Split) -> Mapping[str, Any]:
        rows = self._rows[split]
        for row in rows:
            try:
                require_file(row.file)
            except UserError as error:
                missing = None if os.path.lexists(row.file) else f"no such file {row.path}"
                raise UserError(f"{row.place}: {missing or error}") from None
        files = fingerprint(row.file for row in rows)
        labels = None if split == "unlabeled" else [row.numbers or row.label for row in rows]
        return {"files": files, "labels": labels, "classes": self._classes}

    def open(self, split: Split) -> EncodedSplit:
        rows, classes = self._rows[split], self._classes
        if self.numbers and split != "unlabeled":
            labels = torch.tensor([row.numbers for row in rows])
            return EncodedSplit(ListedImages.of(rows), labels, ())
        if not classes or split == "unlabeled":
            return EncodedSplit(ListedImages.of(rows), None, classes)
        class_ids = {name: index for index, name in enumerate(classes)}
        for row in rows:
            if row.label not in class_ids:
                cause = (
                    f"label '{row.label}' does not occur in train" if row.label else "has no label"
                )
                raise UserError(
                    f"{row.place}: {cause}: it should be one of {', '.join(classes[:10])}"
                )
        labels = torch.tensor([class_ids[row.label] for row in rows])
        return EncodedSplit(ListedImages.of(rows), labels, classes)

    @cached_property
    def _classes(self) -> tuple[str, ...]:
        """The labels of the training split, sorted (as numbers if they all are); () if none."""
        rows = self._rows.get("train", next(iter(self._rows.values())))
        labels = {row.label for row in rows} - {""}
        if len(labels) == 1:
            raise UserError(
                f"{rows[0].table}: has only one class, '{labels.pop()}': at least two are needed; "
                "to go without labels, remove the column"
            )
        if all(label.isdecimal() for label in labels):
            return tuple(sorted(labels, key=int))
        return tuple(sorted(labels))

    @cached_property
    def _rows(self) -> dict[Split, list[ListedImage]]:
        if not self.path.is_dir():
            return assign_roles(self._read_splits(self.path), test_on_val=False)
        stored: dict[Split, list[ListedImage]] = {}
        for split, names in SPELLINGS.items():
            for name in names:
                for suffix in (".csv", ".tsv"):
                    file = self.path / f"{name}{suffix}"
                    if file.is_file():
                        stored[split] = [row for row, _ in self._read(file, split != "unlabeled")]
        if not stored:
            raise UserError(
                f"{self.path}: should be a CSV file, or a folder with train.csv (and test.csv)"
            )
        return assign_roles(stored, test_on_val=False)

    def _read_splits(self, file: Path) -> dict[Split, list[ListedImage]]:
        """Read one CSV file and group its rows by their split."""
        by_spelling = {name: split for split, names in SPELLINGS.items() for name in names}
        stored: dict[Split, list[ListedImage]] = {}
        for row, spelling in self._read(file):
            split = "train" if spelling is None else by_spelling.get(spelling.lower())
            if split is None:
                known = ", ".join(by_spelling)
                raise UserError(f"{row.place}: split '{spelling}' should be one of {known}")
            stored.setdefault(split, []).append(row)
        return {split: stored[split] for split in SPELLINGS if split in stored}

    def _read(self, file: Path, labeled: bool = True) -> Iterator[tuple[ListedImage, str | None]]:
        """Yield each row with its split; None if there is no column of splits.

        If not `labeled`, the column of labels is not read.
        """
        rows = read_csv(file)
        _, header = next(rows)
        table, image = str(file), self._find_column(file, header, self.image, "image")
        label, numbers = None, []
        if labeled and self.numbers:
            numbers = [self._find_column(file, header, name, "numbers") for name in self.numbers]
        elif labeled:
            label = self._find_optional(file, header, "label", self.label)
        split = self._find_optional(file, header, "split", self.split)
        is_empty = True
        for line, cells in rows:
            is_empty = False
            if len(cells) != len(header):
                raise UserError(
                    f"{file}:{line}: should have {len(header)} cells, like the header, "
                    f"not {len(cells)}"
                )
            path = cells[image]
            if not path:
                raise UserError(f"{file}:{line}: the column '{header[image]}' is empty")
            row = ListedImage(
                table,
                line,
                path,
                label="" if label is None else sys.intern(cells[label]),  # few different ones
                numbers=tuple(parse_number(cells[place], f"{file}:{line}") for place in numbers),
            )
            yield row, None if split is None else cells[split]
        if is_empty:
            raise UserError(f"{file}: lists no images: add a row for each")

    def _find_optional(
        self, file: Path, header: list[str], default: str, column: str | None
    ) -> int | None:
        if column is None:
            return header.index(default) if default in header else None
        return self._find_column(file, header, column, default)

    @staticmethod
    def _find_column(file: Path, header: list[str], column: str, option: str) -> int:
        if column not in header:
            hint = did_you_mean(column, header)
            raise UserError(
                f"{file}:1: no column '{column}'.{hint} Name it, as in {option}: {header[0]}"
            )
        return header.index(column)


def read_csv(file: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the header and then each row that is not blank, with the line on which it begins.

    Raises:
        UserError: The file is missing, has no header, or is not CSV in UTF-8.
    """
    try:
        # A spreadsheet's byte order mark is not part of the first column's name.
        with open(file, encoding="utf-8-sig", newline="") as text:
            reader = csv.reader(text, delimiter="\t" if file.suffix == ".tsv" else ",", strict=True)
            line, has_header = 1, False
            try:
                for cells in reader:
                    if any(cells):
                        has_header = True
                        yield line, [cell.strip() for cell in cells]
                    line = reader.line_num + 1
            except csv.Error as error:
                raise UserError(f"{file}:{line}: cannot be read as CSV: {error}") from None
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; it should be a CSV file") from None
    except (OSError, UnicodeError) as error:
        raise UserError(f"{file}: cannot be read as CSV: {_one_line(error)}") from None
    if not has_header:
        raise UserError(f"{file}: is empty: the first line should name the columns")


def parse_number(cell: str, place: str) -> float:
    """Parse the cell of a label that is a number; NaN if it is empty.

    Raises:
        UserError: It is no finite number; the message begins with `place`.
    """
    try:
        number = float(cell) if cell else math.nan
    except ValueError:
        raise UserError(f"{place}: its label is not a number: {cell!r}") from None
    if math.isinf(number):
        raise UserError(f"{place}: its label is not a finite number: {cell!r}")
    return number


# ---------------------------------------------------------------- shared


def fingerprint(files: Iterable[str]) -> str:
    """Return a digest of the absolute path, size and modification time (ns) of each file.

    Raises:
        UserError: One is missing, or is a pipe or a device.
    """
    digest = hashlib.sha256()
    for file in files:
        stat = require_file(file)
        state = f"{os.path.abspath(file)}\0{stat.st_size}\0{stat.st_mtime_ns}\0"
        digest.update(state.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _one_line(error: BaseException) -> str:
    """Return the first 300 characters of an error's message, in one line."""
    return " ".join(str(error).split())[:300]


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Silence the progress bars and the log of `datasets`.

    Reading a local file needs no progress bar, and the caller reports its errors.
    """
    import datasets

    verbosity = datasets.logging.get_verbosity()
    bars = not datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if bars:
            datasets.enable_progress_bars()
