"""Shortest paths in a fixed random directed graph: the appendix experiment of its paper."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sslrun.data.control.environments import Environment, Step, environments

NODES = 20
EDGES = 0.1
"""Probability of each directed edge."""
GRAPH_SEED = 0


@environments.register("paths")
class Paths(Environment):
    """Walk to the goal in a fixed random directed graph of 20 nodes (Chen et al. 2021, appendix).

    The state is the node and the action the node to go to; without such an edge the walk stays. The
    reward is -1 for every step from another node than the goal, and 0 at the goal, where the walk
    stays. Episodes have 10 steps and begin at a random node from which the goal can be reached. So
    the return is minus the number of steps to the goal. Random data follow random edges. The goal
    is our choice: the node that can be reached from most others.
    """

    has_goals = True
    state_size = actions = NODES
    horizon = 10
    scale = 10.0

    def __init__(self, variant: str = "") -> None:
        super().__init__(variant)
        generator = np.random.default_rng(GRAPH_SEED)
        self.edges = (generator.random((NODES, NODES)) < EDGES) & ~np.eye(NODES, dtype=bool)
        lengths = shortest_paths(self.edges)
        self.goal = int(np.isfinite(lengths).sum(axis=0).argmax())
        self.edges[self.goal] = False  # a walk at the goal stays there
        self.distances = shortest_paths(self.edges)[:, self.goal]
        """(20,): number of steps to the goal; infinite if there is no path."""
        reachable = np.isfinite(self.distances) & (self.distances > 0)
        self.starts = np.flatnonzero(reachable & (self.distances <= self.horizon))
        self.reference = self._random_return(), -float(self.distances[self.starts].mean())
        self.nodes = np.zeros(0, np.int64)
        self.steps = 0

    def reset(self, seeds: Sequence[int]) -> np.ndarray:
        drawn = [np.random.default_rng(seed).integers(len(self.starts)) for seed in seeds]
        self.nodes, self.steps = self.starts[drawn], 0
        return self._states()

    def step(self, actions: np.ndarray) -> Step:
        rewards = -(self.nodes != self.goal).astype(np.float64)
        self.nodes = np.where(self.edges[self.nodes, actions], actions, self.nodes)
        self.steps += 1
        done = np.full(len(self.nodes), self.steps >= self.horizon)
        return Step(self._states(), rewards, done)

    def random_actions(self, uniform: np.ndarray) -> np.ndarray:
        """A random next node along an edge; a node without edges is left by none."""
        edges = self.edges[self.nodes]
        rank = (uniform[:, 0] * edges.sum(axis=1)).astype(np.int64)
        chosen = (edges & (edges.cumsum(axis=1) == rank[:, None] + 1)).argmax(axis=1)
        return np.where(edges.any(axis=1), chosen, self.nodes)

    def expert_actions(self) -> np.ndarray:
        """The next node on a shortest path."""
        return np.where(self.edges[self.nodes], self.distances, np.inf).argmin(axis=1)

    def goals(self) -> np.ndarray:
        return np.eye(NODES, dtype=np.float32)[np.full(len(self.nodes), self.goal)]

    def _states(self) -> np.ndarray:
        return np.eye(NODES, dtype=np.float32)[self.nodes]

    def _random_return(self) -> float:
        """The expected return of random edges: minus the expected number of steps off the goal."""
        degrees = self.edges.sum(axis=1, keepdims=True)
        moves = np.where(degrees > 0, self.edges / np.maximum(degrees, 1), np.eye(NODES))
        places = np.zeros(NODES)
        places[self.starts] = 1 / len(self.starts)
        total = 0.0
        for _ in range(self.horizon):
            total -= 1 - places[self.goal]
            places = places @ moves
        return float(total)


def shortest_paths(edges: np.ndarray) -> np.ndarray:
    """Number of steps (N, N) from each node to each other one, from edges (N, N) bool.

    Infinite if there is no path.
    """
    count = len(edges)
    lengths = np.where(np.eye(count, dtype=bool), 0.0, np.inf)
    reached = np.eye(count, dtype=bool)
    for steps in range(1, count):
        further = (reached.astype(int) @ edges > 0) & np.isinf(lengths)
        lengths[further] = steps
        reached = further
    return lengths
