"""Collect trajectories by scripted policies, and keep them in the cache."""

from __future__ import annotations

from dataclasses import fields
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from sslrun.data.cache import cache_entry, cache_root, digest_key
from sslrun.data.control.environments import Environment, make_environment
from sslrun.data.control.trajectories import Episodes, join_episodes
from sslrun.seeds import derive_seed

Behavior = Literal["random", "medium", "expert", "medium-expert", "replay"]

MEDIUM_NOISE = 0.5
"""Share of random actions of the medium policy; our choice."""
PARALLEL = 250
"""Episodes collected at a time, to limit the number of environments."""
VERSION = 1
"""Raise it when the same settings come to give other trajectories."""


def noise_levels(behavior: Behavior, count: int) -> np.ndarray:
    """The share (count,) of random actions in each trajectory; the others are the expert's.

    D4RL (Fu et al. 2020) has data of the same names, made by policies that were learned.
    """
    match behavior:
        case "random":
            return np.ones(count)
        case "medium":
            return np.full(count, MEDIUM_NOISE)
        case "expert":
            return np.zeros(count)
        case "medium-expert":
            return np.where(np.arange(count) % 2, 0.0, MEDIUM_NOISE)
        case "replay":
            return np.linspace(1, 0, count)


def collect(title: str, behavior: Behavior, count: int, seed: int) -> Episodes:
    """Play `count` episodes in the environment `title`, or read them from the cache.

    The seed of an episode follows from `seed` and its number, so that the first trajectories of a
    larger number are the same, except with `replay`.

    Raises:
        UserError: the environment does not exist or has no scripted expert, or the cache cannot be
            written.
    """
    settings = [title, behavior, count, seed, VERSION]
    path = cache_root() / "control" / f"{digest_key(settings)}.safetensors"

    def compute() -> tuple[dict[str, Tensor], dict[str, str]]:
        environment, parts = make_environment(title), []
        for numbers in np.array_split(np.arange(count), -(-count // PARALLEL)):
            seeds = [derive_seed(seed, number) for number in numbers.tolist()]
            parts.append(play(environment, seeds, noise_levels(behavior, count)[numbers]))
        whole = join_episodes(parts)
        tensors = {field.name: getattr(whole, field.name) for field in fields(whole)}
        return tensors, {"made": f"{count} episodes of {title}, behavior {behavior}, seed {seed}"}

    return Episodes(**cache_entry(path, compute)[0])


def play(environment: Environment, seeds: list[int], noise: np.ndarray) -> Episodes:
    """Play one episode for each seed, with a share `noise` (B,) of random actions."""
    width = environment.actions
    draws = np.stack([_draw_policy(seed, environment.horizon, width) for seed in seeds])
    state, done = environment.reset(seeds), np.zeros(len(seeds), bool)
    states, actions, rewards, running = [], [], [], []
    for time in range(environment.horizon):
        is_random = draws[:, time, 0] < noise
        action = _choose(environment, is_random, draws[:, time, 1:])
        states.append(state)
        actions.append(action)
        running.append(~done)
        state, reward, done = environment.step(action)
        rewards.append(reward)
        if done.all():
            break
    kept = np.stack(running, axis=1)
    columns = [np.stack(rows, axis=1)[kept] for rows in (states, actions, rewards)]
    starts = np.concatenate([[0], kept.sum(axis=1).cumsum()])
    return Episodes(*map(torch.from_numpy, (*columns, starts)))


def _draw_policy(seed: int, horizon: int, width: int) -> np.ndarray:
    """The policy's draws (horizon, 1 + width) in an episode, apart from the environment's."""
    return np.random.default_rng(derive_seed(seed, 1)).random((horizon, 1 + width))


def _choose(environment: Environment, is_random: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Random actions where `is_random` (B,), the expert's elsewhere."""
    actions = environment.random_actions(uniform)
    if is_random.all():
        return actions
    expert = environment.expert_actions()
    return np.where(is_random if actions.ndim == 1 else is_random[:, None], actions, expert)
