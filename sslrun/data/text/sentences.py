"""Labeled sentences and pairs of sentences."""

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
from sslrun.data.text.base import (
    PublishedText,
    TableText,
    TextCard,
    TextOptions,
    TextSource,
    cell_text,
    register_published,
)
from sslrun.data.text.sequences import Sequences, build_labeled
from sslrun.errors import UserError


class SentenceRows(NamedTuple):
    """The texts and labels of a split."""

    first: Sequence[str]
    second: Sequence[str] | None
    """The second texts of pairs; None for single texts."""
    labels: Tensor | None
    """(N,) int64 classes, or float32 numbers to predict."""
    classes: tuple[str, ...]
    """Names of the classes; empty if labels are numbers."""


class SentenceSource(TextSource):
    """Single texts or pairs, each with a class or, in a regression set, a number."""

    task = "sentences"

    @abstractmethod
    def rows(self, split: Split) -> SentenceRows:
        """Return the texts and labels of a split."""

    def texts(self) -> Iterator[str]:
        rows = self.rows("train")
        yield from rows.first
        yield from rows.second or ()

    def load(self, split: Split) -> Sequences:
        rows, encode = self.rows(split), self.spec.tokenizer.encode
        second = None if rows.second is None else encode(rows.second)
        return build_labeled(encode(rows.first), second, rows.labels, rows.classes, self.spec)


class TableSentences(TableText, SentenceSource):
    """Texts in one or two columns of a table, and their labels in another."""

    @property
    @abstractmethod
    def columns(self) -> tuple[tuple[str, ...], str, bool]:
        """The columns of the texts, the column of the label, and whether the label is a number."""

    def rows(self, split: Split) -> SentenceRows:
        texts, label, regression = self.columns
        table = self.table(split, *texts, label)
        if regression:
            numbers = self._check_numbers(table[label], label, split)
            labels = torch.tensor(numbers, dtype=torch.float32)
            classes: tuple[str, ...] = ()
        else:
            labels, classes = self.store.labels(table, label, split)
        first, *rest = (self._read_texts(table, column) for column in texts)
        return SentenceRows(first, rest[0] if rest else None, labels, classes)

    def _read_texts(self, table: Any, column: str) -> list[str]:
        return [cell_text(value, self.title, column) for value in table[column]]

    def _check_numbers(self, values: Iterable[Any], label: str, split: Split) -> list[float]:
        """Return the labels of a regression set.

        Raises:
            UserError: A label is not a finite number.
        """
        numbers = list(values)
        for row, value in enumerate(numbers):
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise UserError(
                    f"{self.title}: split '{split}', row {row}: its {label} is not a number: "
                    f"{value!r}"
                )
        return numbers


class PublishedSentences(PublishedText, TableSentences):
    """A published set of labeled sentences or pairs."""

    @property
    def columns(self) -> tuple[tuple[str, ...], str, bool]:
        return self.card.columns, self.card.label or "label", self.card.regression


def _glue(name: str, test: str = "validation") -> Hub:
    """Locate a set of GLUE; its test labels are secret, so development splits test models."""
    return Hub("nyu-mll/glue", {"train": "train", "test": test}, config=name)


SENTENCES = {
    "mnli": TextCard(
        "Does the premise entail the hypothesis? Williams et al., NAACL 2018; matched genres.",
        _glue("mnli", "validation_matched"),
        ("premise", "hypothesis"),
    ),
    "qnli": TextCard(
        "Does the sentence answer the question? Derived from SQuAD; Wang et al., GLUE, ICLR 2019.",
        _glue("qnli"),
        ("question", "sentence"),
    ),
    "mrpc": TextCard(
        "Are the sentences paraphrases? Dolan and Brockett, IWP 2005.",
        _glue("mrpc"),
        ("sentence1", "sentence2"),
    ),
    "sst2": TextCard(
        "Is the review positive? Socher et al., EMNLP 2013.", _glue("sst2"), ("sentence",)
    ),
    "qqp": TextCard(
        "Do the questions ask the same? Quora, 2017.", _glue("qqp"), ("question1", "question2")
    ),
    "rte": TextCard(
        "Does the first sentence entail the second? Dagan et al. 2006, and later RTE challenges.",
        _glue("rte"),
        ("sentence1", "sentence2"),
    ),
    "cola": TextCard(
        "Is the sentence grammatical? Warstadt et al., TACL 2019.", _glue("cola"), ("sentence",)
    ),
    "stsb": TextCard(
        "How similar are the sentences, from 0 to 5? Cer et al., SemEval 2017.",
        _glue("stsb"),
        ("sentence1", "sentence2"),
        regression=True,
    ),
    "wnli": TextCard(
        "Does the sentence with the pronoun resolved follow? Levesque et al., KR 2012.",
        _glue("wnli"),
        ("sentence1", "sentence2"),
    ),
    "mnli-mismatched": TextCard(
        "MNLI's genres that are not in its training split: a shifted test set for mnli.",
        Hub("nyu-mll/glue", {"test": "validation_mismatched"}, config="mnli"),
        ("premise", "hypothesis"),
    ),
    "hans": TextCard(
        "Pairs whose word overlap misleads: a shifted test set for mnli. McCoy et al., ACL 2019.",
        Hub(
            "jhu-cogsci/hans",
            {"test": "validation"},
            revision="refs/convert/parquet",
            files={"validation": "plain_text/validation/*.parquet"},
        ),
        ("premise", "hypothesis"),
    ),
    "movie_reviews": TextCard(
        "Sentiment of whole movie reviews: a shifted test set for sst2. Pang and Lee, ACL 2004.",
        None,
        ("sentence",),
    ),
    "product_reviews": TextCard(
        "Sentiment of product reviews: a shifted test set for sst2. Hu and Liu, KDD 2004.",
        None,
        ("sentence",),
    ),
    "sick": TextCard(
        "Does the premise entail the hypothesis? Marelli et al., LREC 2014.",
        None,
        ("premise", "hypothesis"),
    ),
}

register_published(PublishedSentences, SENTENCES)


@sources.register("sentences")
class OwnSentences(TableSentences):
    """Your own labeled sentences or pairs: a CSV, TSV, JSON or parquet file, or a folder of them.

    A folder holds train, and optionally val and test.
    """

    class Options(TextOptions):
        path: Path
        """A file, or a folder of files."""
        first: str = "sentence"
        """Column of the text, or of the first text of a pair."""
        second: str | None = None
        """Column of the second text of a pair; default: single texts."""
        label: str = "label"
        """Column of the class, or of the number to predict."""
        regression: bool = False
        """Whether the label is a number to predict instead of a class."""

    @cached_property
    def store(self) -> TableStore:
        return FileStore(self.options.path, self.options.label)

    @property
    def columns(self) -> tuple[tuple[str, ...], str, bool]:
        options = self.options
        texts = (options.first, options.second) if options.second else (options.first,)
        return texts, options.label, options.regression
