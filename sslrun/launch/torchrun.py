"""Processes of torchrun on this machine, one per device, that train one network together."""

from __future__ import annotations

import logging
import os
import signal
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from sslrun.errors import UserError

ERROR_FILE = "SSLRUN_ERROR_FILE"
"""Environment variable of the processes: the file for the first error, which is printed once."""


def train_together(arguments: Sequence[str], count: int, device: str) -> None:
    """Run sslrun with `arguments` in `count` processes of torchrun, and wait for them.

    SIGINT, SIGTERM and the notice of a time limit reach all processes, which save before they end.

    Raises:
        UserError: this machine has too few devices, or a process failed; the message and the exit
            code are those of the first one that did.
    """
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from sslrun.launch.local import threads_of
    from sslrun.launch.timelimit import NOTICE, time_limit

    def stop_at_limit(number: int, frame: FrameType | None) -> None:
        signal.signal(NOTICE, signal.SIG_IGN)
        time_limit.reached = True
        raise SignalException("the time limit is near", signal.SIGTERM)

    signal.signal(NOTICE, stop_at_limit)  # torchrun does not handle it
    check_device_count(device, count)
    logging.disable(logging.CRITICAL)  # torchrun's own reports; an error comes as one line
    os.environ.setdefault("OMP_NUM_THREADS", str(threads_of(count)))
    options = torchrun.get_args_parser().parse_args(
        ["--standalone", f"--nproc-per-node={count}", "-m", "sslrun", *arguments]
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "error"
        os.environ[ERROR_FILE] = str(path)
        try:
            torchrun.run(options)
        except (ChildFailedError, SignalException) as error:
            raise _first_error(error, path) from None
        finally:
            logging.disable(logging.NOTSET)
            del os.environ[ERROR_FILE]


def check_device_count(device: str, count: int) -> None:
    """Raise UserError if this machine does not have `count` devices of the kind of `device`."""
    import torch

    from sslrun.training.device import compute

    chosen = compute(device).device
    if chosen.type == "cpu" and device == "auto":
        raise UserError(
            f"--gpus {count}: this machine has no GPU; add --device cpu to train in {count} "
            "processes on the CPU"
        )
    if chosen.index is not None or chosen.type == "mps":
        raise UserError(f"--gpus {count}: --device {device} is one device: leave one of them out")
    if chosen.type == "cuda" and torch.cuda.device_count() < count:
        raise UserError(f"--gpus {count}: this machine has {torch.cuda.device_count()}")


def leave_error(message: str) -> bool:
    """Leave the message of an error to the process that started this one; False if none did.

    Of several processes, the first one leaves its message.
    """
    path = os.environ.get(ERROR_FILE)
    if path is None:
        return False
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(message)
    except FileExistsError:
        pass
    return True


def _first_error(error: Exception, path: Path) -> UserError:
    """The error of the process that failed first, which may have left a message at `path`."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    code = 130  # stopped by a signal
    if isinstance(error, ChildFailedError):
        rank, failure = error.get_first_failure()
        code = failure.exitcode if failure.exitcode > 0 else 1
        ended = failure.signal_name() if failure.exitcode < 0 else f"exit code {code}"
        reason = f"process {rank} ended by {ended}; give the same command again to continue"
    else:
        reason = "stopped; give the same command again to continue"
    first = UserError(path.read_text(encoding="utf-8") if path.exists() else reason)
    first.exit_code = code
    return first
