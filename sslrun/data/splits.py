"""Splits: what a stage trains on, chooses by and is scored on; and which of the labels it may see."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import tee

import torch
from torch import Tensor

from sslrun.data.examples import Batch, Examples, TensorExamples
from sslrun.data.image.images import Progress
from sslrun.data.source import Source, sources
from sslrun.data.specs import InputSpec
from sslrun.errors import UserError
from sslrun.registry import Options

SPLIT_SEED = 0
"""Of every split that is carved: never the run's, so that all runs are scored on the same examples."""
VAL_FRACTION = 0.1
TEST_FRACTION = 0.25
"""Of a set that has no test split of its own."""


@dataclass
class Splits:
    """A source's splits, each loaded when it is first asked for.

    `val` is the source's own, or else a share of its training split, class-balanced and always the same. A source
    without a test split has one carved in the same way, before. `train` is what remains.
    """

    source: Source
    val_fraction: float = VAL_FRACTION

    @property
    def spec(self) -> InputSpec:
        return self.train.spec

    @property
    def classes(self) -> tuple[str, ...]:
        return self.train.classes

    @property
    def train(self) -> Examples:
        return self._train_and_val[0]

    @property
    def val(self) -> Examples:
        return self._train_and_val[1]

    @cached_property
    def test(self) -> Examples:
        return self.source.load("test") if "test" in self.source.splits else self._train_and_test[1]

    @cached_property
    def pretrain(self) -> Examples:
        """What needs no labels: `train`, with the source's unlabelled images where it has such."""
        if "unlabeled" not in self.source.splits:
            return self.train
        return pooled(self.train, self.source.load("unlabeled"))

    @cached_property
    def _train_and_val(self) -> tuple[Examples, Examples]:
        train = self.source.load("train") if "test" in self.source.splits else self._train_and_test[0]
        return (train, self.source.load("val")) if "val" in self.source.splits else _carved(train, self.val_fraction)

    @cached_property
    def _train_and_test(self) -> tuple[Examples, Examples]:
        return _carved(self.source.load("train"), TEST_FRACTION)


def load_splits(
    name: str, options: Options, val_fraction: float = VAL_FRACTION, progress: Progress | None = None
) -> Splits:
    """The splits of the data set `name`. UserError: no such set; and, when a split is asked for, what loading finds."""
    return Splits(sources[name](options, progress), val_fraction)


def _carved(examples: Examples, fraction: float) -> tuple[Examples, Examples]:
    rest, carved = carve(len(examples) if examples.strata is None else examples.strata, fraction, SPLIT_SEED)
    return examples.subset(rest), examples.subset(carved)


def carve(labels: Tensor | int, fraction: float, seed: int = SPLIT_SEED) -> tuple[Tensor, Tensor]:
    """Two disjoint sets of indices, ascending: what remains, and what is carved off.

    `labels`: (N,) class ids, or N where there are none. Of each class a `fraction` is carved, rounded, but at least
    one example and never the last one. UserError: no class has two examples.
    """
    if isinstance(labels, int):
        if labels < 2:
            raise UserError(
                f"there is only {labels} example (of a corpus: document), so that none can be held out for validation: "
                "add some (in .txt files a blank line ends a document)"
            )
        labels = torch.zeros(labels, dtype=torch.int64)
    counts = labels.bincount()
    if len(counts) == 0 or counts.max() < 2:
        raise UserError("no class has 2 training examples, so that none can be held out for validation: add some")
    wanted = _share(counts, fraction).clamp(min=1).minimum(counts - 1)
    carved = _rank_in_class(labels, seed) < wanted[labels]
    return (~carved).nonzero()[:, 0], carved.nonzero()[:, 0]


def label_fraction(labels: Tensor | None, fraction: float, seed: int, classes: Sequence[str] = ()) -> Tensor:
    """Indices, ascending, of the examples whose labels may be seen.

    `fraction` in (0, 1]: that share of each class, rounded to the nearest number, halves up: of 115 examples 1% is
    one. A whole number above 1: so many of each class. The choice depends on the seed alone, and a smaller fraction's
    lies within a larger one's. UserError: no labels, a class would be left without any, or has fewer than asked for.
    """
    if fraction > 1 and fraction == int(fraction):
        return label_count(labels, int(fraction), seed, classes)
    counts = _counts(labels, classes)
    assert labels is not None
    if fraction == 1:
        return torch.arange(len(labels))
    if not 0 < fraction < 1:
        raise UserError(f"labels: {fraction} is neither a share of the labels, in (0, 1], nor a number of them a class")
    wanted = _share(counts, fraction)
    if (wanted == 0).any():
        fewest, called = _fewest(counts, classes)
        if fewest == 0:
            raise UserError(f"labels: {called} has no training example: add some, or leave the class out")
        least = math.ceil(0.5 / fewest * 10_000) / 10_000
        raise UserError(
            f"labels: {fraction:g} leaves {called}, which has {fewest} training examples, without any: "
            f"the smallest fraction that works is {least:g}"
        )
    return (_rank_in_class(labels, seed) < wanted[labels]).nonzero()[:, 0]


