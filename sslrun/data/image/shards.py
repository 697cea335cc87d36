"""Images in shards: tar files in the layout of webdataset, or parquet files.

An index of each tar file says where its images are. It is made once and cached, so that any image
is one read, and epochs are shuffled exactly, as those of any set. Nothing is extracted to the disk.
"""

from __future__ import annotations

import itertools
import json
import re
import tarfile
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from pydantic import model_validator
from torch import Tensor

from sslrun.data.cache import cache_entry, cache_root, digest_key
from sslrun.data.examples import ProgressCallback
from sslrun.data.image.images import EncodedSplit, UnreadableError
from sslrun.data.image.parquet import ParquetShards, StreamedParquet
from sslrun.data.image.sources import HASHED_BYTES, ImageSource, StreamingOptions
from sslrun.data.packed import PackedStrings
from sslrun.data.remote import (
    StoredFile,
    is_url,
    list_stored,
    open_stored,
    read_range,
)
from sslrun.data.source import sources
from sslrun.data.stores import IMAGE_SUFFIXES, Split, Store
from sslrun.errors import UserError
from sslrun.files import require_file

INDEX_VERSION = 1
"""Part of the key of every cached index. Raise it when the content of an index changes."""
LARGEST_LABEL = 2**20
"""Largest number of bytes of a member that holds a label."""
BLOCK = 512
"""Bytes of a header in a tar file."""
MEMBER = re.compile(r"((?:.*/)?[^/.]+)\.([^/]+)")
"""Key and ending of a member, as webdataset divides its name: at the first dot after the folder."""


# ---------------------------------------------------------------- the index of a tar file


class Member(NamedTuple):
    """One file in a tar file."""

    key: str
    ending: str
    offset: int
    size: int
    content: bytes
    """The bytes of a label; b"" for others."""


@dataclass(frozen=True)
class LabelRule:
    """Which members are images, and where their labels are."""

    image: str | None = None
    """Ending of the images; None: that of any format."""
    field: str | None = None
    """Field of the .json members that holds the label; None: the .cls members, or else the field
    "label" of .json members."""

    def choose_image(self, members: Mapping[str, Member]) -> Member:
        """Return the image among the members of one key.

        Raises:
            UserError: There is none, or there are several.
        """
        if self.image is not None:
            endings = [ending for ending in members if ending == self.image]
        else:
            endings = [ending for ending in members if f".{ending}" in IMAGE_SUFFIXES]
        if len(endings) != 1:
            found = ", ".join(members)
            raise UserError(
                f"has {'several images' if endings else 'no image'} among its members ({found}): "
                "the members of an image should follow each other; choose an ending, as in "
                "image: jpg"
            )
        return members[endings[0]]

    def read_label(self, members: Mapping[str, Member]) -> str | None:
        """Return the label among the members of one key; None if there is none.

        Raises:
            UserError: A member cannot be read, or its label is neither text nor a whole number.
        """
        if self.field is None and "cls" in members:
            return members["cls"].content.decode("utf-8", "replace").strip()
        if "json" not in members:
            return None
        try:
            fields = json.loads(members["json"].content)
        except (ValueError, RecursionError) as error:
            raise UserError(f"json: cannot be read: {error}") from None
        label = fields.get(self.field or "label") if isinstance(fields, dict) else None
        if label is not None and (isinstance(label, bool) or not isinstance(label, str | int)):
            raise UserError(f"json: its label is {label!r:.50}, neither text nor a whole number")
        return None if label is None else str(label)


@dataclass(frozen=True)
class ShardIndex:
    """Where the images of a shard are, and their labels."""

    spans: np.ndarray
    """(N, 2) int64: offset and size of each image."""
    names: PackedStrings
    codes: np.ndarray
    """(N,) int64: the label of each image, as a position in `labels`; -1 without."""
    labels: list[str]


