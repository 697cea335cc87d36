from collections import Counter
from itertools import pairwise

import pytest
import torch

from sslrun.data import splits as module
from sslrun.data.examples import Batch, Examples, TensorExamples
from sslrun.data.source import sources
from sslrun.data.specs import ImageSpec
from sslrun.data.splits import (
    PooledExamples,
    Splits,
    carve,
    load_splits,
    pool,
    select_fraction,
    select_labeled,
)
from sslrun.errors import UserError

CPU = torch.device("cpu")
UNEVEN = torch.tensor([0] * 50 + [1] * 200 + [2] * 30)[
    torch.randperm(280, generator=torch.Generator().manual_seed(3))
]


def examples(count, offset=0, labeled=True):
    inputs = (torch.arange(count) + offset).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    return TensorExamples(
        inputs, torch.arange(count) % 2 if labeled else None, ("a", "b"), ImageSpec(2)
    )


class Source:
    """A source that counts what is loaded."""

    def __init__(self, **held):
        self.held = held
        self.loads = Counter()

    @property
    def splits(self):
        return tuple(self.held)

    def load(self, split):
        self.loads[split] += 1
        return self.held[split]


# ---------------------------------------------------------------- carving


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5])
def test_carving_is_balanced_and_a_partition(fraction):
    rest, carved = carve(UNEVEN, fraction)
    assert torch.equal(torch.cat([rest, carved]).sort().values, torch.arange(280))
    assert carved.equal(carved.sort().values)
    expected = [int(n * fraction + 0.5) for n in (50, 200, 30)]
    assert UNEVEN[carved].bincount().tolist() == expected


def test_carving_depends_on_its_seed_alone():
    torch.manual_seed(1)
    first = carve(UNEVEN, 0.1)[1]
    torch.manual_seed(2)
    assert torch.equal(carve(UNEVEN, 0.1)[1], first)
    assert not torch.equal(carve(UNEVEN, 0.1, seed=1)[1], first)


def test_carving_takes_some_of_every_class_but_never_all():
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    rest, carved = carve(labels, 0.01)
    assert labels[carved].tolist() == [0, 1]
    assert set(labels[rest].tolist()) == {0, 1, 2}
    rest, carved = carve(labels, 0.99)
    assert set(labels[rest].tolist()) == {0, 1, 2}
    with pytest.raises(UserError, match=r"no class has 2 training examples"):
        carve(torch.tensor([0, 1, 2]), 0.5)


def test_carving_without_labels():
    rest, carved = carve(40, 0.1)
    assert len(rest) == 36
    assert len(carved) == 4


# ---------------------------------------------------------------- labels


def test_label_fractions_are_balanced_and_nested():
    nested = [select_fraction(UNEVEN, fraction, 0) for fraction in (0.02, 0.1, 0.5, 1.0)]
    assert UNEVEN[nested[1]].bincount().tolist() == [5, 20, 3]
    for small, large in pairwise(nested):
        assert set(small.tolist()) < set(large.tolist())
    assert not torch.equal(nested[1], select_fraction(UNEVEN, 0.1, 1))


def test_one_percent_of_115_per_class_is_one_per_class():
    labels = torch.arange(10).repeat(115)
    assert labels[select_fraction(labels, 0.01, 0)].bincount().tolist() == [1] * 10


def test_number_of_labels_per_class():
    for count in (4, 4.0):
        assert UNEVEN[select_fraction(UNEVEN, count, 0)].bincount().tolist() == [4, 4, 4]
    assert set(select_fraction(UNEVEN, 4, 0).tolist()) < set(
        select_fraction(UNEVEN, 0.5, 0).tolist()
    )
    with pytest.raises(UserError, match=r"class 'c' has only 30 training examples"):
        select_fraction(UNEVEN, 31, 0, ("a", "b", "c"))


def test_empty_class_is_named_with_the_smallest_fraction_that_works():
    with pytest.raises(
        UserError, match=r"0.01 leaves class 'c', which has 30.*smallest.*works is 0.0167"
    ) as error:
        select_fraction(UNEVEN, 0.01, 0, ("a", "b", "c"))
    least = float(str(error.value).split()[-1])
    assert (UNEVEN[select_fraction(UNEVEN, least, 0)].bincount() > 0).all()
    with pytest.raises(UserError, match=r"class 'd' has no training example"):
        select_fraction(UNEVEN, 0.1, 0, ("a", "b", "c", "d"))


