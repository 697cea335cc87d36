"""Where a set lies before it is read: a folder of images, the files of a table, or the Hugging Face hub."""

from __future__ import annotations

import csv
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from sslrun.data.cache import cache_root
from sslrun.data.image.images import EncodedFiles, EncodedSplit
from sslrun.errors import UserError
from sslrun.hub import hub_or_offline
from sslrun.registry import did_you_mean

T = TypeVar("T")

Split = Literal["train", "val", "test", "unlabeled"]

SPELLINGS: Mapping[Split, tuple[str, ...]] = {
    "train": ("train",),
    "val": ("validation", "valid", "val"),
    "test": ("test",),
    "unlabeled": ("unlabeled", "unlabelled"),
}
"""What a split's folder or file may be called."""
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


class Store(ABC):
    """Encoded images, by split."""

    @property
    @abstractmethod
    def splits(self) -> tuple[Split, ...]:
        """What it holds: `train`, and others."""

    @abstractmethod
    def identity(self, split: Split) -> Mapping[str, Any]:
        """JSON values that change when the split's content does; for the hub, when its description does."""

    @abstractmethod
    def open(self, split: Split) -> EncodedSplit:
        """The split's images and labels. UserError: it can't be read, has no images, or only one class."""


def local_store(root: Path, label: str | None = None, test_on_val: bool = False) -> Store:
    """The store for a folder of parquet files, or of images."""
    if any(root.glob("*.parquet")):
        return ParquetStore(root, label=label, test_on_val=test_on_val)
    return FolderStore(root, test_on_val)


def _by_split(found: Mapping[Split, T], test_on_val: bool) -> dict[Split, T]:
    """What was found, by what it serves as: a validation split is the test split where there is no other."""
    served = dict(found)
    if "val" in served and (test_on_val or "test" not in served):
        served["test"] = served.pop("val")
    return served


# ---------------------------------------------------------------- folders


@dataclass
class FolderStore(Store):
    """Images in folders: `root/<split>/<class>/*.png`; or `root/<class>/*.png`, a training split alone.

    Below a class's folder there may be others. Images with no folders beside them have no labels.
    """

    root: Path
    test_on_val: bool = False
    """The set is tested on its validation split, even where there is a test split (which has no labels)."""

    @property
    def splits(self) -> tuple[Split, ...]:
        return tuple(self._folders)

    def identity(self, split: Split) -> Mapping[str, Any]:
        return {"files": fingerprint(self._files(split)), "classes": self._classes}

    def open(self, split: Split) -> EncodedSplit:
        files, folder, classes = self._files(split), self._folders[split], self._classes
        if not classes or split == "unlabeled":
            return EncodedSplit(EncodedFiles(files), None, classes)
        number = {name: index for index, name in enumerate(classes)}
        labels = [number.get(_top(each, folder)) for each in files]
        if None in labels:
            known = ", ".join(classes[:10])
            raise UserError(f"{files[labels.index(None)]}: lies in none of the classes' folders ({known}): move it")
        return EncodedSplit(EncodedFiles(files), torch.tensor(labels), classes)

    @cached_property
    def _folders(self) -> dict[Split, Path]:
        if not self.root.is_dir():
            raise UserError(f"{self.root}: no such folder; it should hold train/<class>/, or <class>/, with images")
        found = {
            split: self.root / name
            for split, names in SPELLINGS.items()
            for name in names
            if (self.root / name).is_dir()
        }
        return _by_split(found, self.test_on_val) if "train" in found else {"train": self.root}

    @cached_property
    def _classes(self) -> tuple[str, ...]:
        """The names of the folders in the training split's that hold images."""
        train = self._folders["train"]
        names = sorted({_top(each, train) for each in self._files("train")} - {""})
        if len(names) == 1:
            raise UserError(
                f"{train}: has only one class, '{names[0]}': give each class a folder of its own there; "
                f"to go without labels, put the images right into {train}"
            )
        return tuple(names)

    def _files(self, split: Split) -> tuple[str, ...]:
        folder = self._folders[split]
        found = [
            os.path.join(where, name)
            for where, _, names in os.walk(folder, followlinks=True)
            for name in names
            if name.lower().endswith(SUFFIXES) and not name.startswith(".")
        ]
        if not found:
            raise UserError(f"{folder}: holds no images ({', '.join(SUFFIXES)}): is it the right folder?")
        return tuple(sorted(found))


