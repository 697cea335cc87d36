"""What every stage gets in addition to its recipe: where to write, which device to use, how to report, when to stop."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from sslrun import distributed
from sslrun.errors import UserError
from sslrun.runs import Run, check_root, environment, report_disk_full
from sslrun.stages.reporting import Reporter
from sslrun.training.device import Compute, compute


class Busy(UserError):
    """Another process is working on the run."""


class Interrupted(UserError):
    """The user or the scheduler asked to stop; everything that was computed is saved."""

    exit_code = 130


AGAIN_SECONDS = 2.0
"""Seconds within which a second signal counts as the same one: torchrun repeats what the terminal
has sent."""


@dataclass
class Stop:
    """A request to stop, by SIGINT or SIGTERM: training saves and ends at the next step; a second SIGINT ends at once."""

    leads: bool = True
    """False: another process saves for all, and this one continues until that one stops."""
    signal: signal.Signals | None = None
    since: float = 0.0
    at_once: bool = False
    """Whether the first signal ends the process at once, too."""

    @property
    def due(self) -> bool:
        """Whether to save and end."""
        return self.leads and self.signal is not None

    def listen(self) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, self._received)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """While inside, a signal ends the process at once: data are being read, and caches keep what was read."""
        self.check()
        self.at_once = self.leads
        try:
            yield
        finally:
            self.at_once = False

    def _received(self, number: int, frame: FrameType | None) -> None:
        if self.at_once:
            raise KeyboardInterrupt
        # A second SIGTERM is no sign of impatience: what started this process passes one on when it
        # ends itself.
        if self.due and number == signal.SIGINT and time.monotonic() - self.since > AGAIN_SECONDS:
            raise KeyboardInterrupt
        if self.signal is None:
            self.signal, self.since = signal.Signals(number), time.monotonic()

    def check(self, remedy: str = "give the same command again to continue") -> None:
        """Raise `Interrupted` if a signal was received."""
        if self.due:
            assert self.signal is not None
            raise Interrupted(
                f"stopped by {self.signal.name}; everything finished is saved: {remedy}"
            )


@dataclass
class Context:
    """The surroundings of a stage. Nothing in it changes a result, except by the device's rounding."""

    runs: Path
    compute: Compute
    reporter: Reporter = field(default_factory=Reporter)
    fresh: bool = False
    """Delete what the runs have already computed."""
    profile: bool = False
    """Trace some steps of the first training."""
    stop: Stop = field(default_factory=Stop)
    features: dict[tuple[str, ...], tuple[Tensor, float]] = field(default_factory=dict)
    """Frozen features and their FLOPs per example, kept for the next evaluation that reads the same
    ones."""

    @classmethod
    def open(cls, device: str, runs: Path, fresh: bool = False, profile: bool = False) -> Context:
        """Open the context of a command: on a device by name, among torchrun's processes, listening to signals.

        UserError: no such device, or no place for runs.
        """
        check_root(runs)
        local = os.environ.get("LOCAL_RANK")
        made = compute(
            f"cuda:{local}"
            if local and device in ("auto", "cuda") and torch.cuda.is_available()
            else device
        )
        distributed.setup(made.device)
        main = distributed.is_main()
        context = cls(runs, made, Reporter(quiet=not main), fresh, profile, Stop(leads=main))
        context.stop.listen()
        return context


def perform(
    run: Run, recipe: Mapping[str, Any], context: Context, body: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """Return the run's result: read it if the run is finished, else compute it by `body` and keep it.

    `recipe`: the content of the run's recipe.yaml. Busy: another process is computing it.
    """
    if run.finished and not context.fresh:
        if context.profile:
            context.reporter.say(
                f"{run.path}: is finished, so that nothing is profiled; add --fresh to run it again"
            )
        return run.result
    if not distributed.is_main():
        try:
            distributed.wait()
            made = body()
            distributed.wait()  # for what the first process writes, which a job after this one may read
            return made
        except RuntimeError:
            if context.stop.signal is None:
                raise
            raise SystemExit(
                Interrupted.exit_code
            ) from None  # the first process saved, said so, and left
    with run.claimed() as mine:
        if not mine:
            raise Busy(
                f"{run.path}: another process is working on this run; wait for it, or end it"
            )
        if context.fresh:
            run.clear()
        if not run.finished:
            run.start(recipe, environment(str(context.compute), distributed.world_size()))
            distributed.wait()  # the others must not look for checkpoints before old ones are gone
            with report_disk_full(run.path), context.reporter.job(f"{run.recipe} · {run.stage}"):
                run.finish(body())
            distributed.wait()
        return run.result
