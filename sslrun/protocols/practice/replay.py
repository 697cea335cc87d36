"""Replayed steps of practice, and the goals that they are learned with."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sslrun.data.examples import Batch, Examples, to_device
from sslrun.data.specs import InputSpec
from sslrun.protocols.practice.episodes import Episodes
from sslrun.protocols.practice.options import Relabel
from sslrun.seeds import derive_seed
from sslrun.tasks.reach import Cells


class Transitions(NamedTuple):
    """A batch of steps; goals are codes."""

    codes: Tensor
    actions: Tensor
    next_codes: Tensor
    goals: Tensor

    def to(self, device: torch.device) -> Transitions:
        return Transitions(*[to_device(tensor, device) for tensor in self])

    def rewards(self) -> Tensor:
        """Minus the distance (B,) of the next code from the goal."""
        return -(self.next_codes - self.goals).norm(dim=1)


class Replay(Examples):
    """All steps of practice; an example is one step.

    `order` draws steps with replacement, with weights density^alpha of the code that they reach:
    data that are collected and reweighted while a policy learns.
    """

    labels = None
    classes = ()

    def __init__(self, spec: InputSpec, horizon: int, cells: Cells, alpha: float) -> None:
        self.spec, self.horizon, self.cells, self.alpha = spec, horizon, cells, alpha
        self.chosen: Tensor | None = None
        self._state: dict[str, Tensor] = {}

    def add(self, episodes: Episodes, goals: Tensor) -> None:
        """Append episodes, which were played with goals (B, D)."""
        new = {"codes": episodes.codes, "actions": episodes.actions, "goals": goals}
        old = self._state
        self._state = {key: torch.cat([old[key], new[key]]) if old else new[key] for key in new}

    def state_dict(self) -> dict[str, Any]:
        return dict(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._state = dict(state)

    def __len__(self) -> int:
        if self.chosen is not None:
            return len(self.chosen)
        return self._state["actions"].shape[:2].numel() if self._state else 0

    @property
    def steps(self) -> Tensor:
        """(N,) int64: the number of each example's step among all."""
        return torch.arange(len(self)) if self.chosen is None else self.chosen

    def subset(self, indices: Tensor) -> Replay:
        part = copy.copy(self)
        part.chosen = self.steps[indices]
        return part

    @property
    def reached(self) -> Tensor:
        """The codes (N, D) that the steps lead to."""
        return self.codes(self.steps, torch.ones(len(self), dtype=torch.int64))

    def codes(self, steps: Tensor, offsets: Tensor) -> Tensor:
        """The codes (B, D) of the same episodes, `offsets` (B,) after steps (B,)."""
        return self._state["codes"][steps // self.horizon, steps % self.horizon + offsets]

    def left(self, steps: Tensor) -> Tensor:
        """The number (B,) of codes that follow steps (B,) in their episodes, at least 1."""
        return self.horizon - steps % self.horizon

    def order(self, seed: int, epoch: int) -> Tensor:
        weights = skew_weights(self.cells(self.reached), self.alpha)
        generator = torch.Generator().manual_seed(derive_seed(seed, epoch))
        return torch.multinomial(weights, len(self), replacement=True, generator=generator)

    def batches(self, indices: Iterable[Tensor], device: torch.device) -> Iterator[Batch]:
        for chosen in indices:
            yield Batch(self.read(self.steps[chosen]), None).to(device)

    def read(self, steps: Tensor) -> Transitions:
        """The steps (B,) with the goals of their episodes."""
        episodes, times = steps // self.horizon, steps % self.horizon
        return Transitions(
            self._state["codes"][episodes, times],
            self._state["actions"][episodes, times],
            self._state["codes"][episodes, times + 1],
            self._state["goals"][episodes],
        )


def skew_weights(cells: Tensor, alpha: float) -> Tensor:
    """Weights (N,) float64 of points in cells (N,) int64: density^alpha, with sum 1.

    The density of a point is the share of all points in its cell. Example: three points in one cell
    and one in another have the weights 1/6 1/6 1/6 1/2 if alpha is -1.
    """
    weights = (cells.bincount().double() / len(cells))[cells] ** alpha
    return weights / weights.sum()


def future_offsets(left: Tensor, discount: float, generator: torch.Generator) -> Tensor:
    """Draw an offset (B,) int64 from 1 to `left` (B,): geometric, P(k) ~ discount^k, truncated."""
    uniform = torch.rand(len(left), generator=generator, dtype=torch.float64)
    mass = 1 - discount ** left.double()
    offsets = (torch.log1p(-uniform * mass) / math.log(discount)).floor().long() + 1
    return offsets.minimum(left)


def relabel(
    replay: Replay, steps: Tensor, shares: Relabel, goals: Goals, generator: torch.Generator
) -> Transitions:
    """Read steps (B,), a share with new goals and a share with codes reached later, evenly drawn.

    A reward follows from a step's codes and its goal, so that it is that of the new goal.
    """
    transitions = replay.read(steps)
    chance, place = torch.rand(2, len(steps), generator=generator)
    offsets = 1 + (place * replay.left(steps)).long().minimum(replay.left(steps) - 1)
    later, drawn = replay.codes(steps, offsets), goals.draw(len(steps))
    new = torch.where((chance < shares.future)[:, None], later, drawn)
    is_new = chance < shares.future + shares.goals
    return transitions._replace(goals=torch.where(is_new[:, None], new, transitions.goals))


class Goals:
    """The distribution of the goals of practice."""

    def __init__(self, kind: str, known: Tensor, generator: torch.Generator) -> None:
        """`known` (N, D) are the codes of the training pictures."""
        self.kind, self.known, self.generator = kind, known, generator
        self.mean, self.deviation = known.mean(dim=0), known.std(dim=0, correction=0)

    def draw(self, count: int) -> Tensor:
        """Draw codes (count, D)."""
        if self.kind in ("data", "skew"):
            return self.known[torch.randint(len(self.known), (count,), generator=self.generator)]
        normal = torch.randn(count, self.known.shape[1], generator=self.generator)
        return normal if self.kind == "prior" else self.mean + self.deviation * normal
