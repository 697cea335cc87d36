"""The returns of episodes in an environment, in which a policy acts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from sslrun.data.control.environments import Environment, make_environment
from sslrun.data.specs import ControlSpec
from sslrun.errors import UserError
from sslrun.metric import Metric
from sslrun.tasks.base import Task, TaskOptions, tasks

ASKED = ("asked_best", "asked_mean", "asked_beyond")
"""Metrics of the normalized return when asked for a target of `rollout` that is not the first."""


class ReturnsOptions(TaskOptions):
    """Options of a task without a head."""

    reference: tuple[float, float] | None = None
    """Returns of random actions and of an expert, which are 0 and 100 of the normalized return;
    default: the environment's."""

    @property
    def linear(self) -> bool:
        return False


@tasks.register("returns")
class Returns(Task):
    """Act in the environment of the data; the score is the normalized return of D4RL.

    It is 100 (return - random) / (expert - random), Fu et al. 2020 (arXiv:2004.07219). `return` is
    the mean return itself. `rank_correlation` is Spearman's between the returns that were asked for
    and achieved, over the targets of an episode up to the data's best, averaged over episodes; it
    is 0 where all achieved returns are equal. `asked_mean` and the
    like are the normalized returns for the other targets of `rollout`.
    """

    Options = ReturnsOptions
    reads = ControlSpec
    has_head = False
    metrics = (
        Metric("normalized_return"),
        Metric("return", unit="", digits=2),
        Metric("rank_correlation"),
        *(Metric(name) for name in ASKED),
    )
    conditional = frozenset({"rank_correlation", *ASKED})
    spec: ControlSpec

    def environment(self) -> Environment:
        """Make the environment. Raises UserError if it does not exist."""
        return make_environment(self.spec.environment)

    def normalize(self, returns: Any, environment: Environment) -> Any:
        """Normalize returns, in percent.

        Raises:
            UserError: the returns of random actions and of an expert are not known.
        """
        reference = self.options.reference or environment.reference
        if reference is None:
            raise UserError(
                f"{environment.title}: its returns of random actions and of an expert are not "
                "known: give them, as in task: {name: returns, reference: [-20.3, 3234.3]}"
            )
        random, expert = reference
        return 100 * (returns - random) / (expert - random)


def rank_correlation(asked: Sequence[np.ndarray], achieved: Sequence[np.ndarray]) -> float:
    """Spearman's correlation over targets, averaged over episodes, in percent; arrays are (B,)."""
    columns = zip(np.transpose(asked), np.transpose(achieved), strict=True)
    return 100 * float(np.mean([_spearman(one, other) for one, other in columns]))


def _spearman(asked: np.ndarray, achieved: np.ndarray) -> float:
    """Spearman's correlation; 0 if either is constant."""
    if np.ptp(asked) == 0 or np.ptp(achieved) == 0:
        return 0.0
    return float(spearmanr(asked, achieved).statistic)
