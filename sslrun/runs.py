"""Runs: one stage of one recipe with one seed.

The directory of a run is named by a hash of everything that determines its result.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import platform
import shutil
import sys
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TextIO

import yaml

from sslrun.errors import UserError, disk_is_full
from sslrun.files import (
    SUMS,
    checksum,
    expand_home,
    has_checksum,
    remove_unfinished,
    replacing,
    walk,
    write_sums,
)

FORMAT = 2
"""Part of every hash. Raise it when a change of the code makes old results incomparable."""
PACKAGE = __name__.partition(".")[0]


def digest(identity: Mapping[str, Any]) -> str:
    """Hash `identity` (JSON values) to twelve hexadecimal digits.

    The order of its keys does not matter.
    """
    canonical = json.dumps({"format": FORMAT, **identity}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


LARGE = 2**30
"""A folder of this many bytes or more is identified by the names and sizes of its files only."""
MANY = 10_000
"""So is a folder of this many files or more."""


@lru_cache
def hash_contents(path: Path) -> str | None:
    """Hash the content of a file or of all files in a folder; None if `path` holds no file.

    For a folder of `LARGE` bytes or `MANY` files only names and sizes are hashed, which takes
    seconds instead of hours.
    """
    path = expand_home(path)
    is_file = path.is_file()
    if not is_file and not path.is_dir():
        return None
    names = [] if is_file else _list_names(path)
    files = names or [""]  # text, because a million of Path take a gigabyte
    if not is_file and not names:
        return None
    sizes = [os.stat(path / name).st_size for name in files]
    total = hashlib.sha256(repr((names, sizes)).encode())
    if is_file or (sum(sizes) < LARGE and len(files) < MANY):
        for name in files:
            with open(path / name, "rb") as content:
                total.update(hashlib.file_digest(content, "sha256").digest())
    return total.hexdigest()[:12]


def _list_names(folder: Path) -> list[str]:
    """List the files in a folder and its subfolders, relative to it, one folder after the other."""
    start = len(os.path.join(folder, ""))
    # "\0" sorts before any character of a name, so that names sort as the lists of their parts do.
    names = [file[start:].replace(os.sep, "\0") for file in walk(folder) if os.path.isfile(file)]
    names.sort()
    return [name.replace("\0", "/") for name in names]


def component_identity(component: type[Any]) -> dict[str, Any]:
    """Return what the class of a component adds to a run's hash.

    It is the version, unless that is 1, and a hash of the source file of a plug-in, so that an
    edited plug-in never reads an old result. Components of this package are distinguished by their
    version alone.
    """
    identity: dict[str, Any] = {}
    if (raised := getattr(component, "version", 1)) != 1:
        identity["component.version"] = raised
    module = sys.modules.get(component.__module__)
    source = getattr(module, "__file__", None)
    if component.__module__.partition(".")[0] != PACKAGE and source is not None:
        identity["component.source"] = hash_contents(Path(source))
    return identity


@contextmanager
def report_disk_full(path: Path) -> Iterator[None]:
    """Turn the error of a full disk into a UserError that names `path`."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or not disk_is_full(error):
            raise
        raise UserError(
            f"{path}: the disk is full; free some space and give the same command again"
        ) from None


UNWRITABLE = (
    errno.EACCES, errno.EEXIST, errno.EIO, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG,
    errno.ENOENT, errno.ENOTDIR, errno.EPERM, errno.EROFS, errno.ESTALE,
)  # fmt: skip
"""Error numbers for a path that cannot be written."""


def check_root(root: Path) -> None:
    """Check that `root` is a readable folder, or that it can be created; create nothing.

    Raises:
        UserError: It is neither.
    """
    nearest = _find_nearest(root)
    if not nearest.is_dir():
        raise UserError(f"--runs {root}: {nearest} is not a folder; name another place")
    needed = os.R_OK | os.X_OK if nearest == root.absolute() else os.W_OK | os.X_OK
    if not os.access(nearest, needed):
        verb = "read" if nearest == root.absolute() else "write to"
        raise UserError(f"--runs {root}: no permission to {verb} {nearest}; name another place")


