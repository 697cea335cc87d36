"""The context of a stage: where to write, which device to use, how to report, and when to stop."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from sslrun import distributed
from sslrun.data.source import sources
from sslrun.errors import UserError, describe_os_error
from sslrun.launch.timelimit import NOTICE, time_limit
from sslrun.recipe import Named
from sslrun.runs import Run, check_root, environment, hash_contents, report_disk_full
from sslrun.stages.devices import check_devices
from sslrun.stages.reporting import Reporter
from sslrun.training.device import Compute, compute
from sslrun.training.loop import Step


class Busy(UserError):
    """Another process is working on the run."""


class Interrupted(UserError):
    """The user or the scheduler asked to stop; everything computed so far is saved."""

    exit_code = 130


AGAIN_SECONDS = 2.0
"""Seconds within which a second signal counts as the first: torchrun repeats the terminal's
signal."""


@dataclass
class Stop:
    """A request to stop, by SIGINT, SIGTERM or the notice of a time limit.

    Training saves and ends at the next step. A second SIGINT ends the process immediately, and so
    does any signal during work that saves nothing before its end.
    """

    leads: bool = True
    """Whether this process decides to stop; if not, it continues until the leading one stops."""
    signal: signal.Signals | None = None
    since: float = 0.0
    at_once: bool = False
    """Whether the first signal already ends the process immediately."""

    @property
    def due(self) -> bool:
        """Whether training must save and stop."""
        return self.leads and self.signal is not None

    def listen(self) -> None:
        """Handle these signals from now on."""
        for number in (signal.SIGINT, signal.SIGTERM, NOTICE):
            signal.signal(number, self._received)

    @contextmanager
    def unsaved(self) -> Iterator[None]:
        """Let a signal end the process immediately: there is nothing to save before the end.

        This is for reading data, which caches keep, and for evaluations, whose trainings are
        `saving`. A library in which the signal arrives may swallow the KeyboardInterrupt or raise
        another error in its place, so that it is raised again at the end.
        """
        self.check()
        before, self.at_once = self.at_once, self.leads
        try:
            yield
        finally:
            self.at_once = before
            if self.due and not isinstance(sys.exception(), Interrupted):
                raise KeyboardInterrupt

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Within `unsaved`, let work that saves when a stop is `due` end by itself."""
        before, self.at_once = self.at_once, False
        try:
            yield
        finally:
            self.at_once = before
        self.check()

    def _received(self, number: int, frame: FrameType | None) -> None:
        if number == NOTICE and self.leads:
            time_limit.reached = True
        if self.at_once:
            self.signal = signal.Signals(number)
            raise KeyboardInterrupt
        # A second SIGTERM does not mean impatience: a parent process that ends may pass one on.
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
    """The context of a stage. Nothing in it changes a result, except for the device's rounding."""

    runs: Path
    compute: Compute
    reporter: Reporter = field(default_factory=Reporter)
    fresh: bool = False
    """Whether to delete what the runs have already computed."""
    profile: bool = False
    """Whether to trace some steps of the first training."""
    stop: Stop = field(default_factory=Stop)
    on_check: Callable[[Step, Mapping[str, float]], None] | None = None
    """Receives the step and the record of each feature check; may raise to end the training."""
    features: dict[tuple[str, ...], tuple[Tensor, float]] = field(default_factory=dict)
    """Cache of frozen features and their FLOPs per example, for evaluations that share them."""

    @classmethod
    def open(cls, device: str, runs: Path, fresh: bool = False, profile: bool = False) -> Context:
        """Open the context of a command, join torchrun's processes, and listen to signals.

        `device` is a name such as "auto" or "cuda:1". Raises UserError if there is no such device,
        or if runs cannot be written.
        """
        check_root(runs)
        local = os.environ.get("LOCAL_RANK")
        if local and device in ("auto", "cuda") and torch.cuda.is_available():
            device = f"cuda:{local}"
        placement = compute(device)
        distributed.setup(placement.device)
        main = distributed.is_main()
        context = cls(runs, placement, Reporter(quiet=not main), fresh, profile, Stop(leads=main))
        context.stop.listen()
        return context


@contextmanager
def holding(run: Run) -> Iterator[None]:
    """Lock the run. Raises Busy if another process holds it."""
    with run.claimed() as is_claimed:
        if not is_claimed:
            raise Busy(
                f"{run.path}: another process is working on this run; wait for it, or end it"
            )
        yield


def perform(
    run: Run,
    recipe: Mapping[str, Any],
    context: Context,
    body: Callable[[], dict[str, Any]],
    reads: Iterable[Named] = (),
) -> dict[str, Any]:
    """Return the run's result: read it if the run is finished, else compute and save it.

    `recipe` is the content of the run's recipe.yaml. `body` computes the result from the data sets
    `reads`. Raises Busy if another process is computing it, and UserError if the run was computed
    from other data than are here now.
    """
    if not context.fresh and run.path.exists():
        _check_data(run, reads)
    if run.finished and not context.fresh:
        if context.profile:
            context.reporter.say(
                f"{run.path}: is finished, so nothing is profiled; add --fresh to run it again"
            )
        run.check()
        return run.result
    check_devices(run)
    if not distributed.is_main():
        with _end_with_the_others(context.stop):
            distributed.wait()
            result = body()
            distributed.wait()  # until the first process has written files that a later job reads
            return result
    with holding(run):
        if context.fresh:
            run.clear()
        if not run.finished:
            described = environment(str(context.compute), distributed.world_size())
            data = {name: digest for name, (_, digest) in local_copies(reads).items()}
            run.start(recipe, {**described, "data": data})
            with _end_with_the_others(context.stop), _report_os_error(run):
                distributed.wait()  # the others must not look for checkpoints that are cleared now
                with context.reporter.job(f"{run.recipe} · {run.stage}"):
                    run.finish(body())
                distributed.wait()
        return run.result


@contextmanager
def _report_os_error(run: Run) -> Iterator[None]:
    """Turn the errors of files, such as a full disk, into a UserError."""
    try:
        with report_disk_full(run.path):
            yield
    except OSError as error:
        raise UserError(describe_os_error(error)) from error


@contextmanager
def _end_with_the_others(stop: Stop) -> Iterator[None]:
    """End without a message if another process has ended, which has said why."""
    try:
        yield
    except RuntimeError as error:
        if not distributed.has_lost_a_process(error):
            raise
        # If a signal stopped all, the first process has saved and reported it.
        raise SystemExit(1 if stop.signal is None else Interrupted.exit_code) from None


def local_copies(reads: Iterable[Named]) -> dict[str, tuple[Path, str]]:
    """Name -> folder and digest of each local copy that data sets were found in."""
    found = {sources[data.name].found(data.options) for data in reads}
    digests = {path: hash_contents(path) for path in found if path is not None}
    return {path.name: (path, digest) for path, digest in digests.items() if digest is not None}


def _check_data(run: Run, reads: Iterable[Named]) -> None:
    """Check that the local data are those that the run was, or is being, computed from.

    No hash covers them: tables must be readable where the data are not.
    """
    before = run.environment.get("data")
    if not before:
        return  # nothing to compare with, so that nothing is hashed
    for name, (path, digest) in local_copies(reads).items():
        if before.get(name, digest) != digest:
            raise UserError(
                f"{path}: its files are not those that {run.path} was computed from: put the "
                "old ones back, add --fresh to compute it from the new ones, or name another "
                "place with --runs"
            )
