"""CoNLL files: one word and its tag per line, a blank line between sentences."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from sslrun.data.source import sources
from sslrun.data.stores import SPELLINGS, Split, assign_roles, fingerprint
from sslrun.data.text.base import TextOptions
from sslrun.data.text.tags import TagSource
from sslrun.errors import UserError

SUFFIXES = (".conll", ".txt", ".tsv")
"""Endings of CoNLL files."""
DOCUMENT_START = "-DOCSTART-"
"""First word of the lines that separate documents; they belong to no sentence."""

Column = Literal["first", "last"] | Annotated[int, Field(ge=1)]


class Line(NamedTuple):
    """A line with a word."""

    number: int
    """Line number in the file, from 1."""
    columns: list[str]


@sources.register("conll-files")
class ConllTags(TagSource):
    """Your own tagged words in CoNLL files: one word and its tag per line.

    <path> is a .conll, .txt or .tsv file in UTF-8, or a folder with train.conll (or another of
    these endings), and optionally files of the splits val and test. A blank line separates
    sentences. Columns are separated by tabs or, in lines without a tab, by spaces. Lines that begin
    with -DOCSTART- are skipped. Without a test split, the validation split serves as one; without
    either, one is carved from train.
    """

    class Options(TextOptions):
        path: Path
        """A .conll, .txt or .tsv file, or a folder with such a file for each split."""
        word_column: Column = "first"
        """Column of the words: first, last, or its number, counted from 1."""
        tag_column: Column = "last"
        """Column of the tags: first, last, or its number, counted from 1. Entities are tagged as
        B-PER, I-PER and O; other tags, such as parts of speech, are scored word by word."""

    options: ConllTags.Options

    @property
    def title(self) -> str:
        return str(self.options.path)

    @property
    def splits(self) -> tuple[Split, ...]:
        return tuple(self._files)

    def content(self) -> Any:
        return fingerprint([str(self._files["train"])])

    def words(self, split: Split) -> tuple[list[list[str]], list[list[str]]]:
        return self._sentences[split]

    @cached_property
    def _sentences(self) -> dict[Split, tuple[list[list[str]], list[list[str]]]]:
        """Words and tags of each split."""
        words, tags = self.options.word_column, self.options.tag_column
        return {split: read_conll(file, words, tags) for split, file in self._files.items()}

    @cached_property
    def _files(self) -> dict[Split, Path]:
        path = self.options.path
        if path.is_file():
            if path.suffix not in SUFFIXES:
                raise UserError(f"{path}: should end with one of {', '.join(SUFFIXES)}")
            return {"train": path}
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        files: dict[Split, Path] = {}
        for split, names in SPELLINGS.items():
            if split == "unlabeled":
                continue
            candidates = [path / f"{name}{suffix}" for name in names for suffix in SUFFIXES]
            present = [file for file in candidates if file.is_file()]
            if len(present) > 1:
                raise UserError(
                    f"{path}: both {present[0].name} and {present[1].name} are the {split} split; "
                    "remove one of them"
                )
            if present:
                files[split] = present[0]
        if "train" not in files:
            raise UserError(f"{path}: should hold a file train{{{','.join(SUFFIXES)}}}")
        return assign_roles(files, test_on_val=False)


def read_conll(
    file: Path, words: Column = "first", tags: Column = "last"
) -> tuple[list[list[str]], list[list[str]]]:
    """Read the words and the tags of each sentence.

    Raises:
        UserError: The file cannot be read, holds no sentence, or has a line with a missing word or
            tag or with more or fewer columns than the first line.
    """
    word_lists: list[list[str]] = []
    tag_lists: list[list[str]] = []
    count = 0
    for sentence in _read_sentences(file):
        for line in sentence:
            count = count or len(line.columns)
            if len(line.columns) != count:
                raise UserError(
                    f"{file}:{line.number}: has {_count_columns(len(line.columns))}, the lines "
                    f"above have {count}; every line should hold a word and its tag"
                )
        place = f"{file}:{sentence[0].number}"
        word_column = _column_index(words, "word_column", count, place)
        tag_column = _column_index(tags, "tag_column", count, place)
        if word_column == tag_column:
            raise UserError(
                f"{place}: words and tags are both read from column {word_column + 1} of {count}; "
                "choose two columns with word_column and tag_column"
            )
        for line in sentence:
            if not (line.columns[word_column] and line.columns[tag_column]):
                raise UserError(f"{file}:{line.number}: has an empty word or tag")
        word_lists.append([line.columns[word_column] for line in sentence])
        tag_lists.append([line.columns[tag_column] for line in sentence])
    if not word_lists:
        raise UserError(f"{file}: holds no sentences")
    return word_lists, tag_lists


def _count_columns(count: int) -> str:
    return "1 column" if count == 1 else f"{count} columns"


def _column_index(column: Column, option: str, count: int, place: str) -> int:
    """Return the index, from 0, of a column among `count`.

    Raises:
        UserError: There is no such column.
    """
    if column == "first":
        return 0
    if column == "last":
        return count - 1
    if column > count:
        raise UserError(f"{place}: has {_count_columns(count)}, but {option} is {column}")
    return column - 1


def _read_sentences(file: Path) -> Iterator[list[Line]]:
    """Yield the lines of each sentence, split into columns."""
    sentence: list[Line] = []
    try:
        with open(file, encoding="utf-8-sig") as lines:
            for number, text in enumerate(lines, start=1):
                columns = _split_columns(text)
                if columns and not columns[0].startswith(DOCUMENT_START):
                    sentence.append(Line(number, columns))
                elif sentence:
                    yield sentence
                    sentence = []
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: is not UTF-8 text (byte {error.start}); convert it") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    if sentence:
        yield sentence


def _split_columns(text: str) -> list[str]:
    """Split a line at tabs or, if it has none, at spaces; a blank line gives an empty list.

    Only ASCII white space separates columns: a word may be a non-breaking space.
    """
    if not text.strip(" \t\r\n"):
        return []
    if "\t" in text:
        return [column.strip(" \r\n") for column in text.split("\t")]
    return re.split(" +", text.strip(" \r\n"))
