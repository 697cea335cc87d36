"""The returns of episodes in an environment, in which a policy acts."""

from __future__ import annotations

from statistics import fmean

from torch import Tensor

from sslrun.data.control.environments import Environment, make_environment
from sslrun.data.examples import Examples
from sslrun.data.specs import ControlSpec
from sslrun.errors import UserError
from sslrun.metric import Metric
from sslrun.tasks.base import Task, TaskOptions, tasks


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

    It is 100 (return - random) / (expert - random), Fu et al. 2020 (arXiv:2004.07219).
    `rank_correlation` is Spearman's between the returns that an episode was asked for and achieved,
    averaged over episodes; it is 0 where all achieved returns are equal. Both metrics are in
    percent.
    """

    Options = ReturnsOptions
    reads = ControlSpec
    has_head = False
    metrics = (Metric("normalized_return"), Metric("rank_correlation"))
    conditional = frozenset({"rank_correlation"})
    spec: ControlSpec

    def environment(self) -> Environment:
        """Make the environment. Raises UserError if it does not exist."""
        return make_environment(self.spec.environment)

    def score(self, outputs: Tensor, examples: Examples) -> dict[str, float]:
        """Compute the metrics of asked and achieved returns (B, T, 2) for T targets.

        The normalized return is that for the first target, and the correlation is over all.
        """
        asked, achieved = outputs.double().unbind(dim=2)
        values = {"normalized_return": float(self.normalize(achieved[:, 0]).mean())}
        if outputs.shape[1] > 1:
            values["rank_correlation"] = 100 * fmean(map(_spearman, asked, achieved))
        return values

    def normalize(self, returns: Tensor) -> Tensor:
        """Normalize returns, in percent.

        Raises:
            UserError: the returns of random actions and of an expert are not known.
        """
        environment = self.environment()
        reference = self.options.reference or environment.reference
        if reference is None:
            raise UserError(
                f"{environment.title}: its returns of random actions and of an expert are not "
                "known: give them, as in task: {name: returns, reference: [-20.3, 3234.3]}"
            )
        random, expert = reference
        return 100 * (returns - random) / (expert - random)


def _spearman(asked: Tensor, achieved: Tensor) -> float:
    """Spearman's correlation of two vectors (T,); 0 if either is constant."""
    if (asked == asked[0]).all() or (achieved == achieved[0]).all():
        return 0.0
    from scipy.stats import spearmanr  # scipy.stats takes a while to import

    return float(spearmanr(asked, achieved).statistic)
