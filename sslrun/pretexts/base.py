"""The type of every pretext task."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from sslrun.backbones.base import Backbone
from sslrun.data.examples import Batch
from sslrun.learner import Output
from sslrun.registry import Options, Registry


class PretextOptions(Options):
    """Settings of a pretext task."""


class Pretext(nn.Module):
    """A self-supervised objective: makes its targets from the data, owns its heads and teachers, returns a loss.

    A learner (see `sslrun.learner`): the loop calls `views` outside autocast and compilation, without gradients, and
    hands what it returns to `forward`, which may be compiled, autocast and wrapped for many devices.
    """

    Options: ClassVar[type[PretextOptions]] = PretextOptions
    name: ClassVar[str]
    modality: ClassVar[str]

    def __init__(self, options: Any, backbone: Backbone) -> None:
        super().__init__()
        self.options = options
        self.backbone = backbone

    def views(self, batch: Batch, generator: torch.Generator) -> Any:
        """What this pretext makes of a raw batch: a tensor, or a tuple of tensors, on the batch's device."""
        raise NotImplementedError

    def forward(self, views: Any) -> Output:
        """The loss of these views, and named metrics worth watching."""
        raise NotImplementedError

    def after_step(self, progress: float) -> None:
        """Called after every optimizer step with the share (0, 1] of training done: moving averages, queues."""


pretexts: Registry[Pretext] = Registry("pretext")
