"""Batches of similar lengths: who meets again in the next epoch, and how much is padding."""

import pytest
import torch

from sslrun.data.examples import TensorExamples, shuffle
from sslrun.data.source import sources
from sslrun.data.specs import ImageSpec
from sslrun.training import order
from sslrun.training.order import group_lengths, indices
from sslrun.training.schedule import Schedule


class Ragged(TensorExamples):
    """Examples of which only the lengths matter."""

    @classmethod
    def of(cls, lengths):
        ragged = cls(torch.zeros(len(lengths), 1), None, (), ImageSpec(8))
        object.__setattr__(ragged, "given", lengths)
        return ragged

    @property
    def lengths(self):
        return self.given


def gamma_lengths(count):
    """Lengths like those of SST-2's sentences: 25 tokens on average, 5 to 66."""
    torch.manual_seed(0)
    drawn = torch.distributions.Gamma(torch.tensor(4.3), torch.tensor(4.3 / 23)).sample((count,))
    return 2 + drawn.round().clamp(3, 64).long()


def uniform_lengths(count):
    return torch.randint(8, 129, (count,), generator=torch.Generator().manual_seed(0))


def world_lengths(name, count):
    source = sources[name]
    return source(source.Options(train=count)).load("train").lengths


def epochs(lengths, batch, seed=0, count=2, by_length=True):
    """The batches (steps, batch) of each epoch."""
    schedule = Schedule(epochs=count, batch=batch, lr=0.1, by_length=by_length)
    steps = len(lengths) // batch
    every = list(indices(Ragged.of(lengths), schedule, seed, 0, count * steps))
    return torch.stack(every).view(count, steps, batch)


def repeated(first, second, total):
    """How much of a batch of the second epoch was together in the first, averaged over batches.

    Two measures: the share of a batch's pairs that shared a batch, and the largest number of its
    examples that did, as a share of the batch. Two batches of 3, [0 1 2] [3 4 5], then
    [0 1 3] [2 4 5]: 1 of 3 pairs, and 2 of 3 examples.
    """
    batch_of = torch.full((total,), -1)
    batch_of[first] = torch.arange(len(first))[:, None].expand_as(first)
    pairs, largest = [], []
    for batch in second:
        before = batch_of[batch]
        counts = before[before >= 0].bincount().double()
        pairs.append((counts * (counts - 1)).sum() / (len(batch) * (len(batch) - 1)))
        largest.append(counts.max() / len(batch))
    return torch.stack(pairs).mean().item(), torch.stack(largest).mean().item()


def padded(batches, lengths):
    """Positions computed for each real token."""
    longest = lengths[batches].max(dim=-1, keepdim=True).values
    return (longest.expand_as(batches).sum() / lengths[batches].sum()).item()


def test_the_measure_of_what_is_repeated():
    first, second = torch.tensor([[0, 1, 2], [3, 4, 5]]), torch.tensor([[0, 1, 3], [2, 4, 5]])
    assert repeated(first, second, 6) == pytest.approx((1 / 3, 2 / 3))
    assert repeated(first, first, 6) == (1, 1)


@pytest.mark.parametrize("draw", [gamma_lengths, uniform_lengths])
@pytest.mark.parametrize(("count", "batch"), [(500, 16), (500, 32), (1000, 32), (4000, 32)])
def test_a_fifth_of_a_batch_at_most_meets_again(draw, count, batch):
    lengths = draw(count)
    found = [repeated(*epochs(lengths, batch, seed), count) for seed in range(4)]
    plain = [repeated(*epochs(lengths, batch, seed, by_length=False), count) for seed in range(4)]
    pairs, largest = torch.tensor(found).mean(0).tolist()
    assert pairs < 0.1
    assert largest < 0.22  # chance alone makes 0.07 to 0.14
    assert largest - torch.tensor(plain).mean(0)[1].item() < 0.12


@pytest.mark.parametrize("name", ["world-paraphrase", "world-span"])
def test_a_fifth_of_a_batch_at_most_meets_again_in_small_tasks(name):
    lengths = world_lengths(name, 1000)
    for batch in (16, 32):
        pairs, largest = repeated(*epochs(lengths, batch), 1000)
        assert pairs < 0.1
        assert largest < 0.2
        plain = epochs(lengths, batch, by_length=False)
        assert padded(epochs(lengths, batch), lengths) < padded(plain, lengths)


