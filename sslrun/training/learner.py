"""A learner: what the loop trains. Pretext tasks are learners, and so is a backbone with a task's head on it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sslrun.data.examples import Batch


class Output(NamedTuple):
    """What a learner returns for one batch."""

    loss: Tensor
    """0-d, with gradient."""
    metrics: dict[str, Tensor] = {}  # noqa: RUF012 (never mutated)
    """Named 0-d tensors without gradient, worth watching."""


class Learner(nn.Module):
    """A module that the loop can train.

    For every optimizer step the loop calls `before_step`; then, for every part of the batch,
    `views` (without gradients, outside autocast and compilation) and `forward` on what it returned
    (with gradients, possibly compiled, autocast and wrapped for many devices); and, once the
    optimizer has moved the parameters, `after_step`.
    """

    def views(self, batch: Batch, generator: torch.Generator) -> Any:
        """Make the inputs of `forward` from a raw batch: a tensor or a tuple of tensors on its device.

        Draws randomness from `generator` alone, so that a resumed run draws the same.
        """
        raise NotImplementedError

    def forward(self, views: Any) -> Output:
        """The loss of these views, and named metrics worth watching."""
        raise NotImplementedError

    def before_step(self, progress: float) -> None:
        """Called before every optimizer step with the share [0, 1) of training that is done.

        Schedules of the method belong here. Keep what they set in buffers, so that checkpoints
        carry it.
        """

    def after_step(self, progress: float) -> None:
        """Called after every optimizer step with the share (0, 1] of training done: moving averages, queues."""

    def layers(self) -> list[list[nn.Parameter]]:
        """The backbone's parameters from input to output, grouped by depth, for layer-wise learning-rate decay."""
        return []
