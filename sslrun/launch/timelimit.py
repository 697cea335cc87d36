"""The time limit of a Slurm job: after SIGUSR1 the job saves, and requeues itself to go on."""

from __future__ import annotations

import os
import signal
import subprocess

from sslrun.launch.engine import has_parent

NOTICE = signal.SIGUSR1
"""The signal that says that the time is nearly over, as `sbatch --signal=B:USR1@120` asks for."""


class TimeLimit:
    """Whether the time limit of this process's job is near."""

    reached = False

    def requeue(self) -> str | None:
        """Put this process's Slurm job back into the queue, if its time limit is near.

        Slurm ends the job's other processes meanwhile, so they must have saved. Therefore a process
        that another one of sslrun has started leaves this to that one. Returns what happened; None
        if there is nothing to do.
        """
        job = os.environ.get("SLURM_JOB_ID")
        if not self.reached or job is None or has_parent():
            return None
        try:
            done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
        except OSError as error:
            return f"job {job} cannot be requeued: scontrol: {error.strerror}"
        if done.returncode:
            return f"job {job} cannot be requeued: {' '.join(done.stderr.split())}"
        return f"job {job} is requeued, and continues there"


time_limit = TimeLimit()
"""The time limit of this process's job."""
