"""The runs on this machine: find, show and delete them, and reclaim their disk.

Thousands of runs must be listed in a second, so that this module imports nothing that imports
torch, and an `Entry` reads a file only when something asks for its content.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sslrun.errors import UserError
from sslrun.files import expand_home
from sslrun.metric import Metric
from sslrun.runs import (
    LOCK,
    State,
    hash_contents,
    last_record,
    lock_of,
    read_json,
    report_unwritable,
    state_of,
)

RUN_FOLDER = re.compile(r"(?P<stage>.+)-(?P<hash>[0-9a-f]{12})")
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}")
"""Name of a file that `files.replacing` writes, which stays if the writer is killed."""
WRITING_SECONDS = 3600.0
"""A temporary file that is younger may still be written."""
WEIGHTS = "backbone.safetensors"
UNITS = {"m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
WATCHED = (Metric("knn"), Metric("rankme", unit=""), Metric("held_out_loss", "", "lower", 3))
"""Numbers of feature checks, the most telling first."""
CANDIDATES = 5
"""Number of runs that an error lists."""


def main_number(result: dict[str, Any]) -> dict[str, Any]:
    """Return the number of a result that says most: {"metric": ..., "value": ..., "text": ...}.

    It is the test score of an evaluation, the validation score of a trial, and the last feature
    check of a pretraining; empty if there is none. A trial that has no score gives its reason as
    the text.
    """
    if "reason" in result:
        return {"text": f"{result.get('state')}: {result['reason']}"}
    try:
        if isinstance(declared := result.get("metric"), dict):
            metric = Metric(**declared)
            splits = result.get("metrics", {})
            value = float((splits.get("test") or splits["val"])[metric.name])
        else:
            watched = result.get("watched", {})
            metric = next(known for known in WATCHED if known.name in watched)
            value = float(watched[metric.name])
        text = f"{metric.title} {metric.text(value)}"
    except (
        AttributeError,
        LookupError,
        StopIteration,
        TypeError,
        ValueError,
    ):  # none, or a damaged file
        return {}
    return {"metric": metric.name, "value": value, "text": text}


@dataclass(frozen=True)
class Entry:
    """The folder of a run."""

    folder: Path

    @property
    def name(self) -> str:
        """The names of the recipe's and the run's folder: "mine/probe-0123456789ab"."""
        return f"{self.recipe}/{self.folder.name}"

    @property
    def recipe(self) -> str:
        return self.folder.parent.name

    @property
    def stage(self) -> str:
        return self.folder.name.rpartition("-")[0]

    @property
    def hash(self) -> str:
        return self.folder.name.rpartition("-")[2]

    @cached_property
    def state(self) -> State:
        return state_of(self.folder)

    @cached_property
    def result(self) -> dict[str, Any]:
        return _read(self.folder / "result.json")

    @cached_property
    def identity(self) -> dict[str, Any]:
        return _read(self.folder / "identity.json")

    @property
    def seed(self) -> int | None:
        source = self.result if "seed" in self.result else self.identity
        return source.get("seed")

    @property
    def failure(self) -> str:
        """The last line of why the run failed; empty if it did not."""
        if self.state != "failed":
            return ""
        lines = (self.folder / "failure.txt").read_text(encoding="utf-8").strip().splitlines()
        return lines[-1] if lines else "unknown"

    @cached_property
    def files(self) -> list[tuple[str, int, float]]:
        """Path in the folder, bytes, and time of the last change, of every file but the lock."""
        return sorted(_list_files(self.folder, ""))

    @property
    def size(self) -> int:
        return sum(size for _, size, _ in self.files)

    @property
    def changed(self) -> float:
        """When a file of the run changed last, in seconds since the epoch."""
        times = [changed for _, _, changed in self.files]
        return max(times, default=self.folder.stat().st_mtime)

    @property
    def references(self) -> set[str]:
        """Hashes of the runs, or digests of the weights, that the run was computed from."""
        origin = self.identity.get("origin") or {}
        hashes = {origin.get("pretrain"), origin.get("checkpoint"), self.identity.get("head")}
        hashes |= {self.identity.get("extends"), self.identity.get("init")}
        if self.result.get("state") == "complete":  # a trial of a search
            hashes |= set(self.result.get("runs", ()))
        return {value for value in hashes if isinstance(value, str)}

    @property
    def digests(self) -> set[str]:
        """The names by which other runs refer to this one: its hash and those of its weights."""
        weights = self.folder / WEIGHTS
        if not weights.is_file():
            return {self.hash}
        contents = hash_contents(weights)
        assert contents is not None
        return {self.hash, contents, hash_file(weights)}

    def as_dict(self) -> dict[str, Any]:
        """The line of a list, as JSON values."""
        return {
            "run": self.name,
            "recipe": self.recipe,
            "stage": self.stage,
            "hash": self.hash,
            "seed": self.seed,
            "state": self.state,
            **main_number(self.result),
            **({"failure": self.failure} if self.state == "failed" else {}),
            "age_seconds": round(time.time() - self.changed),
            "bytes": self.size,
        }


def _read(path: Path) -> dict[str, Any]:
    """Return the mapping in a file; empty if it is missing or damaged."""
    try:
        return read_json(path)
    except UserError:
        return {}


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file, which evaluations of a file of weights refer to."""
    import hashlib

    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _list_files(folder: Path, prefix: str) -> Iterator[tuple[str, int, float]]:
    with os.scandir(folder) as items:
        for item in items:
            if item.is_dir(follow_symlinks=False):
                yield from _list_files(Path(item.path), f"{prefix}{item.name}/")
            elif prefix or item.name != LOCK:
                status = item.stat(follow_symlinks=False)
                yield f"{prefix}{item.name}", status.st_size, status.st_mtime


