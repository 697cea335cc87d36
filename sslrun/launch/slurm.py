"""Worker processes as a Slurm array."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence

from sslrun.errors import UserError


def submit(arguments: Sequence[str], workers: int, options: str) -> str:
    """Submit `workers` workers as one array, requeued when preempted, and return what sbatch prints.

    `arguments`: sslrun's, by which each worker reads the same plan. `options`: sbatch's own, as on
    a command line. Two minutes before its time is up a worker saves: `B:` sends the signal to the
    batch shell, which the worker replaces. UserError: there is no sbatch here, or it refuses.
    """
    if shutil.which("sbatch") is None:
        raise UserError(
            "--slurm: no sbatch on this machine; run the sweep on a login node of the cluster"
        )
    try:
        given = shlex.split(options)
    except ValueError as error:
        raise UserError(f"--slurm {options}: not options of sbatch: {error}") from None
    command = shlex.join([sys.executable, "-m", "sslrun", *arguments])
    sbatch = [
        "sbatch", f"--array=1-{workers}", "--requeue", "--signal=B:TERM@120", "--job-name=sslrun",
        *given, "--wrap", f"exec {command}",
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