def _top(file: str, folder: Path) -> str:
    """The first folder on the way from `folder` to `file`; empty where the file lies in `folder` itself."""
    first, *rest = os.path.relpath(file, folder).split(os.sep)
    return first if rest else ""


# ---------------------------------------------------------------- tables


class TableStore(Store):
    """Images in a column of a table that `datasets` can load, and labels in another."""

    def __init__(self, name: str, image: str | None, label: str | None) -> None:
        """`name`: for errors. `image`, `label`: columns; None: found by their types, or the column 'label'."""
        self.name = name
        self.image = image
        self.label = label

    @abstractmethod
    def table(self, split: Split) -> Any:
        """The split as a `datasets.Dataset`. UserError: it can't be had."""

    def open(self, split: Split) -> EncodedSplit:
        table = self.table(split)
        if len(table) == 0:
            raise UserError(f"{self.name}: split '{split}' has no rows")
        image, label = self._image_column(table.features), self._label_column(table.features)
        labels, classes = (None, ()) if label is None or split == "unlabeled" else self.labels(table, label, split)
        return EncodedSplit(Rows(table.select_columns([image]), image, f"{self.name} {split}"), labels, classes)

    def _image_column(self, features: Mapping[str, Any]) -> str:
        columns = [name for name, feature in features.items() if _holds_images(feature)]
        if self.image is not None:
            if self.image not in columns:
                raise UserError(f"{self.name}: no image column '{self.image}'.{did_you_mean(self.image, columns)}")
            return self.image
        if len(columns) != 1:
            found = f"holds images in {', '.join(columns)}" if columns else "holds no images"
            remedy = f"choose, as in image: {columns[0]}" if columns else "is it an image set?"
            raise UserError(f"{self.name}: {found}, with the columns {', '.join(features)}: {remedy}")
        return columns[0]

    def _label_column(self, features: Mapping[str, Any]) -> str | None:
        import datasets

        if self.label is not None:
            if self.label not in features:
                raise UserError(f"{self.name}: no column '{self.label}'.{did_you_mean(self.label, list(features))}")
            return self.label
        columns = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        columns = columns or [name for name in ("label", "labels") if name in features]
        if len(columns) > 1:
            raise UserError(f"{self.name}: has labels in {', '.join(columns)}: choose, as in label: {columns[0]}")
        return columns[0] if columns else None

    def labels(self, table: Any, column: str, split: Split) -> tuple[Tensor, tuple[str, ...]]:
        """(N,) int64 and the classes' names. A column of plain numbers or words has the classes that train has."""
        values = _values(table, column)
        if None in values:
            raise UserError(f"{self.name}: split '{split}', row {values.index(None)}: has no {column}")
        classes = getattr(table.features[column], "names", None)
        if classes is None:
            if not isinstance(values[0], str | int):
                raise UserError(f"{self.name}: column '{column}' holds {type(values[0]).__name__}s: not classes")
            known = "train" if "train" in self.splits else split
            classes = sorted(set(values if split == known else _values(self.table(known), column)))
            number = {value: index for index, value in enumerate(classes)}
            values = [number.get(value, -1) for value in values]
        if len(classes) < 2:
            raise UserError(f"{self.name}: column '{column}' has only one class, {classes[0]!r}: nothing to tell apart")
        odd = next((at for at, value in enumerate(values) if not 0 <= value < len(classes)), None)
        if odd is not None:
            raise UserError(f"{self.name}: split '{split}', row {odd}: its {column} is no class of train")
        return torch.tensor(values), tuple(map(str, classes))


