"""Plug-ins: the user's own components, in a Python file or in an installed package.

A file is named by `--import` or SSLRUN_IMPORT, never by a recipe. A package names its plug-ins by
entry points. Importing a plug-in runs its `register` decorators, which registers its components.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import traceback
from collections.abc import Iterable, Sequence
from hashlib import sha256
from importlib.metadata import entry_points
from itertools import pairwise
from pathlib import Path

from sslrun.errors import UserError
from sslrun.files import expand_home

VARIABLE = "SSLRUN_IMPORT"
"""Environment variable with the files to import, separated as in PATH."""
GROUP = "sslrun.plugins"
"""Group of the entry points that are imported: `[project.entry-points."sslrun.plugins"]`."""

_modules: dict[Path, str] = {}
"""Imported file -> name of its module."""


def list_requested(arguments: Sequence[str]) -> list[str]:
    """List the files to import: those of SSLRUN_IMPORT, then those of the command line.

    The command line names them as `--import FILE` or `--import=FILE`.
    """
    files = [path for path in os.environ.get(VARIABLE, "").split(os.pathsep) if path]
    options: list[str | None] = [*arguments]
    if "--" in options:
        options = options[: options.index("--")]
    for option, following in pairwise([*options, None]):
        if option == "--import" and following is not None:
            files.append(following)
        elif option is not None and option.startswith("--import="):
            files.append(option.removeprefix("--import="))
    return files


def load_files(paths: Iterable[str | Path]) -> None:
    """Import Python files, each once.

    Raises:
        UserError: A file is missing or cannot be imported; the message names the file and line.
    """
    for path in map(Path, paths):
        resolved = expand_home(path).resolve()
        if resolved not in _modules:
            _modules[resolved] = _import_file(path, resolved)


def list_loaded() -> list[Path]:
    """List the absolute paths of the imported files, in order; workers import them too."""
    return list(_modules)


def are_installed() -> bool:
    """Return whether an installed package has plug-ins."""
    return bool(entry_points(group=GROUP))


def load_entry_points() -> None:
    """Import the plug-ins of installed packages.

    Raises:
        UserError: A plug-in cannot be imported; the message names its package.
    """
    for point in entry_points(group=GROUP):
        package = f" of the package '{point.dist.name}'" if point.dist else ""
        try:
            point.load()
        except (Exception, SystemExit) as error:
            raise UserError(
                f"plug-in '{point.name}'{package} ({point.value}): {_describe(error)}; update or "
                "uninstall the package"
            ) from error


def _import_file(path: Path, resolved: Path) -> str:
    """Import a file under a module name of its own, and return that name."""
    if not resolved.is_file():
        raise UserError(f"{path}: no such file; --import and {VARIABLE} name Python files")
    if resolved.suffix != ".py":
        raise UserError(
            f"{path}: is not a Python file (.py); --import and {VARIABLE} name Python files"
        )
    name = f"sslrun_plugin_{resolved.stem}_{sha256(str(resolved).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, resolved)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # pydantic resolves annotations there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        line = _find_line(resolved, error)
        raise UserError(
            f"{path}{f':{line}' if line else ''}: cannot be imported: {_describe(error)}"
        ) from error
    return name


def _find_line(file: Path, error: BaseException) -> int | None:
    """Return the line of `file` that is not valid Python, or the last that ran before the error.

    Returns None if there is no such line.
    """
    if isinstance(error, SyntaxError) and error.filename == str(file):
        return error.lineno
    frames = traceback.extract_tb(error.__traceback__)
    return next((frame.lineno for frame in reversed(frames) if frame.filename == str(file)), None)


def _describe(error: BaseException) -> str:
    """Describe an error in one line, with its class unless the message alone is clear."""
    message = " ".join((error.msg if isinstance(error, SyntaxError) else str(error)).split())
    if isinstance(error, UserError) or (type(error) is ValueError and message):
        return message
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
