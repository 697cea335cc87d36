"""Files by patterns: on this machine or, by their URL, in an object store that fsspec reads."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from sslrun.data.cache import cache_root, digest_key, locked
from sslrun.errors import UserError, disk_is_full
from sslrun.files import replacing, require_file

VERSIONS = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "created")
"""Keys at which object stores report what changes with the content of a file; the first counts."""
RANGE = re.compile(r"(\d{1,9})\.\.(\d{1,9})")
BRACES = re.compile(r"\{([^{}]*)\}")
MOST_FILES = 100_000
"""Largest number of files that braces may stand for."""


class StoredFile(NamedTuple):
    """A file on this machine or in an object store."""

    path: str
    """Its absolute path, or its URL."""
    size: int | None
    """In bytes, if known."""
    version: str
    """Changes when the content does."""


def is_url(path: str) -> bool:
    """Return whether a path names a file of an object store, as in s3://bucket/file."""
    return "://" in path


def expand_braces(pattern: str) -> list[str]:
    """Expand {000..146} to its numbers, and {a,b} to its words, as shells do.

    Example: "{a,b}-{08..10}" gives a-08, a-09, a-10, b-08, b-09, b-10.

    Raises:
        UserError: They stand for more than `MOST_FILES`.
    """
    texts = BRACES.split(pattern)  # what is between braces is at odd positions
    choices = [_choices(text) if place % 2 else [text] for place, text in enumerate(texts)]
    if math.prod(map(len, choices)) > MOST_FILES:
        raise UserError(f"{pattern}: stands for more than {MOST_FILES:,} files: give fewer")
    return ["".join(parts) for parts in itertools.product(*choices)]


def _choices(braced: str) -> Sequence[str]:
    if bounds := RANGE.fullmatch(braced):
        first, last = bounds.groups()
        digits = len(first) if first.startswith("0") else 0
        numbers = range(int(first), min(int(last), int(first) + MOST_FILES) + 1)
        return [f"{number:0{digits}}" for number in numbers]
    return braced.split(",")


def list_stored(pattern: str) -> list[StoredFile]:
    """List the files of a pattern with braces, `*` and `?`, each of its parts in order.

    Raises:
        UserError: There are none, one that is named does not exist, or the store cannot be reached.
    """
    files = [file for part in expand_braces(pattern) for file in _list_part(part)]
    if not files:
        raise UserError(f"{pattern}: no such file")
    return files


def _list_part(pattern: str) -> list[StoredFile]:
    with _open_store(pattern) as (store, inner):
        is_pattern = bool(set(inner) & set("*?["))
        if not is_url(pattern):
            paths = sorted(store.glob(inner)) if is_pattern else [inner]
            return [_describe_local(path) for path in paths]
        infos = store.glob(inner, detail=True) if is_pattern else {inner: store.info(inner)}
        return [_describe(store.unstrip_protocol(name), infos[name]) for name in sorted(infos)]


def _describe_local(path: str) -> StoredFile:
    state = require_file(path)  # follows links
    return StoredFile(path, state.st_size, str(state.st_mtime_ns))


def _describe(url: str, info: Mapping[str, Any]) -> StoredFile:
    if info["type"] != "file":
        raise UserError(f"{url}: not a file but a folder; name a file")
    version = next((info[key] for key in VERSIONS if key in info), None)
    return StoredFile(url, info.get("size"), str(version))


def read_range(path: str, start: int, size: int) -> bytes:
    """Read `size` bytes of a file or URL from `start` on; fewer if it ends before.

    Raises:
        UserError: The file cannot be read.
    """
    with _open_store(path) as (store, inner):
        content: bytes = store.cat_file(inner, start, start + size)
        return content


@contextmanager
def open_stored(path: str) -> Iterator[IO[bytes]]:
    """Open a file or URL to read it from its beginning.

    Raises:
        UserError: It cannot be opened or, in the `with` body, read.
    """
    with _open_store(path) as (store, inner), store.open(inner, "rb") as file:
        yield file


def copy_to_cache(file: StoredFile) -> Path:
    """Return the path of a file of this machine; one of an object store is copied once.

    Raises:
        UserError: The file cannot be read, or the cache cannot be written.
    """
    if not is_url(file.path):
        return Path(file.path)
    copy = cache_root() / "remote" / digest_key(file) / file.path.rsplit("/", 1)[-1]
    with locked(copy):
        if not copy.exists() or file.size not in (None, copy.stat().st_size):
            with _open_store(file.path) as (store, inner), replacing(copy) as temporary:
                store.get_file(inner, str(temporary))
    return copy


@contextmanager
def _open_store(path: str) -> Iterator[tuple[Any, str]]:
    """Yield the file system of a path or URL, and the path in it.

    The file system is looked up at each use: fsspec keeps one per process, and that of a parent
    process must not be used by a worker.

    Raises:
        UserError: Opening it, or the `with` body, fails.
    """
    import fsspec

    try:
        yield fsspec.core.url_to_fs(path)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except ImportError as error:
        raise UserError(
            f"{path}: needs a package of its object store ({error}): pip install 'sslrun[cloud]'"
        ) from None
    except Exception as error:  # each object store raises errors of its own
        if disk_is_full(error):
            raise
        cause = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path}: cannot be read: {cause}") from None
