"""Atomic writes, and checksums: a path holds the old file or the whole new one, or is found out.

Checksums are CRC-32, which finds every short damage and costs about a second for 1.4 GB.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import stat
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from sslrun.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

SUMS = "sums.json"
"""Name of a file with the checksums of the files beside it."""
log = logging.getLogger(__name__)

BLOCK = 2**22
"""Bytes to read at a time."""


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


def sync(path: Path) -> None:
    """Wait until a file, or the directory entry of a folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def expand_home(path: str | Path) -> Path:
    """Return a path with `~` or `~user` at its beginning replaced by the home, as in a shell.

    Raises:
        UserError: There is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        name = Path(path).parts[0]
        raise UserError(
            f"{path}: no user has the home folder {name}; for a file of that name write ./{path}"
        ) from None


# ---------------------------------------------------------------- reading


def require_file(path: str | Path) -> os.stat_result:
    """Return the state of a file.

    Raises:
        UserError: It is missing, or is a folder, a pipe or a device, which may have no end.
    """
    try:
        state = os.stat(path)
    except OSError as error:
        if os.path.islink(path):
            raise UserError(
                f"{path}: a link to nothing; remove it, or put the file there"
            ) from None
        is_missing = isinstance(error, FileNotFoundError)
        cause = "no such file" if is_missing else f"cannot be read ({error.strerror})"
        raise UserError(f"{path}: {cause}") from None
    if not stat.S_ISREG(state.st_mode):
        raise UserError(f"{path}: not a file but a folder, a pipe or a device; name a file")
    return state


def walk(folder: str | Path) -> Iterator[str]:
    """Yield the path of each file in a folder and its subfolders, in no order.

    Links to folders are followed, except to one that holds the link, which has no end.

    Raises:
        UserError: The folder is one of the system, such as /proc, or cannot be read.
    """
    real = Path(folder).resolve()
    yield from _walk(str(folder), frozenset(map(_identify, (real, *real.parents))))


def _walk(folder: str, above: frozenset[tuple[int, int]]) -> Iterator[str]:
    if os.path.realpath(folder).startswith(("/proc/", "/sys/")):
        raise UserError(f"{folder}: leads into the system's own files; name a folder of data")
    try:
        with os.scandir(folder) as listing:
            entries = list(listing)
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror})") from None
    for entry in entries:
        if not entry.is_dir():
            yield entry.path
        elif entry.is_symlink() and _identify(entry.path) in above:
            log.warning("%s: not followed, as it is a link to a folder that holds it", entry.path)
        else:
            yield from _walk(entry.path, above | {_identify(entry.path)})


def _identify(path: str | Path) -> tuple[int, int]:
    """Return what two paths of one file or folder have in common."""
    state = os.stat(path)
    return state.st_dev, state.st_ino


# ---------------------------------------------------------------- checksums


def checksum(path: Path, size: int | None = None) -> int:
    """Return the CRC-32 of a file, or of its first `size` bytes."""
    total, left = 0, path.stat().st_size if size is None else size
    with open(path, "rb") as file:
        while left > 0 and (block := file.read(min(BLOCK, left))):
            total = zlib.crc32(block, total)
            left -= len(block)
    return total


def has_checksum(path: Path, expected: int | None) -> bool:
    """Return whether a file is there and has a checksum, which is computed once per process."""
    try:
        state = path.stat()
        return _checksum_of(path, state.st_ino, state.st_size, state.st_mtime_ns) == expected
    except OSError:
        return False


@lru_cache(maxsize=4096)
def _checksum_of(path: Path, inode: int, size: int, modified: int) -> int:
    """The checksum of a file; another `inode`, `size` or `modified` means another content."""
    return checksum(path)


def write_sums(path: Path, sums: Mapping[str, int]) -> None:
    """Write the checksums of files beside `path`, by name."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(sums, indent=2), encoding="utf-8")


def are_intact(path: Path, names: Iterable[str]) -> bool:
    """Return whether files beside `path` have the checksums that `write_sums` wrote to it."""
    try:
        sums = json.loads(path.read_text(encoding="utf-8"))
        return all(has_checksum(path.parent / name, sums[name]) for name in names)
    except (OSError, ValueError, KeyError, TypeError):
        return False


# ---------------------------------------------------------------- tensors

CHECKSUM = "crc32"
"""Key of a tensor file's metadata that holds the checksum of everything else in it."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file with a checksum of its content, atomically."""
    from safetensors.torch import save_file

    stored = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_file(stored, temporary, {**metadata, CHECKSUM: _checksum_tensors(stored, metadata)})


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Return the tensors, memory-mapped, and the metadata that `write_tensors` wrote.

    Returns None if the file is missing, damaged, or has no checksum.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (SafetensorError, OSError):
        return None
    recorded = metadata.pop(CHECKSUM, None)
    return (tensors, metadata) if recorded == _checksum_tensors(tensors, metadata) else None


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of an intact file of `write_tensors`, without reading its tensors."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def _checksum_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """The CRC-32 of names, types, shapes, values and metadata, independent of their order."""
    import torch

    total = zlib.crc32(json.dumps(dict(metadata), sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        total = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), total)
        total = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, total)
    return f"{total:08x}"
