"""Time several trainings in alternating blocks of steps, for the scripts in this folder."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping

import torch


def time_blocks(
    runs: Mapping[str, Iterator[None]],
    steps: int,
    blocks: int,
    device: str,
    clocks: Mapping[str, Callable[[], float]] | None = None,
) -> dict[str, float]:
    """Median seconds of a step of each run, over `blocks` blocks after one that warms up.

    The blocks of all runs alternate, so that drift in the machine's speed affects all of them.
    `clocks` replaces the wall clock for some runs.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for block in range(blocks + 1):
        for name, run in runs.items():
            clock = (clocks or {}).get(name, time.perf_counter)
            start = clock()
            for _ in range(steps):
                next(run)
            if device != "cpu":
                torch.cuda.synchronize()
            if block:
                seconds[name].append((clock() - start) / steps)
    return {name: statistics.median(values) for name, values in seconds.items()}
