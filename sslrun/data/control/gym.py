"""Environments of gymnasium, as a loop over single ones."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from sslrun.data.control.environments import Environment, Step, environments
from sslrun.errors import UserError

REFERENCES = {
    "Hopper": (-20.272305, 3234.3),
    "HalfCheetah": (-280.178953, 12135.0),
    "Walker2d": (1.629008, 4592.3),
    "Pendulum": (-1220.0, -150.0),
}
"""Name without its version -> mean returns of random actions and of an expert. Those of MuJoCo are
D4RL's (Fu et al. 2020, arXiv:2004.07219; d4rl/infos.py of its code); Pendulum's are those of
uniform torques and of `swing_up`, measured by us over 1,000 episodes and rounded."""
SCALES = {"Hopper": 1000.0, "HalfCheetah": 1000.0, "Walker2d": 1000.0, "Pendulum": 1000.0}
"""Divisors of returns; those of MuJoCo as in the code of Chen et al. 2021, Pendulum's ours."""
LONGEST = 1000
"""Horizon of environments that state none."""


@environments.register("gymnasium")
class Gymnasium(Environment):
    """An environment of gymnasium by its name, as in gymnasium:Pendulum-v1; needs the extra.

    States and actions must be vectors, or actions discrete. Pictures are rendered without a
    display. Each episode has an environment of its own, seeded by the episode's seed.
    """

    variants = None

    def __init__(self, variant: str = "") -> None:
        super().__init__(variant)
        self.family = variant.rpartition("/")[2].partition("-v")[0]
        first = self._make()
        self.state_size = _size_of(first.observation_space, self.title)
        self.horizon = first.spec.max_episode_steps or LONGEST
        self.scale = SCALES.get(self.family, 1.0)
        self.reference = REFERENCES.get(self.family)
        actions = first.action_space
        if hasattr(actions, "n"):
            self.actions = int(actions.n)
        else:
            self.actions = _size_of(actions, self.title)
            self.low = tuple(map(float, actions.low.flatten()))
            self.high = tuple(map(float, actions.high.flatten()))
            if not np.isfinite([self.low, self.high]).all():
                raise UserError(f"{self.title}: its actions have no bounds: take another one")
        self.envs = [first]
        self.states = np.zeros((0, self.state_size), np.float32)
        self.done = np.zeros(0, bool)
        self.steps = 0

    def _make(self) -> Any:
        """Make one environment, which renders to arrays if it can render at all.

        Raises UserError if a package is missing, or if there is no such environment.
        """
        try:
            import gymnasium
        except ImportError:
            raise UserError(
                f"{self.title}: needs the package gymnasium: pip install 'sslrun[control]'"
            ) from None
        try:
            modes = gymnasium.make(self.variant).metadata.get("render_modes", ())
            mode = "rgb_array" if "rgb_array" in modes else None
            return gymnasium.make(self.variant, render_mode=mode)
        except (gymnasium.error.Error, ImportError) as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise UserError(f"{self.title}: gymnasium cannot make it: {reason}") from None

    def reset(self, seeds: Sequence[int]) -> np.ndarray:
        while len(self.envs) < len(seeds):
            self.envs.append(self._make())
        firsts = [env.reset(seed=seed)[0] for env, seed in zip(self.envs, seeds, strict=False)]
        self.states = np.stack([np.array(first, dtype=np.float32).flatten() for first in firsts])
        self.done = np.zeros(len(seeds), bool)
        self.steps = 0
        return self.states.copy()

    def step(self, actions: np.ndarray) -> Step:
        rewards = np.zeros(len(self.states))
        for index in np.flatnonzero(~self.done):
            action = int(actions[index]) if self.is_discrete else actions[index]
            state, reward, terminated, truncated, _ = self.envs[index].step(action)
            self.states[index] = np.array(state, dtype=np.float32).flatten()
            rewards[index] = reward
            self.done[index] = terminated or truncated
        self.steps += 1
        self.done |= self.steps >= self.horizon
        return Step(self.states.copy(), rewards, self.done.copy())

    def expert_actions(self) -> np.ndarray:
        if self.family != "Pendulum":
            return super().expert_actions()
        return swing_up(self.states)

    def picture(self) -> np.ndarray:
        """Render every episode to an array; no display is needed.

        Raises UserError if the environment has no pictures, or if a package is missing.
        """
        frames = [self._render(env) for env in self.envs[: len(self.states)]]
        return np.ascontiguousarray(np.stack(frames).transpose(0, 3, 1, 2))

    def _render(self, env: Any) -> np.ndarray:
        """One frame (H, W, 3) uint8."""
        import gymnasium

        if env.render_mode is None:
            super().picture()
        # MuJoCo opens a window's context unless it is asked for EGL.
        if not os.environ.get("DISPLAY"):
            os.environ.setdefault("MUJOCO_GL", "egl")
        try:
            return np.asarray(env.render(), dtype=np.uint8)
        except gymnasium.error.DependencyNotInstalled as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{self.title}: cannot be rendered: {reason}") from None


def _size_of(space: Any, title: str) -> int:
    """The number of values in a space of vectors. Raises UserError for any other space."""
    if getattr(space, "low", None) is None or not space.shape:
        raise UserError(
            f"{title}: its states or actions are {space}, and only vectors and discrete actions "
            "are supported: take another environment"
        )
    return int(np.prod(space.shape))


ENERGY_GAIN, ANGLE_GAIN, SPEED_GAIN = 1.0, 10.0, 2.0
NEAR_TOP = 0.5
"""Angle from the top, in radians, within which the expert balances instead of swinging up."""


def swing_up(states: np.ndarray) -> np.ndarray:
    """Torques (B, 1) that swing a pendulum up and balance it, from states (B, 3) of Pendulum.

    The angle accelerates by 15 sin(angle) + 3 torque, so that speed**2 / 2 + 15 (cos(angle) - 1)
    is its energy, 0 at rest at the top. Far from the top, energy is pumped toward 0; near it, the
    angle and the speed are damped.
    """
    cos, sin, speed = states.T
    angle = np.arctan2(sin, cos)
    energy = speed**2 / 2 + 15 * (cos - 1)
    pump = -ENERGY_GAIN * energy * np.where(speed == 0, 1, np.sign(speed))
    damp = -(ANGLE_GAIN * angle + SPEED_GAIN * speed)
    torque = np.where(np.abs(angle) < NEAR_TOP, damp, pump)
    return np.clip(torque, -2, 2)[:, None].astype(np.float32)