def find_entries(root: Path) -> list[Entry]:
    """List the runs in a folder, by name. Raises UserError if there is no such folder."""
    if not root.is_dir():
        raise UserError(f"--runs {root}: no such folder")
    entries = []
    for recipe in sorted(path for path in root.iterdir() if path.is_dir()):
        names = sorted(path.name for path in recipe.iterdir() if RUN_FOLDER.fullmatch(path.name))
        entries += [Entry(recipe / name) for name in names]
    return entries


def select(
    entries: Iterable[Entry], name: str | None, failed: bool, older: float | None
) -> list[Entry]:
    """Select runs whose name holds a text, that failed, and that are `older` seconds unchanged."""
    before = time.time() - (older or 0.0)
    return [
        entry
        for entry in entries
        if (name is None or name in entry.name)
        and (not failed or entry.state == "failed")
        and (older is None or entry.changed < before)
    ]


def parse_age(text: str) -> float:
    """Read an age such as 7d, 12h or 30m as seconds. Raises UserError if it is none."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([mhdw])", text)
    if match is None:
        raise UserError(f"--older {text}: give a number and a unit: 30m, 12h, 7d or 2w")
    return float(match[1]) * UNITS[match[2]]


def find_entry(entries: Sequence[Entry], text: str) -> Entry:
    """Find a run by its folder, or by the beginning of its name, folder's name or hash.

    Raises:
        UserError: There is no such run, or there are several.
    """
    if not text:  # such as a variable of the shell without a value, which would name any run
        raise UserError("the name of the run is empty; `sslrun runs ls` lists them")
    folder = expand_home(text).resolve()
    exact = [entry for entry in entries if entry.folder.resolve() == folder or entry.name == text]
    found = exact or [
        entry
        for entry in entries
        if any(name.startswith(text) for name in (entry.name, entry.folder.name, entry.hash))
    ]
    if not found:
        raise UserError(f"{text}: no such run; `sslrun runs ls` lists them")
    if len(found) > 1:
        names = ", ".join(entry.name for entry in found[:CANDIDATES])
        more = f" and {len(found) - CANDIDATES} more" if len(found) > CANDIDATES else ""
        raise UserError(f"{text}: {len(found)} runs begin so: {names}{more}")
    return found[0]


def users_of(entry: Entry, entries: Iterable[Entry]) -> list[Entry]:
    """List the runs that were computed from a run."""
    digests = entry.digests
    return [
        other
        for other in entries
        if other.folder != entry.folder and not digests.isdisjoint(other.references)
    ]


def describe_entry(entry: Entry, entries: Sequence[Entry]) -> dict[str, Any]:
    """Describe a run as JSON values: recipe, lineage, environment, last record, and files."""
    recipe = entry.folder / "recipe.yaml"
    references = entry.references
    parents = [other.name for other in entries if other.hash in references and other != entry]
    return {
        **entry.as_dict(),
        "folder": str(entry.folder),
        "parents": parents,
        "used_by": [other.name for other in users_of(entry, entries)],
        "environment": _read(entry.folder / "environment.json"),
        "last_record": last_record(entry.folder),
        "result": entry.result,
        "files": {name: size for name, size, _ in entry.files},
        "recipe_yaml": recipe.read_text(encoding="utf-8") if recipe.is_file() else "",
    }


# ---------------------------------------------------------------- delete


def check_removal(chosen: Sequence[Entry], entries: Sequence[Entry], force: bool) -> None:
    """Check that no process works on the chosen runs, and that no other run needs them.

    Raises:
        UserError: One of them is running, or is needed and `force` is not set.
    """
    for entry in chosen:
        if entry.state == "running":
            raise UserError(f"{entry.name}: a process is working on it; end that process first")
        users = [] if force else [user for user in users_of(entry, entries) if user not in chosen]
        if users:
            names = ", ".join(user.name for user in users[:CANDIDATES])
            raise UserError(
                f"{entry.name}: {len(users)} runs were computed from it, such as {names}: remove "
                "them too, or add --force"
            )


def remove(entry: Entry) -> None:
    """Delete a run's folder. Raises UserError if a process has begun to work on it."""
    with report_unwritable(entry.folder, "it is not removed"), lock_of(entry.folder) as is_claimed:
        if not is_claimed:
            raise UserError(f"{entry.name}: a process is working on it; it is not removed")
        shutil.rmtree(entry.folder)


