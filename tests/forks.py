"""Run sslrun's command line in forked processes, which need not import torch again.

Started by the fixture `start_command` of conftest.py. Reads one request a line on standard input,
as JSON: a command, answered with the id of its process; or such an id, answered with the exit code
of the process, null while it runs. Engines start such processes by tests/client.py, each through
a connection to the socket whose descriptor is the first argument.
"""

import contextlib
import importlib
import json
import os
import select
import signal
import socket
import sys
import traceback

MODULES = (
    "sslrun.cli",
    "sslrun.backbones",
    "sslrun.pretexts",
    "sslrun.stages.sweep",
    "sslrun.stages.evaluate",
    "sklearn.linear_model",
    "scipy.stats",
    "torch._dynamo",
    "torchvision.models.resnet",
)
"""Imported once, before the first fork."""


def become_command(request):
    """Apply the request's folder, environment and streams in the child, run its command, and end.

    The process ends without Python's teardown, which takes two seconds with all these modules.
    """
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    paths = (os.devnull, request.get("stdout"), request.get("stderr"))
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC
    for stream, file in enumerate(request.get("files") or [os.open(p, flags) for p in paths]):
        os.dup2(file, stream)
        os.close(file)
    sys.argv = ["sslrun", *request["arguments"]]
    code = 1
    try:
        importlib.import_module("sslrun.cli").main()
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Clients:
    """Connections of tests/client.py, and the process that each of them has asked for."""

    def __init__(self, file):
        self.listener = socket.socket(fileno=file)
        self.running = {}

    def accept(self):
        """Fork the process that a client asks for, with the client's streams."""
        connection, _ = self.listener.accept()
        _, files, *_ = socket.recv_fds(connection, 1, 3)
        with connection.makefile() as lines:
            request = {**json.loads(lines.readline()), "files": files}
        if (pid := os.fork()) == 0:
            connection.close()
            become_command(request)
        for file in files:
            os.close(file)
        connection.sendall(f"{pid}\n".encode())
        self.running[connection] = pid

    def report(self):
        """Answer the clients whose processes have ended; kill the process of one that is gone."""
        for connection, pid in list(self.running.items()):
            if select.select([connection], [], [], 0)[0]:
                os.kill(pid, signal.SIGKILL)
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                del self.running[connection]
                with connection, contextlib.suppress(OSError):
                    connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())


def serve(file):
    import torch

    torch.set_num_threads(1)  # a process with threads cannot be forked safely
    for module in MODULES:
        importlib.import_module(module)
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    clients = Clients(file)
    while True:
        ready, _, _ = select.select([requests, clients.listener], [], [], 0.02)
        clients.report()
        if clients.listener in ready:
            clients.accept()
        if requests not in ready:
            continue
        if not (line := requests.readline()):  # one line: the next one waits for its answer
            break
        request = json.loads(line)
        if isinstance(request, int):
            ended, status = os.waitpid(request, os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if ended else None
        elif (answer := os.fork()) == 0:
            requests.close()
            become_command(request)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
