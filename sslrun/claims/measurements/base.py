"""Base class and registry of measurements: tests of a claim that are not sweeps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from sslrun.data.examples import Examples
from sslrun.registry import Options, Registry
from sslrun.results.table import Table
from sslrun.training.device import Compute
from sslrun.training.learner import Learner
from sslrun.training.loop import Training, train
from sslrun.training.schedule import Schedule

AnyLearner = TypeVar("AnyLearner", bound=Learner)


class Measurement:
    """A measurement that fills the cells of a table, one seed at a time.

    A claim runs it once per seed and combines the tables into one.
    """

    Options: ClassVar[type[Options]] = Options
    name: ClassVar[str]

    def __init__(self, options: Any) -> None:
        self.options = options

    def table(self, seed: int, compute: Compute, folder: Path, check: Callable[[], None]) -> Table:
        """Measure with one seed and return the table of its values.

        Args:
            seed: seed of everything random; the values are stored under it.
            compute: device and precision.
            folder: existing folder for plots.
            check: to be called regularly; raises if the user asked to stop.
        """
        raise NotImplementedError


measurements: Registry[Measurement] = Registry("measurement")


def short_schedule(steps: int, batch: int, lr: float) -> Schedule:
    """The schedule of a measurement that trains for a few hundred steps."""
    return Schedule(
        steps=steps, batch=batch, optimizer="adamw", lr=lr, weight_decay=0.01, warmup=0.1
    )


def train_to_end(
    learner: AnyLearner,
    examples: Examples,
    schedule: Schedule,
    seed: int,
    compute: Compute,
    check: Callable[[], None],
) -> AnyLearner:
    """Train a learner on examples, and return it in evaluation mode; `check` is called each step.

    The batches follow from `seed`.
    """
    training = Training(learner, schedule, compute)
    for _ in train(training, compute.place(examples), seed):
        check()
    return training.averaged.eval()
