"""Commands in forked processes, and what they leave in a folder of runs."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from forks import become_command

PATIENCE = 60.0
"""Seconds after which a process that was asked to stop counts as hanging."""
CLOCK = {"finished", "seconds", "rate", "data_wait", "memory", "started"}
"""Numbers of a result or a log that depend on the clock."""


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code (negative: by a signal), and its last messages."""

    code: int
    stdout: str
    stderr: str

    @property
    def message(self) -> str:
        """The error message, if it is a single line as users should see it; else empty."""
        said = [line for line in self.stderr.splitlines() if line.startswith("sslrun: ")]
        lines = [line for line in said if not line.startswith("sslrun: warning: ")]
        return lines[0] if self.code == 2 and len(lines) == 1 and not self.failed else ""

    @property
    def failed(self) -> bool:
        """Whether it ended with a traceback or a crash, which no fault may cause."""
        return "Traceback" in self.stderr or self.code not in (0, 2, 130)

    @property
    def last_line(self) -> str:
        return next(reversed(self.stderr.strip().splitlines()), "")


class Command:
    """A command line of sslrun in a forked process, with its own streams."""

    def __init__(
        self,
        arguments: Sequence[str],
        folder: Path,
        cache: Path,
        prepare: Callable[[], object] | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        """Start it in `folder`; `prepare` runs in the process before, to plant a fault.

        `settings` are variables of its environment.
        """
        settings = settings or {}
        rank = settings.get("RANK", "")
        self.streams = [folder / f"stdout{rank}", folder / f"stderr{rank}"]
        environment = {**os.environ, **settings, "SSLRUN_CACHE": str(cache)}
        environment.pop("SSLRUN_DATA", None)
        request = {
            "arguments": [*arguments, "--device=cpu"],
            "cwd": str(folder),
            "env": environment,
            "stdout": str(self.streams[0]),
            "stderr": str(self.streams[1]),
        }
        for stream in self.streams:
            stream.touch()  # a process may be killed before it opens them
        self.started = time.monotonic()
        self.code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the command handles signals
            if prepare is not None:
                prepare()
            become_command(request)

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def send_after(self, seconds: float, number: int) -> None:
        """Send a signal `seconds` after the start, if it still runs then."""
        while self.poll() is None and time.monotonic() - self.started < seconds:
            time.sleep(0.002)
        if self.code is None:
            os.kill(self.pid, number)

    def wait(self, patience: float = 10 * PATIENCE) -> Ended:
        """Wait for the end; a process that does not end in time is killed, and counts as failed."""
        limit = time.monotonic() + patience
        while self.poll() is None and time.monotonic() < limit:
            time.sleep(0.002)
        if self.code is None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.code = -signal.SIGALRM
        texts = [path.read_text(errors="replace") for path in self.streams]
        return Ended(self.code, *texts)


class Together:
    """Two processes that train one network, as torchrun starts and ends them."""

    def __init__(self, arguments: Sequence[str], folder: Path, cache: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        self.ranks = [
            Command(arguments, folder, cache, settings={**group, "RANK": rank, "LOCAL_RANK": rank})
            for rank in ("0", "1")
        ]

    def send_after(self, seconds: float, number: int) -> None:
        """Send a signal after some seconds: SIGKILL to one of them, others to both."""
        one = random.Random(seconds).choice(self.ranks)
        for rank in [one] if number == signal.SIGKILL else self.ranks:
            rank.send_after(seconds, number)

    def wait(self, patience: float = 10 * PATIENCE) -> Ended:
        """Wait for both; if one dies, the other one is asked to end."""
        limit = time.monotonic() + patience
        while all(rank.poll() is None for rank in self.ranks) and time.monotonic() < limit:
            time.sleep(0.002)
        if any(rank.code for rank in self.ranks):
            for rank in self.ranks:
                rank.send_after(0.0, signal.SIGTERM)
        ended = [rank.wait(patience) for rank in self.ranks]
        codes = [end.code for end in ended]
        # The one that lost the other ends with 1, or by SIGTERM if it was still waiting for it.
        causes = [code for code in codes if code not in (0, 1, -signal.SIGTERM)]
        code = next(iter(causes), max(codes, key=abs))
        return Ended(code, "".join(end.stdout for end in ended), "".join(e.stderr for e in ended))


def snapshot(runs: Path) -> dict[str, Any]:
    """Everything in a folder of runs that must be equal after any fault: place -> content.

    Numbers of the clock are left out, and so are the files of the environment and what workers of
    a sweep print.
    """
    return dict(sorted(entry for path in runs.rglob("*") for entry in _read(path, runs)))


def _read(path: Path, runs: Path) -> Iterator[tuple[str, Any]]:
    name = str(path.relative_to(runs))
    unequal = (".lock", "environment.json", "recipe.yaml", "manifest.json", "sums.json")
    printed = path.parent.name == "workers"
    if not path.is_file() or path.name in unequal or path.parent == runs or printed:
        return
    if path.name == "result.json":
        yield name, _parse(path.read_text(errors="replace"))
    elif path.name == "metrics.jsonl":
        records = [_parse(line) for line in path.read_text(errors="replace").splitlines()]
        # A resumed evaluation repeats the end of a training after the beginning of the next.
        yield name, sorted(json.dumps(record, sort_keys=True) for record in records)
    elif path.name.startswith("shard-"):  # torch writes their metadata in the order of threads
        yield name, _digest(load_file(path))
    elif path.suffix == ".pt":
        yield name, _load(path)
    else:
        yield name, hashlib.sha256(path.read_bytes()).hexdigest()


def _load(path: Path) -> Any:
    """A digest of a saved state without numbers of the clock; if damaged, that of its bytes."""
    try:
        return _digest(_without_clock(torch.load(path, weights_only=True)))
    except (RuntimeError, pickle.UnpicklingError, EOFError):
        return hashlib.sha256(path.read_bytes()).hexdigest()


def _parse(text: str) -> Any:
    """The value of a JSON text without numbers of the clock; of a damaged one the text."""
    try:
        return _without_clock(json.loads(text))
    except ValueError:
        return text


def _without_clock(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _without_clock(item)
            for key, item in value.items()
            if key not in CLOCK and not key.endswith("_a_second")
        }
    return value


def _digest(value: Any) -> Any:
    """A value with each tensor replaced by a digest of its bytes."""
    if isinstance(value, torch.Tensor):
        data = value.detach().reshape(-1).clone(memory_format=torch.contiguous_format)
        return hashlib.sha256(data.view(torch.uint8).numpy().tobytes()).hexdigest()
    if isinstance(value, dict):
        return {key: _digest(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_digest(item) for item in value]
    return value


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """The places in which two snapshots differ."""
    return [name for name in sorted(found.keys() | expected.keys())
            if found.get(name) != expected.get(name)]  # fmt: skip
