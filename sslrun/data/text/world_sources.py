"""The small world as sets of text: a corpus, and a task of each kind. Made by a generator: no download."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field

from sslrun.data.source import sources
from sslrun.data.stores import Split
from sslrun.data.text import world
from sslrun.data.text.base import TextOptions, TextSource
from sslrun.data.text.corpora import Corpus
from sslrun.data.text.passages import SpanRow, SpanSource
from sslrun.data.text.sentences import SentenceRows, SentenceSource
from sslrun.data.text.tags import TagSource
from sslrun.data.text.world import World


@lru_cache
def _generator() -> str:
    """A digest of the generator's own text: what another one told is not taken from the cache."""
    return hashlib.sha256(Path(world.__file__).read_bytes()).hexdigest()


@sources.register("world")
class WorldCorpus(Corpus):
    """Text about a small world, from a generator: no download. See `sslrun.data.text.world`."""

    class Options(TextOptions):
        documents: int = Field(12_000, ge=2)
        """Number of documents, of about 45 words each."""
        seed: int = Field(0, ge=0)
        """Seed of the generator."""

    def content(self) -> Any:
        return _generator()

    def documents(self) -> Iterator[list[str]]:
        return iter(World(self.options.seed).documents(self.options.documents))

    @classmethod
    def count(cls) -> int | None:
        return None


class WorldOptions(TextOptions):
    train: int = Field(1500, ge=8)
    """Number of training examples."""
    held_out: int = Field(500, ge=8)
    """Number of validation examples; the test split has twice as many."""
    seed: int = Field(0, ge=0)
    """Seed of the generator."""


class WorldTask(TextSource):
    """A task of the small world."""

    Options = WorldOptions
    splits: tuple[Split, ...] = ("train", "val", "test")

    def content(self) -> Any:
        return _generator()

    def drawn(self, split: Split) -> list[Any]:
        counts = {"train": self.options.train, "val": self.options.held_out, "test": 2 * self.options.held_out}
        return World(self.options.seed).examples(self.name.removeprefix("world-"), split, counts[split])


class WorldSentences(WorldTask, SentenceSource):
    """A task of the small world with a class a sentence or pair."""

    labels: ClassVar[tuple[str, ...]]

    def rows(self, split: Split) -> SentenceRows:
        *texts, labels = zip(*self.drawn(split), strict=True)
        return SentenceRows(texts[0], texts[1] if len(texts) > 1 else None, torch.tensor(labels), self.labels)


@sources.register("world-entailment")
class WorldEntailment(WorldSentences):
    """Does the hypothesis follow from the premise, may it be, or can't it? Of the small world, as MNLI."""

    labels = ("entailment", "neutral", "contradiction")


@sources.register("world-questions")
class WorldQuestions(WorldSentences):
    """Does the sentence answer the question? Of the small world, as QNLI."""

    labels = ("answer", "no answer")


@sources.register("world-paraphrase")
class WorldParaphrase(WorldSentences):
    """Do the sentences say the same? Of the small world, as MRPC."""

    labels = ("different", "same")


@sources.register("world-sentiment")
class WorldSentiment(WorldSentences):
    """Is the person concerned glad about the event? In the small world, as SST-2."""

    labels = ("sorry", "glad")


@sources.register("world-span")
class WorldSpans(WorldTask, SpanSource):
    """Which words of the passage answer the question? Of the small world, as SQuAD."""

    class Options(WorldOptions, SpanSource.Options):
        pass

    def questions(self, split: Split) -> list[SpanRow]:
        return [
            SpanRow(f"{split}-{at}", question, passage, ((answer, start),))
            for at, (question, passage, answer, start) in enumerate(self.drawn(split))
        ]


@sources.register("world-tagging")
class WorldTags(WorldTask, TagSource):
    """Which words name who acts, who receives, a thing, a place or a time? Of the small world, as named entities."""

    def words(self, split: Split) -> tuple[list[list[str]], list[list[str]]]:
        words, tags = zip(*self.drawn(split), strict=True)
        return list(words), list(tags)