def _holds_images(feature: Any) -> bool:
    """Whether a column is of encoded images: declared so, or of bytes, bare or with a path beside them."""
    import datasets

    if isinstance(feature, dict):
        return feature.keys() == {"bytes", "path"}
    return isinstance(feature, datasets.Image) or getattr(feature, "dtype", None) in ("binary", "large_binary")


def _values(table: Any, column: str) -> list[Any]:
    return list(table.select_columns([column]).with_format("arrow")[:][column].to_pylist())


@dataclass(frozen=True)
class Rows:
    """Images in a column of a table."""

    table: Any
    column: str
    title: str

    def __len__(self) -> int:
        return len(self.table)

    def read(self, index: int) -> bytes:
        cell = self.table.data.column(self.column)[index].as_py()  # from Arrow itself: `datasets` would decode it
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
        found: list[str | None] = pyarrow.compute.struct_field(column, "path").to_pylist()  # without the images' bytes
        return found


class ParquetStore(TableStore):
    """Parquet files, `root/train.parquet` or `root/train-*.parquet`; or one file, a training split alone."""

    def __init__(
        self, root: Path, image: str | None = None, label: str | None = None, test_on_val: bool = False
    ) -> None:
        super().__init__(str(root), image, label)
        self.root = root
        self.test_on_val = test_on_val

    @property
    def splits(self) -> tuple[Split, ...]:
        return tuple(self._files)

    def identity(self, split: Split) -> Mapping[str, Any]:
        read = {split, "train"} & self._files.keys()  # train may say what the classes are
        files = {each: fingerprint(self._files[each]) for each in sorted(read)}
        return {"files": files, "image": self.image, "label": self.label}

    def table(self, split: Split) -> Any:
        import datasets

        files = self._files[split]
        try:
            with no_bars():
                return datasets.load_dataset(
                    "parquet", data_files={"split": files}, split="split", cache_dir=str(cache_root() / "tables")
                )
        except (datasets.exceptions.DatasetGenerationError, ValueError, OSError) as error:
            raise UserError(f"{files[0]}: can't be read as parquet: {_line(error.__cause__ or error)}") from None

    @cached_property
    def _files(self) -> dict[Split, list[str]]:
        if self.root.is_file():
            return {"train": [str(self.root)]}
        found: dict[Split, list[str]] = {}
        for split, names in SPELLINGS.items():
            files = [each for name in names for part in ("", "-*") for each in self.root.glob(f"{name}{part}.parquet")]
            if files:
                found[split] = sorted(map(str, files))
        if not found:
            raise UserError(f"{self.root}: should hold train.parquet (and test.parquet), or be one parquet file")
        return _by_split(found, self.test_on_val)


