"""Words with a tag each."""

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
    """What scores tags: those of all words, and where they stand."""

    tags: list[list[str]]
    """Of each sentence, also of words that were cut off."""


class TagSource(TextSource):
    """Sentences of words, each with a tag: of entities BIO, or else any, as parts of speech.

    Each sentence stands alone, where Devlin et al. (2019, 5.3) give it what of its document fits: the sets as they are
    published mark no documents.
    """

    task = "tagging"

    @abstractmethod
    def words(self, split: Split) -> tuple[list[list[str]], list[list[str]]]:
        """Words and their tags, sentence by sentence."""

    def texts(self) -> Iterator[str]:
        return (" ".join(words) for words in self.words("train")[0])

    @cached_property
    def tags(self) -> tuple[str, ...]:
        """Those of train; and of each kind of entity in it the tag that begins it and the one that goes on, which another
        split may have though train does not (in CoNLL-2000 I-LST)."""
        found = {tag for tags in self.words("train")[1] for tag in tags}
        if any(tag.startswith("I-") for tag in found):
            found |= {f"{mark}-{tag.partition('-')[2]}" for tag in found if "-" in tag for mark in "BI"}
        return tuple(sorted(found))

    def load(self, split: Split) -> Sequences:
        words, tags = self.words(split)
        named = [tag for tag in self.tags if tag != "O"]
        strange = [tag for tag in named if not tag.startswith(("B-", "I-"))]
        if 0 < len(strange) < len(named):
            raise UserError(
                f"{self.title}: the tag '{strange[0]}' is neither O nor begins with B- or I-, as others do: entities are "
                "tagged as B-PER, I-PER, O"
            )
        number = {tag: at for at, tag in enumerate(self.tags)}
        unknown = {tag for each in tags for tag in each} - number.keys()
        if unknown:
            raise UserError(f"{self.title}: split '{split}' has the tag '{min(unknown)}', which train lacks")
        encoded = self.spec.tokenizer.encode_words(words)
        lost = [set(range(len(each))).difference(owners) for each, (_, owners) in zip(words, encoded, strict=True)]
        if any(lost):  # nothing is left of a word of control characters, and each must have a piece that speaks for it
            words = [
                ["-" if at in gone else word for at, word in enumerate(each)]
                for each, gone in zip(words, lost, strict=True)
            ]
            encoded = self.spec.tokenizer.encode_words(words)
        tokens, offsets = flat([ids for ids, _ in encoded])
        labels = [
            number[each[word]]
            if word is not None and word != before
            else IGNORED  # the first piece of a word speaks for it
            for each, (_, owners) in zip(tags, encoded, strict=True)
            for before, word in zip([-1, *owners], owners, strict=False)
        ]
        none = torch.zeros(len(words), dtype=torch.int64)
        ranges = trimmed(torch.stack([offsets[:-1], offsets[1:], none, none], dim=1), self.spec.length)
        return Sequences(tokens, ranges, None, self.tags, self.spec, torch.tensor(labels), TagSet(tags))


class TableTags(TableText, TagSource):
    """Lists of words and of their tags in two columns of a table."""

    @property
    @abstractmethod
    def columns(self) -> tuple[str, str]: ...

    def words(self, split: Split) -> tuple[list[list[str]], list[list[str]]]:
        words, tags = self.columns
        table = self.table(split, words, tags)
        for column in self.columns:
            odd = next((at for at, each in enumerate(table[column]) if not isinstance(each, list)), None)
            if odd is not None:
                raise UserError(
                    f"{self.title}: split '{split}', row {odd}: column '{column}' should hold lists, one entry a word"
                )
        feature = getattr(table.features[tags], "feature", None)
        names = getattr(feature, "names", None)
        found = [[names[tag] if names else str(tag) for tag in each] for each in table[tags]]
        given = [[str(word) or "-" for word in each] for each in table[words]]
        wrong = [at for at, (a, b) in enumerate(zip(given, found, strict=True)) if len(a) != len(b)]
        if wrong:
            raise UserError(f"{self.title}: split '{split}', row {wrong[0]}: not as many tags as words")
        return given, found


TAGS = {
    "conll2000": TextCard("Chunks of phrases in Wall Street Journal text. Tjong Kim Sang and Buchholz 2000.", None, ("tokens", "tags")),
    "conll2003": TextCard("Names in Reuters news. Tjong Kim Sang and De Meulder 2003.", Hub("tomaarsen/conll2003", {"train": "train", "val": "validation", "test": "test"}), ("tokens", "ner_tags")),
}  # fmt: skip


class PublishedTags(PublishedText, TableTags):
    """A published set of tagged words."""

    @property
    def columns(self) -> tuple[str, str]:
        words, tags = self.card.columns
        return words, tags


register_published(PublishedTags, TAGS)


@sources.register("words")
class OwnTags(TableTags):
    """Tagged words of one's own: a JSON or parquet file with two columns of lists, or a folder of them."""

    class Options(TextOptions):
        path: Path
        """A file, or a folder of files."""
        words: str = "tokens"
        """The column of the words."""
        tags: str = "tags"
        """The column of their tags: of entities B-PER, I-PER, O; or others, as parts of speech."""

    @cached_property
    def store(self) -> TableStore:
        return FileStore(self.options.path)

    @property
    def columns(self) -> tuple[str, str]:
        return self.options.words, self.options.tags
