"""Training time against a budget, for trainings that end on time instead of after some steps."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sslrun import distributed


class Clock:
    """The seconds of a budget that a training has used.

    Time between `tick`s counts, except where the clock is `paused`. All devices agree on it: the
    first one measures.
    """

    def __init__(self, budget: float, device: torch.device) -> None:
        self.budget = budget
        self.device = device
        self.used = 0.0
        self._since = 0.0

    @property
    def share(self) -> float:
        """The share of the budget that is used, at most 1."""
        return min(1.0, self.used / self.budget)

    def start(self) -> None:
        """Start, or go on after an interruption, whose time does not count."""
        self._since = time.monotonic()

    def tick(self) -> None:
        """Count the time since the last call. Does not wait for the device."""
        now = time.monotonic()
        self.used = distributed.decide(self.used + now - self._since)
        self._since = now

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time in this context. The device finishes its steps first."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        pending = time.monotonic() - self._since
        yield
        self._since = time.monotonic() - pending
