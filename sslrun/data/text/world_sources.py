"""Data sets of the small world: a corpus, and a task of each kind; generated, no download."""

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
from sslrun.data.text.translation import TranslationSource
from sslrun.data.text.world import World


@lru_cache
def _generator_digest() -> str:
    """Return a digest of the source code of the generator, so that a change invalidates caches."""
    return hashlib.sha256(Path(world.__file__).read_bytes()).hexdigest()


@sources.register("world")
class WorldCorpus(Corpus):
    """A corpus about a small world, generated without download. See `sslrun.data.text.world`."""

    class Options(TextOptions):
        documents: int = Field(12_000, ge=2)
        """Number of documents, of about 45 words each."""
        seed: int = Field(0, ge=0)
        """Seed of the generator."""

    def content(self) -> Any:
        return [_generator_digest(), self.options.documents, self.options.seed]

    def documents(self) -> Iterator[list[str]]:
        return iter(World(self.options.seed).documents(self.options.documents))

    @classmethod
    def count(cls) -> int | None:
        return None


class WorldOptions(TextOptions):
    """Options shared by the tasks of the small world."""

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
        return _generator_digest()

    def draw(self, split: Split) -> list[Any]:
        """Draw the examples of a split."""
        train, held_out = self.options.train, self.options.held_out
        counts = {"train": train, "val": held_out, "test": 2 * held_out}
        task = self.name.removeprefix("world-")
        return World(self.options.seed).examples(task, split, counts[split])


class WorldSentences(WorldTask, SentenceSource):
    """A task of the small world with one class per sentence or pair."""

    labels: ClassVar[tuple[str, ...]]

    def rows(self, split: Split) -> SentenceRows:
        *texts, labels = zip(*self.draw(split), strict=True)
        return SentenceRows(
            texts[0], texts[1] if len(texts) > 1 else None, torch.tensor(labels), self.labels
        )


@sources.register("world-entailment")
class WorldEntailment(WorldSentences):
    """Does the hypothesis follow from the premise, may it be true, or is it false?

    A task of the small world, like MNLI.
    """

    labels = ("entailment", "neutral", "contradiction")


@sources.register("world-questions")
class WorldQuestions(WorldSentences):
    """Does the sentence answer the question? A task of the small world, like QNLI."""

    labels = ("answer", "no answer")


@sources.register("world-paraphrase")
class WorldParaphrase(WorldSentences):
    """Do the sentences say the same? A task of the small world, like MRPC."""

    labels = ("different", "same")


@sources.register("world-sentiment")
class WorldSentiment(WorldSentences):
    """Is the person that the event concerns glad? A task of the small world, like SST-2."""

    labels = ("sorry", "glad")


@sources.register("world-span")
class WorldSpans(WorldTask, SpanSource):
    """Which words of the passage answer the question? A task of the small world, like SQuAD."""

    class Options(WorldOptions, SpanSource.Options):
        """Options of world-span."""

    def questions(self, split: Split) -> list[SpanRow]:
        return [
            SpanRow(f"{split}-{number}", question, passage, ((answer, start),))
            for number, (question, passage, answer, start) in enumerate(self.draw(split))
        ]


@sources.register("world-tagging")
class WorldTags(WorldTask, TagSource):
    """Which words name the actor, the receiver, a thing, a place or a time?

    A task of the small world, like named entities.
    """

    def words(self, split: Split) -> tuple[list[list[str]], list[list[str]]]:
        words, tags = zip(*self.draw(split), strict=True)
        return list(words), list(tags)


@sources.register("world-translation")
class WorldTranslation(WorldTask, TranslationSource):
    """Translate a sentence into a grammar whose verb comes last. A task of the small world."""

    def pairs(self, split: Split) -> list[tuple[str, str]]:
        return self.draw(split)
