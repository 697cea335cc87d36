"""Images in the rows of parquet files, here or in an object store, perhaps while they arrive."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sslrun.data.image.augment import Size
from sslrun.data.image.images import (
    EncodedImages,
    EncodedSplit,
    Pixels,
    StreamedImages,
    Whole,
    choose_decoder,
)
from sslrun.data.remote import StoredFile, copy_to_cache, open_stored
from sslrun.data.stores import Hub, ParquetStore, Split, TableImages, open_on_hub
from sslrun.errors import UserError
from sslrun.seeds import derive_seed

WINDOW = 10_000
"""Rows among which the first epoch of an arriving set is shuffled."""


class ParquetShards(ParquetStore):
    """Images in parquet files that patterns name; those of an object store are copied once."""

    def __init__(
        self, shards: Mapping[Split, Sequence[StoredFile]], image: str | None, label: str | None
    ) -> None:
        super().__init__(Path(), image, label)
        self.name = shards["train"][0].path
        self.shards = shards

    @property
    def splits(self) -> tuple[Split, ...]:
        return tuple(self.shards)

    def identity(self, split: Split) -> Mapping[str, Any]:
        splits = sorted({split, "train"})  # train may determine the classes
        shards = {name: self.shards[name] for name in splits}
        return {"shards": shards, "image": self.image, "label": self.label}

    def list_files(self, split: Split) -> list[str]:
        return [str(copy_to_cache(shard)) for shard in self.shards[split]]


# ---------------------------------------------------------------- while files arrive


class StreamedParquet(ParquetShards):
    """Images in parquet files; a file is copied when an image of it is first read.

    Only the number of rows and the labels are read before. So the set is as any other: its length,
    its classes, and what is held out are known from the beginning.
    """

    def __init__(
        self, shards: Mapping[Split, Sequence[StoredFile]], image: str | None, label: str | None
    ) -> None:
        super().__init__(shards, image, label)
        self._tables: dict[Split, Any] = {}
        self._counts: dict[Split, list[int]] = {}

    def table(self, split: Split) -> Any:
        """Return the split as a `datasets.Dataset` in which all columns are empty except labels."""
        import datasets
        import pyarrow

        if split not in self._tables:
            parts = [self._read_labels(shard) for shard in self.shards[split]]
            self._counts[split] = [len(part) for part in parts]
            try:
                self._tables[split] = datasets.Dataset(pyarrow.concat_tables(parts))
            except pyarrow.ArrowInvalid:
                raise UserError(
                    f"{self.name}: the files of split '{split}' differ in their columns"
                ) from None
        return self._tables[split]

    def images(self, table: Any, column: str, split: Split) -> EncodedImages:
        counts = np.array(self._counts[split])
        return ArrivingRows(self.shards[split], counts.cumsum() - counts, len(table), column)

    def _read_labels(self, shard: StoredFile) -> Any:
        """Read the column of labels of one file, without the others, as an Arrow table."""
        import datasets
        import pyarrow
        from pyarrow import parquet

        with open_stored(shard.path) as content:
            file = parquet.ParquetFile(content)
            schema, count = file.schema_arrow, file.metadata.num_rows
            label = self._label_column(datasets.Features.from_arrow_schema(schema))
            read = file.read(columns=[] if label is None else [label])
        columns = [
            read[field.name] if field.name == label else pyarrow.nulls(count, field.type)
            for field in schema
        ]
        return pyarrow.Table.from_arrays(columns, schema=schema)


@dataclass(frozen=True)
class ArrivingRows:
    """Encoded images in a column of parquet files; a file is copied when it is first read.

    The processes of one machine share the copies.
    """

    shards: Sequence[StoredFile]
    starts: np.ndarray
    """(S,) int64: the number of the first row of each file."""
    count: int
    column: str

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> bytes:
        shard, row = self._locate(index)
        return open_copy(shard, self.column).read(row)

    def name(self, index: int) -> str:
        shard, row = self._locate(index)
        return f"{shard.path}, row {row}"

    def files(self) -> Sequence[str | None]:
        return [None] * self.count

    def _locate(self, index: int) -> tuple[StoredFile, int]:
        shard = int(self.starts.searchsorted(index, side="right")) - 1
        return self.shards[shard], index - int(self.starts[shard])


@cache
def open_copy(shard: StoredFile, column: str) -> TableImages:
    """Copy a parquet file, if there is no copy yet, and open its column of images."""
    store = ParquetStore(copy_to_cache(shard))
    return TableImages(store.table("train").select_columns([column]), column, shard.path)


@dataclass(frozen=True)
class ArrivingImages(StreamedImages):
    """Images whose files arrive during the first epoch, which therefore reads them in order.

    Its order is shuffled within `WINDOW` rows. Every order is a function of seed and epoch, as for
    any set, so that a run resumes exactly.
    """

    def order(self, seed: int, epoch: int) -> Tensor:
        if epoch > 0:
            return super().order(seed, epoch)
        generator = torch.Generator().manual_seed(derive_seed(seed, epoch))
        noise = torch.rand(len(self), generator=generator, dtype=torch.float64) * WINDOW
        rows = torch.arange(len(self)) if self.indices is None else self.indices
        return (rows + noise).argsort()


def load_arriving(
    split: EncodedSplit, size: Size | None, form: Whole | Pixels | None
) -> ArrivingImages:
    """Return a split whose files arrive as it is read.

    Raises:
        UserError: Without `size`, the first image cannot be read.
    """
    decoder = choose_decoder(split.images, size, False, False, form)
    return ArrivingImages(split.images, split.labels, split.classes, decoder)


def list_hub_files(hub: Hub, title: str, remedy: str) -> dict[Split, list[StoredFile]]:
    """List the parquet files of a set on the hub; their URLs hold its revision.

    Raises:
        UserError: The hub cannot be reached, or the set is missing or in another format.
    """
    import datasets

    builder = open_on_hub(hub, title, remedy, datasets.load_dataset_builder)
    known = builder.config.data_files or {}
    listed: dict[Split, list[StoredFile]] = {}
    for split, name in hub.splits.items():
        urls = [str(url) for url in known.get(name, ())]
        if not urls:
            raise UserError(f"{title}: has no files of a split '{name}' on the hub")
        if not all(url.endswith(".parquet") for url in urls):
            raise UserError(f"{title}: is not in parquet files on the hub: remove streaming")
        listed[split] = [StoredFile(url, None, "") for url in urls]
    return listed