def label_count(labels: Tensor | None, count: int, seed: int, classes: Sequence[str] = ()) -> Tensor:
    """Indices, ascending, of `count` examples of each class; of fewer they lie within those of more, and within those
    of a share of as many. UserError: no labels, or a class that has fewer."""
    counts = _counts(labels, classes)
    assert labels is not None
    if (counts < count).any():
        fewest, called = _fewest(counts, classes)
        raise UserError(f"labels: {called} has {fewest} training examples: ask for no more than that a class")
    return (_rank_in_class(labels, seed) < count).nonzero()[:, 0]


def _counts(labels: Tensor | None, classes: Sequence[str]) -> Tensor:
    """Examples of each class."""
    if labels is None:
        raise UserError("this set has no labels to learn from: name a labelled one under 'evaluate'")
    return labels.bincount(minlength=len(classes))


def _fewest(counts: Tensor, classes: Sequence[str]) -> tuple[int, str]:
    """How many examples the smallest class has, and what it is called."""
    at = int(counts.argmin())
    return int(counts[at]), f"class '{classes[at] if classes else at}'"


def labelled(examples: Examples, labels: float, seed: int, *, a_class: bool = False) -> Tensor:
    """`label_fraction` of examples, or `label_count` where `labels` are `a_class`. Where an example has not one class but
    tags or a span, all are balanced as one."""
    strata = examples.strata
    classes = examples.classes if strata is examples.labels else ()
    if a_class:
        return label_count(strata, int(labels), seed, classes)
    return label_fraction(strata, labels, seed, classes)


def _share(counts: Tensor, fraction: float) -> Tensor:
    """That share of each count, rounded to the nearest number, halves up."""
    return (counts.double() * fraction + 0.5).floor().long()


def _rank_in_class(labels: Tensor, seed: int) -> Tensor:
    """(N,) each example's place in a random order of its class."""
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    counts = labels.bincount()
    first = (counts.cumsum(0) - counts)[labels[by_class]]
    ranks = torch.empty_like(labels)
    ranks[by_class] = torch.arange(len(labels)) - first
    return ranks


# ---------------------------------------------------------------- two sets as one


def pooled(first: Examples, second: Examples) -> Examples:
    """The inputs of both, without labels: to pretrain on. Both are of one `spec`."""
    if first.spec != second.spec:
        raise UserError(f"the unlabelled examples are {second.spec}, the training examples {first.spec}: give one size")
    if isinstance(first, TensorExamples) and isinstance(second, TensorExamples):
        return replace(first, inputs=torch.cat([first.inputs, second.inputs]), labels=None)
    return PooledExamples(first, second, torch.arange(len(first) + len(second)))


@dataclass(frozen=True)
class PooledExamples(Examples):
    """Two sets as one, without labels, where not both lie in memory."""

    first: Examples
    second: Examples
    chosen: Tensor
    """(M,) places in the first set, and from `len(first)` on in the second."""
    labels = None

    @property
    def spec(self) -> InputSpec:  # type: ignore[override]
        return self.first.spec

    @property
    def classes(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.first.classes

    def __len__(self) -> int:
        return len(self.chosen)

    def subset(self, indices: Tensor) -> PooledExamples:
        return replace(self, chosen=self.chosen[indices])

    def batches(self, indices: Iterable[Tensor], device: torch.device) -> Iterator[Batch]:
        start = len(self.first)
        places, near, far = tee((self.chosen[each] for each in indices), 3)
        from_first = self.first.batches((each[each < start] for each in near), device)
        from_second = self.second.batches((each[each >= start] - start for each in far), device)
        for place, a, b in zip(places, from_first, from_second, strict=True):
            order = (place >= start).int().argsort(stable=True).argsort().to(a.inputs.device)
            yield Batch(torch.cat([a.inputs, b.inputs])[order], None)