def check_output(path: Path, *, is_folder: bool = False) -> None:
    """Check that a file, or a folder of files, can be written at `path`; write nothing.

    Raises:
        UserError: It cannot.
    """
    nearest = _find_nearest(path if is_folder else path.parent)
    if path.is_dir() and not is_folder:
        cause = "is a folder"
    elif not nearest.is_dir():
        cause = f"{nearest} is not a folder"
    elif not os.access(nearest, os.W_OK | os.X_OK):
        cause = f"no permission to write to {nearest}"
    else:
        return
    raise UserError(f"{path}: can't be written ({cause}); name another place")


def _find_nearest(path: Path) -> Path:
    """Return `path` if it exists, or else the nearest folder above it that does."""
    candidates = (path.absolute(), *path.absolute().parents)
    return next(candidate for candidate in candidates if os.path.lexists(candidate))


@contextmanager
def report_unwritable(path: Path, remedy: str = "name another place with --runs") -> Iterator[None]:
    """Turn the error of a full disk or of an unwritable path into a UserError that names `path`."""
    try:
        with report_disk_full(path):
            yield
    except OSError as error:
        if error.errno in UNWRITABLE:
            raise UserError(f"{path}: can't be written ({error.strerror}); {remedy}") from None
        raise


def write_atomically(path: Path, text: str, remedy: str = "name another place with --runs") -> None:
    """Write `text` to `path`, which at every moment is either the old file or the whole new one.

    Raises:
        UserError: The file cannot be written; the message ends with `remedy`.
    """
    with report_unwritable(path, remedy):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")


DEVICES = "devices.json"
"""Name of the file in a recipe's folder that lists how many devices its runs were computed on."""


def device_counts(folder: Path) -> list[int]:
    """List the numbers of devices, above 1, that the runs in a recipe's folder depend on."""
    path = folder / DEVICES
    try:
        counts: list[int] = json.loads(path.read_text()) if path.is_file() else []
        return [int(count) for count in counts]
    except (OSError, TypeError, ValueError):
        raise UserError(
            f"{path}: damaged; write the numbers of devices of the runs beside it, as in [2, 8]"
        ) from None


RESULT = "result.json"
"""Name of the file with the result of a finished run."""
SEALED = (".json", ".safetensors", ".yaml")
"""Endings of the files of a finished run that are read again, and have a checksum."""
WORKER = "SSLRUN_WORKER"
"""Environment variable with the name of a worker of a sweep."""


def own_name() -> str:
    """Return the name of this worker; of another process its host and process id."""
    return os.environ.get(WORKER) or f"{platform.node()}:{os.getpid()}"


FAILURE = "failure.txt"
"""Name of the file that says why a run failed."""
LOCK = ".lock"
"""Name of the file that the process which computes a run holds locked."""
TAIL = 65_536
"""Bytes at the end of a log that hold its last record."""

State = Literal["done", "running", "failed", "stopped", "waiting"]
"""State of a run. stopped: begun, but no process works on it; waiting: not begun."""


def state_of(folder: Path) -> State:
    """Return the state of the run in a folder."""
    if (folder / "result.json").exists():
        return "done"
    if is_locked(folder):
        return "running"
    if (folder / FAILURE).is_file():
        return "failed"
    return "stopped" if (folder / "environment.json").is_file() else "waiting"


def is_locked(folder: Path) -> bool:
    """Return whether a process works on the run in a folder, on any host that shares the folder."""
    try:
        with open(folder / LOCK) as lock:
            # Shared and released at once: workers that try to lock the run meanwhile try again.
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no such run, or that of another user
        return False
    return False


@contextmanager
def lock_of(folder: Path) -> Iterator[TextIO | None]:
    """Lock a folder for this process, and yield the lock; None if another process holds it."""
    with report_unwritable(folder):
        lock = open(folder / LOCK, "a", encoding="utf-8")  # noqa: SIM115 (closed by the next line)
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        yield lock


