"""Failing machines: full, broken and vanishing disks, several processes, NaN, and clocks."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from kills import Subject
from processes import Command, Ended, differences, snapshot
from tally import Tally
from tiny import pretext_recipes, protocol_recipes, write

Draw = random.Random


class Skipped(Exception):
    """This machine cannot make the fault."""


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Callable[[str], None]]:
    """Mount a file system of a size at `folder`; yield a function that remounts it otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        raise Skipped("cannot mount a tmpfs")
    try:
        yield lambda options: _mount("-o", f"remount,{options}", str(folder))
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


def full_disk(subject: Subject, folder: Path, draw: Draw) -> Ended:
    """The disk fills up at a random moment, and has space again later."""
    whole = sum(path.stat().st_size for path in (subject.folder / "runs").rglob("*.*")) // 1024
    with small_disk(folder / "runs", draw.randint(4, 4 * whole)) as remount:
        ended = command(subject, folder).wait()
        remount("size=256m")
        return _finish(subject, folder, ended)


def full_cache(subject: Subject, folder: Path, draw: Draw) -> Ended:
    """The disk of the caches is full."""
    with small_disk(folder / "cache", draw.randint(4, 64)):
        ended = Command(subject.arguments, folder, folder / "cache").wait()
    return _finish(subject, folder, ended)


def read_only(subject: Subject, folder: Path, draw: Draw) -> Ended:
    """The disk becomes read-only at a random moment."""
    with small_disk(folder / "runs", 2**18) as remount:
        started = command(subject, folder)
        time.sleep(draw.uniform(0, subject.seconds))
        with suppress(subprocess.CalledProcessError):  # a file is open for writing at this moment
            remount("ro")
        ended = started.wait()
        remount("rw")
        return _finish(subject, folder, ended)


def vanishing_folder(subject: Subject, folder: Path, draw: Draw) -> Ended:
    """Somebody deletes the folder of runs at a random moment."""
    started = command(subject, folder)
    time.sleep(draw.uniform(0, subject.seconds))
    shutil.rmtree(folder / "runs", ignore_errors=True)
    return _finish(subject, folder, started.wait())


def input_output_error(subject: Subject, folder: Path, draw: Draw) -> Ended:
    """The operating system reports EIO when a file under the runs is opened or renamed."""
    return _finish(subject, folder, _with_broken_calls(subject, folder, errno.EIO, draw))


def no_space_for_a_call(subject: Subject, folder: Path, draw: Draw) -> Ended:
    """The operating system reports ENOSPC when a file under the runs is opened or renamed."""
    return _finish(subject, folder, _with_broken_calls(subject, folder, errno.ENOSPC, draw))


