"""Pairs of a source text and its target text, for tasks that write text."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from sslrun.data.source import sources
from sslrun.data.stores import FileStore, Split, TableStore
from sslrun.data.text.base import TableText, TextOptions, TextSource, cell_text
from sslrun.data.text.sequences import IGNORED, Sequences, build_labeled
from sslrun.data.text.tokenizer import Tokenizer
from sslrun.errors import UserError


class TranslationSource(TextSource):
    """Source texts, each with the text to write for it."""

    task = "translation"

    @abstractmethod
    def pairs(self, split: Split) -> Sequence[tuple[str, str]]:
        """Return the source and target texts of a split."""

    def texts(self) -> Iterator[str]:
        for pair in self.pairs("train"):
            yield from pair

    def load(self, split: Split) -> Sequences:
        """Load a split: labels are the targets' ids, and `extra` holds the target texts."""
        texts, targets = zip(*self.pairs(split), strict=True)
        encode = self.spec.tokenizer.encode
        labels = target_ids(encode(targets), self.spec.tokenizer, self.spec.length)
        examples = build_labeled(encode(texts), None, labels, (), self.spec)
        return replace(examples, extra=targets)


def target_ids(texts: Sequence[Sequence[int]], tokenizer: Tokenizer, length: int) -> Tensor:
    """Make targets (N, T) of the ids of texts: each with [SEP] at its end, then `IGNORED`.

    Texts are cut to `length` tokens, [SEP] included. T is that of the longest.
    """
    rows = [torch.tensor([*text[: length - 1], tokenizer.sep]) for text in texts]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORED)


@sources.register("translation-pairs")
class OwnPairs(TableText, TranslationSource):
    """Your own pairs of texts: a CSV, TSV, JSON or parquet file, or a folder of them.

    A folder holds train, and optionally val and test.
    """

    class Options(TextOptions):
        path: Path
        """A file, or a folder of files."""
        source: str = "source"
        """Column of the text to read."""
        target: str = "target"
        """Column of the text to write."""

    @cached_property
    def store(self) -> TableStore:
        return FileStore(self.options.path)

    def pairs(self, split: Split) -> list[tuple[str, str]]:
        columns = self.options.source, self.options.target
        table = self.table(split, *columns)
        texts, targets = (
            [cell_text(value, self.title, column) for value in table[column]] for column in columns
        )
        for row, target in enumerate(targets):
            if not target.strip():
                raise UserError(
                    f"{self.title}: split '{split}', row {row}: column '{columns[1]}' is empty, so "
                    "that there is nothing to learn to write: remove the row"
                )
        return list(zip(texts, targets, strict=True))
