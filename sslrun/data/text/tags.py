"""Tagged words: named entities (BIO), chunks, parts of speech."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch

from sslrun.data.source import sources
from sslrun.data.stores import FileStore, Hub, Split, TableStore
from sslrun.data.text.base import PublishedText, TableText, TextCard, TextOptions, TextSource, register_published
from sslrun.data.text.sequences import IGNORED, Sequences, flat, trimmed
from sslrun.errors import UserError


class TagSet(NamedTuple):
    """The tags that predictions are scored against."""

    tags: list[list[str]]
    """One tag per word of each sentence, including words cut off by the maximum length."""


class TagSource(TextSource):
    """Sentences of words with one tag per word: BIO tags of entities, or others such as parts of speech.

    Deviation from Devlin et al. (2019, section 5.3): each sentence is read alone, without the rest of
    its document, because the published sets do not mark documents.
    """

    task = "tagging"

    @abstractmethod
    def words(self, split: Split) -> tuple[list[list[str]], list[list[str]]]:
        """Return the words of each sentence, and their tags."""

    def texts(self) -> Iterator[str]:
        return (" ".join(words) for words in self.words("train")[0])

    @cached_property
    def tags(self) -> tuple[str, ...]:
        """Sorted tags of train. If they are BIO, both B- and I- of each entity type of train are included:
        another split may have one that train lacks (I-LST in CoNLL-2000)."""
        observed = {tag for tags in self.words("train")[1] for tag in tags}
        if any(tag.startswith("I-") for tag in observed):
            observed |= {f"{mark}-{tag.partition('-')[2]}" for tag in observed if "-" in tag for mark in "BI"}
        return tuple(sorted(observed))

    def load(self, split: Split) -> Sequences:
        words, tags = self.words(split)
        entity_tags = [tag for tag in self.tags if tag != "O"]
        other_tags = [tag for tag in entity_tags if not tag.startswith(("B-", "I-"))]
        if 0 < len(other_tags) < len(entity_tags):
            raise UserError(
                f"{self.title}: the tag '{other_tags[0]}' is not O and does not begin with B- or I-, but other "
                "tags do: tag entities as B-PER, I-PER, O"
            )
        tag_ids = {tag: index for index, tag in enumerate(self.tags)}
        unknown = {tag for sentence in tags for tag in sentence} - tag_ids.keys()
        if unknown:
            raise UserError(
                f"{self.title}: split '{split}' has the tag '{min(unknown)}', which train lacks: correct the "
                "tag, or add an example to train"
            )
        encoded = self.spec.tokenizer.encode_words(words)
        # A word of control characters has no pieces, but each word needs a piece that carries its tag: encode it as "-".
        lost = [
            set(range(len(sentence))).difference(owners) for sentence, (_, owners) in zip(words, encoded, strict=True)
        ]
        if any(lost):
            words = [
                ["-" if index in gone else word for index, word in enumerate(sentence)]
                for sentence, gone in zip(words, lost, strict=True)
            ]
            encoded = self.spec.tokenizer.encode_words(words)
        tokens, offsets = flat([ids for ids, _ in encoded])
        # The first piece of a word carries its tag: the pieces "play", "##ing" have the labels VERB, IGNORED.
        labels = [
            tag_ids[sentence_tags[word]] if word is not None and word != before else IGNORED
            for sentence_tags, (_, owners) in zip(tags, encoded, strict=True)
            for before, word in zip([-1, *owners], owners, strict=False)
        ]
        none = torch.zeros(len(words), dtype=torch.int64)
        ranges = trimmed(torch.stack([offsets[:-1], offsets[1:], none, none], dim=1), self.spec.length)
        return Sequences(tokens, ranges, None, self.tags, self.spec, torch.tensor(labels), TagSet(tags))


class TableTags(TableText, TagSource):
    """Tagged words in two columns of a table: a list of words, and a list of their tags."""

    @property
    @abstractmethod
    def columns(self) -> tuple[str, str]:
        """Names of the columns of words and of tags."""

    def words(self, split: Split) -> tuple[list[list[str]], list[list[str]]]:
        words, tags = self.columns
        table = self.table(split, words, tags)
        for column in self.columns:
            not_lists = (row for row, value in enumerate(table[column]) if not isinstance(value, list))
            row = next(not_lists, None)
            if row is not None:
                raise UserError(
                    f"{self.title}: split '{split}', row {row}: column '{column}' should hold lists, with one "
                    "entry per word"
                )
        feature = getattr(table.features[tags], "feature", None)
        names = getattr(feature, "names", None)
        tag_lists = [[names[tag] if names else str(tag) for tag in sentence] for sentence in table[tags]]
        word_lists = [[str(word) or "-" for word in sentence] for sentence in table[words]]
        for row, (row_words, row_tags) in enumerate(zip(word_lists, tag_lists, strict=True)):
            if len(row_words) != len(row_tags):
                raise UserError(
                    f"{self.title}: split '{split}', row {row}: has {len(row_words)} words but {len(row_tags)} "
                    "tags: each word needs one tag"
                )
        return word_lists, tag_lists


TAGS = {
    "conll2000": TextCard("Phrase chunks in Wall Street Journal text. Tjong Kim Sang and Buchholz 2000.", None, ("tokens", "tags")),
    "conll2003": TextCard("Named entities in Reuters news. Tjong Kim Sang and De Meulder 2003.", Hub("tomaarsen/conll2003", {"train": "train", "val": "validation", "test": "test"}), ("tokens", "ner_tags")),
}  # fmt: skip


class PublishedTags(PublishedText, TableTags):
    """A published data set of tagged words."""

    @property
    def columns(self) -> tuple[str, str]:
        words, tags = self.card.columns
        return words, tags


register_published(PublishedTags, TAGS)


@sources.register("words")
class OwnTags(TableTags):
    """Your own tagged words: a JSON or parquet file with two columns of lists, or a folder of such files."""

    class Options(TextOptions):
        path: Path
        """A JSON or parquet file, or a folder with one file per split."""
        words: str = "tokens"
        """Column of the words: a list per row."""
        tags: str = "tags"
        """Column of the tags, a list per row: B-PER, I-PER, O for entities, or others such as parts of speech."""

    @cached_property
    def store(self) -> TableStore:
        return FileStore(self.options.path)

    @property
    def columns(self) -> tuple[str, str]:
        return self.options.words, self.options.tags
