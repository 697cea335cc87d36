"""Let a network act in the environment of its data, asked for several returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from sslrun.backbones.control import ControlBackbone, require_actions
from sslrun.data.control.collect import play
from sslrun.data.control.environments import Environment
from sslrun.data.control.trajectories import Episodes, Trajectories, WindowExamples
from sslrun.data.specs import ControlSpec
from sslrun.protocols.base import Bench, Protocol, Scores, protocols
from sslrun.registry import Options
from sslrun.seeds import derive_seed
from sslrun.tasks.base import Task, TaskOptions
from sslrun.tasks.returns import Returns

FAR = 3.0
"""A target this many times as far from the data's mean return as any of its returns is reported."""

TEST = 1_000
"""Distinguishes the seeds of test episodes from those of data."""

Target = Literal["best", "mean", "beyond"] | float


class EpisodesOptions(Options):
    """Options of protocols that act in an environment."""

    episodes: int = Field(20, ge=1)
    """Number of episodes for each asked return; all begin as those of other rows with the same
    seed."""


class RolloutOptions(EpisodesOptions):
    """Options of rollouts.

    Chen et al. 2021 play 100 episodes for each of two returns that they name per environment.
    """

    targets: tuple[Target, ...] = Field(("best", "mean", "beyond"), min_length=1)
    """Returns to ask for; the score is that of the first. best, mean: the best and the mean return
    of the data. beyond: half as far beyond the best as the mean is below it. Or numbers."""
    per_start: bool = False
    """Take best, mean and beyond over the trajectories with the episode's first state, if the data
    have any, instead of over all."""


class ActingProtocol(Protocol):
    """Base class of protocols that act in the environment of the data."""

    learns = False

    @classmethod
    def supports(cls, task: type[Task], options: TaskOptions) -> str | None:
        if issubclass(task, Returns):
            return None
        return f"acts in an environment, which '{task.name}' does not have: take task: returns"

    def refit_obstacle(self) -> str | None:
        return "learns nothing"


@protocols.register("rollout")
class Rollout(ActingProtocol):
    """Act in the environment, asked for several returns, with nothing trained.

    Chen et al., NeurIPS 2021 (arXiv:2106.01345), and evaluation/evaluate_episodes.py of its code:
    the first return is the target, and after each step the return to go falls by the reward. The
    last steps of a window's length are read. Discrete actions are the most likely ones. A network
    that was trained without returns acts once, and one trained on goals is given the environment's
    goal.
    """

    Options = RolloutOptions
    options: RolloutOptions

    def needs(self) -> tuple[str, ...]:
        return ("actions",)

    def own_metrics(self) -> tuple[str, ...]:
        """The normalized returns for further targets, and their correlation with the targets."""
        asked = [asked_metric(target) for target in self.options.targets[1:]]
        return (*asked, "rank_correlation")

    @torch.inference_mode()
    def run(self, bench: Bench) -> Scores:
        """Raises UserError if the backbone does not decide, or the environment cannot be made."""
        task, data = bench.task, bench.examples("train")
        backbone = require_actions(bench.backbone(), "rollout").eval()
        assert isinstance(task, Returns)
        assert isinstance(data, WindowExamples)
        environment = task.environment()
        seeds = episode_seeds(bench.seed, self.options.episodes)
        asks = backbone.condition == "return"
        results = []
        for target in self.options.targets if asks else self.options.targets[:1]:
            asked = self._resolve(target, data.episodes, environment.reset(seeds))
            if asks and is_far(asked, data.episodes):
                bench.say(
                    f"asked for a return of {asked.mean():g}, but those of the data are "
                    f"{describe_range(data.episodes)}: the network extrapolates"
                )
            results.append(Result(target, asked, act(backbone, environment, seeds, asked)))
        metrics = task.score(compare(results, float(data.episodes.totals.max())), data)
        for result in results[1:]:
            metrics[asked_metric(result.target)] = float(
                task.normalize(torch.from_numpy(result.achieved)).mean()
            )
        details = {"rollouts": [result.as_dict(asks) for result in results]}
        return Scores(dict.fromkeys(bench.tests, metrics), details)

    def _resolve(self, target: Target, data: Episodes, first: np.ndarray) -> np.ndarray:
        """The return (B,) float64 to ask for in episodes that begin in the states (B, S)."""
        if not isinstance(target, str):
            return np.full(len(first), target, dtype=np.float64)
        totals, starts = data.totals.numpy(), data.first_states.numpy()
        asked = []
        for state in first:
            same = (starts == state).all(axis=1)
            known = totals[same] if self.options.per_start and same.any() else totals
            best, mean = known.max(), known.mean()
            asked.append({"best": best, "mean": mean, "beyond": best + (best - mean) / 2}[target])
        return np.array(asked)


