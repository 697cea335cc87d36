"""Files of object stores are read in parts, and a server that fails is asked again."""

import http.server
import io
import re
import tarfile
import threading
import tracemalloc

import fsspec
import pytest
import torch
from PIL import Image

from sslrun.data import remote
from sslrun.data.image import images
from sslrun.data.remote import StoredFile, copy_to_cache, list_stored, open_stored, read_range
from sslrun.data.source import sources
from sslrun.errors import UserError

CPU = torch.device("cpu")
SHARD = "train-0.tar"
PADDED = 2**20
"""Bytes of an image in `write_shard`."""
COUNT = 12


class Server(http.server.ThreadingHTTPServer):
    """A server of a folder that knows ranges, and answers with `faults` first."""

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.faults = []
        """What goes wrong, in order: a status, or "break" for a connection that ends early."""
        self.requests = []
        """The range of each request for content; None for the whole file."""
        self.knows_ranges = True

    def url(self, name=SHARD):
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(sends_content=False)

    def do_GET(self):
        self.server.requests.append(self.headers.get("Range"))
        self.answer(sends_content=True)

    def answer(self, sends_content):
        fault = self.server.faults.pop(0) if self.server.faults else None
        file = self.server.folder / self.path.lstrip("/")
        if isinstance(fault, int) or not file.is_file():
            self.send_response(fault or 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        size = file.stat().st_size
        bounds = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        has_range = bounds is not None and self.server.knows_ranges
        start, last = (
            (int(bounds[1]), min(int(bounds[2]), size - 1)) if has_range else (0, size - 1)
        )
        self.send_response(206 if has_range else 200)
        self.send_header("Content-Length", str(last + 1 - start))
        if has_range:
            self.send_header("Content-Range", f"bytes {start}-{last}/{size}")
        self.end_headers()
        if not sends_content:
            return
        with open(file, "rb") as content:
            content.seek(start)
            left = (last + 1 - start) // (2 if fault == "break" else 1)
            while left:
                left -= self.wfile.write(content.read(min(left, 2**16)))
        if fault == "break":
            self.close_connection = True


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("SSLRUN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SSLRUN_WORKERS", "0")
    monkeypatch.setattr(remote, "WAITS", (0.0, 0.0))
    monkeypatch.setattr(images, "MAX_TENSOR_BYTES", 0)
    with Server(tmp_path) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()
    fsspec.filesystem("memory").store.clear()


def write_shard(folder):
    """Write a shard of images that zeros make large."""
    with tarfile.open(folder / SHARD, "w") as tar:
        for number in range(COUNT):
            file = io.BytesIO()
            Image.new("RGB", (40, 40), (number * 20, 0, 0)).save(file, "jpeg")
            content = file.getvalue().ljust(PADDED, b"\0")
            for ending, part in (("jpg", content), ("cls", b"%d" % (number % 2))):
                info = tarfile.TarInfo(f"{number}.{ending}")
                info.size = len(part)
                tar.addfile(info, io.BytesIO(part))


def read(url):
    """Load a shard and read its images in batches of 2; return their mean colors and labels."""
    source = sources["shards"]
    examples = source(source.Options(train=url, size=8)).load("train")
    batches = examples.batches(torch.arange(COUNT).flip(0).split(2), CPU)
    return torch.cat([batch.inputs.float().mean((2, 3)) for batch in batches]), examples.labels


@pytest.mark.parametrize("kind", ["http", "file", "memory"])
def test_shards_are_never_held_in_memory(server, tmp_path, monkeypatch, kind):
    write_shard(tmp_path)
    url = server.url() if kind == "http" else f"{kind}://{tmp_path}/{SHARD}"
    if kind == "memory":
        fsspec.filesystem(kind).pipe(f"{tmp_path}/{SHARD}", (tmp_path / SHARD).read_bytes())
    monkeypatch.setattr(remote, "AHEAD", 2**19)
    expected, labels = read(str(tmp_path / SHARD))
    read_range(url, 0, 1)  # imports the library of the store
    tracemalloc.start()
    try:
        colors, found = read(url)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert colors.equal(expected)
    assert found.equal(labels)
    # An image with copies of it, while it is received; the shard has twelve images.
    assert peak < 4 * PADDED


@pytest.mark.parametrize("fault", [503, "break"])
def test_a_failed_request_is_repeated(server, tmp_path, fault):
    content = bytes(range(256)) * 2**10
    (tmp_path / SHARD).write_bytes(content)
    assert list_stored(server.url())[0].size == len(content)
    server.faults = [fault, fault]
    assert read_range(server.url(), 1000, 2000) == content[1000:3000]
    assert server.requests[-3:] == ["bytes=1000-2999"] * 3
    server.faults = [None, fault]  # the request for the size succeeds
    with open_stored(server.url()) as file:
        assert file.read() == content
    server.faults = [fault]
    assert copy_to_cache(StoredFile(server.url(), None, "")).read_bytes() == content


@pytest.mark.parametrize(
    ("fault", "message"),
    [(500, "answers 500 Internal Server Error"), ("break", "Response payload is not completed")],
)
def test_a_server_that_keeps_failing_is_one_line(server, tmp_path, fault, message):
    write_shard(tmp_path)
    shard = StoredFile(server.url(), None, "")
    for request in (lambda: read_range(server.url(), 0, 9000), lambda: copy_to_cache(shard)):
        server.faults, server.requests = [fault] * 3, []
        with pytest.raises(UserError, match=rf"^http://\S*{SHARD}: cannot be read: .*{message}"):
            request()
        assert len(server.requests) == 3
    server.faults = [500] * 9
    with pytest.raises(UserError, match="cannot be read: its server answers 500"):
        list_stored(server.url())
    assert not [path for path in (tmp_path / "cache").rglob("*.tar") if path.is_file()]


def test_what_cannot_succeed_is_not_repeated(server, tmp_path):
    (tmp_path / SHARD).write_bytes(bytes(2000))
    server.faults = [403]
    with pytest.raises(UserError, match="answers 403 Forbidden"):
        read_range(server.url(), 0, 10)
    with pytest.raises(UserError, match="gone: no such file"):
        read_range(server.url("gone"), 0, 10)
    server.knows_ranges = False
    with pytest.raises(UserError, match="sends the whole file when a part is requested"):
        read_range(server.url(), 10, 10)
    assert server.requests == ["bytes=0-9", "bytes=0-9", "bytes=10-19"]


def test_a_server_that_is_gone_is_one_line(server):
    url = server.url().replace(str(server.server_port), "9")
    with pytest.raises(UserError, match=r"cannot be read: Cannot connect") as error:
        read_range(url, 0, 10)
    assert "\n" not in str(error.value)
