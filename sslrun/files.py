"""Atomic writes, so that a path holds the old file or the whole new one; and checksums."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path that atomically replaces `path` on success.

    The new file is on the disk before it replaces the old one. It gets the default mode of new
    files, because safetensors writes files that only their owner can read, and others in a lab
    should read them too.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_unfinished(paths: Iterable[Path], before: float) -> None:
    """Remove the temporary files of `replacing` that were last written before a time.

    The caller holds the lock under which they are written: their writers were killed.
    """
    for path in paths:
        is_temporary = re.fullmatch(r"\..+\.[0-9a-f]{8}", path.name) and path.is_file()
        if is_temporary and path.stat().st_mtime < before:
            path.unlink(missing_ok=True)


def checksum(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Wait until a file, or the directory entry of a folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
