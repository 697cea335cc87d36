"""Splits to train on, to select by and to be tested on; and the labels that a run may see."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import tee

import torch
from torch import Tensor

from sslrun.data.examples import Batch, Examples, ProgressCallback, TensorExamples
from sslrun.data.source import Source, sources
from sslrun.data.specs import InputSpec
from sslrun.errors import UserError
from sslrun.registry import Options

SPLIT_SEED = 0
"""Seed of every carved split, not the run's, so that all runs are scored on the same examples."""
VAL_FRACTION = 0.1
TEST_FRACTION = 0.25
"""Fraction carved from the training split of a set that has no test split."""


@dataclass
class Splits:
    """The splits of a source, each loaded on first use.

    `val` is the source's own validation split if it has one; otherwise it is a class-balanced share
    of the training split, always the same. A missing test split is carved first, in the same way.
    `train` is what remains.
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
        has_test = "test" in self.source.splits
        return self.source.load("test") if has_test else self._train_and_test[1]

    @cached_property
    def pretrain(self) -> Examples:
        """The examples to pretrain on: `train`, and the source's unlabeled split if any."""
        if "unlabeled" not in self.source.splits:
            return self.train
        return pool(self.train, self.source.load("unlabeled"))

    @cached_property
    def _train_and_val(self) -> tuple[Examples, Examples]:
        has_test = "test" in self.source.splits
        train = self.source.load("train") if has_test else self._train_and_test[0]
        if "val" in self.source.splits:
            return train, self.source.load("val")
        return _carve_examples(train, self.val_fraction)

    @cached_property
    def _train_and_test(self) -> tuple[Examples, Examples]:
        return _carve_examples(self.source.load("train"), TEST_FRACTION)


def load_splits(
    name: str,
    options: Options,
    val_fraction: float = VAL_FRACTION,
    progress: ProgressCallback | None = None,
) -> Splits:
    """Return the splits of the data set `name`; each is loaded on first use.

    Raises:
        UserError: There is no such set. Reading a split raises the UserErrors of loading it.
    """
    return Splits(sources[name](options, progress), val_fraction)


def _carve_examples(examples: Examples, fraction: float) -> tuple[Examples, Examples]:
    strata = len(examples) if examples.strata is None else examples.strata
    rest, carved = carve(strata, fraction, SPLIT_SEED)
    return examples.subset(rest), examples.subset(carved)


def carve(labels: Tensor | int, fraction: float, seed: int = SPLIT_SEED) -> tuple[Tensor, Tensor]:
    """Split indices into two disjoint sets, both ascending: what remains, and what is carved off.

    `labels` is (N,) class ids, or N if there are no labels. A `fraction` of each class, rounded, is
    carved off: at least one example, and never the last one.

    Raises:
        UserError: No class has two examples.
    """
    if isinstance(labels, int):
        if labels < 2:
            raise UserError(
                f"there is only {labels} example (for a corpus: document), so that none can be "
                "held out for validation: add some (in .txt files a blank line ends a document)"
            )
        labels = torch.zeros(labels, dtype=torch.int64)
    counts = labels.bincount()
    if len(counts) == 0 or counts.max() < 2:
        raise UserError(
            "no class has 2 training examples, so that none can be held out for validation: "
            "add some"
        )
    carved_counts = _share(counts, fraction).clamp(min=1).minimum(counts - 1)
    carved = _rank_in_class(labels, seed) < carved_counts[labels]
    return (~carved).nonzero()[:, 0], carved.nonzero()[:, 0]


def select_labeled(
    examples: Examples, labels: float, seed: int, *, per_class: bool = False
) -> Tensor:
    """Return the indices, ascending, of the examples whose labels may be seen.

    With `per_class`, `labels` is a number of examples per class (see `select_count`), otherwise a
    fraction or a number above 1 (see `select_fraction`). Examples with tags or a span instead of a
    class count as one class.
    """
    strata = examples.strata
    classes = examples.classes if strata is examples.labels else ()
    if per_class:
        return select_count(strata, int(labels), seed, classes)
    return select_fraction(strata, labels, seed, classes)


def select_fraction(
    labels: Tensor | None, fraction: float, seed: int, classes: Sequence[str] = ()
) -> Tensor:
    """Return the indices, ascending, of a `fraction` of each class.

    A fraction in (0, 1] of each class is rounded to the nearest number, halves up: 1% of 115
    examples is one. A whole number above 1 means that many examples per class. The selection
    depends on the seed alone, and that of a smaller fraction lies within that of a larger one.

    Raises:
        UserError: There are no labels, or a class would have none or has fewer than requested.
    """
    if fraction > 1 and fraction == int(fraction):
        return select_count(labels, int(fraction), seed, classes)
    labels, counts = _count_classes(labels, classes)
    if fraction == 1:
        return torch.arange(len(labels))
    if not 0 < fraction < 1:
        raise UserError(
            f"labels: {fraction} is neither a fraction of the labels, in (0, 1], nor a whole "
            "number of labels per class"
        )
    selected_counts = _share(counts, fraction)
    if (selected_counts == 0).any():
        smallest_count, smallest = _find_smallest(counts, classes)
        if smallest_count == 0:
            raise UserError(
                f"labels: {smallest} has no training example: add some, or leave the class out"
            )
        least = math.ceil(0.5 / smallest_count * 10_000) / 10_000
        raise UserError(
            f"labels: {fraction:g} leaves {smallest}, which has {smallest_count} training "
            f"examples, without any: the smallest fraction that works is {least:g}"
        )
    return (_rank_in_class(labels, seed) < selected_counts[labels]).nonzero()[:, 0]