class FileStore(TableStore):
    """EncodedFiles of a table of text: `<path>/train.parquet` (or .csv, .tsv, .json, .jsonl) or parts `train-*.parquet`, test and
    val; or one file."""

    FORMATS: ClassVar = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json"}

    def __init__(self, path: Path, label: str | None = None) -> None:
        super().__init__(str(path), None, label)
        self.path = path

    @property
    def splits(self) -> tuple[Split, ...]:
        return tuple(self._files)

    def identity(self, split: Split) -> Any:
        return fingerprint([str(each) for each in self._parts(split)])

    def table(self, split: Split) -> Any:
        import datasets

        parts = self._parts(split)
        file = parts[0]
        more: dict[str, Any] = {}
        if file.suffix in (".csv", ".tsv"):  # an empty cell is nothing; "None", "NA" and "null" are words
            more = {"keep_default_na": False, "na_values": [""]}
        if file.suffix == ".tsv":  # without quotes, as GLUE's: a lone one would swallow the lines up to the next
            more |= {"sep": "\t", "quoting": csv.QUOTE_NONE}
        try:
            with no_bars():
                return datasets.load_dataset(
                    self.FORMATS[file.suffix], data_files=[str(each) for each in parts], split="train",
                    cache_dir=str(cache_root() / "tables"), **more,
                )  # fmt: skip
        except Exception as error:  # pandas, Arrow and datasets each have their own
            cause = _line(error.__cause__ or error)[:200]
            if "corresponds to no data" in cause or not any(each.stat().st_size for each in parts):
                raise UserError(f"{file}: holds no rows") from None
            raise UserError(f"{file}: can't be read as {self.FORMATS[file.suffix]}: {cause}") from None

    def _parts(self, split: Split) -> list[Path]:
        if split not in self._files:
            there = ", ".join(each[0].name for each in self._files.values())
            raise UserError(
                f"{self.path}: holds {there} alone, and nothing to {'train on' if split == 'train' else split}"
            )
        return self._files[split]

    @cached_property
    def _files(self) -> dict[Split, list[Path]]:
        if self.path.is_file():
            if self.path.suffix not in self.FORMATS:
                raise UserError(f"{self.path}: should end with one of {', '.join(self.FORMATS)}")
            return {"train": [self.path]}
        spellings: dict[Split, tuple[str, ...]] = {
            "train": ("train",), "val": ("validation", "val", "dev"), "test": ("test",)
        }  # fmt: skip
        found: dict[Split, list[Path]] = {
            split: files
            for split, names in spellings.items()
            for name in names
            for suffix in self.FORMATS
            if (files := [*self.path.glob(f"{name}{suffix}")] or sorted(self.path.glob(f"{name}-*{suffix}")))
        }
        if not found:
            raise UserError(f"{self.path}: should be a file, or a folder with train{{{','.join(self.FORMATS)}}}")
        return _by_split(found, test_on_val=False)


@dataclass(frozen=True)
class Hub:
    """A set on the Hugging Face hub, or one of its configurations."""

    repository: str
    splits: Mapping[Split, str]
    """What each split is called there."""
    config: str | None = None
    revision: str | None = None
    files: Mapping[str, str] | None = None
    """Name of a split there -> pattern of its files; None: as the repository says."""


class HubStore(TableStore):
    """A set that `datasets` downloads from the hub, and keeps."""

    def __init__(self, name: str, hub: Hub, remedy: str, image: str | None = None, label: str | None = None) -> None:
        """`remedy`: what to do where the hub can't be reached."""
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
            there = ", ".join(self._tables)
            raise UserError(f"{self.name}: no split '{name}' on the hub; there is {there}: name one under '{split}'")
        return self._tables[name]

    @cached_property
    def _tables(self) -> Any:
        import datasets

        hub = self.hub
        endpoint = datasets.config.HF_ENDPOINT
        hub_or_offline()
        try:
            return datasets.load_dataset(hub.repository, hub.config, revision=hub.revision, data_files=hub.files)
        except datasets.exceptions.DatasetNotFoundError as error:
            page = f"{endpoint}/datasets/{hub.repository}"
            if "gated" in str(error):
                why = f"wants its terms accepted at {page}, and you logged in: `hf auth login`"
            else:
                why = f"there is no data set at {page}, or it is private: then `hf auth login`"
            raise UserError(f"{self.name}: {why}") from None
        except ConnectionError:
            raise UserError(f"{self.name}: not on this machine and the hub can't be reached. {self.remedy}") from None
        except (datasets.exceptions.DatasetGenerationError, ValueError, OSError, RuntimeError) as error:
            raise UserError(f"{self.name}: can't be loaded from the hub: {_line(error.__cause__ or error)}") from None


# ---------------------------------------------------------------- shared


def fingerprint(files: Sequence[str]) -> list[tuple[str, int, int]]:
    """Paths, sizes and times of change."""
    found = ((os.path.abspath(each), os.stat(each)) for each in files)
    return [(path, stat.st_size, stat.st_mtime_ns) for path, stat in found]


def _line(error: BaseException) -> str:
    """The beginning of an error's message, in one line."""
    return " ".join(str(error).split())[:300]


@contextmanager
def no_bars() -> Iterator[None]:
    """`datasets` without its progress bars and its log: the reading of a local file is nothing to watch, and what goes
    wrong is told by whoever catches it."""
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
