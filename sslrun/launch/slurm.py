"""Workers as a Slurm array, by submitit: requeued when preempted and at the time limit."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from types import FrameType
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from sslrun.errors import UserError
from sslrun.launch.engine import (
    INTERRUPTED,
    ClusterOptions,
    Engine,
    Workers,
    describe_exit,
    engines,
)

if TYPE_CHECKING:
    from types import ModuleType

SAVE_SECONDS = 120
"""Seconds before the time limit at which a worker saves its work and is requeued."""
RESTARTS = 10_000
"""How many times a job is requeued at its time limit; submitit needs a number."""
GRACE_SECONDS = 300
"""Seconds that a process waits for Slurm to end it, after it has saved its work."""


OWN = {"array", "no-requeue", "requeue", "signal"}
"""Options of sbatch that sslrun sets itself, so that jobs are requeued."""


class SlurmOptions(ClusterOptions):
    """Options of workers on Slurm."""

    partition: str | None = None
    """Partition; default: the cluster's own."""
    time: str = "4h"
    """Time limit, such as 30m, 4h, 2d, 12:00:00 or 1-12:00:00. At the limit a job saves its work,
    is requeued and goes on."""
    nodes: int = Field(1, ge=1)
    """Nodes of one pretraining, which uses `gpus` GPUs on each of them."""
    cpus: int | None = Field(None, ge=1)
    """CPU cores per GPU, or per node without GPUs; default: the cluster's own."""
    memory: float | None = Field(None, gt=0)
    """GB of memory per node; default: the cluster's own."""
    sbatch: str = ""
    """More options of sbatch, as on a command line, such as "--account=vision --qos=low"."""

    @field_validator("sbatch")
    @classmethod
    def _check_sbatch(cls, text: str) -> str:
        if taken := sorted(OWN.intersection(_long_options(text))):
            raise ValueError(f"--{taken[0]} is set by sslrun: leave it out")
        return text

    @field_validator("time")
    @classmethod
    def _check_time(cls, text: str) -> str:
        if 60 * minutes_of(text) <= SAVE_SECONDS:
            raise ValueError(f"should be above {SAVE_SECONDS} s, before which the work is saved")
        return text

    @field_validator("gpus")
    @classmethod
    def _check_whole(cls, gpus: float | None) -> float | None:
        if gpus is not None and gpus != int(gpus):
            raise ValueError("should be a whole number: jobs of Slurm do not share a GPU")
        return gpus


UNITS = {"m": 1, "h": 60, "d": 1440}


def minutes_of(text: str) -> int:
    """Return the minutes of a time limit, such as 90m, 4h, 12:00:00 or 1-12:00:00.

    Raises ValueError for another form.
    """
    if short := re.fullmatch(r"(\d+)([mhd])", text):
        return int(short[1]) * UNITS[short[2]]
    long = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)", text)
    if long is None:
        raise ValueError("write a time as 30m, 4h, 2d, 12:00:00 or 1-12:00:00")
    days, hours, minutes, seconds = (int(part or 0) for part in long.groups())
    return max(1, days * 1440 + hours * 60 + minutes + (seconds > 0))