def select_count(
    labels: Tensor | None, count: int, seed: int, classes: Sequence[str] = ()
) -> Tensor:
    """Return the indices, ascending, of `count` examples of each class.

    The selection lies within that of any larger count, and within that of any fraction that selects
    as many.

    Raises:
        UserError: There are no labels, or a class has fewer examples.
    """
    labels, counts = _count_classes(labels, classes)
    if (counts < count).any():
        smallest_count, smallest = _find_smallest(counts, classes)
        raise UserError(
            f"labels: {smallest} has only {smallest_count} training examples: "
            f"give at most {smallest_count} labels per class"
        )
    return (_rank_in_class(labels, seed) < count).nonzero()[:, 0]


def _count_classes(labels: Tensor | None, classes: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return the labels (N,) and the number of examples of each class (C,).

    Raises:
        UserError: There are no labels.
    """
    if labels is None:
        raise UserError("this set has no labels to learn from: name a labeled one under 'evaluate'")
    return labels, labels.bincount(minlength=len(classes))


def _find_smallest(counts: Tensor, classes: Sequence[str]) -> tuple[int, str]:
    """Return the size of the smallest class, and its name for a message."""
    index = int(counts.argmin())
    return int(counts[index]), f"class '{classes[index] if classes else index}'"


def _share(counts: Tensor, fraction: float) -> Tensor:
    """Return that fraction of each count, rounded to the nearest number, halves up."""
    return (counts.double() * fraction + 0.5).floor().long()


def _rank_in_class(labels: Tensor, seed: int) -> Tensor:
    """Return the rank (N,) of each example in a random order of its class, from 0.

    Example: labels 0 1 0 1 0 with the random order 4 1 2 3 0 of the examples. `by_class` lists
    class 0 in that order, then class 1: 4 2 0 1 3. The classes start there at 0 and 3, so that
    `ranks[by_class]` is 0 1 2 0 1, and `ranks` is 2 0 1 1 0.
    """
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    counts = labels.bincount()
    class_starts = (counts.cumsum(0) - counts)[labels[by_class]]
    ranks = torch.empty_like(labels)
    ranks[by_class] = torch.arange(len(labels)) - class_starts
    return ranks


# ---------------------------------------------------------------- two sets as one


def pool(first: Examples, second: Examples) -> Examples:
    """Join two sets of equal `spec`, without labels, to pretrain on.

    Raises:
        UserError: Their specs differ.
    """
    if first.spec != second.spec:
        raise UserError(
            f"the unlabeled examples are {second.spec}, the training examples {first.spec}: "
            "give one size"
        )
    if isinstance(first, TensorExamples) and isinstance(second, TensorExamples):
        return replace(first, inputs=torch.cat([first.inputs, second.inputs]), labels=None)
    return PooledExamples(first, second, torch.arange(len(first) + len(second)))


@dataclass(frozen=True)
class PooledExamples(Examples):
    """Two sets as one, without labels, if they are not both in memory."""

    first: Examples
    second: Examples
    indices: Tensor
    """(M,) int64: positions in the first set; from `len(first)` on, positions in the second."""
    labels = None

    @property
    def spec(self) -> InputSpec:  # type: ignore[override]
        return self.first.spec

    @property
    def classes(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.first.classes

    def __len__(self) -> int:
        return len(self.indices)

    def subset(self, indices: Tensor) -> PooledExamples:
        return replace(self, indices=self.indices[indices])

    def batches(self, indices: Iterable[Tensor], device: torch.device) -> Iterator[Batch]:
        """Yield batches that mix both sets.

        Example: len(first) is 10 and a batch has the positions 12 3 11. The first set gives row 3,
        the second rows 2 and 1, joined as 3 12 11. `order` is 1 0 2, which restores 12 3 11.
        """
        start = len(self.first)
        all_positions, for_first, for_second = tee((self.indices[batch] for batch in indices), 3)
        first = self.first.batches((batch[batch < start] for batch in for_first), device)
        second_positions = (batch[batch >= start] - start for batch in for_second)
        second = self.second.batches(second_positions, device)
        for positions, a, b in zip(all_positions, first, second, strict=True):
            is_second = (positions >= start).int()
            order = is_second.argsort(stable=True).argsort().to(a.inputs.device)
            yield Batch(torch.cat([a.inputs, b.inputs])[order], None)
