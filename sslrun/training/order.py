"""The order of examples in training: batches, their parts, and the share of each device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count

import torch
from torch import Tensor

from sslrun import distributed
from sslrun.data.examples import Examples, shuffle
from sslrun.errors import UserError
from sslrun.seeds import derive_seed
from sslrun.training.schedule import Schedule

STRETCH = 50
"""Largest number of consecutive batches in which examples of similar length are grouped."""
EPOCH_SHARE = 8
"""A stretch holds at most this part of an epoch's batches: an eighth."""
NOISE = 0.05
"""Largest relative noise on a length. With `EPOCH_SHARE` it decides how many examples of a batch
meet again in the next epoch; `benchmarks/lengths.py` measures that, and the padding it costs."""


def indices(
    examples: Examples,
    schedule: Schedule,
    seed: int,
    first: int,
    total: int | None,
    begin_epoch: Callable[[], None] = lambda: None,
) -> Iterator[Tensor]:
    """Yield the indices of every part of every batch for steps `first` to `total` - 1.

    If `total` is None, there is no last step.

    Indices are (batch / accumulate / devices,) int64: with several devices, this rank's share.
    `begin_epoch` is called before each epoch is ordered, including the first.

    Raises:
        UserError: the devices cannot share a part evenly.
    """
    world, rank = distributed.world_size(), distributed.rank()
    part_size = schedule.batch // schedule.accumulate
    if part_size % world:
        raise UserError(
            f"a batch of {part_size} cannot be shared evenly by {world} devices: "
            f"make it a multiple of {world}"
        )
    lengths = examples.lengths if schedule.by_length else None
    epoch_steps = schedule.steps_an_epoch(len(examples))
    order, ordered_epoch = torch.empty(0, dtype=torch.int64), -1
    for step in count(first) if total is None else range(first, total):
        epoch, place = divmod(step, epoch_steps)
        if epoch != ordered_epoch:
            begin_epoch()
            order = _epoch(examples, schedule, lengths, seed, epoch)
            ordered_epoch = epoch
        batch = order[place * schedule.batch : (place + 1) * schedule.batch]
        # Parts are interleaved, so that no part or device gets all the longest examples.
        for part in range(schedule.accumulate):
            yield batch[part :: schedule.accumulate][rank::world].long()


def _epoch(
    examples: Examples, schedule: Schedule, lengths: Tensor | None, seed: int, epoch: int
) -> Tensor:
    """The order of one epoch: that of `examples.order`, with similar lengths batched together."""
    order = examples.order(seed, epoch)
    if lengths is None:
        return order
    generator = torch.Generator().manual_seed(derive_seed(seed, epoch))
    shuffle(len(order), generator)  # skip the draws that shuffled
    return group_lengths(order, lengths, schedule.batch, generator)


def group_lengths(order: Tensor, lengths: Tensor, batch: int, generator: torch.Generator) -> Tensor:
    """Reorder the whole batches of a random order (N,) so that a batch holds similar lengths.

    Sorts within stretches of batches, by lengths with noise, then shuffles the batches. Examples
    that fill no whole batch are dropped. With batches of 2, stretches of 2 batches and no noise:

        order   [4 1 0 3 | 2 7 6 5],  their lengths [5 2 9 2 | 7 3 1 8]
        sorted  [1 3 4 0 | 6 7 2 5],  in batches    [1 3] [4 0] [6 7] [2 5]
        shuffled, for example         [6 7] [4 0] [2 5] [1 3]

    In the next epoch, the random order deals the examples into other stretches. A stretch is at
    most an eighth of an epoch, so of the examples that share a batch today, about an eighth share a
    stretch again. If it were the whole epoch, sorting would make nearly the same batches each time.
    An epoch of fewer than 16 batches has stretches of one batch, so that nothing is grouped.
    """
    count = len(order) // batch
    order = order[: count * batch]
    stretch_batches = max(1, min(STRETCH, count // EPOCH_SHARE))
    bound = 2 * (lengths.max() + 1)
    grouped = torch.empty_like(order)
    stretches = zip(*(t.split(stretch_batches * batch) for t in (order, grouped)), strict=True)
    for number, (stretch, target) in enumerate(stretches):
        noise = torch.rand(len(stretch), generator=generator, dtype=torch.float64)
        noisy = lengths[stretch] * (1 + NOISE * (2 * noise - 1))
        # The sum rounds the key, as in an earlier version that sorted all stretches at once.
        target.copy_(stretch[(number * bound + noisy).argsort(stable=True)])
    return grouped.view(count, batch)[torch.randperm(count, generator=generator)].flatten()
