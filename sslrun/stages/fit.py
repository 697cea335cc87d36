"""Training as a stage does it, whatever is trained: resumed, logged, shown, checkpointed, stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sslrun import distributed
from sslrun.data.examples import Examples
from sslrun.runs import Run
from sslrun.stages.context import Context
from sslrun.stages.logging import Log
from sslrun.stages.profiling import step_profiler
from sslrun.training.checkpoint import latest, restore, save
from sslrun.training.loop import NonFinite, Step, Training, train

LOG_SECONDS = 0.5
"""Between two records of the log, or one a step where steps take longer: reading a loss waits for the device."""


def fit(
    training: Training,
    examples: Examples,
    seed: int,
    run: Run,
    context: Context,
    name: str,
    log: Log,
    *,
    minutes: float,
    folder: Path | None = None,
) -> Iterator[Step]:
    """Train from the last checkpoint in `folder` (by default the run's) to the schedule's end; yields every step.

    A checkpoint is written every so many `minutes`, and when a signal asks to stop; the step is yielded before it is
    saved, so that a run never resumes past something its caller has not done. UserError: stopped. NonFinite: loss or
    gradient is, told with the last good checkpoint.
    """
    folder = folder or run.checkpoints
    found = latest(folder) if folder.exists() else None
    if found is not None:
        restore(training, found)
        context.reporter.say(f"{name}: continues after step {training.step}")
    if distributed.is_main():
        run.forget_after(training.step)
    total = training.schedule.total_steps(len(examples))
    saved = logged = time.monotonic()
    seen = training.step * training.schedule.batch
    with (
        context.reporter.stage(name, total, training.step, examples.spec.unit) as show,
        _profiler(run, context) as after_step,
    ):
        try:
            for step in train(training, examples, seed):
                after_step()
                now = time.monotonic()
                if now - logged > LOG_SECONDS or step.last:
                    record = step.record()
                    rate = (step.examples - seen) / (time.monotonic() - logged)
                    logged, seen = time.monotonic(), step.examples
                    log({**record, "rate": round(rate, 1)})
                    show(step.step, record["loss"], rate)
                yield step
                if not step.last and (context.stop.due or now - saved > 60 * minutes):
                    saved = now
                    training.check_finite()
                    if distributed.is_main():
                        save(training, folder)
                    context.stop.check()
        except NonFinite as error:
            good = latest(folder) if folder.exists() else None
            kept = f"the last good checkpoint is {good}" if good else "no checkpoint had been written yet"
            raise NonFinite(f"{name}: {error}; {kept}. Lower lr, or raise warmup, or set clip: 1.0") from None


@contextmanager
def _profiler(run: Run, context: Context) -> Iterator[Callable[[], None]]:
    """Trace the first training of a command with --profile; the yielded function is called after every step."""
    if not context.profile or not distributed.is_main():
        yield lambda: None
        return
    context.profile = False
    with step_profiler(run.path, context.compute.device, context.reporter.say) as after_step:
        yield after_step