@pytest.mark.parametrize("fraction", [0, -0.1, 1.5])
def test_invalid_fractions_are_rejected(fraction):
    with pytest.raises(UserError, match=r"neither a fraction of the labels"):
        select_fraction(UNEVEN, fraction, 0)


def test_choosing_labels_of_an_unlabeled_set_is_an_error():
    with pytest.raises(UserError, match=r"no labels to learn from"):
        select_fraction(None, 0.1, 0)


# ---------------------------------------------------------------- splits


def test_validation_is_carved_and_test_is_loaded_lazily():
    source = Source(train=examples(100), test=examples(20))
    splits = Splits(source)
    assert (len(splits.train), len(splits.val), splits.classes) == (90, 10, ("a", "b"))
    assert splits.pretrain is splits.train
    assert source.loads == {"train": 1}
    assert splits.test is source.held["test"]
    assert source.loads == {"train": 1, "test": 1}


def test_missing_test_split_is_carved_before_validation():
    splits = Splits(Source(train=examples(100)))
    parts = [
        set(part.inputs[:, 0, 0, 0].tolist()) for part in (splits.train, splits.val, splits.test)
    ]
    assert [len(part) for part in parts] == [
        66,
        8,
        26,
    ]  # 12.5 of 50 per class, then 3.7 of the remaining 37, rounded
    assert set.union(*parts) == set(range(100))


def test_own_validation_split_is_used():
    source = Source(train=examples(40), val=examples(10, 100), test=examples(10))
    splits = Splits(source)
    assert splits.val is source.held["val"]
    assert len(splits.train) == 40


