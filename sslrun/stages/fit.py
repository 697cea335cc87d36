"""The training loop of every stage: resume, log, show progress, write checkpoints, and stop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sslrun import distributed
from sslrun.data.examples import Examples
from sslrun.runs import Run
from sslrun.stages.context import Context
from sslrun.stages.logging import Log
from sslrun.stages.profiling import step_profiler
from sslrun.training.checkpoint import latest, restore, save
from sslrun.training.device import memory_in_use
from sslrun.training.loop import NonFinite, Step, Training, train

LOG_SECONDS = 0.5
"""Shortest time between two records of the log: reading a loss waits for the device."""
LAST_SECONDS = 10.0
"""Seconds without a checkpoint after which the last state is saved, too, if work follows that may
be interrupted, such as scoring."""
REMEDY = "Lower lr, or raise warmup, or set clip: 1.0"


@dataclass(frozen=True)
class Checkpoints:
    """Where and how often a training writes checkpoints."""

    folder: Path
    minutes: float
    """Minutes between two checkpoints."""
    extended: Path | None = None
    """The last state of the finished training that this one extends; None: it begins at step 0."""
    attempt: str | None = None
    """The `attempt` in the log's records, if the run trains several times, or scores what it has
    trained; None if it ends with its training."""

    def is_due(self, step: Step, seconds: float, stopped: bool) -> bool:
        """Whether to save after this step, `seconds` after the last checkpoint.

        The last step is saved, too, unless the run ends with it.
        """
        if step.last and self.attempt is None:
            return False
        limit = min(60 * self.minutes, LAST_SECONDS) if step.last else 60 * self.minutes
        return stopped or seconds > limit

    @property
    def latest(self) -> Path | None:
        """The last checkpoint written; None if there is none."""
        return latest(self.folder) if self.folder.exists() else None


def fit(
    training: Training[Any],
    examples: Examples,
    seed: int,
    run: Run,
    context: Context,
    name: str,
    log: Log,
    checkpoints: Checkpoints,
) -> Iterator[Step]:
    """Train from the last checkpoint to the end of the schedule; yield every step.

    A checkpoint is written at the interval of `checkpoints`, and when a signal asks to stop. A step
    is yielded before it is saved, so that a run never resumes past unfinished work of the caller.

    Raises UserError if a signal stopped it, and NonFinite if the loss or a gradient is not finite;
    the message names the last good checkpoint.
    """
    if (checkpoint := checkpoints.latest) is not None:
        restore(training, checkpoint)
        context.reporter.say(f"{name}: continues after step {training.step}")
    elif checkpoints.extended is not None:
        restore(training, checkpoints.extended)
        training.restart()
        context.reporter.say(f"{name}: extends {training.step} steps, with a warm restart")
    if distributed.is_main():
        run.forget_after(training.step, checkpoints.attempt)
    total = training.schedule.planned_steps(len(examples)) or training.step
    saved = time.monotonic()
    with (
        context.reporter.stage(name, total, training.step, examples.spec.unit) as show,
        _profiler(run, context) as after_step,
    ):
        speed = _Speed(training)
        try:
            for step in train(training, examples, seed):
                after_step()
                speed.wait(step.data_seconds)
                if step.last or speed.elapsed > LOG_SECONDS:
                    record = step.record() | speed.read(step)
                    log(record)
                    show(step.step, record["loss"], record["rate"], step.total)
                yield step
                due = checkpoints.is_due(step, time.monotonic() - saved, context.stop.due)
                if training.sharded:  # all processes write
                    due = bool(distributed.decide(due))
                if not due:
                    continue
                saved = time.monotonic()
                training.check_finite()
                with training.paused():
                    save(training, checkpoints.folder)
                context.stop.check()
        except NonFinite as error:
            good = checkpoints.latest
            last = (
                f"the last good checkpoint is {good}" if good else "no checkpoint was written yet"
            )
            raise NonFinite(f"{name}: {error}; {last}. {REMEDY}") from None


class _Speed:
    """Speed, share of time spent waiting for data, and memory since the last record of the log."""

    def __init__(self, training: Training[Any]) -> None:
        self.device = training.compute.device
        self.examples = training.step * training.schedule.batch
        self.since = time.monotonic()
        self.waited = 0.0

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.since

    def wait(self, seconds: float) -> None:
        self.waited += seconds

    def read(self, step: Step) -> dict[str, float]:
        """Return the numbers since the last call, and start counting again.

        Keys: rate (examples/s), data_wait (share of the time, 0 to 1), memory (bytes).
        """
        elapsed = self.elapsed
        record = {
            "rate": round((step.examples - self.examples) / elapsed, 1),
            "data_wait": round(min(1.0, self.waited / elapsed), 3),
            "memory": memory_in_use(self.device),
        }
        self.examples, self.since, self.waited = step.examples, time.monotonic(), 0.0
        return record


@contextmanager
def _profiler(run: Run, context: Context) -> Iterator[Callable[[], None]]:
    """Trace the first training of a command if --profile is set.

    Call the yielded function after every step.
    """
    if not context.profile or not distributed.is_main():
        yield lambda: None
        return
    context.profile = False
    with step_profiler(run.path, context.compute.device, context.reporter.say) as after_step:
        yield after_step
