"""The learner, which the loop trains: a pretext task, or a backbone with a task's head."""

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
    """Named 0-d tensors without gradient, to log."""


class Learner(nn.Module):
    """A module that the loop can train.

    For every optimizer step the loop calls, in this order:

    1. `before_step`;
    2. for every part of the batch, `views` (without gradients, outside autocast and compilation),
       then `forward` on the result (with gradients, possibly compiled, autocast and wrapped for
       several devices);
    3. `after_step`, when the optimizer has updated the parameters.
    """

    @property
    def sync_norm(self) -> bool:
        """Whether batch norms use the statistics of all devices' batches together."""
        return False

    @property
    def batch_multiple(self) -> int:
        """The number of examples that a device gets at a time must be a multiple of this."""
        return 1

    def views(self, batch: Batch, generator: torch.Generator) -> Any:
        """Make the inputs of `forward` from a raw batch: a tensor or a tuple of tensors.

        They are on the batch's device. All random numbers must come from `generator`, so that a
        resumed run draws the same ones.
        """
        raise NotImplementedError

    def forward(self, views: Any) -> Output:
        """Compute the loss of the views, and metrics to log."""
        raise NotImplementedError

    def before_step(self, progress: float) -> None:
        """Prepare an optimizer step; `progress` in [0, 1) is the share of training that is done.

        Schedules of the method belong here. Keep what they set in buffers, so that checkpoints
        contain it.
        """

    def after_step(self, progress: float) -> None:
        """Update moving averages or queues after an optimizer step.

        `progress` in (0, 1] is the share of training that is done.
        """

    def last_layer(self) -> list[nn.Parameter]:
        """Parameters that do not learn during the first `freeze_last` epochs of a schedule.

        They are those of a head's last layer, such as prototypes.
        """
        return []

    def layers(self) -> list[list[nn.Parameter]]:
        """The backbone's parameters from input to output, by depth, for layer-wise decay."""
        return []

    def blocks(self) -> list[nn.Module]:
        """Modules whose parameters are gathered together where parameters are sharded.

        The other parameters are gathered for the whole step. Nothing may use a block's parameters
        except its `forward`.
        """
        return []
