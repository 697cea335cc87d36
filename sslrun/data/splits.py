"""Splits to train on, to select by and to be tested on; and the labels that a run may see."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import tee
from typing import Any, Literal

import torch
from torch import Tensor

from sslrun.data.examples import Batch, Examples, ProgressCallback, TensorExamples, to_device
from sslrun.data.source import Source, SourceOptions, sources
from sslrun.data.specs import ImageSpec, InputSpec
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

    `val` is what `validation` says (see `SourceOptions`): the source's own validation split, or
    some of the training split, balanced over classes and always the same. A missing test split is
    carved first, in the same way. `train` is what remains.
    """

    source: Source
    validation: float | Literal["split"] | None = None
    pretrain_on: Literal["train", "all"] = "train"

    @property
    def spec(self) -> InputSpec:
        return self.train.spec

    @property
    def classes(self) -> tuple[str, ...]:
        return self.train.classes

    @property
    def has_val(self) -> bool:
        """Whether there are examples to validate on."""
        return self.validation != 0

    @cached_property
    def train(self) -> Examples:
        if self._val_is_own or not self.has_val:
            return self._learning
        return self._learning.subset(self._carved[0])

    @cached_property
    def val(self) -> Examples:
        if not self.has_val:
            raise UserError(
                "data.validation: 0 leaves no examples to validate on: give a share, as in "
                f"validation: {VAL_FRACTION}"
            )
        return (
            self.source.load("val") if self._val_is_own else self._learning.subset(self._carved[1])
        )

    @cached_property
    def train_and_val(self) -> Examples:
        """The examples of `train` and `val` as one set, with labels; see `positions`."""
        if not self.has_val or not self._val_is_own:
            return self._learning
        if not isinstance(self.spec, ImageSpec):
            raise UserError(
                f"the validation split is a file of its own, and {self.spec.unit} of two files "
                "cannot be joined: give a share of the training split, as in "
                f"data.validation: {VAL_FRACTION}"
            )
        return pool(self.train, self.val, labeled=True)

    @cached_property
    def positions(self) -> dict[str, Tensor]:
        """The positions of "train" and "val" in `train_and_val`, each (M,) int64."""
        if not self.has_val:
            return {"train": torch.arange(len(self.train))}
        if self._val_is_own:
            start, end = len(self.train), len(self.train) + len(self.val)
            return {"train": torch.arange(start), "val": torch.arange(start, end)}
        return dict(zip(("train", "val"), self._carved, strict=True))

    @cached_property
    def test(self) -> Examples:
        has_test = "test" in self.source.splits
        return self.source.load("test") if has_test else self._learning_and_test[1]

    @cached_property
    def pretrain(self) -> Examples:
        """The examples to pretrain on: as `pretrain_on` says, and the unlabeled split if any."""
        examples = self.train_and_val if self.pretrain_on == "all" else self.train
        if "unlabeled" not in self.source.splits:
            return examples
        return pool(examples, self.source.load("unlabeled"))

    @property
    def holds_out(self) -> bool:
        """Whether pretraining never sees the validation examples."""
        return self.has_val and self.pretrain_on == "train"

    @cached_property
    def monitored(self) -> tuple[Examples, Examples]:
        """Two disjoint sets to compare features of during pretraining: a bank, and queries.

        They are `train` and `val`. Without `val`, the queries are carved from `train`; pretraining
        sees them too, but no labels.
        """
        return (self.train, self.val) if self.has_val else _carve_examples(self.train, VAL_FRACTION)

    @property
    def _val_is_own(self) -> bool:
        """Whether `val` is a split of the source itself."""
        has_val = "val" in self.source.splits
        if self.validation == "split" and not has_val:
            raise UserError(
                "data.validation: split: the set has no validation split of its own: give a share, "
                f"as in validation: {VAL_FRACTION}"
            )
        return has_val and self.validation in (None, "split")

    @cached_property
    def _learning(self) -> Examples:
        """The training split before validation is carved from it."""
        has_test = "test" in self.source.splits
        return self.source.load("train") if has_test else self._learning_and_test[0]

    @cached_property
    def _learning_and_test(self) -> tuple[Examples, Examples]:
        return _carve_examples(self.source.load("train"), TEST_FRACTION)

    @cached_property
    def _carved(self) -> tuple[Tensor, Tensor]:
        """The positions of `train` and `val` in `_learning`."""
        amount = VAL_FRACTION if self.validation is None else self.validation
        assert not isinstance(amount, str)
        return _divide(self._learning, amount)


def load_splits(name: str, options: Options, progress: ProgressCallback | None = None) -> Splits:
    """Return the splits of the data set `name`; each is loaded on first use.

    Raises:
        UserError: There is no such set. Reading a split raises the UserErrors of loading it.
    """
    source = sources[name](options, progress)
    if not isinstance(options, SourceOptions):  # a plug-in may have options of its own alone
        return Splits(source)
    return Splits(source, options.validation, options.pretrain_on)


