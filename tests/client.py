"""Stand in for Python: `python -m sslrun ARGUMENTS` runs in a process that tests/forks.py forks.

The fixture `forking_python` of conftest.py writes the first lines, which name PYTHON and SOCKET.
Signals reach the command, which dies with this process; this one ends as the command does.
Everything else is run by Python itself.
"""

import contextlib
import json
import os
import signal
import socket
import sys

arguments = [each for each in sys.argv[1:] if each != "-u"]
if arguments[:2] != ["-m", "sslrun"]:
    os.execv(PYTHON, [PYTHON, *sys.argv[1:]])  # noqa: F821
server = socket.socket(socket.AF_UNIX)
server.connect(SOCKET)  # noqa: F821
request = {"arguments": arguments[2:], "cwd": os.getcwd(), "env": dict(os.environ)}
with server.makefile("rw") as lines:
    socket.send_fds(server, [b"\n"], [0, 1, 2])
    lines.write(json.dumps(request) + "\n")
    lines.flush()
    pid = int(lines.readline())

    def forward(number, frame):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, forward)
    code = int(lines.readline())
if code < 0:
    if code != -signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
