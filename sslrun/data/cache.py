"""The cache folder, which keeps decoded images and films, and tokenized texts."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from sslrun.errors import UserError, disk_is_full
from sslrun.files import remove_unfinished, replacing


def cache_root() -> Path:
    """Return the cache folder: SSLRUN_CACHE, or ~/.cache/sslrun."""
    return Path(os.environ.get("SSLRUN_CACHE") or "~/.cache/sslrun").expanduser()


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


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Return the tensors and the metadata of a cache file; None if it is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError):
        return None


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a cache file atomically."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata)
    except (OSError, SafetensorError) as error:
        raise cache_error(path.parent, error) from None


def cache_tensors(path: Path, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors of a cache file, memory-mapped; compute and write them if it is missing.

    A damaged file is replaced.
    """
    with locked(path):
        content = read_tensors(path)
        if content is None:
            write_tensors(path, compute(), {})
            content = read_tensors(path)
    if content is None:
        raise UserError(
            f"{path}: was written, but cannot be read back: check the disk, or set SSLRUN_CACHE "
            "to another folder"
        )
    return content[0]
