"""Sentences whose words have one tag each."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch

from sslrun.data.source import sources
from sslrun.data.stores import FileStore, Hub, Split, TableStore
from sslrun.data.text.base import (
    PublishedText,
    TableText,
    TextCard,
    TextOptions,
    TextSource,
    register_published,
)
from sslrun.data.text.sequences import IGNORED, Sequences, concatenate_texts, trim_ranges
from sslrun.errors import UserError

EncodedSentence = tuple[list[int], list[int | None]]
"""The ids of a sentence, and the index of the word that each id belongs to."""


class TagSet(NamedTuple):
    """The true tags, to score predictions against."""

    tags: list[list[str]]
    """The tags of each sentence, including those of words that were cut off."""


class TagSource(TextSource):
    """Sentences of words with one tag each: BIO tags of entities, or others (parts of speech).

    Each sentence is an example of its own. Devlin et al. (NAACL 2019, section 5.3) add as much of
    the document as fits; the published sets do not mark documents.
    """

    task = "tagging"

    @abstractmethod
    def words(self, split: Split) -> tuple[list[list[str]], list[list[str]]]:
        """Return the words and the tags of each sentence."""

    def texts(self) -> Iterator[str]:
        return (" ".join(words) for words in self.words("train")[0])

    @cached_property
    def tags(self) -> tuple[str, ...]:
        """The tags of train, with both the B- and the I- tag of each entity type.

        Another split may use one of these that does not occur in train (I-LST in CoNLL-2000).
        """
        names = {tag for tags in self.words("train")[1] for tag in tags}
        if any(tag.startswith("I-") for tag in names):
            types = {tag.partition("-")[2] for tag in names if "-" in tag}
            names |= {f"{mark}-{entity}" for entity in types for mark in "BI"}
        return tuple(sorted(names))

    def load(self, split: Split) -> Sequences:
        words, tags = self.words(split)
        self._check_tags(split, tags)
        encoded = self._encode(words)
        tokens, offsets = concatenate_texts([ids for ids, _ in encoded])
        zeros = torch.zeros(len(words), dtype=torch.int64)
        ranges = torch.stack([offsets[:-1], offsets[1:], zeros, zeros], dim=1)
        return Sequences(
            tokens,
            trim_ranges(ranges, self.spec.length),
            None,
            self.tags,
            self.spec,
            torch.tensor(self._label_pieces(tags, encoded)),
            TagSet(tags),
        )

    def _check_tags(self, split: Split, tags: list[list[str]]) -> None:
        """Check that entity tags are BIO and that train has every tag.

        Raises:
            UserError: Some tags are BIO and others are not, or `split` has a tag that train lacks.
        """
        named = [tag for tag in self.tags if tag != "O"]
        strange = [tag for tag in named if not tag.startswith(("B-", "I-"))]
        if 0 < len(strange) < len(named):
            raise UserError(
                f"{self.title}: the tag '{strange[0]}' is not O and does not begin with B- or I-, "
                "as other tags do; tag entities as B-PER, I-PER, O"
            )
        unknown = {tag for sentence in tags for tag in sentence}.difference(self.tags)
        if unknown:
            raise UserError(
                f"{self.title}: split '{split}' has the tag '{min(unknown)}', which train lacks"
            )

    def _encode(self, words: list[list[str]]) -> list[EncodedSentence]:
        """Encode sentences so that every word has at least one piece.

        The tokenizer drops words of control characters; they are encoded as "-".
        """
        encoded = self.spec.tokenizer.encode_words(words)
        repaired = []
        for sentence, (_, owners) in zip(words, encoded, strict=True):
            kept = set(owners)
            repaired.append([word if i in kept else "-" for i, word in enumerate(sentence)])
        return encoded if repaired == words else self.spec.tokenizer.encode_words(repaired)

    def _label_pieces(self, tags: list[list[str]], encoded: Sequence[EncodedSentence]) -> list[int]:
        """Return the label of each piece: the first piece of a word has its tag, others IGNORED.

        Example: "unseen cats" as [un, ##seen, cats] with owners [0, 0, 1] and tags [O, B-X] gives
        [O, IGNORED, B-X].
        """
        number = {tag: index for index, tag in enumerate(self.tags)}
        labels = []
        for sentence_tags, (_, owners) in zip(tags, encoded, strict=True):
            previous: int | None = -1
            for owner in owners:
                is_first = owner is not None and owner != previous
                labels.append(number[sentence_tags[owner]] if is_first else IGNORED)  # type: ignore[index]
                previous = owner
        return labels


class TableTags(TableText, TagSource):
    """Lists of words and of their tags, in two columns of a table."""

    @property
    @abstractmethod
    def columns(self) -> tuple[str, str]:
        """The column of the words and the column of the tags."""

    def words(self, split: Split) -> tuple[list[list[str]], list[list[str]]]:
        word_column, tag_column = self.columns
        table = self.table(split, word_column, tag_column)
        for column in self.columns:
            self._check_lists(table[column], column, split)
        feature = getattr(table.features[tag_column], "feature", None)
        names = getattr(feature, "names", None)
        words, tags = [], []
        rows = zip(table[word_column], table[tag_column], strict=True)
        for number, (row_words, row_tags) in enumerate(rows):
            if len(row_words) != len(row_tags):
                raise UserError(
                    f"{self.title}: split '{split}', row {number}: has {len(row_words)} words but "
                    f"{len(row_tags)} tags; each word needs one tag"
                )
            words.append([str(word) or "-" for word in row_words])
            tags.append([names[tag] if names else str(tag) for tag in row_tags])
        return words, tags

    def _check_lists(self, rows: Sequence[object], column: str, split: Split) -> None:
        for number, row in enumerate(rows):
            if not isinstance(row, list):
                raise UserError(
                    f"{self.title}: split '{split}', row {number}: column '{column}' should hold "
                    "lists with one entry per word; for files with one word per line, use the data "
                    "set conll-files"
                )


TAGS = {
    "conll2000": TextCard(
        "Chunks of phrases in Wall Street Journal text. Tjong Kim Sang and Buchholz, CoNLL 2000.",
        None,
        ("tokens", "tags"),
    ),
    "conll2003": TextCard(
        "Named entities in Reuters news. Tjong Kim Sang and De Meulder, CoNLL 2003.",
        Hub(
            "tomaarsen/conll2003",
            {"train": "train", "val": "validation", "test": "test"},
        ),
        ("tokens", "ner_tags"),
    ),
}


class PublishedTags(PublishedText, TableTags):
    """A published set of tagged words."""

    @property
    def columns(self) -> tuple[str, str]:
        words, tags = self.card.columns
        return words, tags


register_published(PublishedTags, TAGS)


@sources.register("words")
class OwnTags(TableTags):
    """Your own tagged words: a JSON or parquet file with two columns of lists, or a folder of them.

    For files with one word and its tag per line, use `conll-files`.
    """

    class Options(TextOptions):
        path: Path
        """A file, or a folder of files."""
        words: str = "tokens"
        """Column of the lists of words."""
        tags: str = "tags"
        """Column of the lists of tags. Entities are tagged as B-PER, I-PER and O; other tags, such
        as parts of speech, are scored word by word."""

    @cached_property
    def store(self) -> TableStore:
        path = self.options.path
        if path.is_file() and path.suffix in (".conll", ".txt"):
            raise UserError(
                f"{path}: is not a table; for files with one word per line, use the data set "
                "conll-files"
            )
        return FileStore(path)

    @property
    def columns(self) -> tuple[str, str]:
        return self.options.words, self.options.tags
