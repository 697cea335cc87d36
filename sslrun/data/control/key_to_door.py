"""Key-to-Door: three rooms, and a reward that only an early action makes possible."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sslrun.data.control.environments import Environment, Step, environments

SIDE = 3
"""Side of a room, in cells."""
STAY = 5
"""Number of steps in each room."""
ROOMS = 3
KEY, DOOR = (0, 0), (SIDE - 1, SIDE - 1)
"""Cells of the key in the first room and of the door in the last."""
MOVES = np.array([[0, 1], [0, -1], [1, 0], [-1, 0]])
"""Right, left, down, up: changes of (row, column)."""


@environments.register("key-to-door")
class KeyToDoor(Environment):
    """Take the key in the first room, pass an empty room, and open the door in the third.

    After Mesnard et al. (ICML 2021), as in Chen et al. 2021. The reward is 1 at the door if the key
    was taken, which ends the episode, and 0 otherwise. The state shows the room, the cell, and the
    key while it lies there; it does not show later whether the key was taken. Rooms have 3x3 cells
    and are left after 5 steps; each begins at a random cell. Sizes are our choice.
    """

    state_size = ROOMS + SIDE * SIDE + 1
    actions = len(MOVES)
    horizon = ROOMS * STAY
    reference = (0.087, 1.0)  # of random actions, measured over 20,000 episodes

    def __init__(self, variant: str = "") -> None:
        super().__init__(variant)
        self.cells = np.zeros((0, 2), np.int64)
        self.starts = np.zeros((0, ROOMS, 2), np.int64)
        self.has_key = self.done = np.zeros(0, bool)
        self.steps = 0

    @property
    def room(self) -> int:
        return min(self.steps // STAY, ROOMS - 1)

    def reset(self, seeds: Sequence[int]) -> np.ndarray:
        drawn = [np.random.default_rng(seed).integers(SIDE, size=(ROOMS, 2)) for seed in seeds]
        self.starts = np.reshape(drawn, (len(seeds), ROOMS, 2))
        self.cells, self.steps = self.starts[:, 0], 0
        self.done = np.zeros(len(seeds), bool)
        self.has_key = (self.cells == KEY).all(axis=1)
        return self._states()

    def step(self, actions: np.ndarray) -> Step:
        moved = np.clip(self.cells + MOVES[actions], 0, SIDE - 1)
        self.cells = np.where(self.done[:, None], self.cells, moved)
        if self.room == 0:
            self.has_key = self.has_key | (self.cells == KEY).all(axis=1)
        opened = (self.room == ROOMS - 1) & self.has_key & (self.cells == DOOR).all(axis=1)
        rewards = np.where(opened & ~self.done, 1.0, 0.0)
        self.done = self.done | opened
        self.steps += 1
        if self.steps % STAY == 0 and self.steps < self.horizon:
            self.cells = np.where(self.done[:, None], self.cells, self.starts[:, self.room])
        self.done = self.done | (self.steps >= self.horizon)
        return Step(self._states(), rewards, self.done.copy())

    def expert_actions(self) -> np.ndarray:
        """Move to the key, or to the door: first along rows, then along columns."""
        down, right = (np.array(DOOR if self.room else KEY) - self.cells).T
        along_row = np.where(right > 0, 0, 1)
        return np.where(down > 0, 2, np.where(down < 0, 3, along_row))

    def _states(self) -> np.ndarray:
        rooms = np.eye(ROOMS, dtype=np.float32)[np.full(len(self.cells), self.room)]
        cells = np.eye(SIDE * SIDE, dtype=np.float32)[self.cells @ np.array([SIDE, 1])]
        key = (~self.has_key & (self.room == 0)).astype(np.float32)[:, None]
        return np.concatenate([rooms, cells, key], axis=1)
