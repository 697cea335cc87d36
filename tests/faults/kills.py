"""Kill every pretext task and protocol at random moments: each ends with the same bits."""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from processes import PATIENCE, Command, Ended, Together, differences, snapshot
from tally import Tally
from tiny import OFTEN, pretext_recipes, protocol_recipes, recipes_of_two, write

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Signals to draw from."""
RARELY = 10.0
"""Minutes between checkpoints in the other half of the trials: a signal alone saves."""


@dataclass
class Subject:
    """A command that is killed, and what it leaves if it is not."""

    kind: str
    recipe: dict[str, Any]
    folder: Path
    """Its folder `before` holds the runs that it starts from, and `cache` the caches."""
    expected: dict[str, Any]
    seconds: float

    @property
    def arguments(self) -> list[str]:
        command = "sweep" if self.kind == "protocol" else "pretrain"
        return [command, f"{self.recipe['name']}.yaml"]

    def start(self, folder: Path, cache: Path) -> Command | Together:
        """Start the command in a folder."""
        start = Together if self.kind == "two processes" else Command
        return start(self.arguments, folder, cache)

    @classmethod
    def prepare(cls, kind: str, recipe: dict[str, Any], folder: Path) -> Subject:
        """Run the command undisturbed; a protocol's pretraining is done before."""
        folder.mkdir(parents=True)
        write(recipe, folder)
        cache, before = folder / "cache", folder / "before"
        subject = cls(kind, recipe, folder, {}, 0.0)
        if kind == "protocol":
            pretrain = ["pretrain", f"{recipe['name']}.yaml", f"--runs={before}"]
            require(Command(pretrain, folder, cache).wait())
        before.mkdir(exist_ok=True)
        shutil.copytree(before, folder / "runs")
        started = time.monotonic()
        require(subject.start(folder, cache).wait())
        subject.seconds = time.monotonic() - started
        subject.expected = snapshot(folder / "runs")
        return subject


def require(ended: Ended) -> Ended:
    """Check that an undisturbed command ended well."""
    if ended.code:
        raise RuntimeError(f"an undisturbed command ended with {ended.code}: {ended.stderr}")
    return ended


def subjects(folder: Path, names: set[str]) -> list[Callable[[], Subject]]:
    """Return functions that prepare every recipe of `tiny` once, or those named."""
    recipes = {
        **{("pretext", name): recipe for name, recipe in pretext_recipes().items()},
        **{("protocol", name): recipe for name, recipe in protocol_recipes().items()},
        **{("two processes", name): recipe for name, recipe in recipes_of_two().items()},
    }
    return [
        cache(partial(Subject.prepare, kind, recipe, folder / f"{kind.replace(' ', '-')}-{name}"))
        for (kind, name), recipe in recipes.items()
        if not names or name in names
    ]


def trial(subject: Subject, seed: str, folder: Path, tally: Tally) -> None:
    """Kill a command one to three times, finish it, and compare what it leaves."""
    draw = random.Random(seed)
    part, case = f"kill {subject.kind}", f"{subject.recipe['name']} {seed}"
    folder.mkdir(parents=True)
    write(subject.recipe, folder, draw.choice((OFTEN, RARELY)))
    shutil.copytree(subject.folder / "before", folder / "runs")
    cache = subject.folder / "cache" if draw.random() < 0.7 else folder / "cache"
    for _ in range(draw.randint(1, 3)):
        number = draw.choice(SIGNALS)
        command = subject.start(folder, cache)
        command.send_after(draw.uniform(0, 0.9) * subject.seconds, number)
        ended = command.wait(PATIENCE)
        tally.add(f"signals, {subject.kind}", f"{number.name}: {_describe(ended)}")
        if ended.code not in (0, 130, -number) or "Traceback" in ended.stderr:
            tally.find(part, f"{number.name} ended with {ended.code}: {ended.last_line}", case)
            return
        if ended.code == 0:
            break
    ended = subject.start(folder, cache).wait()
    if ended.code:
        tally.find(part, f"does not continue: {ended.last_line}", case)
        return
    changed = differences(snapshot(folder / "runs"), subject.expected)
    if changed:
        tally.find(part, "another result", f"{case}: {', '.join(changed)}")
        return
    tally.add(part, "the same bits")
    shutil.rmtree(folder)


def _describe(ended: Ended) -> str:
    if ended.code == 130:
        return "stopped"
    return "too late" if ended.code == 0 else "killed"


def run(cases: int, seed: int, folder: Path, tally: Tally, names: set[str]) -> None:
    """Run `cases` trials, in turn over all subjects."""
    prepared = subjects(folder / "kills", names)
    random.Random(seed).shuffle(prepared)
    for number in range(cases):
        subject = prepared[number % len(prepared)]()
        trial(subject, f"{seed}-{number}", subject.folder / f"trial-{number}", tally)
