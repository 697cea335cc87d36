"""The type of every pretext task."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sslrun.backbones.base import Backbone
from sslrun.data.examples import Batch, Examples
from sslrun.registry import Options, Registry
from sslrun.training.learner import Output


class PretextOptions(Options):
    """Settings of a pretext task."""


class Pretext(nn.Module):
    """A self-supervised objective: makes its targets from the data, owns its heads and teachers, returns a loss.

    A learner (see `sslrun.training.learner`): the loop calls `views` outside autocast and compilation, without gradients, and
    hands what it returns to `forward`, which may be compiled, autocast and wrapped for many devices.
    """

    Options: ClassVar[type[PretextOptions]] = PretextOptions
    name: ClassVar[str]
    modality: ClassVar[str]

    def __init__(self, options: Any, backbone: Backbone) -> None:
        super().__init__()
        self.options = options
        self.backbone = backbone

    def arrange(self, examples: Examples, seed: int) -> Examples:
        """The examples as this pretext reads them, such as text in pairs of segments; by default as they are."""
        return examples

    def views(self, batch: Batch, generator: torch.Generator) -> Any:
        """What this pretext makes of a raw batch: a tensor, or a tuple of tensors, on the batch's device."""
        raise NotImplementedError

    def forward(self, views: Any) -> Output:
        """The loss of these views, and named metrics worth watching."""
        raise NotImplementedError

    def after_step(self, progress: float) -> None:
        """Called after every optimizer step with the share (0, 1] of training done: moving averages, queues."""

    def held_out(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Metrics on held-out examples, `held_out_loss` among them, whatever training does to its inputs; in eval mode,
        without gradient. By default none: a loss that compares views says little of what was learned."""
        return {}

    def floor(self, examples: Examples) -> float | None:
        """The held-out loss of a model that uses no context, to tell one that is stuck; None where there is no such."""
        return None


pretexts: Registry[Pretext] = Registry("pretext")
