"""Runs: one stage of one recipe with one seed, in a directory named by a hash of what determines its result."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from sslrun.errors import UserError, disk_is_full
from sslrun.files import replacing

FORMAT = 2
"""Part of every hash; raised when a change of the code makes old results incomparable."""
PACKAGE = __name__.partition(".")[0]


def digest(identity: Mapping[str, Any]) -> str:
    """Hash `identity` (JSON values) to twelve hexadecimal digits; the order of keys does not matter."""
    canonical = json.dumps({"format": FORMAT, **identity}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


LARGE = 2**30
"""Size in bytes from which a folder is identified by the names and sizes of its files alone."""


@lru_cache
def contents(path: Path) -> str | None:
    """Hash the content of a file or of all files in a folder; None if there is nothing at `path`.

    For folders of `LARGE` bytes or more only names and sizes are hashed, to take seconds instead of
    hours.
    """
    path = path.expanduser()
    files = [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())
    if not files:
        return None
    sizes = [each.stat().st_size for each in files]
    names = [] if path.is_file() else [each.relative_to(path).as_posix() for each in files]
    found = hashlib.sha256(repr((names, sizes)).encode())
    if path.is_file() or sum(sizes) < LARGE:
        for each in files:
            with open(each, "rb") as file:
                found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()[:12]


def component_identity(component: type[Any]) -> dict[str, Any]:
    """What a component's class adds to a run's hash: its version if that was raised, and a plug-in's source.

    Components of this package are distinguished by their version; those of a user's own file or
    package by the content of the file that defines them, so that an edited plug-in never reads an
    old result.
    """
    found: dict[str, Any] = {}
    if (raised := getattr(component, "version", 1)) != 1:
        found["component.version"] = raised
    module = sys.modules.get(component.__module__)
    source = getattr(module, "__file__", None)
    if component.__module__.partition(".")[0] != PACKAGE and source is not None:
        found["component.source"] = contents(Path(source))
    return found


@contextmanager
def report_disk_full(path: Path) -> Iterator[None]:
    """Turn the error of a full disk into a UserError that names the place."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or not disk_is_full(error):
            raise
        raise UserError(
            f"{path}: the disk is full; free some room and give the same command again"
        ) from None


UNWRITABLE = (
    errno.EACCES, errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR,
    errno.EPERM, errno.EROFS,
)  # fmt: skip
"""Error numbers of a place that cannot be written."""


def check_root(root: Path) -> None:
    """Raise UserError if no folder of runs can be at `root`; nothing is created yet."""
    nearest = next(
        place for place in (root.absolute(), *root.absolute().parents) if os.path.lexists(place)
    )
    if not nearest.is_dir():
        raise UserError(f"--runs {root}: {nearest} is not a folder; name another place")
    needed = os.R_OK | os.X_OK if nearest == root.absolute() else os.W_OK | os.X_OK
    if not os.access(nearest, needed):
        verb = "read" if nearest == root.absolute() else "write to"
        raise UserError(f"--runs {root}: no permission to {verb} {nearest}; name another place")


@contextmanager
def report_unwritable(path: Path, remedy: str = "name another place with --runs") -> Iterator[None]:
    """Turn the error of a full disk, or of a place that cannot be written, into a UserError that names it."""
    try:
        with report_disk_full(path):
            yield
    except OSError as error:
        if error.errno in UNWRITABLE:
            raise UserError(f"{path}: can't be written ({error.strerror}); {remedy}") from None
        raise


def write_atomically(path: Path, text: str, remedy: str = "name another place with --runs") -> None:
    """Write `text` so that `path` is at every moment the old file or the whole new one.

    UserError, with the `remedy`: the file cannot be written.
    """
    with report_unwritable(path, remedy):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")


FAILURE = "failure.txt"


@dataclass(frozen=True)
class Run:
    """`root/recipe/stage-hash/`, holding recipe.yaml, environment.json, metrics.jsonl, checkpoint/ and result.json.

    `start` creates the directory; the run is finished once result.json is there.
    """

    root: Path
    recipe: str
    stage: str
    identity: Mapping[str, Any]
    """Everything that determines the result, and nothing else, as JSON values."""

    @property
    def hash(self) -> str:
        return digest({"stage": self.stage, **self.identity})

    @property
    def path(self) -> Path:
        return self.root / self.recipe / f"{self.stage}-{self.hash}"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoint"

    @property
    def finished(self) -> bool:
        return (self.path / "result.json").exists()

    @property
    def result(self) -> dict[str, Any]:
        """What `finish` wrote. UserError: the run is not finished, or the file is damaged."""
        return read_result(self.path)

    @contextmanager
    def claimed(self) -> Iterator[bool]:
        """Lock the run for this process while inside; yields False if another process holds it."""
        with report_unwritable(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            lock = open(self.path / ".lock", "w")  # noqa: SIM115 (closed below; only opening it is reported)
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True

    def start(self, recipe: Mapping[str, Any], environment: Mapping[str, Any]) -> None:
        """Write the recipe, the identity and the environment. A run that was begun before keeps its logs and checkpoints."""
        (self.path / FAILURE).unlink(missing_ok=True)
        write_atomically(
            self.path / "recipe.yaml",
            yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True),
        )
        write_atomically(
            self.path / "identity.json",
            json.dumps({"stage": self.stage, **self.identity}, indent=2),
        )
        write_atomically(self.path / "environment.json", json.dumps(environment, indent=2))

    def fail(self, reason: str) -> None:
        """Write down why the run failed, for the notes of tables."""
        write_atomically(self.path / FAILURE, reason)

    @property
    def failure(self) -> str | None:
        """Why the run failed when it was last tried; None if it was never tried, or is finished."""
        path = self.path / FAILURE
        return path.read_text(encoding="utf-8") if path.is_file() and not self.finished else None

    def clear(self) -> None:
        """Delete everything in the run's folder, for a fresh start."""
        if self.path.exists():
            for each in self.path.iterdir():
                if each.name == ".lock":
                    continue
                shutil.rmtree(each) if each.is_dir() else each.unlink()

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        with (
            report_unwritable(self.path),
            open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file,
        ):
            file.write(json.dumps(record) + "\n")

    def forget_after(self, step: int) -> None:
        """Drop the log's records after `step`, which a resumed run writes again."""
        path = self.path / "metrics.jsonl"
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
            write_atomically(path, "".join(line + "\n" for line in kept))

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write the result, which makes the run finished, and delete its checkpoints."""
        stamped = {**result, "finished": datetime.now(UTC).isoformat(timespec="milliseconds")}
        write_atomically(self.path / "result.json", json.dumps(stamped, indent=2))
        shutil.rmtree(self.checkpoints, ignore_errors=True)


def _step_of(line: str) -> float:
    try:
        return json.loads(line).get("step", 0)
    except ValueError:  # the last line of a run that was killed while it wrote
        return float("inf")


def read_result(path: Path) -> dict[str, Any]:
    """Read the result.json of a run's directory. UserError: it is missing, or damaged."""
    try:
        return json.loads((path / "result.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: not a finished run") from None
    except ValueError:
        raise UserError(
            f"{path}/result.json: not valid JSON; remove it and run the stage again"
        ) from None


def environment(device: str, devices: int = 1) -> dict[str, Any]:
    """Describe what the run runs on, to explain a difference later. `devices`: how many of them."""
    import torch

    import sslrun

    return {
        "sslrun": sslrun.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
        "cuda": torch.version.cuda,
        "device": device,
        "devices": devices,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "command": sys.argv,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }
