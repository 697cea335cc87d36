"""A point that moves in a square, with pictures: the smallest environment with goals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sslrun.data.control.environments import Environment, Step, environments

PIXELS = 48
"""Side of pictures."""
RADIUS = 1 / 6
"""Radius of the drawn point: 4 pixels."""
MOVE = 0.1
"""Largest move in a step along each axis."""
TARGET = np.array([0.0, 0.0], dtype=np.float32)
"""The position that rewards ask for; with the wall it is inside the U."""
WALLS = np.array([
    [-0.6, -0.45, -0.6, 0.4],
    [0.45, 0.6, -0.6, 0.4],
    [-0.6, 0.6, -0.6, -0.45],
], dtype=np.float32)  # fmt: skip
"""The U as rectangles (left, right, bottom, top), open at the top; thicker than a move."""
REFERENCES = {"": (-23.2, -2.4), "wall": (-23.8, -6.7)}
"""Variant -> mean returns of random actions and of the expert, measured over 20,000 episodes."""
CLEARANCE = 0.1
"""Distance from the wall at which the expert passes it."""


@environments.register("point")
class Point(Environment):
    """A point in [-1, 1]^2 that should stay near the center, with pictures of 48 pixels.

    An action moves it by at most 0.1 along each axis. The reward is minus the distance from the
    center. `point:wall` has a U-shaped wall around the center, open at the top, along which the
    point slides. Pictures show the point, the wall, and no target.
    """

    has_goals = True
    variants = ("", "wall")
    state_size = 2
    actions = 2
    low, high = (-MOVE, -MOVE), (MOVE, MOVE)
    horizon = 30
    scale = 10.0

    def __init__(self, variant: str = "") -> None:
        super().__init__(variant)
        self.reference = REFERENCES[variant]
        self.walls = WALLS if variant == "wall" else WALLS[:0]
        self.positions = np.zeros((0, 2), np.float32)
        self.steps = 0

    def reset(self, seeds: Sequence[int]) -> np.ndarray:
        """Begin at random free positions."""
        return self.reset_to(self.draw_positions(seeds))

    def reset_to(self, positions: np.ndarray) -> np.ndarray:
        """Begin at given free positions (B, 2)."""
        self.positions, self.steps = np.array(positions, dtype=np.float32), 0
        return self.positions.copy()

    def draw_positions(self, seeds: Sequence[int]) -> np.ndarray:
        """Draw a free position (B, 2) float32 for each seed, uniformly, as starts or goals."""
        drawn = [np.random.default_rng(seed).uniform(-1, 1, (64, 2)) for seed in seeds]
        candidates = np.array(drawn, dtype=np.float32).reshape(len(drawn), 64, 2)
        first_free = self.is_free(candidates).argmax(axis=1)
        return candidates[np.arange(len(drawn)), first_free]

    def is_free(self, positions: np.ndarray) -> np.ndarray:
        """Whether positions (..., 2) are outside of walls: (...) bool."""
        x, y = positions[..., 0, None], positions[..., 1, None]
        left, right, bottom, top = self.walls.T
        return ~((x > left) & (x < right) & (y > bottom) & (y < top)).any(axis=-1)

    def step(self, actions: np.ndarray) -> Step:
        """Move along x, then along y; a move into a wall is left out, so that the point slides."""
        moves = np.clip(actions, -MOVE, MOVE).astype(np.float32)
        for axis in (0, 1):
            moved = self.positions.copy()
            moved[:, axis] = np.clip(moved[:, axis] + moves[:, axis], -1, 1)
            free = self.is_free(moved)
            self.positions = np.where(free[:, None], moved, self.positions)
        self.steps += 1
        rewards = -np.linalg.norm(self.positions.astype(np.float64) - TARGET, axis=1)
        done = np.full(len(self.positions), self.steps >= self.horizon)
        return Step(self.positions.copy(), rewards, done)

    def expert_actions(self) -> np.ndarray:
        """Move straight to the center; around the wall and in from above if there is one."""
        waypoints = np.broadcast_to(TARGET, self.positions.shape)
        if len(self.walls):
            waypoints = self._around_wall()
        return np.clip(waypoints - self.positions, -MOVE, MOVE)

    def _around_wall(self) -> np.ndarray:
        """The next waypoint (B, 2) float32 on a way to the center that leaves the wall aside."""
        x, y = self.positions.T
        (left, inner_left, _, top), (inner_right, right, _, _), (_, _, _, floor) = WALLS
        inside = (x > inner_left) & (x < inner_right) & (y > floor)
        above = y > top
        beside = (x < left) | (x > right)
        side = np.where(x < 0, left - CLEARANCE, right + CLEARANCE)
        waypoint_x = np.where(inside | above, 0, np.where(beside, x, side))
        waypoint_y = np.where(inside, 0, np.where(above | ~beside, y, top + CLEARANCE))
        return np.stack([waypoint_x, waypoint_y], axis=1).astype(np.float32)

    def goals(self) -> np.ndarray:
        return np.broadcast_to(TARGET, self.positions.shape).copy()

    def picture(self) -> np.ndarray:
        return self.draw(self.positions)

    def draw(self, positions: np.ndarray) -> np.ndarray:
        """Pictures (B, 3, 48, 48) uint8 of any positions (B, 2), drawn on black.

        The point is yellow and walls are gray. Autoencoders learn a black ground at once, and a
        white one slowly.
        """
        centers = (np.arange(PIXELS, dtype=np.float32) + 0.5) / PIXELS * 2 - 1
        x, y = centers[None, None, :], -centers[None, :, None]
        place = np.array(positions, dtype=np.float32)[:, :, None, None]
        distance = np.sqrt((x - place[:, 0]) ** 2 + (y - place[:, 1]) ** 2)
        # Coverage falls over one pixel at the border, so that small moves change the picture.
        coverage = np.clip((RADIUS - distance) * PIXELS / 2 + 0.5, 0, 1)[:, None]
        grid = np.stack(np.broadcast_arrays(x[0], y[0]), axis=-1)
        background = np.where(self.is_free(grid), 0.0, 0.5).astype(np.float32)
        color = np.array([1.0, 0.9, 0.2], dtype=np.float32)[:, None, None]
        canvas = background * (1 - coverage) + color * coverage
        return (canvas * 255).round().astype(np.uint8)
