"""Files by patterns: on this machine or, by their URL, in an object store that fsspec reads."""

from __future__ import annotations

import io
import itertools
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

from sslrun.data.cache import cache_root, digest_key, locked
from sslrun.errors import UserError, disk_is_full
from sslrun.files import replacing, require_file

VERSIONS = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "created")
"""Keys at which object stores report what changes with the content of a file; the first counts."""
RANGE = re.compile(r"(\d{1,9})\.\.(\d{1,9})")
BRACES = re.compile(r"\{([^{}]*)\}")
MOST_FILES = 100_000
"""Largest number of files that braces may stand for."""
WAITS = (0.5, 2.0, 8.0)
"""Seconds to wait after each failed attempt at an object store, before the next one."""
AHEAD = 2**22
"""Bytes of a file in an object store that are read at a time, and held in memory."""
LASTING = (
    FileNotFoundError,
    PermissionError,
    ImportError,
    NotImplementedError,
    UserError,
    ValueError,
)
"""Errors that another attempt would meet again."""

T = TypeVar("T")


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
    def find(store: Any, inner: str) -> list[StoredFile]:
        is_pattern = bool(set(inner) & set("*?["))
        if not is_url(pattern):
            paths = sorted(store.glob(inner)) if is_pattern else [inner]
            return [_describe_local(path) for path in paths]
        infos = store.glob(inner, detail=True) if is_pattern else {inner: store.info(inner)}
        return [_describe(store.unstrip_protocol(name), infos[name]) for name in sorted(infos)]

    return _ask(pattern, find)


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
    content: bytes = _ask(path, lambda store, inner: store.cat_file(inner, start, start + size))
    if len(content) > size:
        raise UserError(
            f"{path}: its server sends the whole file when a part is requested: use a server that "
            "knows range requests, or copy the file here"
        )
    return content


@contextmanager
def open_stored(path: str) -> Iterator[IO[bytes]]:
    """Open a file or URL to read it from its beginning; memory holds `AHEAD` bytes of it.

    Raises:
        UserError: It cannot be opened or, in the `with` body, read.
    """
    with _explain(path), _open(path) as file:
        yield file


def _open(path: str) -> IO[bytes]:
    return io.BufferedReader(_RemoteFile(path), AHEAD) if is_url(path) else open(path, "rb")


class _RemoteFile(io.RawIOBase):
    """A file of an object store, read in ranges, so that a failed read can be repeated."""

    def __init__(self, path: str) -> None:
        """Raises UserError if the store does not report the size of the file."""
        self.path = path
        self.size = _ask(path, lambda store, inner: store.info(inner)).get("size")
        self.position = 0
        if self.size is None:
            raise UserError(f"{path}: its server does not report its size: copy the file here")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        self.position = start + offset
        return self.position

    def readinto(self, buffer: Any) -> int:
        size = min(len(buffer), max(0, self.size - self.position))
        content = read_range(self.path, self.position, size) if size else b""
        buffer[: len(content)] = content
        self.position += len(content)
        return len(content)


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
            with replacing(copy) as temporary:
                _ask(file.path, lambda store, inner: store.get_file(inner, str(temporary)))
    return copy


def _ask(path: str, request: Callable[[Any, str], T]) -> T:
    """Return what `request` returns for the file system of a path or URL and the path in it.

    If an object store fails, the request is repeated after each of `WAITS`. The file system is
    looked up each time: fsspec keeps one per process, and that of a parent process must not be used
    by a worker.

    Raises:
        UserError: All attempts failed, or another one would be in vain.
    """
    import fsspec

    waits = list(WAITS) if is_url(path) else []
    with _explain(path):
        while True:
            try:
                return request(*fsspec.core.url_to_fs(path))
            except Exception as error:  # each object store raises errors of its own
                if not waits or not _may_pass(error):
                    raise
            time.sleep(waits.pop(0))


def _may_pass(error: Exception) -> bool:
    """Return whether another attempt may succeed."""
    error = _find_cause(error)
    status = getattr(error, "status", None)  # of an HTTP response
    is_refused = isinstance(status, int) and 400 <= status < 500 and status not in (408, 429)
    return not (is_refused or isinstance(error, LASTING) or disk_is_full(error))


def _find_cause(error: Exception) -> Exception:
    """Return the error of the server, which fsspec reports as a missing file."""
    is_masked = isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception)
    return error.__cause__ if is_masked else error  # type: ignore[return-value]


@contextmanager
def _explain(path: str) -> Iterator[None]:
    """Turn errors of the `with` body, which reads a path or URL, into UserErrors."""
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        raise UserError(
            f"{path}: needs a package of its object store ({error}): pip install 'sslrun[cloud]'"
        ) from None
    except Exception as raised:
        failure = _find_cause(raised)
        if disk_is_full(failure):
            raise
        if isinstance(failure, FileNotFoundError):
            raise UserError(f"{path}: no such file") from None
        status, message = getattr(failure, "status", None), getattr(failure, "message", "")
        cause = f"its server answers {status} {message}" if status else str(failure)
        cause = " ".join(cause.split())[:200] or type(failure).__name__
        raise UserError(f"{path}: cannot be read: {cause}") from None
