"""The number of devices in a run's identity, and the runs that were computed on another number.

Training on several devices usually gives another result than training on one, since each device
draws its own views. Such a run has the number of devices in its identity. A command on another
number of devices, such as `sslrun table` on one, still finds the run.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from sslrun import distributed
from sslrun.errors import UserError
from sslrun.runs import Run, device_counts


class HasRun(Protocol):
    """A job that produces a run."""

    @property
    def run(self) -> Run: ...


AnyJob = TypeVar("AnyJob", bound=HasRun)


def devices_identity(devices: int, depends: bool) -> dict[str, Any]:
    """Return what the number of devices adds to the identity of a run that may depend on it."""
    return {"devices": devices} if devices > 1 and depends else {}


def on_known_devices(build: Callable[[int], AnyJob], folder: Path) -> AnyJob:
    """Build a job for this command's number of devices, or for another one if only that is done.

    `build` makes the job for a number of devices; `folder` holds the recipe's runs.
    """
    own_count = distributed.device_count()
    own = build(own_count)
    if own.run.finished:
        return own
    counts = [count for count in (1, *device_counts(folder)) if count != own_count]
    others = (build(count) for count in counts)
    return next((job for job in others if job.run.finished), own)


def describe_begun(build: Callable[[int], AnyJob], folder: Path) -> str | None:
    """Say which run was begun, and not finished, on a number of devices that its result depends on.

    `build` makes a job for a number of devices; `folder` holds the recipe's runs. None: this
    command's own run was begun, or none was.
    """
    own = build(distributed.device_count()).run
    if own.path.exists():
        return None
    for count in (1, *device_counts(folder)):
        run = build(count).run
        if run.checkpoints.exists() and not run.finished:
            return (
                f"{run.path} was begun on {count} device(s), and its result depends on their "
                f"number: give --gpus {count} to continue it; this is a new run"
            )
    return None


def check_devices(run: Run) -> None:
    """Raise UserError if a run's identity has another number of devices than this command has.

    Call before the run is computed.
    """
    here = distributed.device_count()
    if run.devices is not None and run.devices != here:
        raise UserError(
            f"{run.path}: this run is of {run.devices} devices, and here is {here}: start it again "
            f"with `torchrun --nproc-per-node {run.devices}` (pretrain: --gpus {run.devices}), "
            "or give another --runs"
        )