@engines.register("slurm")
class Slurm(Engine):
    """An array of jobs on a Slurm cluster, whose nodes share the runs' folder."""

    Options = SlurmOptions
    detached = True

    def count_devices(self, workers: Workers) -> int:
        return max(1, int(self.options.gpus_of(workers))) * self.options.nodes

    def submit(self, workers: Workers) -> str:
        submitit = import_submitit()
        if shutil.which("sbatch") is None or shutil.which("srun") is None:
            raise UserError(
                "--engine slurm: no sbatch on this machine; use a login node of the cluster"
            )
        executor = submitit.SlurmExecutor(workers.logs, max_num_timeout=RESTARTS)
        executor.update_parameters(**self._parameters(workers))
        task = Task(workers.command(workers.device, self.options.idle))
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                if workers.count == 1:
                    jobs = [executor.submit(task, 0)]
                else:
                    jobs = executor.map_array(task, range(workers.count))
        except submitit.core.utils.FailedJobError as error:
            lines = [
                line.removeprefix("sbatch: error: ").removeprefix("sbatch: ")
                for line in str(error).splitlines()
            ]
            message = "; ".join(lines)
            if "generic resource" in message:
                message += " (on a cluster without GPUs use --device cpu or -E gpus=0)"
            raise UserError(f"--engine slurm: sbatch refused: {message}") from None
        number = jobs[0].job_id.partition("_")[0]
        return f"Submitted Slurm job {number}; logs: {workers.logs}"

    def _parameters(self, workers: Workers) -> dict[str, Any]:
        """Return the parameters of submitit."""
        options = self.options
        gpus = int(options.gpus_of(workers))
        if workers.is_sweep and options.nodes > 1:
            raise UserError(
                f"-E nodes={options.nodes}: a worker of a sweep uses one node; raise --jobs to use "
                "more, and give several nodes to `sslrun pretrain` only"
            )
        parameters = {
            "job_name": "sslrun",
            "partition": options.partition,
            "time": minutes_of(options.time),
            "nodes": options.nodes,
            "ntasks_per_node": max(1, gpus),
            "gpus_per_node": gpus or None,
            "cpus_per_task": options.cpus,
            "mem": None if options.memory is None else f"{round(options.memory * 1024)}M",
            "signal_delay_s": SAVE_SECONDS,
            "array_parallelism": workers.count,
            "additional_parameters": {"requeue": True, **_long_options(options.sbatch)},
        }
        return {key: value for key, value in parameters.items() if value is not None}


def _long_options(text: str) -> dict[str, Any]:
    """Parse options of sbatch: name -> value, or True for one without a value.

    Raises ValueError for text that is no list of long options.
    """
    words = shlex.split(text)
    options: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not name:
            raise ValueError(f"write each option as --name=value, not {word!r}")
        options[name] = value if equals else True
    return options


class Task:
    """One task of a job: a process of sslrun. submitit pickles it, and calls it on the node."""

    def __init__(self, arguments: tuple[str, ...]) -> None:
        self.arguments = arguments
        self.process: subprocess.Popen[bytes] | None = None

    def __call__(self, number: int) -> None:
        """Run the process; raise RuntimeError if it dies."""
        import submitit

        if submitit.JobEnvironment().num_tasks > 1:
            distributed = submitit.helpers.TorchDistributedEnvironment()
            distributed.export(set_cuda_visible_devices=False, overwrite=True)
        command = [sys.executable, "-m", "sslrun", *self.arguments]
        self.process = subprocess.Popen(command, preexec_fn=_ignore_limit)
        signal.signal(signal.SIGTERM, self._save)
        code = self.process.wait()
        if code == INTERRUPTED:
            # Slurm is about to requeue this job, or to end it. One that ends first would count as
            # completed.
            time.sleep(GRACE_SECONDS)
        if code:
            raise RuntimeError(describe_exit(code))

    def _save(self, number: int, frame: FrameType | None) -> None:
        """Pass SIGTERM on: with some settings Slurm signals only this process."""
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGTERM)

    def checkpoint(self, number: int) -> Any:
        """Save the work before the time limit; return what submitit is to run after the requeue.

        submitit calls this in the handler of a signal, while `__call__` waits for the process.
        """
        import submitit

        if self.process is not None:
            self._save(signal.SIGTERM, None)
            # Not wait(), which would wait forever for the lock that the interrupted wait() holds.
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        return submitit.helpers.DelayedSubmission(Task(self.arguments), number)


def _ignore_limit() -> None:
    """Leave submitit's signal to the parent process: Slurm may send it to both."""
    import submitit

    signal.signal(submitit.JobEnvironment._usr_sig(), signal.SIG_IGN)


def import_submitit() -> ModuleType:
    """Import submitit. Raises UserError if it is not installed."""
    try:
        import submitit
    except ImportError:
        raise UserError(
            "--engine slurm: submitit is not installed; run `pip install 'sslrun[slurm]'`"
        ) from None
    return submitit
