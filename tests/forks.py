"""Run sslrun's command line in forked processes, which need not import torch again.

Started by the fixture `start_command` of conftest.py. Reads one request a line on standard input,
as JSON: a command, answered with the id of its process; or such an id, answered with the exit code
of the process, null while it runs.
"""

import importlib
import json
import os
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
    for stream, path in ((0, os.devnull), (1, request["stdout"]), (2, request["stderr"])):
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
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


def serve():
    import torch

    torch.set_num_threads(1)  # a process with threads cannot be forked safely
    for module in MODULES:
        importlib.import_module(module)
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    for line in requests:
        request = json.loads(line)
        if isinstance(request, int):
            ended, status = os.waitpid(request, os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if ended else None
        elif (answer := os.fork()) == 0:
            requests.close()
            become_command(request)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve()