@dataclass(frozen=True)
class Leftover:
    """Something that no run needs."""

    kind: str
    path: Path
    size: int

    def delete(self) -> None:
        with report_unwritable(self.path, "it is not removed"):
            shutil.rmtree(self.path) if self.path.is_dir() else self.path.unlink(missing_ok=True)


@dataclass(frozen=True)
class UnfinishedRun(Leftover):
    """A run that failed or was stopped."""

    def delete(self) -> None:
        remove(Entry(self.path))


def find_leftovers(root: Path, older: float | None) -> list[Leftover]:
    """List what can be deleted among the runs without losing a result.

    These are runs that failed or were stopped, the training state of finished ones, and files that
    killed processes left. What changed in the last `older` seconds stays.
    """
    leftovers: list[Leftover] = []
    entries = find_entries(root)
    needed = {digest for entry in entries if entry.state == "done" for digest in entry.references}
    for entry in select(entries, None, False, older):
        if entry.state in ("failed", "stopped", "waiting") and entry.hash not in needed:
            kind = {"waiting": "empty"}.get(entry.state, entry.state)
            leftovers.append(UnfinishedRun(f"{kind} runs", entry.folder, entry.size))
        elif entry.state == "done":
            for name in ("checkpoint", "last"):
                files = [size for path, size, _ in entry.files if path.startswith(f"{name}/")]
                if files:
                    path = entry.folder / name
                    leftovers.append(Leftover("training states", path, sum(files)))
    return leftovers + _find_temporary(root, leftovers)


def _find_temporary(root: Path, leftovers: Sequence[Leftover]) -> list[Leftover]:
    """List the files that killed writers left outside of other leftovers."""
    covered = {leftover.path for leftover in leftovers}
    before, found = time.time() - WRITING_SECONDS, []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if Path(folder, name) not in covered]
        for path in (Path(folder, name) for name in files if TEMPORARY.fullmatch(name)):
            if (status := path.stat()).st_mtime < before:
                found.append(Leftover("temporary files", path, status.st_size))
    return found


def find_unread_caches() -> list[Leftover]:
    """List the cached data that were not read for a month; reading the data again fills them."""
    from sslrun.data.cache import find_unread

    return [Leftover("cached data", path, size) for path, size in find_unread().items()]
