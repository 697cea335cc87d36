"""Prefer the right sentence of minimal pairs."""

from __future__ import annotations

from torch import Tensor

from sslrun.data.examples import Examples
from sslrun.data.specs import TextSpec
from sslrun.metric import Metric
from sslrun.tasks.base import Task, TaskOptions, tasks


class PairOptions(TaskOptions):
    """Options of a task without a head."""

    @property
    def linear(self) -> bool:
        return False


@tasks.register("minimal-pairs")
class MinimalPairs(Task):
    """Give the right sentence of each pair a higher score than the wrong one.

    BLiMP: Warstadt et al., TACL 2020 (arXiv:1912.00582). All metrics are in percent: the
    accuracy is the mean over phenomena. Equal scores are wrong; chance is 50 %.
    """

    Options = PairOptions
    reads = TextSpec
    has_head = False
    metrics = (Metric("accuracy"),)
    options: PairOptions

    def by_phenomenon(self, scores: Tensor, examples: Examples) -> dict[str, float]:
        """Accuracy of each phenomenon, from scores (2N,) of right and wrong sentences in turn."""
        kinds = self.targets(examples)[::2].to(scores.device)
        good, bad = scores.view(-1, 2).unbind(dim=1)
        right = (good > bad).double()
        values = {}
        for number, name in enumerate(examples.classes):
            values[name] = 100 * float(right[kinds == number].mean())
        return values

    def score(self, outputs: Tensor, examples: Examples) -> dict[str, float]:
        values = self.by_phenomenon(outputs, examples).values()
        return {"accuracy": sum(values) / len(values)}
