"""Command lines of other processes: workers of a sweep, and advice to the user."""

from __future__ import annotations

import secrets
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from sslrun.launch import Engine, Workers
    from sslrun.stages.sweep import Jobs


def command_line(
    command: str, recipe: Path, overrides: list[str] | None, seed: int, runs: Path
) -> str:
    """Build the command line of another command with the same options."""
    words = ["sslrun", command, str(recipe), *(overrides or ())]
    words += ["--seed", str(seed)] if seed else []
    words += ["--runs", str(runs)] if runs != Path("runs") else []
    return shlex.join([*words, *import_options()])


def build_workers(
    command: Sequence[str], name: str, runs: Path, count: int, device: str, **details: Any
) -> Workers:
    """Describe workers that run `command`, which lacks the options that all commands have.

    `name` is that of the folder of their logs; `details` are further fields of `Workers`.
    """
    from sslrun.launch import Workers

    arguments = (*command, f"--runs={runs}", *import_options())
    logs = runs / name / "workers"
    return Workers(arguments, count, device, logs, name=secrets.token_hex(4), **details)


def run_workers(
    plans: Sequence[Jobs], engine: Engine, workers: Workers, runs: Path, fresh: bool
) -> list[str] | None:
    """Run plans with an engine; return the reasons of the failures.

    None if the workers go on without this process.
    """
    from sslrun.stages.context import Context
    from sslrun.stages.sweep import launch, submit

    # Only local workers need the device on this machine.
    context = Context.open(workers.device if engine.name == "local" else "cpu", runs, fresh)
    if engine.detached:
        typer.echo(submit(plans, context, engine, workers))
        return None
    return launch(plans, context, engine, workers)


def run_as_worker(plans: Sequence[Jobs], device: str, runs: Path, idle: float) -> None:
    """Work as one of several workers, and end after `idle` minutes without a run to take."""
    from sslrun.launch import end_with_parent
    from sslrun.stages.context import Context
    from sslrun.stages.sweep import work_all

    end_with_parent()
    work_all(plans, Context.open(device, runs), idle=idle)


def import_options() -> list[str]:
    """Return the options that make another process import the same plug-ins."""
    from sslrun import plugins

    return [f"--import={path}" for path in plugins.list_loaded()]
