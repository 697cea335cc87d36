"""The cache folder, which keeps decoded images and films, and tokenized texts."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import itertools
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from sslrun import files
from sslrun.errors import UserError, disk_is_full
from sslrun.files import expand_home, remove_unfinished


def cache_root() -> Path:
    """Return the cache folder: SSLRUN_CACHE, or ~/.cache/sslrun."""
    return expand_home(os.environ.get("SSLRUN_CACHE") or "~/.cache/sslrun")


def digest_key(key: Any) -> str:
    """Return the digest that names a cache entry.

    `key` holds the JSON values that determine the content of the entry; their order does not
    matter.
    """
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def cache_error(folder: Path, error: Exception) -> UserError:
    """Return the UserError for a cache folder that cannot be written."""
    cause = error.strerror if isinstance(error, OSError) and error.strerror else error
    return UserError(f"{folder}: cannot be written ({cause}): set SSLRUN_CACHE to another folder")


CONTENTS = ("control", "films", "graphs", "images", "tokenizers", "tokens")
"""Folders of the cache that are filled again when they are needed."""
DIGEST = re.compile(r"(.+-)?[0-9a-f]{16}(\.safetensors)?")
UNREAD_DAYS = 30
"""Days after which cached data that were not read may be deleted."""


def find_unread() -> dict[Path, int]:
    """Return the entries of the cache that were not read for `UNREAD_DAYS`, with their bytes."""
    before = time.time() - UNREAD_DAYS * 86400
    unread = {}
    for path in (entry for name in CONTENTS for entry in (cache_root() / name).glob("*")):
        files = path.rglob("*") if path.is_dir() else [path]
        stats = [file.stat() for file in files if file.is_file()]
        is_unread = all(max(stat.st_atime, stat.st_mtime) < before for stat in stats)
        if DIGEST.fullmatch(path.name) and is_unread:
            unread[path] = sum(stat.st_size for stat in stats)
    return unread


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of `path`, a file or folder that one process creates while the others wait.

    A process that waited must check again whether `path` exists. The parent folder of `path` is
    created. Temporary files of `path` that a killed process left are removed.

    Raises:
        UserError: The folder cannot be created, or the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path.with_suffix(".lock"), "w")  # noqa: SIM115
    except OSError as error:
        raise cache_error(path.parent, error) from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        left = path.parent.glob(f".{glob.escape(path.name)}.*"), path.glob(".*")
        remove_unfinished(itertools.chain(*left), os.fstat(lock.fileno()).st_mtime)
        try:
            yield
        except Exception as error:
            if isinstance(error, UserError) or not disk_is_full(error):
                raise
            raise cache_error(path.parent, error) from None


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a cache file atomically; `files.read_tensors` reads it.

    Raises:
        UserError: The cache cannot be written.
    """
    from safetensors import SafetensorError

    try:
        files.write_tensors(path, tensors, metadata)
    except (OSError, SafetensorError) as error:
        raise cache_error(path.parent, error) from None


def cache_tensors(path: Path, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors of a cache file, memory-mapped; compute and write them if it is missing.

    A damaged file is replaced.
    """
    return cache_entry(path, lambda: (compute(), {}))[0]


def cache_entry(
    path: Path, compute: Callable[[], tuple[dict[str, Tensor], dict[str, str]]]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a cache file and its metadata, as `cache_tensors` does."""
    with locked(path):
        content = files.read_tensors(path)
        if content is None:
            write_tensors(path, *compute())
            content = files.read_tensors(path)
    if content is None:
        raise UserError(
            f"{path}: was written, but cannot be read back: check the disk, or set SSLRUN_CACHE "
            "to another folder"
        )
    return content