def values(examples):
    return examples.inputs[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("amount", [1, 7, 50, 250])
def test_carving_a_number_takes_the_same_share_of_every_class(amount):
    rest, carved = carve(UNEVEN, amount)
    assert len(carved) == amount
    assert torch.equal(torch.cat([rest, carved]).sort().values, torch.arange(280))
    counts, sizes = UNEVEN[carved].bincount(minlength=3), torch.tensor([50, 200, 30])
    assert (counts < sizes).all()
    assert (counts - sizes * amount / 280).abs().max() <= 1
    with pytest.raises(UserError, match="only 277 can be, because each class keeps one"):
        carve(UNEVEN, 278)


def test_without_validation_all_is_learned_from():
    source = Source(train=examples(100), val=examples(10, 100), test=examples(20))
    splits = Splits(source, validation=0)
    assert len(splits.train) == len(splits.train_and_val) == len(splits.pretrain) == 100
    assert not splits.has_val
    with pytest.raises(UserError, match=r"validation: 0 leaves no examples to validate on"):
        splits.val  # noqa: B018
    bank, queries = splits.monitored
    assert len(bank) + len(queries) == 100
    assert not set(values(bank)) & set(values(queries))


def test_validation_by_number_and_by_the_sets_own_split():
    source = Source(train=examples(100), val=examples(10, 100), test=examples(20))
    carved = Splits(source, validation=30)
    assert (len(carved.train), len(carved.val)) == (70, 30)
    assert max(values(carved.val)) < 100
    own = Splits(source, validation="split")
    assert own.val is source.held["val"]
    with pytest.raises(UserError, match="has no validation split of its own: give a share"):
        Splits(Source(train=examples(9), test=examples(9)), validation="split").val  # noqa: B018


@pytest.mark.parametrize("own", [False, True])
def test_train_and_validation_are_one_set_with_known_positions(own):
    held = {"val": examples(10, 100)} if own else {}
    splits = Splits(Source(train=examples(100), test=examples(20), **held))
    whole = splits.train_and_val
    assert sorted(values(whole)) == list(range(110 if own else 100))
    for part, split in (("train", splits.train), ("val", splits.val)):
        positions = splits.positions[part]
        assert values(whole.subset(positions)) == values(split)
        assert torch.equal(whole.labels[positions], split.labels)


def test_pretraining_on_all_includes_validation_and_unlabeled_examples():
    source = Source(train=examples(20), test=examples(4), unlabeled=examples(5, 100))
    splits = Splits(source, pretrain_on="all")
    assert sorted(values(splits.pretrain)) == [*range(20), *range(100, 105)]
    assert splits.pretrain.labels is None
    assert not splits.holds_out
    assert len(splits.train) == 18


@pytest.mark.parametrize("amount", [-1, 1.5, 0.1j, "all"])
def test_meaningless_validation(amount):
    with pytest.raises(ValueError, match="validation"):
        sources["digits"].Options(validation=amount)


def test_unlabeled_examples_join_pretraining_without_labels():
    splits = Splits(
        Source(train=examples(20), test=examples(4), unlabeled=examples(30, 100, labeled=False))
    )
    assert len(splits.pretrain) == 18 + 30
    assert splits.pretrain.labels is None
    pixels = set(splits.pretrain.inputs[:, 0, 0, 0].tolist())
    assert pixels == set(splits.train.inputs[:, 0, 0, 0].tolist()) | set(range(100, 130))


class Streamed(Examples):
    """A set that is not one tensor."""

    labels = None
    classes = ()

    def __init__(self, inner):
        self.inner, self.spec = inner, inner.spec

    def __len__(self):
        return len(self.inner)

    def subset(self, indices):
        return Streamed(self.inner.subset(indices))

    def batches(self, indices, device):
        for batch in self.inner.batches(indices, device):
            yield Batch(batch.inputs, None)


def test_a_pool_of_a_tensor_and_a_stream_keeps_the_requested_order():
    joined = pool(examples(10), Streamed(examples(5, 10)))
    assert isinstance(joined, PooledExamples)
    order = [torch.tensor([12, 0, 14, 3]), torch.tensor([1, 2]), torch.tensor([11])]
    pixels_ = [batch.inputs[:, 0, 0, 0].tolist() for batch in joined.batches(iter(order), CPU)]
    assert pixels_ == [[12, 0, 14, 3], [1, 2], [11]]
    part = joined.subset(torch.tensor([14, 9, 10]))
    assert len(part) == 3
    (batch,) = part.batches([torch.tensor([2, 0, 1])], CPU)
    assert batch.inputs[:, 0, 0, 0].tolist() == [10, 14, 9]


def test_a_pool_of_two_sizes_is_rejected():
    other = TensorExamples(torch.zeros(2, 3, 4, 4), None, (), ImageSpec(4))
    with pytest.raises(UserError, match=r"give one size"):
        pool(examples(4), other)


def test_digits_are_split_and_labeled_as_in_a_run():
    splits = load_splits("digits", module.sources["digits"].Options(size=16))
    sizes = [len(part) for part in (splits.train, splits.val, splits.test)]
    assert sum(sizes) == 1797
    assert splits.spec == ImageSpec(16)
    assert len(select_fraction(splits.train.labels, 0.01, 0)) == 10
    for part in (splits.val, splits.test):
        counts = part.labels.bincount()
        assert counts.max() - counts.min() <= 2


def test_an_unknown_set_is_an_error():
    with pytest.raises(UserError, match=r"no such data set: 'cifar'. Did you mean 'cifar10'"):
        load_splits("cifar", module.sources["digits"].Options())


def test_fractions_of_tagged_sentences_ignore_classes():
    tagged = load_splits(
        "world-tagging",
        sources["world-tagging"].Options(train=50, held_out=8, tokenizer={"vocab": 200}),
    )
    assert len(select_labeled(tagged.train, 0.1, 0)) == 5
    digits = load_splits("digits", sources["digits"].Options(size=8)).train
    assert digits.labels[select_labeled(digits, 0.01, 0)].bincount().tolist() == [1] * 10


def test_one_label_per_class_is_allowed():
    digits = load_splits("digits", sources["digits"].Options(size=8)).train
    one, five = (set(select_labeled(digits, count, 0, per_class=True).tolist()) for count in (1, 5))
    assert (len(one), len(five)) == (10, 50)
    assert one < five
    assert five == set(select_labeled(digits, 5, 0).tolist())
    assert len(select_labeled(digits, 1, 0)) == len(digits)  # a fraction of 1: all examples
    assert one != set(select_labeled(digits, 1, 1, per_class=True).tolist())
    with pytest.raises(UserError, match=r"give at most \d+ labels per class"):
        select_labeled(digits, 1000, 0, per_class=True)
