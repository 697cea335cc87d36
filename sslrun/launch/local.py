"""Worker processes on this machine, each with its share of the cores and its own GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

Result = TypeVar("Result")


def spread(device: torch.device, workers: int) -> list[str]:
    """Choose a device per worker: the GPUs in turn if no index is named, else the same device."""
    count = torch.cuda.device_count() if device.type == "cuda" and device.index is None else 0
    return [f"cuda:{worker % count}" if count else str(device) for worker in range(workers)]


def command_on(arguments: Sequence[str], device: str) -> list[str]:
    """Build the command of a worker: sslrun with `arguments`, but on `device`."""
    others = [argument for argument in arguments if not argument.startswith("--device=")]
    return [sys.executable, "-m", "sslrun", *others, f"--device={device}"]


def threads_of(workers: int) -> int:
    """Return each worker's share of the machine's cores."""
    return max(1, (os.cpu_count() or 1) // workers)


def beside(work: Callable[[], Result], commands: Sequence[Sequence[str]], threads: int) -> Result:
    """Call `work` while other processes run `commands`, wait for them, and return its result.

    If `work` raises an error, the other processes receive SIGTERM, save their work, and end first.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    others: list[subprocess.Popen[bytes]] = []
    try:
        for command in commands:
            process = subprocess.Popen(
                command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            others.append(process)
        result = work()
        for other in others:
            other.wait()
        return result
    finally:
        for other in others:
            other.terminate()
        for other in others:
            other.wait()
