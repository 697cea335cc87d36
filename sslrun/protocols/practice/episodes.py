"""Episodes of a fixed number of steps in an environment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sslrun.data.control.environments import Environment
from sslrun.data.examples import Batch
from sslrun.errors import UserError
from sslrun.protocols.practice.options import PracticeOptions
from sslrun.protocols.practice.spaces import Space
from sslrun.tasks.reach import Reach


class Episodes(NamedTuple):
    """B episodes of H steps."""

    codes: Tensor
    """(B, H + 1, D): codes of all states, from the first to the last."""
    actions: Tensor
    """(B, H, A) float32 in [-1, 1]."""
    states: Tensor
    """(B, H + 1, S)."""
    first_pictures: Tensor
    """(B, 3, H, W) in [0, 1]; empty (0,) if the environment has no pictures."""
    last_pictures: Tensor


Policy = Callable[[Tensor], Tensor]
"""From codes (B, D) to actions (B, A) in [-1, 1]."""


@dataclass(frozen=True)
class Arena:
    """An environment with episodes of a fixed number of steps."""

    task: Reach
    environment: Environment
    horizon: int
    start: tuple[float, ...] | None

    @classmethod
    def of(cls, task: Reach, options: PracticeOptions) -> Arena:
        """Raises UserError if the environment does not suit."""
        environment = task.environment()
        if environment.is_discrete:
            raise UserError(
                f"practice needs actions that are vectors, but those of {environment.title} are "
                "discrete: take task.environment: point"
            )
        horizon = min(options.horizon or environment.horizon, environment.horizon)
        if horizon < 2:
            raise UserError(
                f"{environment.title}: its episodes have {horizon} step, and practice needs 2 or "
                "more: take another environment"
            )
        if options.start is not None:
            size, start = environment.state_size, np.array(options.start, np.float32)
            if len(start) != size or not environment.is_free(start):
                raise UserError(
                    f"practice.start: {list(options.start)} is no free state of "
                    f"{environment.title}, which has {size} numbers"
                )
        return cls(task, environment, horizon, options.start)

    def play(self, space: Space, seeds: Sequence[int], policy: Policy) -> Episodes:
        """Play an episode for each seed."""
        environment, states = self.environment, [self._reset(seeds)]
        first = self._picture()
        codes, actions = [space.observe(environment, states[0])], []
        for _ in range(self.horizon):
            actions.append(policy(codes[-1]))
            states.append(environment.step(self._scale(actions[-1])).states)
            codes.append(space.observe(environment, states[-1]))
        return Episodes(
            torch.stack(codes, dim=1),
            torch.stack(actions, dim=1),
            torch.from_numpy(np.stack(states, axis=1)),
            first,
            self._picture(),
        )

    def _reset(self, seeds: Sequence[int]) -> np.ndarray:
        if self.start is None:
            return self.environment.reset(seeds)
        starts = np.tile(np.array(self.start, np.float32), (len(seeds), 1))
        return self.environment.reset_to(starts)

    def _scale(self, actions: Tensor) -> np.ndarray:
        """Actions (B, A) float32 within the environment's bounds."""
        low, high = np.array([self.environment.low, self.environment.high], np.float32)
        return low + (actions.numpy() + 1) / 2 * (high - low)

    def _picture(self) -> Tensor:
        return self.task.inputs(Batch(self.task.observe(self.environment), None))