def _with_broken_calls(subject: Subject, folder: Path, number: int, draw: Draw) -> Ended:
    """Let one call of the operating system under `folder`/runs fail, and all after it."""
    left, runs = draw.randint(1, 60), str(folder / "runs")

    def prepare() -> None:
        def fail(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal left
            if event not in ("open", "os.rename", "os.mkdir"):
                return
            path = os.path.abspath(str(arguments[0]))
            writes = event != "open" or bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
            if writes and path.startswith(runs):
                left -= 1
                if left <= 0:
                    raise OSError(number, os.strerror(number), path)

        sys.addaudithook(fail)

    return command(subject, folder, prepare).wait()


def two_processes(subject: Subject, folder: Path, draw: Draw) -> Ended:
    """Two processes get the same command at nearly the same time."""
    first = command(subject, folder)
    time.sleep(draw.uniform(0, 0.5 * subject.seconds))
    (folder / "second").mkdir()
    write(subject.recipe, folder / "second")
    arguments = [*subject.arguments, f"--runs={folder / 'runs'}"]
    second = Command(arguments, folder / "second", subject.folder / "cache").wait()
    ended = first.wait()
    return _finish(subject, folder, ended if ended.failed else second)


def killed_worker(subject: Subject, folder: Path, draw: Draw) -> Ended:
    """The second worker of `sweep --jobs 2` is killed at a random moment."""
    every_step = Path(__file__).with_name("every_step.py")
    arguments = ["sweep", subject.arguments[1], "--jobs=2", f"--import={every_step}"]
    started = Command(arguments, folder, subject.folder / "cache")
    children = Path(f"/proc/{started.pid}/task/{started.pid}/children")
    while started.poll() is None and not (found := children.read_text().split()):
        time.sleep(0.01)
    if started.code is None:
        time.sleep(draw.uniform(0, 3 + subject.seconds))
        if started.poll() is None:
            os.kill(int(found[0]), signal.SIGKILL)
    return _finish(subject, folder, started.wait())


def not_a_number(subject: Subject, folder: Path, draw: Draw) -> Ended:
    """The loss of a random step is NaN."""
    step = draw.randint(1, 3)

    def prepare() -> None:
        from sslrun.training import loop

        run = loop._Passes.run

        def broken(self: Any, *arguments: Any) -> Any:
            done = run(self, *arguments)
            if self.training.step + 1 >= step:
                done.loss = done.loss * float("nan")
            return done

        loop._Passes.run = broken

    ended = command(subject, folder, prepare).wait()
    if f"the loss is not finite at step {step}" not in ended.message:
        return Ended(1, "", f"NaN in a loss is not reported: {ended.last_line}")
    return _finish(subject, folder, ended)


def jumping_clock(subject: Subject, folder: Path, draw: Draw) -> Ended:
    """The clock of the wall jumps by up to a year, between any two looks at it."""

    def prepare() -> None:
        now = time.time
        time.time = lambda: now() + draw.uniform(-3e7, 3e7)

    return _finish(subject, folder, command(subject, folder, prepare).wait())


FAULTS: dict[str, Callable[[Subject, Path, Draw], Ended]] = {
    "full disk": full_disk,
    "full disk of caches": full_cache,
    "read-only disk": read_only,
    "runs deleted meanwhile": vanishing_folder,
    "EIO": input_output_error,
    "ENOSPC": no_space_for_a_call,
    "two processes": two_processes,
    "a worker killed": killed_worker,
    "NaN in a loss": not_a_number,
    "jumping clock": jumping_clock,
}
"""The faults, in the order of trials."""


def command(subject: Subject, folder: Path, prepare: Callable[[], object] | None = None) -> Command:
    return Command(subject.arguments, folder, subject.folder / "cache", prepare)


def _finish(subject: Subject, folder: Path, ended: Ended) -> Ended:
    """Give the command again after a fault, unless it failed as no command should.

    Then compare what it leaves; a difference counts as a failure, too.
    """
    if ended.code and not ended.message:
        return ended
    again = command(subject, folder).wait()
    if again.code:
        return Ended(1, "", f"does not continue: {again.last_line}")
    if changed := differences(snapshot(folder / "runs"), subject.expected):
        return Ended(1, "", f"another result in {', '.join(changed)}")
    return ended


def run(cases: int, seed: int, folder: Path, tally: Tally, names: set[str]) -> None:
    """Let `cases` faults happen, of each kind in turn."""
    recipes = (("pretext", pretext_recipes()["byol"]), ("protocol", protocol_recipes()["finetune"]))
    prepared = [
        Subject.prepare(kind, recipe, folder / "machine" / kind) for kind, recipe in recipes
    ]
    faults = [name for name in FAULTS if not names or name in names]
    for number in range(cases):
        name = faults[number % len(faults)]
        subject = prepared[number // len(faults) % len(prepared)]
        case, place = f"{seed}-{number}", subject.folder / f"trial-{number}"
        place.mkdir()
        write(subject.recipe, place)
        shutil.copytree(subject.folder / "before", place / "runs")
        try:
            ended = FAULTS[name](subject, place, random.Random(case))
        except Skipped as reason:
            tally.add(f"machine: {name}", f"skipped: {reason}")
            continue
        if ended.code in (0, 2) and not ended.failed:
            tally.add(
                f"machine: {name}", "one line, then the same bits" if ended.code else "same bits"
            )
            shutil.rmtree(place, ignore_errors=True)
        else:
            tally.find(f"machine: {name}", ended.last_line[:200], f"{subject.kind} (seed {case})")
