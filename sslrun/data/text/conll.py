"""CoNLL files: one word and its tag per line, and a blank line between sentences."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field

from sslrun.data.source import sources
from sslrun.data.stores import SPELLINGS, Split, assign_roles, fingerprint
from sslrun.data.text.base import TextOptions
from sslrun.data.text.tags import TagSource
from sslrun.errors import UserError

SUFFIXES = (".conll", ".txt")
"""File endings that are looked for in a folder."""
DOCUMENT_START = "-DOCSTART-"
"""First column of a line that marks a new document (CoNLL-2003). Such lines are skipped."""


class TaggedSentences(NamedTuple):
    """The sentences of one file."""

    words: list[list[str]]
    tags: list[list[str]]


@sources.register("conll-files")
class ConllTags(TagSource):
    """Tagged words in CoNLL files: one word and its tag per line, a blank line between sentences.

    <path> is a .conll or .txt file in UTF-8, or a folder with train.conll (or train.txt), and
    optionally files of the splits val and test. Columns are separated by spaces or tabs. Lines that
    begin with -DOCSTART- are skipped. Without a test split, the validation split serves as one;
    without either, one is carved from train.
    """

    class Options(TextOptions):
        path: Path
        """A .conll or .txt file, or a folder with train.conll or train.txt, and val and test files."""
        word_column: int = Field(1, ge=1)
        """Number of the column of the words; the first is 1."""
        tag_column: int | None = Field(None, ge=1)
        """Number of the column of the tags; the first is 1. Default: the last column."""

    @property
    def title(self) -> str:
        return str(self.options.path)

    @property
    def splits(self) -> tuple[Split, ...]:
        return tuple(self._files)

    def content(self) -> Any:
        return fingerprint([str(self._files["train"])])

    def words(self, split: Split) -> tuple[list[list[str]], list[list[str]]]:
        sentences = self._read(self._files[split])
        return sentences.words, sentences.tags

    @cached_property
    def _files(self) -> dict[Split, Path]:
        """The file of each split, always with train."""
        path = self.options.path
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        if path.is_file():
            return {"train": path}
        files: dict[Split, Path] = {}
        for split, names in SPELLINGS.items():
            candidates = [path / f"{name}{suffix}" for name in names for suffix in SUFFIXES]
            existing = [file for file in candidates if file.is_file()]
            if existing and split != "unlabeled":
                files[split] = existing[0]
        if "train" not in files:
            raise UserError(f"{path}: should hold train.conll or train.txt (and test.conll or test.txt)")
        return assign_roles(files, test_on_val=False)

    def _read(self, file: Path) -> TaggedSentences:
        """Read all sentences of a file.

        Raises:
            UserError: The file is not UTF-8 text, has no words, or a line lacks a column.
        """
        sentences = TaggedSentences([], [])
        begins_sentence = True
        for number, columns in _read_columns(file):
            if not columns or columns[0] == DOCUMENT_START:
                begins_sentence = True
                continue
            word, tag = self._word_and_tag(file, number, columns)
            if begins_sentence:
                sentences.words.append([])
                sentences.tags.append([])
                begins_sentence = False
            sentences.words[-1].append(word)
            sentences.tags[-1].append(tag)
        if not sentences.words:
            raise UserError(f"{file}: has no words: write one word and its tag per line")
        return sentences

    def _word_and_tag(self, file: Path, number: int, columns: list[str]) -> tuple[str, str]:
        word_column = self.options.word_column
        tag_column = self.options.tag_column or len(columns)
        needed = max(word_column, tag_column, 2)
        if len(columns) < needed:
            raise UserError(
                f"{file}:{number}: lacks column {needed} (it has {len(columns)}): write a word "
                "and its tag on each line, or set word_column and tag_column"
            )
        return columns[word_column - 1], columns[tag_column - 1]


def _read_columns(file: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the number of each line and its columns; a blank line has none."""
    try:
        with open(file, encoding="utf-8-sig") as lines:  # a byte order mark is no part of a word
            for number, line in enumerate(lines, start=1):
                yield number, line.split()
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: is not UTF-8 text (byte {error.start}): convert it to UTF-8") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
