"""The base class of environments: batches of seeded episodes of one control problem, in NumPy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import numpy as np

from sslrun.errors import UserError
from sslrun.registry import Options, Registry


class Step(NamedTuple):
    """What the actions of B episodes led to."""

    states: np.ndarray
    """(B, S) float32: the next states; those of finished episodes do not change."""
    rewards: np.ndarray
    """(B,) float64; 0 in episodes that were finished before."""
    done: np.ndarray
    """(B,) bool: whether the episode is finished."""


class Environment(ABC):
    """A batch of episodes of one control problem.

    `reset` begins an episode for each seed, and `step` acts in all of them. Every random draw of an
    episode follows from its own seed, so that the size of a batch changes nothing. An environment
    is named by a string, such as `point`, `point:wall` or `gymnasium:Pendulum-v1`; the part after
    the colon is the variant.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    """Raise it when the same name comes to mean another problem."""
    variants: ClassVar[tuple[str, ...] | None] = ("",)
    """Accepted variants; None: any, which the class checks itself."""
    Options: ClassVar[type[Options]] = Options
    """Settings: none, because an environment is named by one string."""
    has_goals: ClassVar[bool] = False
    """Whether the problem is to reach a state, which `goals` returns."""
    reference: tuple[float, float] | None = None
    """Mean return of random actions, and of an expert: 0 and 100 of the normalized return."""
    state_size: int
    """Size S of a state."""
    actions: int
    """Number of discrete actions, or the size A of a vector."""
    low: tuple[float, ...] | None = None
    """Lower bounds of an action's numbers; None: actions are discrete."""
    high: tuple[float, ...] | None = None
    """Upper bounds of an action's numbers."""
    horizon: int
    """Largest number of steps in an episode."""
    scale: float = 1.0
    """The size of typical returns, by which networks divide them."""

    def __init__(self, variant: str = "") -> None:
        """Raises UserError if there is no such variant, or if a package is missing."""
        self.variant = variant
        if self.variants is not None and variant not in self.variants:
            known = [f"{self.name}:{one}" if one else self.name for one in self.variants]
            raise UserError(
                f"no such environment: '{self.name}:{variant}'; there is: {', '.join(known)}"
            )

    @property
    def title(self) -> str:
        """The string that `make_environment` makes an equal environment of."""
        return f"{self.name}:{self.variant}" if self.variant else self.name

    @property
    def is_discrete(self) -> bool:
        return self.low is None

    @abstractmethod
    def reset(self, seeds: Sequence[int]) -> np.ndarray:
        """Begin an episode for each seed, and return the first states (B, S) float32."""

    @abstractmethod
    def step(self, actions: np.ndarray) -> Step:
        """Act in every episode: actions (B,) int64, or (B, A) float32 within the bounds."""

    def reset_to(self, states: np.ndarray) -> np.ndarray:
        """Begin an episode in each of the states (B, S), and return them as float32.

        Raises:
            UserError: episodes cannot begin in given states.
        """
        raise UserError(f"{self.title}: its episodes cannot begin in a given state: take point")

    def is_free(self, states: np.ndarray) -> np.ndarray:
        """Whether states (..., S) can be reached, so that they are outside of walls: (...) bool."""
        return np.ones(states.shape[:-1], bool)

    def random_actions(self, uniform: np.ndarray) -> np.ndarray:
        """Actions of the policy that collects random data, from draws (B, A) in [0, 1).

        Discrete actions read the first column.
        """
        if self.low is None or self.high is None:
            return np.minimum((uniform[:, 0] * self.actions).astype(np.int64), self.actions - 1)
        low, high = np.array(self.low, dtype=np.float32), np.array(self.high, dtype=np.float32)
        return (low + uniform * (high - low)).astype(np.float32)

    def expert_actions(self) -> np.ndarray:
        """The actions of a scripted expert in the current states.

        Raises:
            UserError: there is none.
        """
        raise UserError(
            f"{self.title}: has no scripted expert: take behavior: random, or trajectories of your "
            "own (data: trajectories)"
        )

    def goals(self) -> np.ndarray:
        """The state (B, S) float32 that each episode should end in; see `has_goals`."""
        raise NotImplementedError

    def picture(self) -> np.ndarray:
        """Pictures (B, 3, H, W) uint8 of the current states.

        Raises:
            UserError: the environment has no pictures.
        """
        raise UserError(f"{self.title}: this environment has no pictures: take point or gymnasium")


environments: Registry[Environment] = Registry("environment")


def make_environment(title: str) -> Environment:
    """Make an environment from its name and variant, such as `point:wall`.

    Raises:
        UserError: There is no such environment, or a package is missing.
    """
    name, _, variant = title.partition(":")
    return environments[name](variant)
