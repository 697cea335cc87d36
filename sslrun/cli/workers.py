"""Command lines of other processes: workers of a sweep, and advice to the user."""

from __future__ import annotations

import shlex
from pathlib import Path


def command_line(
    command: str, recipe: Path, overrides: list[str] | None, seed: int, runs: Path
) -> str:
    """Build the command line of another command with the same options."""
    words = ["sslrun", command, str(recipe), *(overrides or ())]
    words += ["--seed", str(seed)] if seed else []
    words += ["--runs", str(runs)] if runs != Path("runs") else []
    return shlex.join([*words, *import_options()])


def worker_options(runs: Path, device: str) -> list[str]:
    """Return the options that the commands of all workers share."""
    return ["--jobs=1", f"--runs={runs}", f"--device={device}", *import_options()]


def import_options() -> list[str]:
    """Return the options that make another process import the same plug-ins."""
    from sslrun import plugins

    return [f"--import={path}" for path in plugins.list_loaded()]
