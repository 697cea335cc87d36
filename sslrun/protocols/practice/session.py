"""One practice: rounds of episodes, then of learning."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sslrun.protocols.practice.episodes import Arena, Policy
from sslrun.protocols.practice.learners import Contrastive, Td3
from sslrun.protocols.practice.options import PracticeOptions
from sslrun.protocols.practice.replay import Goals, Replay
from sslrun.protocols.practice.spaces import Space
from sslrun.seeds import derive_seed
from sslrun.tasks.reach import BINS, Cells

PRACTICE = 2_000
"""Distinguishes the seeds of episodes of practice from those of tests and data."""
SKEW_BINS = {"latent": 5, "state": BINS}
"""Number of cells along each axis by which the density of visited codes is estimated."""
NOISE = 0.2
"""Deviation of the exploration, as a share of an action's largest size."""


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread: for such small networks several are many times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Session:
    """One practice: rounds of episodes, then of learning."""

    def __init__(
        self,
        options: PracticeOptions,
        arena: Arena,
        space: Space,
        known: Tensor,
        seed: int,
        device: torch.device,
    ) -> None:
        """`known` (N, D) are the codes of the training pictures."""
        self.options, self.arena, self.space = options, arena, space
        self.seed, self.device = seed, device
        self.generator = torch.Generator().manual_seed(derive_seed(seed, PRACTICE, 0))
        self.goals = Goals(options.goals, known, self.generator)
        cells = Cells(known, SKEW_BINS[options.space])
        self.replay = Replay(arena.task.spec, arena.horizon, cells, options.alpha)
        self.learner = self._build_learner(known.shape[1])
        self.played: list[Tensor] = []
        self.acting = self.learning = 0.0
        self.gradient_steps = 0

    def _build_learner(self, width: int) -> Td3 | Contrastive | None:
        """Weights follow from torch's seed. None: actions are random."""
        if self.options.learner == "random":
            return None
        cls = Td3 if self.options.learner == "td3" else Contrastive
        learner = cls(width, self.arena.environment.actions, self.options, self.generator)
        learner.networks.to(self.device)
        return learner

    @property
    def visited(self) -> Tensor:
        """The states (N, S) that practice has visited."""
        return torch.cat(self.played).flatten(0, 1)

    def practice(self) -> None:
        """Play and learn until the steps are used up."""
        options = self.options
        per_round = options.parallel * self.arena.horizon
        for number in range(-(-options.steps // per_round)):
            began = time.monotonic()
            self._play(number, explores=number * per_round < options.warmup)
            played = time.monotonic()
            if self.learner is not None:
                with _one_thread():
                    self._learn(self.learner, round(options.updates * per_round))
            self.acting += played - began
            self.learning += time.monotonic() - played

    def _play(self, number: int, explores: bool) -> None:
        """Play a round; if it `explores`, with random actions."""
        goals = self.goals.draw(self.options.parallel)
        first = number * self.options.parallel
        seeds = [derive_seed(PRACTICE, self.seed, first + one) for one in range(len(goals))]
        policy = self._act_randomly if explores else self.policy(goals, explores=True)
        episodes = self.arena.play(self.space, seeds, policy)
        self.replay.add(episodes, goals)
        self.played.append(episodes.states)
        if self.options.goals == "skew":
            self.goals.known = self.replay.reached[self.replay.order(self.seed, number)]

    def _learn(self, learner: Td3 | Contrastive, count: int) -> None:
        for _ in range(count):
            shape = (self.options.batch,)
            steps = torch.randint(len(self.replay), shape, generator=self.generator)
            batch = learner.read(self.replay, steps, self.goals).to(self.device)
            noise = torch.randn(batch.actions.shape, generator=self.generator)
            learner.learn(batch, noise.to(self.device))
        self.gradient_steps += count

    def policy(self, goals: Tensor, explores: bool = False) -> Policy:
        """The policy toward goals (B, D), with noise if it `explores`."""
        learner = self.learner
        if learner is None:
            return self._act_randomly

        @torch.no_grad()
        def act(codes: Tensor) -> Tensor:
            actions = learner.act(codes.to(self.device), goals.to(self.device)).cpu()
            if not explores:
                return actions
            noise = torch.randn(actions.shape, generator=self.generator)
            return (actions + NOISE * noise).clamp(-1, 1)

        return act

    def _act_randomly(self, codes: Tensor) -> Tensor:
        shape = (len(codes), self.arena.environment.actions)
        return 2 * torch.rand(shape, generator=self.generator) - 1

    def describe(self) -> dict[str, Any]:
        """The budget that was used, and the speed, as JSON values."""
        steps = len(self.replay)
        speeds = {"environment_steps_a_second": round(steps / self.acting, 1)}
        if self.learner is not None:
            speeds["gradient_steps_a_second"] = round(self.gradient_steps / self.learning, 1)
        used = {"environment_steps": steps, "gradient_steps": self.gradient_steps}
        return {**used, **speeds, "horizon": self.arena.horizon}
