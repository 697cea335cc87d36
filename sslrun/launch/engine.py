"""Engines: places where the workers of a sweep run, and what each of them offers.

All workers run the same command of sslrun. They share the runs by locks, so that an engine only
starts processes: it knows nothing of the jobs and their order.

To add an engine, also in a plug-in, register one class:

    @engines.register("kubernetes")
    class Kubernetes(Engine): ...
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, ValidationError, field_validator

from sslrun.errors import UserError
from sslrun.launch.torchrun import ERROR_FILE
from sslrun.registry import Options, Registry, did_you_mean
from sslrun.runs import WORKER

INTERRUPTED = 130
"""Exit code of a worker that was asked to stop and has saved its work."""


@dataclass(frozen=True)
class Workers:
    """The workers that an engine is to start."""

    arguments: tuple[str, ...]
    """The arguments of sslrun that each of them runs with, without the device."""
    count: int
    device: str
    """The device that the user chose, such as "auto" or "cuda"."""
    logs: Path
    """The folder of their logs, which all machines share."""
    name: str
    """A name that no other set of workers has."""
    per_gpu: int | None = None
    """Workers that share a GPU of this machine; None: as few as possible."""

    is_sweep: bool = True
    """Whether the command is that of a worker of a sweep; if not, it is that of one training."""

    def command(self, device: str, idle: float) -> tuple[str, ...]:
        """Return all arguments of sslrun for a worker.

        The worker of a sweep ends after `idle` minutes in which it finds no run to take.
        """
        worker = (f"--worker={idle}",) if self.is_sweep else ()
        return (*self.arguments, f"--device={device}", *worker)

    def names(self) -> list[str]:
        """Return the name of each worker, by which the runs that it locks are known."""
        return [f"{self.name}-{number}" for number in range(1, self.count + 1)]

    def log(self, number: int) -> Path:
        """Return the log of worker `number`, counted from 1."""
        return self.logs / f"{number}.log"


@dataclass(frozen=True)
class End:
    """The end of a worker."""

    worker: str
    """Its name."""
    title: str
    """How messages name it, such as "worker 3 (cuda:2)"."""
    reason: str | None
    """Why it died; None if it had nothing left to do or was asked to stop."""
    restarted: bool = False
    """Whether the engine has started another worker in its place."""


class Crew(ABC):
    """The workers that an engine has started."""

    @property
    @abstractmethod
    def is_running(self) -> bool:
        """Whether any worker is running or waits for its start."""

    @abstractmethod
    def ends(self) -> Iterator[End]:
        """Yield the workers that have ended since the last call; return immediately."""

    @abstractmethod
    def stop(self) -> None:
        """Ask all workers to save their work, and wait until they have ended."""


class Engine(ABC):
    """A place where workers run.

    An engine implements `start`, or, if its workers go on without this process, `submit`.
    """

    Options: ClassVar[type[Options]] = Options
    name: ClassVar[str]
    detached: ClassVar[bool] = False
    """Whether the workers go on without this process, so that they are submitted."""

    def __init__(self, options: Any) -> None:
        self.options = options

    def count_devices(self, workers: Workers) -> int:
        """Count the devices of one training; default: the processes of torchrun here."""
        from sslrun import distributed

        return distributed.device_count()

    def start(self, workers: Workers) -> Crew:
        """Start workers that end with this process.

        Raises UserError if the engine is not installed or cannot be reached.
        """
        raise NotImplementedError

    def submit(self, workers: Workers) -> str:
        """Submit workers that go on without this process; return a line that describes them.

        Raises UserError if the engine is not installed, cannot be reached, or refuses them.
        """
        raise NotImplementedError


class ClusterOptions(Options):
    """Options of the workers on any cluster."""

    gpus: float | None = Field(None, ge=0)
    """GPUs of a worker, on each of its nodes; default: 1, or 0 with --device cpu."""
    idle: float = Field(10, ge=0)
    """Minutes after which a worker that finds no run to take ends, and leaves its place free."""

    @field_validator("gpus")
    @classmethod
    def _check_gpus(cls, gpus: float | None) -> float | None:
        if gpus is not None and gpus > 1 and gpus != int(gpus):
            raise ValueError("should be a whole number, or below 1")
        return gpus

    def gpus_of(self, workers: Workers) -> float:
        """Return the GPUs of each worker, on each of its nodes.

        Raises UserError if it is a worker of a sweep, and has several.
        """
        gpus = float(workers.device != "cpu") if self.gpus is None else self.gpus
        if workers.is_sweep and gpus > 1:
            raise UserError(
                f"-E gpus={gpus:g}: a worker of a sweep uses one GPU; raise --jobs to use more, "
                "and give several GPUs to `sslrun pretrain` only"
            )
        return gpus


engines: Registry[Engine] = Registry("engine")


def build(name: str, settings: Sequence[str]) -> Engine:
    """Build an engine from its name and its options, each as "key=value".

    Raises UserError for an unknown engine or option, or for an invalid value.
    """
    engine = engines[name]
    known = list(engine.Options.model_fields)
    values: dict[str, str] = {}
    for text in settings:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"-E {text}: an option of an engine is written KEY=VALUE")
        if not known:
            raise UserError(
                f"-E {text}: the engine '{name}' has no options; name another one with --engine"
            )
        if key not in known:
            raise UserError(
                f"-E {text}: unknown option of '{name}'.{did_you_mean(key, known)}"
                f" See `sslrun show engine {name}`"
            )
        values[key] = value
    try:
        return engine(engine.Options.model_validate(values))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = str(first["loc"][0])
        raise UserError(
            f"-E {key}={values.get(key, '')}: {first['msg'].removeprefix('Value error, ')}"
        ) from None


def has_parent() -> bool:
    """Return whether a process of sslrun has started this one, as a worker or for `--gpus`."""
    return WORKER in os.environ or ERROR_FILE in os.environ


PR_SET_PDEATHSIG = 1
"""Number of the option in Linux's prctl.h."""


def end_with_parent() -> None:
    """Receive SIGTERM, and so save the work, when the parent process ends for any reason.

    Other systems than Linux have no such signal: there a worker goes on.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def describe_exit(code: int, log: Path | None = None) -> str | None:
    """Say why a worker died, from its exit code and log; None if it ended in an orderly way."""
    if code in (0, INTERRUPTED):
        return None
    if code == -signal.SIGKILL:
        return "killed by SIGKILL, which the system sends when memory runs out"
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    text = log.read_text(encoding="utf-8", errors="replace").strip() if log is not None else ""
    last = text.rpartition("\n")[2].removeprefix("sslrun: ")
    return f"exit code {code}" + (f": {last}" if last else "")
