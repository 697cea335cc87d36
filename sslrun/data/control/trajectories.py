"""Trajectories, and the windows of them that networks learn from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from sslrun.data.examples import Batch, Examples, to_device
from sslrun.data.specs import ControlSpec


class Trajectories(NamedTuple):
    """A batch of windows of K steps; a window that ends early is padded at its end."""

    states: Tensor
    """(B, K, S) float32; 0 at padding."""
    actions: Tensor
    """(B, K) int64, or (B, K, A) float32; 0 at padding."""
    returns: Tensor
    """(B, K) float32: the sum of the rewards from each step on; 0 at padding."""
    times: Tensor
    """(B, K) int64: number of each step within its episode, from 0; 0 at padding."""
    real: Tensor
    """(B, K) bool: False at padding."""
    goals: Tensor
    """(B, S) float32: the state to reach; in data the last one of the trajectory."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Trajectories:
        """Apply `change` to each tensor."""
        return Trajectories(*map(change, self))

    def to(self, device: torch.device) -> Trajectories:
        return self.map(lambda tensor: to_device(tensor, device))

    def join(self, other: Trajectories, order: Tensor) -> Trajectories:
        """The windows of both batches, sorted by `order`."""
        pairs = zip(self, other, strict=True)
        return Trajectories(*[torch.cat(pair)[order] for pair in pairs])

    def numel(self) -> int:
        """Return the number of tokens, padding included: a return, a state and an action a step."""
        return 3 * self.real.numel()


@dataclass(frozen=True)
class Episodes:
    """Whole trajectories, one after the other."""

    states: Tensor
    """(N, S) float32: the state before each step."""
    actions: Tensor
    """(N,) int64, or (N, A) float32."""
    rewards: Tensor
    """(N,) float64."""
    starts: Tensor
    """(E + 1,) int64: position of each trajectory's first step, and the end."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> Tensor:
        """(E,) int64: number of steps of each trajectory."""
        return self.starts.diff()

    @cached_property
    def trajectory_of(self) -> Tensor:
        """(N,) int64: the trajectory of each step."""
        return torch.arange(len(self)).repeat_interleave(self.lengths)

    @cached_property
    def totals(self) -> Tensor:
        """(E,) float64: the return of each trajectory."""
        return torch.zeros(len(self), dtype=torch.float64).index_add(
            0, self.trajectory_of, self.rewards
        )

    @cached_property
    def first_states(self) -> Tensor:
        """(E, S) float32."""
        return self.states[self.starts[:-1]]

    def returns_to_go(self) -> Tensor:
        """The sum of rewards (N,) float64 from each step to the end of its trajectory."""
        total = self.rewards.cumsum(0)
        last = self.starts[1:][self.trajectory_of] - 1
        return total[last] - total + self.rewards

    def select(self, chosen: Tensor) -> Episodes:
        """The trajectories (M,) int64, in that order."""
        steps = torch.cat(
            [torch.arange(int(self.starts[one]), int(self.starts[one + 1])) for one in chosen]
        )
        ends = self.lengths[chosen].cumsum(0)
        return Episodes(
            self.states[steps],
            self.actions[steps],
            self.rewards[steps],
            torch.cat([torch.zeros(1, dtype=torch.int64), ends]),
        )

    def best(self, share: float) -> Episodes:
        """The trajectories with the highest returns that make up at most a share of all steps.

        The best one always counts. This is the filter of the 10 % behavior cloning of Chen et al.
        2021.
        """
        order = self.totals.argsort(descending=True, stable=True)
        steps = self.lengths[order].cumsum(0)
        count = max(1, int((steps <= share * len(self.states)).sum()))
        return self.select(order[:count].sort().values)


def join_episodes(parts: Sequence[Episodes]) -> Episodes:
    """Put the trajectories of several sets one after the other."""
    lengths = torch.cat([part.lengths for part in parts])
    return Episodes(
        torch.cat([part.states for part in parts]),
        torch.cat([part.actions for part in parts]),
        torch.cat([part.rewards for part in parts]),
        torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
    )


@dataclass(frozen=True)
class WindowExamples(Examples):
    """Windows of K steps of trajectories; an example is the step at which a window starts.

    A random order of the examples is thus uniform over all steps, as in the code of Chen et al.
    2021, which draws a trajectory in proportion to its length and then a step of it.
    """

    episodes: Episodes
    spec: ControlSpec
    windows: Tensor
    """(M,) int64: the first steps."""
    returns: Tensor
    """(N,) float32: the returns to go of all steps."""

    labels = None
    classes = ()

    @classmethod
    def of(cls, episodes: Episodes, spec: ControlSpec) -> WindowExamples:
        """All windows of the trajectories."""
        windows = torch.arange(len(episodes.states))
        return cls(episodes, spec, windows, episodes.returns_to_go().float())

    def __len__(self) -> int:
        return len(self.windows)

    def subset(self, indices: Tensor) -> WindowExamples:
        return replace(self, windows=self.windows[indices])

    def batches(self, indices: Iterable[Tensor], device: torch.device) -> Iterator[Batch]:
        for chosen in indices:
            yield Batch(self._read(self.windows[chosen]), None).to(device)

    def _read(self, first: Tensor) -> Trajectories:
        """Read the windows that start at steps (B,)."""
        episodes = self.episodes
        trajectory = episodes.trajectory_of[first]
        start, end = episodes.starts[trajectory], episodes.starts[trajectory + 1]
        steps = first[:, None] + torch.arange(self.spec.context)
        real = steps < end[:, None]
        steps = torch.where(real, steps, first[:, None])
        windows = Trajectories(
            episodes.states[steps],
            episodes.actions[steps],
            self.returns[steps],
            steps - start[:, None],
            real,
            episodes.states[end - 1],
        )
        return windows._replace(
            states=windows.states * real[..., None],
            actions=windows.actions * (real if windows.actions.ndim == 2 else real[..., None]),
            returns=windows.returns * real,
            times=windows.times * real,
        )