def last_record(folder: Path) -> dict[str, Any]:
    """Return the last whole record of a run's log; empty if there is none."""
    try:
        with open(folder / "metrics.jsonl", "rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - TAIL))
            lines = log.read().splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except ValueError:  # cut off by a killed process, or by the tail
            continue
        if isinstance(record, dict):
            return record
    return {}


@dataclass(frozen=True)
class Run:
    """A run and its directory, `root/recipe/stage-hash/`.

    The directory holds recipe.yaml, identity.json, environment.json, metrics.jsonl, checkpoint/,
    sums.json and result.json. `start` creates it. The run is finished once it has a result.json.
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
    def devices(self) -> int | None:
        """The number of devices that the result depends on; None if it does not."""
        return self.identity.get("devices")

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoint"

    @property
    def last_state(self) -> Path:
        """The folder of a finished training's last state, if it was kept."""
        return self.path / "last"

    @property
    def finished(self) -> bool:
        return (self.path / RESULT).exists()

    @property
    def environment(self) -> dict[str, Any]:
        """What `start` wrote; empty if it is missing or damaged."""
        try:
            return read_json(self.path / "environment.json")
        except UserError:
            return {}

    @property
    def result(self) -> dict[str, Any]:
        """What `finish` wrote.

        Raises:
            UserError: The run is not finished, or the file is damaged.
        """
        return read_result(self.path)

    @contextmanager
    def claimed(self) -> Iterator[bool]:
        """Lock the run for this process; yield False if another process holds the lock.

        Temporary files that a killed process left are removed. The lock lists its holder; one that
        dies leaves its name there.
        """
        with report_unwritable(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        with lock_of(self.path) as lock:
            if lock is None:
                yield False
                return
            with report_unwritable(self.path):
                lock.write(f"{own_name()}\n")
                lock.flush()
            remove_unfinished(self.path.rglob(".*"), os.fstat(lock.fileno()).st_mtime)
            try:
                yield True
            finally:
                lock.truncate(0)

    @property
    def holders(self) -> list[str]:
        """The processes that died while they held the run, and then the one that holds it now."""
        try:
            return (self.path / LOCK).read_text(encoding="utf-8").split()
        except OSError:
            return []

    def check(self) -> None:
        """Raise UserError if a file that describes the finished run is damaged or missing.

        Weights are checked when they are read.
        """
        for suffix in (".json", ".yaml"):
            if broken := find_broken(self.path, suffix):
                raise damaged(self.path / broken)

    def start(self, recipe: Mapping[str, Any], environment: Mapping[str, Any]) -> None:
        """Write the recipe, the identity and the environment.

        A run that was started before keeps its log and checkpoints.
        """
        for stale in (FAILURE, SUMS):
            (self.path / stale).unlink(missing_ok=True)
        write_atomically(
            self.path / "recipe.yaml",
            yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True),
        )
        write_atomically(
            self.path / "identity.json",
            json.dumps({"stage": self.stage, **self.identity}, indent=2),
        )
        write_atomically(self.path / "environment.json", json.dumps(environment, indent=2))
        counts = device_counts(self.path.parent)
        if self.devices is not None and self.devices not in counts:
            write_atomically(self.path.parent / DEVICES, json.dumps([*counts, self.devices]))

    def fail(self, reason: str) -> None:
        """Write why the run failed, for the notes of tables."""
        write_atomically(self.path / FAILURE, reason)

    @property
    def failure(self) -> str | None:
        """Why the run failed last; None if it did not fail, or is finished."""
        path = self.path / FAILURE
        return path.read_text(encoding="utf-8") if path.is_file() and not self.finished else None

    def clear(self) -> None:
        """Delete everything in the run's folder, for a fresh start."""
        if self.path.exists():
            # First of all, so that a run which is half cleared is not taken for a finished one.
            (self.path / RESULT).unlink(missing_ok=True)
            for path in self.path.iterdir():
                if path.name == LOCK:
                    continue
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        with (
            report_unwritable(self.path),
            open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file,
        ):
            file.write(json.dumps(record) + "\n")

    def forget_after(self, step: int, attempt: str | None = None) -> None:
        """Remove the log's records after `step`, which a resumed run writes again.

        If the run trains several times, only those of the training `attempt`.
        """
        path = self.path / "metrics.jsonl"
        if path.exists():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            kept = [line for line in lines if _stays(line, step, attempt)]
            write_atomically(path, "".join(line + "\n" for line in kept))

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write the result, which makes the run finished, and delete its checkpoints.

        The checksums of all files that are read again are written before.
        """
        stamped = {**result, "finished": datetime.now(UTC).isoformat(timespec="milliseconds")}
        text = json.dumps(stamped, indent=2)
        with report_unwritable(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            files = [path for path in self.path.iterdir() if path.suffix in SEALED]
            sums = {path.name: checksum(path) for path in sorted(files)}
            write_sums(self.path / SUMS, {**sums, RESULT: zlib.crc32(text.encode())})
        write_atomically(self.path / RESULT, text)
        shutil.rmtree(self.checkpoints, ignore_errors=True)


def _stays(line: str, step: int, attempt: str | None) -> bool:
    """Whether a line of the log stays when its training `attempt` continues after `step`."""
    try:
        record = json.loads(line)
        return record.get("attempt") != attempt or float(record.get("step", 0)) <= step
    except (AttributeError, TypeError, ValueError):  # damaged, or half written by a killed process
        return False


def read_result(path: Path) -> dict[str, Any]:
    """Read the result.json in the directory of a run.

    Raises:
        UserError: It is missing or damaged.
    """
    if not (path / RESULT).exists():
        raise UserError(f"{path}: not a finished run")
    return read_json(path / RESULT)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object in the directory of a run; empty if the file is missing.

    Raises:
        UserError: It is damaged.
    """
    text = read_text(path)
    try:
        content = {} if text is None else json.loads(text)
    except ValueError:
        raise damaged(path) from None
    if not isinstance(content, dict):
        raise damaged(path)
    return content


def read_text(path: Path) -> str | None:
    """Read a file in the directory of a run; None if it is missing.

    Raises:
        UserError: It cannot be read, or is not what the run wrote.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    expected = _sums(path.parent).get(path.name)
    if expected is not None and zlib.crc32(content) != expected:
        raise damaged(path)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise damaged(path) from None


def check_file(path: Path) -> None:
    """Check that a file in the directory of a finished run is what the run wrote.

    A file without a recorded checksum passes, as one of another place does. Each file is read once
    per process, which takes a second for 1.4 GB.

    Raises:
        UserError: It is damaged.
    """
    expected = _sums(path.parent).get(path.name)
    if expected is not None and path.is_file() and not has_checksum(path, expected):
        raise damaged(path)


def find_broken(path: Path, suffix: str) -> str | None:
    """Return the first file of a finished run with this ending that is missing or damaged."""
    sums = _sums(path)
    names = (name for name in sums if name.endswith(suffix))
    return next((name for name in names if not has_checksum(path / name, sums[name])), None)


def damaged(path: Path) -> UserError:
    """Return the error for a damaged file in the directory of a run."""
    return UserError(f"{path}: damaged; remove its folder, which lets the run be computed again")


def _sums(folder: Path) -> dict[str, int]:
    """Return the checksums of a finished run, by file; empty for a run of an older version.

    Raises:
        UserError: They are damaged.
    """
    path = folder / SUMS
    try:
        state = path.stat()
    except OSError:
        return {}
    return _parse_sums(path, state.st_ino, state.st_mtime_ns)


@lru_cache(maxsize=64)
def _parse_sums(path: Path, inode: int, modified: int) -> dict[str, int]:
    try:
        sums = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise damaged(path) from None
    if not isinstance(sums, dict):
        raise damaged(path)
    return sums


def environment(device: str, devices: int = 1) -> dict[str, Any]:
    """Describe the software and hardware of a run on a number of `devices`.

    It helps to explain differences between runs.
    """
    import torch

    import sslrun

    return {
        "sslrun": sslrun.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
        "numpy": version("numpy"),
        **({"gymnasium": version("gymnasium")} if find_spec("gymnasium") else {}),
        "cuda": torch.version.cuda,
        "device": device,
        "devices": devices,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "host": platform.node(),
        "pid": os.getpid(),
        "command": sys.argv,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }
