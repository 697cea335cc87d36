"""Damage every file of runs, checkpoints and caches: it is found, or changes no result."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kills import require
from processes import Command, Ended, differences, snapshot
from tally import Tally
from tiny import pretext_recipes, protocol_recipes, write

REGIONS = 8
"""Parts of a file that are damaged in turn."""


@dataclass
class Victim:
    """Files that a later command reads, and what it then computes from the intact ones."""

    kind: str
    folder: Path
    """A folder with a recipe, runs and caches, which trials copy."""
    files: list[Path]
    """The files to damage, relative to `folder`."""
    arguments: list[str]
    expected: dict[str, Any]
    output: str
    """What the command prints."""

    @classmethod
    def prepare(cls, kind: str, folder: Path, inside: str, arguments: list[str]) -> Victim:
        """List the files in the folder `inside`, and run the command on a copy of them."""
        files = [
            path.relative_to(folder)
            for path in sorted((folder / inside).rglob("*"))
            if path.is_file() and path.stat().st_size
        ]
        intact = folder.with_name(f"{folder.name}-intact")
        shutil.copytree(folder, intact)
        ended = require(Command(arguments, intact, intact / "cache").wait())
        expected = snapshot(intact / "runs")
        return cls(kind, folder, files, arguments, results(expected), ended.stdout)


def results(found: dict[str, Any]) -> dict[str, Any]:
    """What a snapshot holds of results and weights: not logs."""
    names = ("result.json", "backbone.safetensors", "head.safetensors")
    return {place: value for place, value in found.items() if place.endswith(names)}


def unfinished(folder: Path) -> Victim:
    """A pretraining that was killed after its third checkpoint."""
    folder.mkdir(parents=True)
    recipe = write(pretext_recipes()["moco"], folder)
    arguments = ["pretrain", recipe.name]
    ended = Command(arguments, folder, folder / "cache", _kill_at_third_checkpoint).wait()
    assert ended.code == -signal.SIGKILL, ended
    return Victim.prepare("checkpoint", folder, "runs", arguments)


def _kill_at_third_checkpoint() -> None:
    from sslrun.stages import fit

    save, count = fit.save, iter(range(2))

    def save_and_die(*arguments: Any) -> None:
        save(*arguments)
        if next(count, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    fit.save = save_and_die


def finished(folder: Path) -> Victim:
    """A sweep that is done, except for one evaluation that reads the weights."""
    folder.mkdir(parents=True)
    recipe = protocol_recipes()["lpft"]
    path = write(recipe, folder)
    require(Command(["sweep", path.name], folder, folder / "cache").wait())
    recipe["evaluate"]["digits"]["protocols"] = ["probe", "lpft", "knn"]
    write(recipe, folder)
    return Victim.prepare("finished run", folder, "runs", ["sweep", path.name])


def cached(folder: Path, name: str) -> Victim:
    """The caches of data that another command has read."""
    folder.mkdir(parents=True)
    path = write({**pretext_recipes()[name], "name": name}, folder)
    arguments = ["pretrain", path.name]
    require(Command([*arguments, "--runs=earlier"], folder, folder / "cache").wait())
    return Victim.prepare(f"cache of {name}", folder, "cache", arguments)


def damage(path: Path, draw: random.Random) -> str:
    """Truncate a file in a random region, or flip one bit there; say which."""
    size = path.stat().st_size
    region = draw.randrange(min(REGIONS, size))
    place = draw.randrange(size * region // REGIONS, max(1, size * (region + 1) // REGIONS))
    if draw.random() < 0.3:
        os.truncate(path, place)
        return f"truncated to {place} of {size} bytes"
    bit = draw.randrange(8)
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1 << bit]))
    return f"bit {bit} of byte {place} of {size}"


def trial(victim: Victim, file: Path, seed: str, folder: Path, tally: Tally) -> None:
    """Damage one file, and give the command that reads it."""
    shutil.copytree(victim.folder, folder)
    what = damage(folder / file, random.Random(seed))
    damaged = (folder / file).read_bytes()
    ended = Command(victim.arguments, folder, folder / "cache").wait()
    part, case = f"damage {victim.kind}", f"{file}: {what} (seed {seed})"
    unread = file if _content(folder / file) == damaged else None
    finding = judge(victim, ended, folder, unread)
    if finding:
        tally.find(part, f"{finding} ({file.name})", case)
        return
    tally.add(part, "named" if ended.code else "redone or passed over, the same bits")
    shutil.rmtree(folder)


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def judge(victim: Victim, ended: Ended, folder: Path, unread: Path | None) -> str:
    """What is wrong with the end of a command after damage; empty if nothing is.

    `unread` is the damaged file if it is as before: then only what is computed from it counts.
    """
    if ended.message:
        return ""
    if ended.code:
        return f"ended with {ended.code}: {ended.last_line[:200]}"
    changed = differences(results(snapshot(folder / "runs")), victim.expected)
    if changed := [place for place in changed if Path("runs", place) != unread]:
        return f"silently another result in {', '.join(sorted({Path(p).name for p in changed}))}"
    return "" if ended.stdout == victim.output else "silently another table"


VICTIMS: dict[str, Callable[[Path], Victim]] = {
    "checkpoint": unfinished,
    "finished": finished,
    "texts": lambda folder: cached(folder, "mlm"),
    "images": lambda folder: cached(folder, "colorize"),
    "films": lambda folder: cached(folder, "walk"),
    "trajectories": lambda folder: cached(folder, "actions"),
}
"""What is damaged, by names for `--name`."""


def run(cases: int, seed: int, folder: Path, tally: Tally, names: set[str]) -> None:
    """Damage each file in turn, `cases` times in all."""
    chosen = [name for name in VICTIMS if not names or name in names]
    victims = [VICTIMS[name](folder / "damage" / name) for name in chosen]
    targets = [(victim, file) for victim in victims for file in victim.files]
    random.Random(seed).shuffle(targets)
    for number in range(cases):
        victim, file = targets[number % len(targets)]
        place = victim.folder.with_name(f"{victim.folder.name}-{number}")
        trial(victim, file, f"{seed}-{number}", place, tally)
