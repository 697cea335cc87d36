"""Reach goals that are given as pictures of an environment."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from sslrun.data.control.environments import Environment, make_environment
from sslrun.data.control.pictures import render
from sslrun.data.examples import Batch, Examples
from sslrun.data.image.augment import to_float
from sslrun.data.specs import ImageSpec
from sslrun.errors import UserError
from sslrun.metric import Metric
from sslrun.tasks.base import Task, TaskOptions, tasks

NEIGHBORS = 5
"""Number of nearest pictures whose states are averaged to read a state from a code."""
BINS = 10
"""Number of cells along each axis of the states whose visits coverage counts."""


class ReachOptions(TaskOptions):
    """Options of a task without a head."""

    environment: str = "point"
    """Environment to act in, such as point or point:wall; pictures of goals should be of it."""
    within: float = Field(0.1, gt=0)
    """Distance from the goal's state at which the goal is reached."""

    @property
    def linear(self) -> bool:
        return False


@tasks.register("reach")
class Reach(Task):
    """Bring an environment to the state that a picture shows; scored by true distances.

    `success` is the share of episodes that end near the goal and is in percent; `final_distance` is
    the mean distance at the end. Both are of true states, because distances of codes cannot be
    compared over seeds.
    """

    Options = ReachOptions
    reads = ImageSpec
    has_head = False
    metrics = (
        Metric("success"),
        Metric("final_distance", unit="", better="lower", digits=2),
    )
    options: ReachOptions
    spec: ImageSpec

    def environment(self) -> Environment:
        """Make the environment. Raises UserError if it does not exist."""
        return make_environment(self.options.environment)

    def inputs(self, batch: Batch) -> Tensor:
        return to_float(batch.inputs)

    def observe(self, environment: Environment) -> Tensor:
        """Pictures (B, 3, H, W) uint8 of current states, in the size of the data's.

        Raises UserError if the environment has no pictures.
        """
        return render(environment, self.spec.size)

    def targets(self, examples: Examples) -> Tensor:
        """The states (N, S) that pictures show. Raises UserError if labels are something else."""
        states = super().targets(examples)
        if states.ndim != 2 or not states.is_floating_point():
            raise UserError(
                f"the task '{self.name}' needs the state that each picture shows, but the labels "
                "are something else: take data: pictures:point"
            )
        return states

    def check_goals(self, goals: Tensor, environment: Environment) -> None:
        """Check that states (N, S) can be reached.

        Raises:
            UserError: they are of another size than the environment's, or lie inside walls.
        """
        size, title = goals.shape[1], environment.title
        if size != environment.state_size:
            raise UserError(
                f"the pictures show states of {size} numbers, but those of {title} have "
                f"{environment.state_size}: set task.environment to the one of the pictures"
            )
        free = torch.from_numpy(environment.is_free(goals.numpy()))
        if not free.all():
            place = ", ".join(f"{value:.2f}" for value in goals[~free][0].tolist())
            raise UserError(
                f"{int((~free).sum())} of {len(goals)} goals are inside walls of {title}, such as "
                f"({place}): take pictures of it, as in data: pictures:{title}"
            )

    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """Compare the states (N, S) in which episodes ended with their goals (N, S)."""
        distances = (outputs - targets).double().norm(dim=1)
        return {
            "success": 100 * float((distances < self.options.within).double().mean()),
            "final_distance": float(distances.mean()),
        }


class Cells:
    """A grid over the range of some points, `bins` cells along each axis."""

    def __init__(self, points: Tensor, bins: int) -> None:
        """`points` (N, D); points beyond them count for the outermost cells."""
        self.low, self.high = points.amin(dim=0), points.amax(dim=0)
        self.bins = bins

    def __call__(self, points: Tensor) -> Tensor:
        """The cells (N,) int64 of points (N, D), numbered from 0 in an order of their own."""
        places = (points - self.low) / (self.high - self.low).clamp(min=1e-12) * self.bins
        places = places.floor().clamp(0, self.bins - 1).long()
        return places.unique(dim=0, return_inverse=True)[1]


def entropy(cells: Tensor) -> float:
    """Entropy of the distribution of cells (N,) int64, in nats."""
    shares = cells.bincount().double() / len(cells)
    return float(-torch.special.xlogy(shares, shares).sum())


def describe_codes(
    known: Tensor, known_states: Tensor, codes: Tensor, states: Tensor
) -> dict[str, float]:
    """Measure how codes (N, D) relate to states (N, S), given those of other pictures (M, ...).

    `neighbor_r2` is the share of the states' variance that the mean state of the 5 nearest known
    codes explains, `rank_correlation` Spearman's of all distances between two pictures, in percent.
    """
    from scipy.stats import spearmanr  # scipy.stats takes a while to import

    nearest = torch.cdist(codes, known).topk(min(NEIGHBORS, len(known)), largest=False).indices
    residual = (known_states[nearest].mean(dim=1) - states).double().square().sum()
    total = (states - states.mean(dim=0)).double().square().sum()
    rank = spearmanr(torch.pdist(codes), torch.pdist(states)).statistic
    return {"neighbor_r2": float(1 - residual / total), "rank_correlation": 100 * float(rank)}
