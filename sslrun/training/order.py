"""The order of examples in training: batches, their parts, and the share of each device."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sslrun import distributed
from sslrun.data.examples import Examples
from sslrun.errors import UserError
from sslrun.seeds import derive_seed
from sslrun.training.schedule import Schedule

STRETCH = 50
"""Number of consecutive batches in which examples of similar length are grouped."""


def indices(
    examples: Examples,
    schedule: Schedule,
    seed: int,
    first: int,
    total: int,
    begin_epoch: Callable[[], None] = lambda: None,
) -> Iterator[Tensor]:
    """Yield the indices of every part of every batch for steps `first` to `total` - 1.

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
    for step in range(first, total):
        epoch, place = divmod(step, epoch_steps)
        if epoch != ordered_epoch:
            begin_epoch()
            order = _epoch(examples, schedule, lengths, seed, epoch)
            ordered_epoch = epoch
        batch = order[place * schedule.batch : (place + 1) * schedule.batch]
        # Parts are interleaved, so that no part or device gets all the longest examples.
        for part in range(schedule.accumulate):
            yield batch[part :: schedule.accumulate][rank::world]


def _epoch(
    examples: Examples, schedule: Schedule, lengths: Tensor | None, seed: int, epoch: int
) -> Tensor:
    """The order of one epoch: that of `examples.order`, with similar lengths batched together."""
    order = examples.order(seed, epoch)
    if lengths is None:
        return order
    generator = torch.Generator().manual_seed(derive_seed(seed, epoch))
    torch.randperm(len(order), generator=generator)  # skip the draws that shuffled
    return group_lengths(order, lengths, schedule.batch, generator)


def group_lengths(order: Tensor, lengths: Tensor, batch: int, generator: torch.Generator) -> Tensor:
    """Reorder the whole batches of a random order (N,) so that a batch holds similar lengths.

    Sorts within stretches of `STRETCH` batches, then shuffles the batches. Examples that fill no
    whole batch are dropped. With batches of 2 and one stretch:

        order [4 1 0 3 2], lengths [9 2 7 2 5]  ->  whole batches [4 1 0 3]
        sorted by length: [1 3 | 4 0] or, batches shuffled, [4 0 | 1 3]
    """
    count = len(order) // batch
    order = order[: count * batch]
    stretch = torch.arange(len(order)) // (STRETCH * batch)
    order = order[(stretch * (lengths.max() + 1) + lengths[order]).argsort(stable=True)]
    return order.view(count, batch)[torch.randperm(count, generator=generator)].flatten()
