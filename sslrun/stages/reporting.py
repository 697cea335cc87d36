"""What a person sees while stages run: progress on stderr, on a terminal as live bars, elsewhere as plain lines."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

Update = Callable[[int, float, float], None]
"""(steps done, loss, examples a second) -> None."""

PLAIN_SECONDS = 30.0
"""Between two lines about one stage where there is no terminal to draw on."""
NUMBERS_WIDTH = 80
"""Columns of a terminal that a bar and the numbers beside it take."""


class _Name(TextColumn):
    """What runs, cut short where the terminal has no room beside the numbers."""

    def __init__(self, console: Console) -> None:
        super().__init__("{task.description}")
        self.console = console

    def render(self, task: Task) -> Text:
        text = super().render(task)
        text.truncate(max(24, self.console.width - NUMBERS_WIDTH), overflow="ellipsis")
        return text


class Reporter:
    """Says things, and shows bars: one for the whole plan, if there is one, and one for the stage that runs."""

    def __init__(self, console: Console | None = None, quiet: bool = False) -> None:
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True, quiet=quiet)
        self.progress = Progress(
            _Name(self.console),
            BarColumn(bar_width=24),  # on a narrow terminal the bar shrinks, and nothing else
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True)),
            TextColumn("left"),
            console=self.console,
            refresh_per_second=4,
            transient=True,
            disable=not self.console.is_terminal,
        )

    def say(self, message: str) -> None:
        """One line, above the bars."""
        self.console.print(escape(message))

    def _now_and_then(self) -> Callable[[str], None]:
        """Says what it is called with where there is no terminal, but no oftener than every PLAIN_SECONDS."""
        spoken = time.monotonic()

        def say(message: str) -> None:
            nonlocal spoken
            if not self.console.is_terminal and time.monotonic() - spoken > PLAIN_SECONDS:
                spoken = time.monotonic()
                self.say(message)

        return say

    @contextmanager
    def reading(self) -> Iterator[Callable[[str, int, int], None]]:
        """Bars of the data sets that are read meanwhile because no cache has them; call what it yields with the name of
        one, how much of it is done, and how much there is (0: not known yet)."""
        say = self._now_and_then()
        bars: dict[str, TaskID] = {}

        def update(name: str, done: int, total: int) -> None:
            if name not in bars:
                bars[name] = self.progress.add_task(escape(name), total=None, note="read")
            self.progress.update(bars[name], completed=done, total=total or None)
            say(f"{name}: {done:,}{f' of {total:,}' if total else ''} read")

        with self._drawn():
            try:
                yield update
            finally:
                for bar in bars.values():
                    self.progress.remove_task(bar)

    @contextmanager
    def _drawn(self) -> Iterator[None]:
        """The bars on the terminal, unless they are there already."""
        outer = self.progress.live.is_started
        if not outer:
            self.progress.start()
        try:
            yield
        finally:
            if not outer:
                self.progress.stop()

    @contextmanager
    def plan(self, name: str, total: int) -> Iterator[Callable[[], None]]:
        """A bar over `total` runs; call what it yields after each."""
        say = self._now_and_then()
        done = 0

        def advance() -> None:
            nonlocal done
            done += 1
            self.progress.advance(bar)
            say(f"{name}: {done}/{total} runs")

        with self.progress:
            bar = self.progress.add_task(f"[bold]{escape(name)}", total=total, note="runs")
            try:
                yield advance
            finally:
                self.progress.remove_task(bar)

    @contextmanager
    def stage(self, name: str, total: int, done: int = 0, unit: str = "examples") -> Iterator[Update]:
        """A bar over `total` steps with the loss and the speed; call what it yields after steps."""
        say = self._now_and_then()

        def update(step: int, loss: float, speed: float) -> None:
            note = f"loss {loss:.3f} · {speed:,.0f} {unit}/s"
            self.progress.update(bar, completed=step, note=note)
            say(f"{name}: step {step}/{total} · {note}")

        with self._drawn():
            bar = self.progress.add_task(escape(name), total=total, completed=done, note="")
            try:
                yield update
            finally:
                self.progress.remove_task(bar)
