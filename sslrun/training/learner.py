"""A learner: what the loop trains. Pretext tasks are learners, and so is a backbone with a task's head on it."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from sslrun.data.examples import Batch


class Output(NamedTuple):
    """What a learner returns for one batch."""

    loss: Tensor
    """0-d, with gradient."""
    metrics: dict[str, Tensor] = {}  # noqa: RUF012 (never mutated)
    """Named 0-d tensors without gradient, worth watching."""


class Learner(Protocol):
    """An `nn.Module` with these three methods; see `sslrun.pretexts.base.Pretext` for when each is called."""

    def views(self, batch: Batch, generator: torch.Generator) -> Any: ...

    def __call__(self, views: Any) -> Output: ...

    def after_step(self, progress: float) -> None: ...
