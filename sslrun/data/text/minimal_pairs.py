"""Minimal pairs: two sentences that differ in one respect, and one of them is wrong.

The layout is that of BLiMP (Warstadt et al., TACL 2020, arXiv:1912.00582).
"""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import Field

from sslrun.data.source import sources
from sslrun.data.stores import FileStore, Split, TableStore
from sslrun.data.text.base import TableText, TextOptions, TextSource, cell_text
from sslrun.data.text.sequences import Sequences, build_labeled
from sslrun.data.text.world import (
    COLORS,
    KINDS,
    PEOPLE,
    PLACES,
    SEASONS,
    THINGS,
    TIMES,
    TOWNS,
)
from sslrun.errors import UserError


class MinimalPair(NamedTuple):
    """A sentence, and a wrong one like it."""

    good: str
    bad: str
    phenomenon: str
    """What is wrong in the bad one."""


class PairSource(TextSource):
    """Minimal pairs. Nothing learns from them, so every split holds all."""

    task = "minimal-pairs"
    splits: tuple[Split, ...] = ("train", "test")

    @abstractmethod
    def pairs(self) -> list[MinimalPair]:
        """Return all pairs."""

    def texts(self) -> Iterator[str]:
        for pair in self.pairs():
            yield from (pair.good, pair.bad)

    def load(self, split: Split) -> Sequences:
        """Load all sentences, each good one before its bad one; labels are their phenomena.

        Raises:
            UserError: A sentence is longer than `data.length`.
        """
        pairs, length = self.pairs(), self.spec.length
        ids = self.spec.tokenizer.encode([*self.texts()])
        for row, sentence in enumerate(ids):
            if len(sentence) + 2 > length:
                raise UserError(
                    f"{self.title}: row {row // 2}: a sentence has {len(sentence) + 2} tokens, "
                    f"more than data.length: {length}: raise it, or leave out the row"
                )
        names = tuple(dict.fromkeys(pair.phenomenon for pair in pairs))
        labels = torch.tensor([names.index(pair.phenomenon) for pair in pairs])
        return build_labeled(ids, None, labels.repeat_interleave(2), names, self.spec)


@sources.register("minimal-pairs")
class OwnMinimalPairs(TableText, PairSource):
    """Your own minimal pairs: a CSV, TSV, JSON lines or parquet file.

    BLiMP's files have the columns sentence_good, sentence_bad and UID.
    """

    splits = PairSource.splits

    class Options(TextOptions):
        path: Path
        """A file, or a folder with files of one split."""
        good: str = "good"
        """Column of the right sentence."""
        bad: str = "bad"
        """Column of the wrong sentence."""
        phenomenon: str | None = None
        """Column of what is wrong; default: all pairs are of one kind."""

    @cached_property
    def store(self) -> TableStore:
        return FileStore(self.options.path)

    def content(self) -> Any:
        return self.store.identity(self.store.splits[0])

    def pairs(self) -> list[MinimalPair]:
        options = self.options
        columns = [options.good, options.bad]
        if options.phenomenon is not None:
            columns.append(options.phenomenon)
        table = self.table(self.store.splits[0], *columns)
        texts = [
            [cell_text(value, self.title, column) for value in table[column]] for column in columns
        ]
        phenomena = texts[2] if options.phenomenon is not None else ["pairs"] * len(table)
        pairs = [MinimalPair(*row) for row in zip(texts[0], texts[1], phenomena, strict=True)]
        for row, pair in enumerate(pairs):
            if not pair.good.strip() or not pair.bad.strip() or pair.good == pair.bad:
                raise UserError(
                    f"{self.title}: row {row}: '{options.good}' and '{options.bad}' should hold "
                    "two different sentences: correct or remove the row"
                )
        return pairs


@sources.register("world-pairs")
class WorldPairs(PairSource):
    """Minimal pairs of the small world: the bad sentence is impossible in its grammar.

    Agreement (was, were), articles (a, an), participles (gave, given) and word order. The two
    sentences of a pair have the same number of words.
    """

    class Options(TextOptions):
        pairs: int = Field(100, ge=1)
        """Number of pairs of each phenomenon."""
        seed: int = Field(0, ge=0)
        """Seed of the generator."""

    def content(self) -> Any:
        return self.pairs()

    def pairs(self) -> list[MinimalPair]:
        draw = random.Random(f"pairs {self.options.seed}")
        return [
            MinimalPair(*make(draw), phenomenon)
            for phenomenon, make in PHENOMENA.items()
            for _ in range(self.options.pairs)
        ]


def _place(draw: random.Random) -> str:
    place = draw.choice(PLACES)
    return f"in {place}" if place in TOWNS else f"in the {place}"


def _time(draw: random.Random) -> str:
    time = draw.choice(TIMES)
    return f"in {time}" if time in SEASONS else f"in the {time}"


def _agreement(draw: random.Random) -> tuple[str, str]:
    """One person was somewhere, and two were."""
    people = draw.sample(PEOPLE, draw.choice((1, 2)))
    right, wrong = ("was", "were") if len(people) == 1 else ("were", "was")
    who, where, when = " and ".join(people), _place(draw), _time(draw)
    return f"{who} {right} {where} {when} .", f"{who} {wrong} {where} {when} ."


def _article(draw: random.Random) -> tuple[str, str]:
    """An animal, but a toy, a flower and anything of a color."""
    if draw.random() < 0.5:
        kind, where = draw.choice(tuple(KINDS)), _place(draw)
        right, wrong = ("an", "a") if kind == "animal" else ("a", "an")
        return f"there was {right} {kind} {where} .", f"there was {wrong} {kind} {where} ."
    who, rest = draw.choice(PEOPLE), f"{draw.choice(COLORS)} {draw.choice(THINGS)}"
    return f"{who} had a {rest} .", f"{who} had an {rest} ."


def _participle(draw: random.Random) -> tuple[str, str]:
    """Something was given or broken; somebody gave or broke it."""
    past, participle = draw.choice((("gave", "given"), ("broke", "broken")))
    who, receiver = draw.sample(PEOPLE, 2)
    thing = f"the {draw.choice(COLORS)} {draw.choice(THINGS)}"
    to = f" to {receiver}" if past == "gave" else ""
    if draw.random() < 0.5:
        return f"{thing} was {participle}{to} by {who} .", f"{thing} was {past}{to} by {who} ."
    return f"{who} {past} {thing}{to} .", f"{who} {participle} {thing}{to} ."


def _word_order(draw: random.Random) -> tuple[str, str]:
    """A person did something; no sentence begins with the verb."""
    who, verb = draw.choice(PEOPLE), draw.choice(("lost", "found", "broke", "cleaned"))
    thing = f"the {draw.choice(COLORS)} {draw.choice(THINGS)}"
    return f"{who} {verb} {thing} .", f"{verb} {who} {thing} ."


PHENOMENA: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "agreement": _agreement,
    "articles": _article,
    "participles": _participle,
    "word order": _word_order,
}
"""Phenomenon -> function that draws a good and a bad sentence."""
