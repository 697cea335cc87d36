"""Progress on stderr: on a terminal live bars, elsewhere a line at least every ten seconds."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, Task, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

from sslrun.errors import UserError
from sslrun.runs import Run


class Update(Protocol):
    """A function that shows a training's progress."""

    def __call__(self, step: int, loss: float, speed: float, total: int | None = None) -> None:
        """Show the steps done, the loss, examples a second, and a new estimate of all steps."""


PLAIN_SECONDS = 9.0
"""Seconds between two lines of progress if stderr is not a terminal."""
TICK_SECONDS = 1.0
"""Seconds between two updates: of the clock, and of the runs that other workers finish."""
NUMBERS_WIDTH = 80
"""Columns of the terminal that a bar and its numbers take."""


class _Name(TextColumn):
    """The name of what runs, truncated if the terminal has no room beside the numbers."""

    def __init__(self, console: Console) -> None:
        super().__init__("{task.description}")
        self.console = console

    def render(self, task: Task) -> Text:
        text = super().render(task)
        text.truncate(max(24, self.console.width - NUMBERS_WIDTH), overflow="ellipsis")
        return text


@dataclass
class _Stage:
    """The progress of a training in steps."""

    name: str
    total: int
    done: int
    note: str = ""
    first: int = field(init=False)
    """Steps that were done before the training was resumed."""
    began: float = field(default_factory=lambda: time.monotonic())

    def __post_init__(self) -> None:
        self.first = self.done

    @property
    def left(self) -> float | None:
        """Seconds left at the current pace; None before the first step."""
        steps = self.done - self.first
        if steps <= 0:
            return None
        return (time.monotonic() - self.began) / steps * (self.total - self.done)


@dataclass
class _Job:
    """The job that is running."""

    title: str
    run_stage: str = ""
    """The stage of its run, such as `pretrain` or `probe`."""
    began: float = field(default_factory=lambda: time.monotonic())
    stage: _Stage | None = None

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    @property
    def left(self) -> float | None:
        """Seconds left of its training; None if it has no steps or none is done."""
        return None if self.stage is None else self.stage.left


class Pace:
    """The progress of a plan and an estimate of the time left.

    The estimate comes from the durations of finished runs of the same stage.
    """

    def __init__(self, runs: Sequence[Run], workers: int = 1) -> None:
        self.runs = {run.path: run for run in runs}
        self.workers = workers
        self.settled: set[Path] = set()
        self.seconds: dict[Path, float] = {}
        """Durations of the finished runs."""

    def update(self) -> None:
        """Count the runs that any worker has finished."""
        for path, run in self.runs.items():
            if path not in self.settled and run.finished:
                self.settle(run)

    def settle(self, run: Run) -> None:
        """Count a run that is finished or failed."""
        self.settled.add(run.path)
        try:
            self.seconds[run.path] = float(run.result.get("seconds", 0.0))
        except (UserError, TypeError):
            return  # it failed or is damaged: the code that reads its result reports that

    def estimates(self, job: _Job | None = None) -> dict[Path, float]:
        """Estimate the seconds of each run; runs of stages without any information are missing.

        An unfinished run takes as long as the mean finished run of its stage. If none is finished,
        the steps of the current `job` give the estimate for its own stage.
        """
        by_stage: dict[str, list[float]] = {}
        for path, seconds in self.seconds.items():
            by_stage.setdefault(self.runs[path].stage, []).append(seconds)
        means = {stage: fmean(values) for stage, values in by_stage.items()}
        if job is not None and job.run_stage and job.left is not None:
            means.setdefault(job.run_stage, job.seconds + job.left)
        known = {path: means[run.stage] for path, run in self.runs.items() if run.stage in means}
        return known | self.seconds

    def left(self, job: _Job | None) -> tuple[float | None, bool]:
        """Estimate the seconds until all runs are settled, and whether every run is covered.

        The seconds are None while nothing is known.
        """
        estimates = self.estimates(job)
        waiting = [path for path in self.runs if path not in self.settled]
        if (
            waiting
            and not any(path in estimates for path in waiting)
            and (job is None or job.left is None)
        ):
            return None, False
        seconds = sum(estimates.get(path, 0.0) for path in waiting)
        if job is not None:
            seconds = max(job.left or 0.0, seconds - job.seconds)
        return seconds / self.workers, all(path in estimates for path in waiting)

    def share(self, left: float | None) -> float:
        """Return the share of the plan that is done: of the time if known, else of the runs."""
        spent = sum(self.seconds.values())
        if left is None or spent <= 0:
            return len(self.settled) / max(1, len(self.runs))
        return spent / (spent + left * self.workers)