def test_one_stretch_for_the_whole_epoch_would_repeat_three_quarters(monkeypatch):
    monkeypatch.setattr(order, "EPOCH_SHARE", 1)
    monkeypatch.setattr(order, "NOISE", 0)
    assert repeated(*epochs(uniform_lengths(1000), 32), 1000)[1] > 0.75


def test_padding_stays_small():
    lengths = gamma_lengths(4000)
    found, plain = epochs(lengths, 32), epochs(lengths, 32, by_length=False)
    assert padded(found, lengths) < 1.15
    assert padded(plain, lengths) > 2


def test_an_epoch_is_a_function_of_seed_and_number_and_holds_each_example_once():
    lengths = gamma_lengths(500)
    whole = epochs(lengths, 16, count=3)
    for epoch in whole:
        assert epoch.unique().numel() == 31 * 16
    schedule = Schedule(epochs=3, batch=16, lr=0.1)
    rest = list(indices(Ragged.of(lengths), schedule, 0, 40, 93))
    assert torch.equal(torch.stack(rest), whole.flatten(0, 1)[40:])
    assert not torch.equal(epochs(lengths, 16, seed=1), whole[:2])


@pytest.mark.parametrize("devices", [2, 4])
def test_devices_share_the_batches_of_one(devices, monkeypatch):
    lengths = gamma_lengths(500)
    whole = epochs(lengths, 16)
    monkeypatch.setattr(order.distributed, "world_size", lambda: devices)
    shares = []
    for rank in range(devices):
        monkeypatch.setattr(order.distributed, "rank", lambda rank=rank: rank)
        schedule = Schedule(epochs=2, batch=16, lr=0.1)
        shares.append(torch.stack(list(indices(Ragged.of(lengths), schedule, 0, 0, 62))))
    together = torch.cat(shares, dim=1)
    assert torch.equal(together.sort(dim=1).values, whole.flatten(0, 1).sort(dim=1).values)


def test_an_order_is_that_of_sorting_all_stretches_at_once():
    """Orders of earlier versions stay: a resumed run may be in the middle of one."""
    lengths, batch, count = gamma_lengths(9000), 32, 281
    draw = torch.Generator().manual_seed(3)
    shuffled = shuffle(len(lengths), draw)
    state = draw.get_state()
    found = group_lengths(shuffled, lengths.int(), batch, draw)
    draw.set_state(state)
    expected = shuffled.long()[: count * batch]
    stretch = torch.arange(len(expected)) // (batch * (count // order.EPOCH_SHARE))
    noise = torch.rand(len(expected), generator=draw, dtype=torch.float64)
    key = stretch * 2 * (lengths.max() + 1) + lengths[expected] * (1 + 0.05 * (2 * noise - 1))
    expected = expected[key.argsort(stable=True)].view(count, batch)
    assert torch.equal(found, expected[torch.randperm(count, generator=draw)].flatten())


def test_orders_take_half_the_memory_and_batches_are_int64():
    plain = torch.randperm(5000, generator=torch.Generator().manual_seed(1))
    shuffled = shuffle(5000, torch.Generator().manual_seed(1))
    assert shuffled.dtype == torch.int32
    assert torch.equal(shuffled, plain)
    schedule = Schedule(epochs=1, batch=16, lr=0.1)
    assert next(indices(Ragged.of(gamma_lengths(500)), schedule, 0, 0, 1)).dtype == torch.int64


def test_the_docstrings_example(monkeypatch):
    monkeypatch.setattr(order, "STRETCH", 2)
    monkeypatch.setattr(order, "EPOCH_SHARE", 1)
    monkeypatch.setattr(order, "NOISE", 0)
    given = torch.tensor([4, 1, 0, 3, 2, 7, 6, 5])
    lengths = torch.empty(8, dtype=torch.int64)
    lengths[given] = torch.tensor([5, 2, 9, 2, 7, 3, 1, 8])
    found = group_lengths(given, lengths, 2, torch.Generator().manual_seed(0)).view(4, 2)
    assert sorted(found.tolist()) == [[1, 3], [2, 5], [4, 0], [6, 7]]


def test_a_tiny_epoch_is_not_grouped():
    given, lengths = torch.randperm(60), torch.arange(60)
    found = group_lengths(given, lengths, 4, torch.Generator().manual_seed(0)).view(15, 4)
    batches = {frozenset(batch) for batch in given.view(15, 4).tolist()}
    assert {frozenset(batch) for batch in found.tolist()} == batches