def _carve_examples(examples: Examples, fraction: float) -> tuple[Examples, Examples]:
    rest, carved = _divide(examples, fraction)
    return examples.subset(rest), examples.subset(carved)


def _divide(examples: Examples, amount: float) -> tuple[Tensor, Tensor]:
    """Split positions into what remains and what is carved off, both ascending."""
    if (parts := examples.divide(amount)) is not None:
        return parts
    strata = examples.strata
    return carve(len(examples) if strata is None else strata, amount)


def carve(labels: Tensor | int, amount: float, seed: int = SPLIT_SEED) -> tuple[Tensor, Tensor]:
    """Split indices into two disjoint sets, both ascending: what remains, and what is carved off.

    `labels` is (N,) class ids, or N if there are no labels. An `amount` below 1 is a share: that
    share of each class, rounded, is carved off, but at least one example. An amount from 1 is a
    number of examples, shared among the classes in proportion to their size. The last example of a
    class is never carved off.

    Raises:
        UserError: No class has two examples, or there are too few examples to carve off as many.
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
    ranks = _rank_in_class(labels, seed)
    if amount < 1:
        carved_counts = _share(counts, amount).clamp(min=1).minimum(counts - 1)
        carved = ranks < carved_counts[labels]
    else:
        carved = _spread(ranks, counts[labels], int(amount))
    return (~carved).nonzero()[:, 0], carved.nonzero()[:, 0]


def _spread(ranks: Tensor, counts: Tensor, amount: int) -> Tensor:
    """Return which examples (N,) bool are among `amount` that are spread over the classes.

    `ranks` and `counts` (N,) are each example's rank in its class and the size of that class.
    Examples come in the order of (rank + 1/2) / count, so that each class has its share at any
    amount; the last example of a class is left out.
    """
    candidates = (ranks < counts - 1).nonzero()[:, 0]
    if amount > len(candidates):
        raise UserError(
            f"data.validation: {amount} examples are to be held out, but only {len(candidates)} "
            "can be, because each class keeps one to train on: give a smaller number"
        )
    order = ((ranks + 0.5) / counts)[candidates].argsort(stable=True)
    spread = torch.zeros(len(ranks), dtype=torch.bool)
    spread[candidates[order[:amount]]] = True
    return spread


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


def pool(first: Examples, second: Examples, *, labeled: bool = False) -> Examples:
    """Join two sets of equal `spec`, to pretrain on without labels or to learn from with them.

    Raises:
        UserError: Their specs differ.
    """
    if first.spec != second.spec:
        raise UserError(
            f"the unlabeled examples are {second.spec}, the training examples {first.spec}: "
            "give one size"
        )
    labels = None
    if labeled and first.labels is not None and second.labels is not None:
        labels = torch.cat([first.labels, second.labels])
    if isinstance(first, TensorExamples) and isinstance(second, TensorExamples):
        return replace(first, inputs=torch.cat([first.inputs, second.inputs]), labels=labels)
    return PooledExamples(first, second, torch.arange(len(first) + len(second)), labels)


@dataclass(frozen=True)
class PooledExamples(Examples):
    """Two sets as one, if they are not both in memory."""

    first: Examples
    second: Examples
    indices: Tensor
    """(M,) int64: positions in the first set; from `len(first)` on, positions in the second."""
    labels: Tensor | None = None

    @property
    def spec(self) -> InputSpec:  # type: ignore[override]
        return self.first.spec

    @property
    def classes(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.first.classes

    def __len__(self) -> int:
        return len(self.indices)

    def subset(self, indices: Tensor) -> PooledExamples:
        labels = None if self.labels is None else self.labels[indices]
        return replace(self, indices=self.indices[indices], labels=labels)

    def batches(self, indices: Iterable[Tensor], device: torch.device) -> Iterator[Batch]:
        """Yield batches that mix both sets.

        Example: len(first) is 10 and a batch has the positions 12 3 11. The first set gives row 3,
        the second rows 2 and 1, joined as 3 12 11. `order` is 1 0 2, which restores 12 3 11.
        """
        start = len(self.first)
        batches, for_labels = tee(indices)
        all_positions, for_first, for_second = tee((self.indices[batch] for batch in batches), 3)
        first = self.first.batches((batch[batch < start] for batch in for_first), device)
        second_positions = (batch[batch >= start] - start for batch in for_second)
        second = self.second.batches(second_positions, device)
        for batch, positions, a, b in zip(for_labels, all_positions, first, second, strict=True):
            labels = None if self.labels is None else to_device(self.labels[batch], device)
            is_second = (positions >= start).int()
            order = is_second.argsort(stable=True).argsort().to(a.inputs.device)
            yield Batch(_join(a.inputs, b.inputs, order), labels)


def _join(first: Any, second: Any, order: Tensor) -> Any:
    """Join two batches of inputs and sort them; an input that is no tensor joins itself."""
    if isinstance(first, Tensor):
        return torch.cat([first, second])[order]
    return first.join(second, order)