def load_index(shard: StoredFile, rule: LabelRule) -> ShardIndex:
    """Return the index of a shard, from the cache if the shard is unchanged.

    Raises:
        UserError: The shard cannot be read, or lacks images.
    """
    key = [INDEX_VERSION, *shard, rule.image, rule.field]
    path = cache_root() / "shards" / f"{digest_key(key)}.safetensors"
    tensors, metadata = cache_entry(path, lambda: _make_index(shard, rule))
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    names = PackedStrings(arrays["names"], arrays["ends"])
    return ShardIndex(arrays["spans"], names, arrays["codes"], json.loads(metadata["labels"]))


def _make_index(shard: StoredFile, rule: LabelRule) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a cached `ShardIndex`."""
    spans, codes = array("q"), array("q")
    labels: dict[str, int] = {}

    def list_names() -> Iterator[str]:
        for key, group in itertools.groupby(_list_members(shard), lambda member: member.key):
            members = list(group)
            by_ending = {member.ending: member for member in members}
            try:
                if len(by_ending) < len(members):
                    raise UserError("has two members of one ending: rename one")
                image, label = rule.choose_image(by_ending), rule.read_label(by_ending)
            except UserError as error:
                raise UserError(f"{shard.path}: {_printable(key)}: {error}") from None
            spans.extend((image.offset, image.size))
            codes.append(-1 if label is None else labels.setdefault(label, len(labels)))
            yield f"{image.key}.{image.ending}"

    names = PackedStrings.pack(list_names())
    if not names:
        raise UserError(f"{shard.path}: holds no images")
    arrays = {
        "spans": np.frombuffer(spans, np.int64).reshape(-1, 2),
        "names": names.content,
        "ends": names.ends,
        "codes": np.frombuffer(codes, np.int64),
    }
    tensors = {name: torch.from_numpy(values.copy()) for name, values in arrays.items()}
    return tensors, {"labels": json.dumps(list(labels))}


def _printable(name: str) -> str:
    """Return the name of a member for a message, without what a terminal would obey."""
    return name if name.isprintable() else ascii(name)


def _list_members(shard: StoredFile) -> Iterator[Member]:
    """Yield the members of a tar file that have an ending, in order.

    Raises:
        UserError: The file is damaged, or is no tar file without compression.
    """
    with open_stored(shard.path) as file:
        try:
            tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 (it holds no file)
            for info in iter(tar.next, None):
                tar.members = []  # type: ignore[attr-defined]  # it would keep all of them
                parts = MEMBER.fullmatch(info.name)
                if info.isreg() and parts:
                    yield _read_member(file, info, parts[1], parts[2].lower())
            _check_end(file, tar.offset)
        except (tarfile.TarError, EOFError) as error:
            raise UserError(
                f"{shard.path}: damaged, or no tar file without compression ({error}): write it "
                "again"
            ) from None


def _read_member(file: IO[bytes], info: tarfile.TarInfo, key: str, ending: str) -> Member:
    content = b""
    if ending in ("cls", "json") and info.size <= LARGEST_LABEL:
        file.seek(info.offset_data)
        content = file.read(info.size)
    return Member(key, ending, info.offset_data, info.size, content)


def _check_end(file: IO[bytes], offset: int) -> None:
    """Check that a tar file ends with zeros; a damaged header looks like an end to `tarfile`."""
    file.seek(offset)
    if file.read(BLOCK) != bytes(BLOCK):
        raise tarfile.ReadError(f"no header at byte {offset}")


# ---------------------------------------------------------------- stores


@dataclass(frozen=True)
class ShardImages:
    """Encoded images in tar files."""

    paths: Sequence[str]
    starts: np.ndarray
    """(S,) int64: the number of the first image of each shard."""
    spans: np.ndarray
    """(N, 2) int64: offset and size of each image in its shard."""
    names: Sequence[PackedStrings]
    """The names of the images of each shard."""

    def __len__(self) -> int:
        return len(self.spans)

    def read(self, index: int) -> bytes:
        shard, _ = self._locate(index)
        offset, size = self.spans[index].tolist()
        content = read_range(self.paths[shard], offset, size)
        if len(content) < size:
            raise UnreadableError(
                f"{self.name(index)}: the shard ends before it: repair the shard, or give "
                "skip_corrupt: true"
            )
        return content

    def name(self, index: int) -> str:
        shard, position = self._locate(index)
        return f"{self.paths[shard]}: {_printable(self.names[shard][position])}"

    def files(self) -> Sequence[str | None]:
        return list(itertools.chain.from_iterable(self.names))

    def _locate(self, index: int) -> tuple[int, int]:
        """Return the shard of an image, and its number there."""
        shard = int(self.starts.searchsorted(index, side="right")) - 1
        return shard, index - int(self.starts[shard])


@dataclass
class ShardStore(Store):
    """Images in tar files in webdataset's layout: KEY.jpg, with KEY.cls or KEY.json.

    Classes are the labels of the training split, sorted (as numbers if they all are); or the lines
    of a file of `names`, for labels that are names, or their numbers from 0.
    """

    shards: Mapping[Split, Sequence[StoredFile]]
    rule: LabelRule
    names: Path | None = None
    progress: ProgressCallback | None = None

    @property
    def splits(self) -> tuple[Split, ...]:
        return tuple(self.shards)

    def identity(self, split: Split) -> Mapping[str, Any]:
        labels = None if split == "unlabeled" else [self.rule.field, self._classes]
        return {"shards": self.shards[split], "image": self.rule.image, "labels": labels}

    def open(self, split: Split) -> EncodedSplit:
        shards, indices = self.shards[split], self._load(split)
        counts = np.array([len(index.spans) for index in indices])
        images = ShardImages(
            [shard.path for shard in shards],
            counts.cumsum() - counts,
            np.concatenate([index.spans for index in indices]),
            [index.names for index in indices],
        )
        if not self._classes or split == "unlabeled":
            return EncodedSplit(images, None, self._classes)
        return EncodedSplit(images, self._find_class_ids(indices, images), self._classes)

    def _find_class_ids(self, indices: Sequence[ShardIndex], images: ShardImages) -> Tensor:
        """Return the class ids (N,) int64 of all images.

        Raises:
            UserError: An image has no label, or one that is no class.
        """
        classes = self._classes
        known = {name: number for number, name in enumerate(classes)}
        if self.names is not None:
            known |= {str(number): number for number in range(len(classes))}
        labels, codes = _join_labels(indices)
        class_ids = np.array([*(known.get(label, -1) for label in labels), -1])[codes]
        if class_ids.min() < 0:
            first = int(class_ids.argmin())
            label = f"label '{labels[codes[first]]}' is no class" if codes[first] >= 0 else None
            raise UserError(
                f"{images.name(first)}: {label or 'has no label'}: it should be one of "
                f"{', '.join(classes[:10])}"
            )
        return torch.from_numpy(class_ids)

    @cached_property
    def _classes(self) -> tuple[str, ...]:
        if self.names is not None:
            return read_class_names(self.names)
        labels, _ = _join_labels(self._load("train"))
        if len(labels) == 1:
            raise UserError(
                f"{self.shards['train'][0].path}: its shards have only one class, '{labels[0]}': "
                "at least two are needed"
            )
        is_numeric = all(label.isdecimal() for label in labels)
        return tuple(sorted(labels, key=int if is_numeric else None))

    def _load(self, split: Split) -> list[ShardIndex]:
        indices = []
        for number, shard in enumerate(self.shards[split], start=1):
            indices.append(load_index(shard, self.rule))
            if self.progress:
                self.progress(f"index of {split}", number, len(self.shards[split]))
        return indices


def _join_labels(indices: Sequence[ShardIndex]) -> tuple[list[str], np.ndarray]:
    """Return the different labels of all shards, and of each image (N,) its position there.

    The position is -1 without a label.
    """
    positions: dict[str, int] = {}
    codes = []
    for index in indices:
        of_shard = [positions.setdefault(label, len(positions)) for label in index.labels]
        codes.append(np.array([*of_shard, -1])[index.codes])  # code -1 takes the last, which is -1
    return list(positions), np.concatenate(codes)


def read_class_names(path: Path) -> tuple[str, ...]:
    """Read the names of classes, one in a line.

    Raises:
        UserError: The file cannot be read, has fewer than two names, or one twice.
    """
    require_file(path)
    try:
        names = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    classes = tuple(name.strip() for name in names if name.strip())
    if len(set(classes)) != len(classes) or len(classes) < 2:
        raise UserError(f"{path}: should hold the names of two or more classes, one in a line")
    return classes


# ---------------------------------------------------------------- the data set

FORMATS = (".tar", ".parquet")
"""Endings of shards."""


@sources.register("shards")
class Shards(ImageSource):
    """Images in tar files of webdataset's layout or in parquet files, here or in object stores.

    A tar file holds KEY.jpg (or another format) and then KEY.cls, a number or a name, or KEY.json
    with a label. A pattern may have numbers or words in braces, and `*`, as in
    photos/train-{000..146}.tar or s3://bucket/train-*.tar. An index of each tar file is made once.
    """

    class Options(StreamingOptions):
        train: str
        """Shards to train on: a pattern of paths, or of URLs that fsspec knows."""
        val: str | None = None
        """Shards of the validation split; default: carved from the training split."""
        test: str | None = None
        """Shards of the test split; default: carved from the training split."""
        unlabeled: str | None = None
        """Shards of unlabeled images to pretrain on; default: there are none."""
        image: str | None = None
        """Ending of the images in tar files, as in jpg or input.png, or their column in parquet
        files; default: the only one that holds images."""
        label: str | None = None
        """Field of KEY.json that holds the label, or column in parquet files; default: KEY.cls,
        else the field label; the only column of classes, or the one named label."""
        classes: Path | None = None
        """File with the names of the classes, one in a line, for labels in tar files that are such
        names, or their numbers from 0. Default: the labels of the training split, sorted."""

        @property
        def patterns(self) -> dict[Split, str]:
            """The patterns of the splits that are named."""
            patterns: dict[Split, str | None] = {
                "train": self.train,
                "val": self.val,
                "test": self.test,
                "unlabeled": self.unlabeled,
            }
            return {split: pattern for split, pattern in patterns.items() if pattern is not None}

        @property
        def format(self) -> str:
            """The ending that the shards share."""
            return Path(self.train).suffix

        @model_validator(mode="after")
        def _check_format(self) -> Shards.Options:
            endings = {Path(pattern).suffix for pattern in self.patterns.values()}
            if len(endings) > 1 or self.format not in FORMATS:
                raise ValueError("all patterns should end with .tar, or all with .parquet")
            if self.format != ".tar" and self.classes is not None:
                raise ValueError("classes is for tar files: remove it")
            if self.format == ".tar" and self.streaming:
                raise ValueError("streaming is for parquet files; tar files never are copied")
            return self

        def files(self) -> list[Path]:
            """Return the file of names, and the shards here if they are small in total."""
            local = [pattern for pattern in self.patterns.values() if not is_url(pattern)]
            try:
                shards = [shard for pattern in local for shard in list_stored(pattern)]
            except UserError:
                return super().files()  # reported when the set is loaded
            is_small = sum(shard.size or 0 for shard in shards) < HASHED_BYTES
            return super().files() + ([Path(shard.path) for shard in shards] if is_small else [])

    @property
    def title(self) -> str:
        return Path(self.options.train).parent.name or self.name

    @cached_property
    def store(self) -> Store:
        options = self.options
        shards = {split: list_stored(pattern) for split, pattern in options.patterns.items()}
        if options.format == ".parquet":
            kind = StreamedParquet if options.streaming else ParquetShards
            return kind(shards, options.image, options.label)
        rule = LabelRule(options.image, options.label)
        return ShardStore(shards, rule, options.classes, self.progress)

    @classmethod
    def found(cls, options: Any) -> None:
        """Return None: all shards are named by options."""