class Reporter:
    """Prints messages and shows the progress of the plan, if there is one, and of the stage."""

    def __init__(self, console: Console | None = None, quiet: bool = False) -> None:
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True, quiet=quiet)
        self.progress = Progress(
            _Name(self.console),
            BarColumn(bar_width=24),  # on a narrow terminal only the bar shrinks
            TextColumn("{task.fields[count]}", table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[note]}", table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[left]}", table_column=Column(no_wrap=True)),
            console=self.console,
            refresh_per_second=4,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._name = ""
        self._pace: Pace | None = None
        self._plan_bar: TaskID | None = None
        self._job: _Job | None = None
        self._reading = ""
        self._spoken = time.monotonic()
        self._depth = 0
        self._lock = threading.RLock()
        """Held while the ticker or the working thread reads or changes the plan's progress."""
        self._stop = threading.Event()
        self._ticker: threading.Thread | None = None

    def say(self, message: str) -> None:
        """Print one line, above the bars."""
        self.console.print(escape(message))

    # ------------------------------------------------------------ plans, jobs and stages

    @contextmanager
    def plan(
        self, name: str, runs: Sequence[Run], workers: int = 1
    ) -> Iterator[Callable[[Run], None]]:
        """Show a bar over all `runs`. Call the yielded function with each finished or failed run.

        Runs that other workers finish are counted too.
        """
        self._name, self._pace = name, Pace(runs, workers)
        self._pace.update()
        with self._running():
            self._plan_bar = self.progress.add_task(
                f"[bold]{escape(name)}", total=1.0, count=f"0/{len(runs)} runs", note="", left=""
            )
            self._draw()
            try:
                yield self._settle
            finally:
                with self._lock:
                    self.progress.remove_task(self._plan_bar)
                    self._plan_bar = self._pace = None

    def _settle(self, run: Run) -> None:
        assert self._pace is not None
        with self._lock:
            self._pace.settle(run)
            self._draw()

    @contextmanager
    def job(self, title: str, run_stage: str = "") -> Iterator[None]:
        """Name the running job, with or without steps. Inside another job, this does nothing."""
        if self._job is not None:
            yield
            return
        self._job = _Job(title, run_stage)
        with self._running():
            try:
                yield
            finally:
                self._job = None

    @contextmanager
    def stage(
        self, name: str, total: int, done: int = 0, unit: str = "examples"
    ) -> Iterator[Update]:
        """Show a bar over `total` steps. Call the yielded function after steps."""
        stage = _Stage(name, total, done)

        def update(step: int, loss: float, speed: float, total: int | None = None) -> None:
            stage.total = stage.total if total is None else total
            stage.done, stage.note = step, f"loss {loss:.3f} · {speed:,.0f} {unit}/s"
            self._draw_stage(bar, stage)

        with self.job(name), self._running():
            assert self._job is not None
            outer, self._job.stage = self._job.stage, stage
            bar = self.progress.add_task(
                escape(name), total=total, completed=done, count="", note="", left=""
            )
            self._draw_stage(bar, stage)
            try:
                yield update
            finally:
                self._job.stage = outer
                self.progress.remove_task(bar)

    @contextmanager
    def reading(self) -> Iterator[Callable[[str, int, int], None]]:
        """Show bars for the data sets that are read because no cache holds them.

        Call the yielded function with a data set's name, the amount done, and the total amount (0
        if unknown).
        """
        bars: dict[str, TaskID] = {}

        def update(name: str, done: int, total: int) -> None:
            self._reading = f"{name}: {done:,}{f' of {total:,}' if total else ''} read"
            count = f"{done:,}/{f'{total:,}' if total else '?'}"
            if name not in bars:
                bars[name] = self.progress.add_task(
                    escape(name), total=None, count=count, note="read", left=""
                )
            self.progress.update(bars[name], completed=done, total=total or None, count=count)

        with self._running():
            try:
                yield update
            finally:
                self._reading = ""
                for bar in bars.values():
                    self.progress.remove_task(bar)

    # ------------------------------------------------------------ bars and lines

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Show bars, or print lines if there is no terminal; nested uses share one ticker."""
        self._depth += 1
        if self._depth == 1:
            self._spoken = time.monotonic()
            self.progress.start()
            if not self.console.quiet:
                self._stop.clear()
                self._ticker = threading.Thread(target=self._tick, daemon=True, name="progress")
                self._ticker.start()
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._stop.set()
                if self._ticker is not None:
                    self._ticker.join()
                    self._ticker = None
                self.progress.stop()

    def _tick(self) -> None:
        """Refresh the times and print a line at intervals. Runs in its own thread."""
        while not self._stop.wait(TICK_SECONDS):
            with self._lock:
                if self._pace is not None:
                    self._pace.update()
                    self._draw()
                line = self.line()
            if (
                line
                and not self.console.is_terminal
                and time.monotonic() - self._spoken >= PLAIN_SECONDS
            ):
                self._spoken = time.monotonic()
                self.say(line)

    def line(self) -> str:
        """Describe the progress in one line: plan, job and time left; empty if nothing runs."""
        pace, job = self._pace, self._job
        parts = []
        if pace is not None:
            parts.append(f"{self._name}: {len(pace.settled)}/{len(pace.runs)} runs")
            parts.append(_left(*pace.left(job)))
        if job is not None:
            parts.append(job.title)
            stage = job.stage
            if stage is not None:
                of = f"/{stage.total:,}" if stage.total else ""  # a budget's number is not known
                parts += [f"step {stage.done:,}{of}", stage.note]
                parts.append("" if pace is not None else _left(stage.left))
            else:
                parts.append("" if self._reading else f"running for {format_duration(job.seconds)}")
        elif pace is not None and len(pace.settled) < len(pace.runs) and not self._reading:
            parts.append("waiting for other workers")
        parts.append(self._reading)
        return " · ".join(filter(None, parts))

    def _draw(self) -> None:
        """Update the plan's bar."""
        pace, bar = self._pace, self._plan_bar
        if pace is None or bar is None:
            return
        job = self._job
        left, whole = pace.left(job)
        is_working = job is not None and job.stage is None
        note = f"running for {format_duration(job.seconds)}" if job and is_working else ""
        self.progress.update(
            bar,
            completed=pace.share(left if whole else None),
            count=f"{len(pace.settled)}/{len(pace.runs)} runs",
            note=note,
            left=_clock(left, whole),
        )

    def _draw_stage(self, bar: TaskID, stage: _Stage) -> None:
        count = f"{stage.done}/{stage.total}"
        self.progress.update(
            bar,
            total=stage.total,
            completed=stage.done,
            count=count,
            note=stage.note,
            left=_clock(stage.left),
        )


def _left(seconds: float | None, whole: bool = True) -> str:
    """Format the time left. If not `whole`, it covers only a part: the rest is unknown."""
    return "" if seconds is None else f"{'' if whole else 'over '}{format_duration(seconds)} left"


def _clock(seconds: float | None, whole: bool = True) -> str:
    """Format the time left for a bar, in few columns: "1:40 left"."""
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    clock = (
        f"{minutes}:{rest:02d}"
        if minutes < 60
        else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
    )
    return f"{'' if whole else '> '}{clock} left"


def format_duration(seconds: float) -> str:
    """Format seconds in one or two units."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
