"""Worker processes on this machine, each with its share of the cores and a GPU."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from sslrun.errors import UserError
from sslrun.launch.engine import Crew, End, Engine, Workers, describe_exit, engines
from sslrun.runs import WORKER

if TYPE_CHECKING:
    import torch


def spread(device: torch.device, workers: int, per_gpu: int | None = None) -> list[str]:
    """Choose a device per worker.

    If no index is named, the workers get the GPUs in turn, or, with `per_gpu`, fill one GPU after
    the other. Else all get the same device.

    Raises UserError if there are more workers than `per_gpu` on each GPU.
    """
    import torch

    count = torch.cuda.device_count() if device.type == "cuda" and device.index is None else 0
    if per_gpu is None or device.type != "cuda":
        return [f"cuda:{worker % count}" if count else str(device) for worker in range(workers)]
    if workers > per_gpu * max(1, count):
        raise UserError(
            f"--jobs {workers} --per-gpu {per_gpu}: there is room for {per_gpu * max(1, count)} "
            "workers; lower --jobs or raise --per-gpu"
        )
    return [f"cuda:{worker // per_gpu}" if count else str(device) for worker in range(workers)]


def places(device: str, per_gpu: int | None) -> int | None:
    """Count the workers that fit on the GPUs of this machine; None without `per_gpu`.

    Raises UserError if this machine has no such device.
    """
    if per_gpu is None:
        return None
    import torch

    from sslrun.training.device import compute

    chosen = compute(device).device
    shared = torch.cuda.device_count() if chosen.type == "cuda" and chosen.index is None else 1
    return per_gpu * shared


def threads_of(workers: int) -> int:
    """Return each worker's share of the cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cores or 1) // workers)


class Processes(Crew):
    """Worker processes on this machine."""

    def __init__(self, workers: Workers, devices: list[str]) -> None:
        """Start one process per device."""
        self.workers, self.devices = workers, devices
        self.running: dict[int, subprocess.Popen[bytes]] = {}
        threads = str(threads_of(workers.count))
        environment = {"OMP_NUM_THREADS": threads, **os.environ}
        for number, (name, device) in enumerate(zip(workers.names(), devices, strict=True), 1):
            command = [sys.executable, "-m", "sslrun", *workers.command(device, math.inf)]
            with open(workers.log(number), "wb") as log:
                self.running[number] = subprocess.Popen(
                    command,
                    env={**environment, WORKER: name},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )

    @property
    def is_running(self) -> bool:
        return bool(self.running)

    def ends(self) -> Iterator[End]:
        names = self.workers.names()
        for number, process in list(self.running.items()):
            code = process.poll()
            if code is not None:
                del self.running[number]
                title = f"worker {number} ({self.devices[number - 1]})"
                reason = describe_exit(code, self.workers.log(number))
                yield End(names[number - 1], title, reason)

    def stop(self) -> None:
        for process in self.running.values():
            process.terminate()
        for process in self.running.values():
            process.wait()


@engines.register("local")
class Local(Engine):
    """Processes on this machine, each on a GPU of its own if there are several."""

    def start(self, workers: Workers) -> Crew:
        from sslrun.training.device import compute

        device = compute(workers.device).device
        return Processes(workers, spread(device, workers.count, workers.per_gpu))
