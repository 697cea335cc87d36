"""Where what is made of data sets is kept, so that it is made once."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sslrun.errors import UserError, disk_is_full


def cache_root() -> Path:
    """SSLRUN_CACHE, or ~/.cache/sslrun."""
    return Path(os.environ.get("SSLRUN_CACHE") or "~/.cache/sslrun").expanduser()


def digest_of(key: Any) -> str:
    """What names a thing in the cache: a digest of all (JSON values) that determines what it holds."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def unwritable(folder: Path, error: Exception) -> UserError:
    """The mistake that a cache can't be written is."""
    cause = error.strerror if isinstance(error, OSError) and error.strerror else error
    return UserError(f"{folder}: can't be written ({cause}): set SSLRUN_CACHE to another place")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time makes `path`, a file or a folder; the others wait, and then find it made. The folder that it
    is in exists from then on. UserError: it can't be, or the disk is full."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path.with_suffix(".lock"), "w")  # noqa: SIM115
    except OSError as error:
        raise unwritable(path.parent, error) from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        except Exception as error:
            if isinstance(error, UserError) or not disk_is_full(error):
                raise
            raise unwritable(path.parent, error) from None