@dataclass(frozen=True)
class Result:
    """The episodes that were asked for one target."""

    target: Target
    asked: np.ndarray
    """(B,): the return that was asked for."""
    achieved: np.ndarray
    """(B,): the return."""

    def as_dict(self, asks: bool) -> dict[str, Any]:
        """The means as JSON values, and the returns of all episodes."""
        asked = {"target": self.target, "asked": float(self.asked.mean())} if asks else {}
        return {**asked, "achieved": float(self.achieved.mean()), "returns": self.achieved.tolist()}


def asked_metric(target: Target) -> str:
    """The name of the normalized return for a target among the metrics."""
    return f"asked_{target if isinstance(target, str) else format(target, 'g')}"


def compare(results: Sequence[Result], best: float) -> Tensor:
    """Asked and achieved returns (B, T, 2) for the first target and those up to the data's best."""
    first, *others = results
    within = [one for one in others if one.target != "beyond" and one.asked.max() <= best]
    pairs = [np.stack([one.asked, one.achieved], axis=-1) for one in (first, *within)]
    return torch.from_numpy(np.stack(pairs, axis=1))


def episode_seeds(seed: int, count: int) -> list[int]:
    """Seeds of test episodes, apart from those of data."""
    return [derive_seed(TEST, seed, number) for number in range(count)]


def is_far(asked: np.ndarray, data: Episodes) -> bool:
    """Whether a return is more than `FAR` times as far from the data's mean as any of theirs."""
    mean = float(data.totals.mean())
    return bool(np.abs(asked - mean).max() > FAR * (data.totals - mean).abs().max())


def describe_range(data: Episodes) -> str:
    """The lowest and the highest return of the data, in words."""
    return f"from {float(data.totals.min()):g} to {float(data.totals.max()):g}"


def act(
    backbone: ControlBackbone, environment: Environment, seeds: Sequence[int], asked: np.ndarray
) -> np.ndarray:
    """Let a network act in an episode for each seed, asked for the returns `asked` (B,).

    Returns the returns (B,) float64. The network is in eval mode.
    """
    states = [environment.reset(seeds)]
    goals = environment.goals() if environment.has_goals else np.zeros_like(states[0])
    actions: list[np.ndarray] = []
    to_go, total = [asked], np.zeros(len(seeds))
    for _ in range(environment.horizon):
        window = last_steps(states, actions, to_go, goals, backbone.spec)
        actions.append(choose(backbone, window))
        step = environment.step(actions[-1])
        states.append(step.states)
        to_go.append(to_go[-1] - step.rewards)
        total += step.rewards
        if step.done.all():
            break
    return total


def last_steps(
    states: Sequence[np.ndarray],
    actions: Sequence[np.ndarray],
    to_go: Sequence[np.ndarray],
    goals: np.ndarray,
    spec: ControlSpec,
) -> Trajectories:
    """The last steps of running episodes, as many as a window holds; the last action is zero."""
    count, first = len(goals), max(0, len(states) - spec.context)
    shape, dtype = ((count,), np.int64) if spec.is_discrete else ((count, spec.actions), np.float32)
    known = [*actions[first:], np.zeros(shape, dtype)]
    times = torch.arange(first, len(states)).expand(count, -1)
    return Trajectories(
        torch.from_numpy(np.stack(states[first:], axis=1)),
        torch.from_numpy(np.stack(known, axis=1)),
        torch.from_numpy(np.stack(to_go[first:], axis=1)).float(),
        times,
        torch.ones(times.shape, dtype=torch.bool),
        torch.from_numpy(goals),
    )


def choose(backbone: ControlBackbone, window: Trajectories) -> np.ndarray:
    """The actions after the last states of windows: (B,) int64, or (B, A) float32 in bounds."""
    window = window.to(backbone.conditions.device)
    predicted = backbone.predict_actions(backbone(window))[:, -1]
    if backbone.spec.is_discrete:
        return predicted.argmax(dim=-1).cpu().numpy()
    return backbone.unscale_actions(predicted).cpu().numpy()


@protocols.register("random-actions")
class RandomActions(ActingProtocol):
    """Take the random actions that random data are made of: the baseline of `rollout`."""

    Options = EpisodesOptions
    options: EpisodesOptions
    initial = True

    def run(self, bench: Bench) -> Scores:
        """Raises UserError if the environment cannot be made."""
        task = bench.task
        assert isinstance(task, Returns)
        environment, count = task.environment(), self.options.episodes
        returns = play(environment, episode_seeds(bench.seed, count), np.ones(count)).totals
        metrics = task.score(returns[:, None, None].expand(-1, 1, 2), bench.examples("train"))
        return Scores(dict.fromkeys(bench.tests, metrics), {"returns": returns.tolist()})
