"""Labeled sentences and sentence pairs."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sslrun.data.source import sources
from sslrun.data.stores import FileStore, Hub, Split, TableStore
from sslrun.data.text.base import PublishedText, TableText, TextCard, TextOptions, TextSource, cell, register_published
from sslrun.data.text.sequences import Sequences, labelled
from sslrun.errors import UserError


class SentenceRows(NamedTuple):
    """A split's texts."""

    first: Sequence[str]
    second: Sequence[str] | None
    labels: Tensor | None
    classes: tuple[str, ...]


class SentenceSource(TextSource):
    """Single texts, or pairs, each with a class (or, without classes, with a number)."""

    task = "sentences"

    @abstractmethod
    def rows(self, split: Split) -> SentenceRows: ...

    def texts(self) -> Iterator[str]:
        rows = self.rows("train")
        yield from rows.first
        yield from rows.second or ()

    def load(self, split: Split) -> Sequences:
        rows, encode = self.rows(split), self.spec.tokenizer.encode
        second = None if rows.second is None else encode(rows.second)
        return labelled(encode(rows.first), second, rows.labels, rows.classes, self.spec)


class TableSentences(TableText, SentenceSource):
    """Texts in one or two columns of a table, and the class in another."""

    @property
    @abstractmethod
    def columns(self) -> tuple[tuple[str, ...], str, bool]:
        """The columns of the texts, that of the label, and whether it is a number to predict."""

    def rows(self, split: Split) -> SentenceRows:
        texts, label, regression = self.columns
        table = self.table(split, *texts, label)
        if regression:
            labels = torch.tensor(self._numbers(table[label], label, split), dtype=torch.float32)
            classes: tuple[str, ...] = ()
        else:
            labels, classes = self.store.labels(table, label, split)
        first, *rest = ([cell(each, self.title, column) for each in table[column]] for column in texts)
        return SentenceRows(first, rest[0] if rest else None, labels, classes)

    def _numbers(self, values: Iterable[Any], label: str, split: Split) -> list[float]:
        found = list(values)
        for at, value in enumerate(found):
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise UserError(f"{self.title}: split '{split}', row {at}: its {label} is no number: {value!r}")
        return found


class PublishedSentences(PublishedText, TableSentences):
    """A published set of sentences or pairs."""

    @property
    def columns(self) -> tuple[tuple[str, ...], str, bool]:
        return self.card.columns, self.card.label or "label", self.card.regression


def _glue(name: str, test: str = "validation") -> Hub:
    """Labels of GLUE's test splits are secret: models are tested on its development splits."""
    return Hub("nyu-mll/glue", {"train": "train", "test": test}, config=name)


SENTENCES = {
    "mnli": TextCard("Does the premise entail the hypothesis? Williams et al., NAACL 2018; matched.", _glue("mnli", "validation_matched"), ("premise", "hypothesis")),
    "qnli": TextCard("Does the sentence answer the question? Made from SQuAD; Wang et al., GLUE, 2019.", _glue("qnli"), ("question", "sentence")),
    "mrpc": TextCard("Are the sentences paraphrases? Dolan and Brockett 2005.", _glue("mrpc"), ("sentence1", "sentence2")),
    "sst2": TextCard("Is the review positive? Socher et al., EMNLP 2013.", _glue("sst2"), ("sentence",)),
    "qqp": TextCard("Are the questions the same? Quora 2017.", _glue("qqp"), ("question1", "question2")),
    "rte": TextCard("Does the first sentence entail the second? Dagan et al. 2006 and on.", _glue("rte"), ("sentence1", "sentence2")),
    "cola": TextCard("Is the sentence grammatical? Warstadt et al. 2019.", _glue("cola"), ("sentence",)),
    "stsb": TextCard("How similar are the sentences, from 0 to 5? Cer et al. 2017.", _glue("stsb"), ("sentence1", "sentence2"), regression=True),
    "wnli": TextCard("Does the sentence with the pronoun resolved follow? Levesque et al. 2012.", _glue("wnli"), ("sentence1", "sentence2")),
    "mnli-mismatched": TextCard("MNLI's other genres, of which none is trained on: a shifted test set for mnli.", Hub("nyu-mll/glue", {"test": "validation_mismatched"}, config="mnli"), ("premise", "hypothesis")),
    "hans": TextCard("Where word overlap misleads: a shifted test set for mnli. McCoy et al., ACL 2019.", Hub("jhu-cogsci/hans", {"test": "validation"}, revision="refs/convert/parquet", files={"validation": "plain_text/validation/*.parquet"}), ("premise", "hypothesis")),
    "movie_reviews": TextCard("Whole film reviews, positive or not: a shifted test set for sst2. Pang and Lee, ACL 2004.", None, ("sentence",)),
    "product_reviews": TextCard("Sentences of reviews of products: a shifted test set for sst2. Hu and Liu, KDD 2004.", None, ("sentence",)),
    "sick": TextCard("Does the premise entail the hypothesis? Marelli et al., LREC 2014.", None, ("premise", "hypothesis")),
}  # fmt: skip

register_published(PublishedSentences, SENTENCES)


@sources.register("sentences")
class OwnSentences(TableSentences):
    """Your own labeled sentences or pairs: a CSV, TSV, JSON or parquet file, or a folder with train, val, test."""

    class Options(TextOptions):
        path: Path
        """A CSV, TSV, JSON or parquet file, or a folder with one file per split."""
        first: str = "sentence"
        """Column of the text, or of the first text of a pair."""
        second: str | None = None
        """Column of the second text of a pair; default: none, single texts."""
        label: str = "label"
        """Column of the class, or of the number to predict."""
        regression: bool = False
        """Predict the label as a number, not as a class."""

    @cached_property
    def store(self) -> TableStore:
        return FileStore(self.options.path, self.options.label)

    @property
    def columns(self) -> tuple[tuple[str, ...], str, bool]:
        given = self.options
        return (given.first, given.second) if given.second else (given.first,), given.label, given.regression
