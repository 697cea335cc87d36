"""Worker processes as a Slurm array."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence

from sslrun.errors import UserError


def submit(arguments: Sequence[str], workers: int, options: str) -> str:
    """Submit the workers as one array that is requeued when preempted; return sbatch's output.

    `arguments` is the command line of sslrun from which each worker reads the same plan. `options`
    are options of sbatch, as on a command line. A worker saves two minutes before its time limit:
    `B:` sends the signal to the batch shell, which the worker replaces.

    Raises UserError if this machine has no sbatch, or if sbatch rejects the job.
    """
    if shutil.which("sbatch") is None:
        raise UserError(
            "--slurm: no sbatch on this machine; run the sweep on a login node of the cluster"
        )
    try:
        extra = shlex.split(options)
    except ValueError as error:
        raise UserError(f"--slurm {options}: not options of sbatch: {error}") from None
    command = shlex.join([sys.executable, "-m", "sslrun", *arguments])
    sbatch = [
        "sbatch", f"--array=1-{workers}", "--requeue", "--signal=B:TERM@120", "--job-name=sslrun",
        *extra, "--wrap", f"exec {command}",
    ]  # fmt: skip
    done = subprocess.run(sbatch, capture_output=True, text=True)
    if done.returncode:
        lines = [
            line.removeprefix("sbatch: error: ")
            for line in done.stderr.splitlines()
            if line.strip()
        ]
        raise UserError(f"sbatch refused: {'; '.join(lines) or f'it ended with {done.returncode}'}")
    return done.stdout.strip()
