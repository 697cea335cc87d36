"""A trace of ten training steps by torch's profiler, for `--profile`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

SKIPPED = 5
"""Steps before the trace: the first steps compile, allocate and fill caches."""
TRACED = 10
"""Steps in the trace."""
TRACE = "trace.json"
"""The file in a run's folder: open it in chrome://tracing or ui.perfetto.dev."""


@contextmanager
def step_profiler(
    folder: Path, device: torch.device, say: Callable[[str], None]
) -> Iterator[Callable[[], None]]:
    """Skip SKIPPED steps, then trace TRACED steps into a file in `folder`.

    Call the yielded function after each step. `say` reports where the trace is and the mean
    duration of its steps, or that there were too few steps.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    done = 0
    began = 0.0
    last = SKIPPED + TRACED

    def write(profiler: profile) -> None:
        path = folder / TRACE
        profiler.export_chrome_trace(str(path))
        steps = min(done, last) - SKIPPED
        seconds = (time.monotonic() - began) / max(1, steps)
        say(
            f"profile of {steps} steps, {1000 * seconds:,.1f} ms each, is at {path}: "
            "open it in ui.perfetto.dev"
        )

    plan = schedule(wait=SKIPPED - 1, warmup=1, active=TRACED, repeat=1)
    with profile(
        activities=activities, schedule=plan, on_trace_ready=write, record_shapes=True
    ) as profiler:

        def after_step() -> None:
            nonlocal done, began
            done += 1
            if done == SKIPPED:
                began = time.monotonic()
            if done <= last:
                profiler.step()

        yield after_step
    if done <= SKIPPED:
        say(
            f"--profile: only {done} steps, but the first {SKIPPED} are not traced; "
            "train for more steps"
        )
