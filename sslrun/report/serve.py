"""Serve the report on this machine, and tell the browser when runs have changed."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from sslrun.errors import UserError
from sslrun.report.build import build
from sslrun.report.collect import collect
from sslrun.report.page import Report, Section, render
from sslrun.runs import FAILURE

HOST = "127.0.0.1"
NAMES = ("127.0.0.1", "localhost")
"""Names of this machine that a browser may ask for; others are refused, since a page elsewhere
could otherwise read the report through a name that resolves to this machine."""
SECONDS = 2.0
"""Seconds between two looks at the runs."""
FILES = ("result.json", "metrics.jsonl", FAILURE)
"""Files of runs whose changes change the page."""


class Site:
    """The page of some runs, built when they have changed."""

    def __init__(self, targets: Sequence[Path], root: Path, command: Sequence[str]) -> None:
        """Build the first page. Raises UserError if a target does not exist."""
        self.targets, self.root, self.command = targets, root, command
        self._lock = threading.Lock()
        self._seen: object = None
        self._page = ""
        self.page()

    def state(self) -> tuple[tuple[str, int, int], ...]:
        """Describe the files that the page is made of: path, time of change and size."""
        folders = [self.root if target.is_file() else target for target in self.targets]
        found = []
        for folder in folders:
            for name in FILES:
                for path in folder.rglob(name):
                    try:
                        status = path.stat()
                    except OSError:  # deleted in between
                        continue
                    found.append((str(path), status.st_mtime_ns, status.st_size))
        return tuple(sorted(found))

    def page(self) -> str:
        """Return the page, built again if runs have changed."""
        with self._lock:
            state = self.state()
            if not self._page or state != self._seen:
                self._page, self._seen = render(self._report(), live=True), state
            return self._page

    def _report(self) -> Report:
        if not self.state():
            title = ", ".join(str(target) for target in self.targets)
            return Report(title, "", [Section("Results", notes=["no run yet"])])
        return build(collect(self.targets, self.root), 0, self.command, lambda line: None)


class _Handler(BaseHTTPRequestHandler):
    """Answers GET / with the page and GET /events with a stream of changes."""

    site: Site

    def do_GET(self) -> None:
        if self.headers.get("Host", "").rpartition(":")[0] not in NAMES:
            self.send_error(HTTPStatus.FORBIDDEN)
        elif self.path == "/":
            self._send_page()
        elif self.path == "/events":
            self._send_events()
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def _send_page(self) -> None:
        try:
            content = self.site.page().encode()
        except UserError as error:
            self.send_error(HTTPStatus.INTERNAL_SERVER_ERROR, explain=str(error))
            return
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(content)

    def _send_events(self) -> None:
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        state = self.site.state()
        try:
            while True:
                time.sleep(SECONDS)
                new = self.site.state()
                self.wfile.write(b": alive\n\n" if new == state else b"event: changed\ndata: \n\n")
                self.wfile.flush()
                state = new
        except OSError:  # the browser has left
            return

    def log_message(self, format: str, *arguments: object) -> None:
        """Print nothing for each request."""


def open_server(site: Site, port: int) -> ThreadingHTTPServer:
    """Open a server of a site on the loopback address. Raises UserError if the port is taken."""
    handler = type("Handler", (_Handler,), {"site": site})
    try:
        server = ThreadingHTTPServer((HOST, port), handler)
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        reason = os.strerror(error.errno).lower()
        raise UserError(
            f"--port {port}: {reason}; give another port, or 0 for any that is free"
        ) from None
    server.daemon_threads = True
    return server


def serve(site: Site, port: int, say: Callable[[str], None]) -> None:
    """Serve a site until the process is interrupted."""
    server = open_server(site, port)
    say(f"http://localhost:{server.server_port}/ (Ctrl-C stops)")
    with server:
        server.serve_forever()
