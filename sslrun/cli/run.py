"""Run a command line: import plug-ins, parse, and turn errors into exit codes."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer

from sslrun.cli.base import app
from sslrun.cli.protocols import add_protocol_commands
from sslrun.errors import UserError, describe_os_error
from sslrun.launch.engine import end_with_parent, has_parent
from sslrun.launch.timelimit import time_limit
from sslrun.launch.torchrun import leave_error

DEBUG = "SSLRUN_DEBUG"
"""Environment variable; 1 also prints the traceback of a user's mistake."""

STOPPED = 130
"""Exit code of a command that a signal stopped: of an interrupted command in shells."""

COMMAND_LINE_ERROR: type[Any] = typer.BadParameter.__mro__[2]
"""ClickException of click, or of the copy of click inside newer versions of typer."""


def main() -> None:
    """Run the command line. A user's mistake prints one line to stderr and exits with code 2.

    A command that was stopped exits with `STOPPED`. If the time limit of a Slurm job stopped it,
    the job is requeued.
    """
    with _warnings_printed():
        code = exit_code(_run)
    if code == STOPPED and (message := time_limit.requeue()):
        typer.echo(f"sslrun: {message}", err=True)
    sys.exit(code)


@contextmanager
def _warnings_printed() -> Iterator[None]:
    """Print the warnings of sslrun's own modules to stderr, each as one line."""
    handler, own = logging.StreamHandler(), logging.getLogger("sslrun")
    handler.setFormatter(logging.Formatter("sslrun: warning: %(message)s"))
    own.addHandler(handler)
    try:
        yield
    finally:
        own.removeHandler(handler)


def _run() -> Any:
    if has_parent():
        end_with_parent()
    _load_plugins(sys.argv[1:])
    add_protocol_commands(app)
    return app(prog_name="sslrun", standalone_mode=False)


def _load_plugins(arguments: list[str]) -> None:
    """Import the plug-ins of the command line, the environment and installed packages."""
    from sslrun import plugins

    files = plugins.list_requested(arguments)
    if files or plugins.are_installed():
        # The package's own components first, so that a name clash is the plug-in's error.
        import sslrun.claims.measurements
        import sslrun.recipe  # noqa: F401
    plugins.load_entry_points()
    plugins.load_files(files)


def exit_code(run: Callable[[], Any]) -> int:
    try:
        code = run()
        if code == STOPPED:  # newer versions of typer return this after a KeyboardInterrupt
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except COMMAND_LINE_ERROR as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            typer.echo(error.format_message())
            return 0
        error.show()
        return int(error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        typer.echo("sslrun: stopped; give the same command again to continue", err=True)
        return STOPPED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (UserError, OSError) as error:
        message = str(error) if isinstance(error, UserError) else describe_os_error(error)
        if not leave_error(message):
            typer.echo(f"sslrun: {message}", err=True)
        if os.environ.get(DEBUG, "0") not in ("", "0"):
            _print_traceback(error)
        return getattr(error, "exit_code", UserError.exit_code)


def _print_traceback(error: BaseException) -> None:
    """Print an error with all its causes, including those that `raise ... from None` hides."""
    import traceback

    cause: BaseException | None = error
    while cause is not None:
        cause.__suppress_context__ = False
        cause = cause.__cause__ or cause.__context__
    typer.echo("".join(traceback.format_exception(error)), err=True, nl=False)
