"""Plug-ins: components of a user's own, in a Python file (`--import`) or in an installed package (an entry point).

Importing a plug-in runs its `register` decorators, which is all that makes its components known.
Only the command line and the environment name files to import; a recipe never does.
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

VARIABLE = "SSLRUN_IMPORT"
"""Environment variable that names files to import, separated as in PATH."""
GROUP = "sslrun.plugins"
"""Entry points of this group are imported: a package's
`[project.entry-points."sslrun.plugins"]`."""

_modules: dict[Path, str] = {}
"""The module that each imported file became."""


def requested(arguments: Sequence[str]) -> list[str]:
    """The files that SSLRUN_IMPORT and a command line (`--import FILE`, `--import=FILE`) name, in this order."""
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
    """Import Python files, each once. UserError, with the file and its line: one is missing or cannot be imported."""
    for path in map(Path, paths):
        resolved = path.expanduser().resolve()
        if resolved not in _modules:
            _modules[resolved] = _import_file(path, resolved)


def loaded_files() -> list[Path]:
    """The files that were imported: absolute, in their order, to be passed on to workers."""
    return list(_modules)


def installed() -> bool:
    """Whether an installed package brings plug-ins."""
    return bool(entry_points(group=GROUP))


def load_entry_points() -> None:
    """Import the plug-ins of installed packages. UserError, with the package: one cannot be imported."""
    for point in entry_points(group=GROUP):
        package = f" of the package '{point.dist.name}'" if point.dist else ""
        try:
            point.load()
        except (Exception, SystemExit) as error:
            raise UserError(
                f"plug-in '{point.name}'{package} ({point.value}): {_describe(error)}; update or uninstall the package"
            ) from error


def _import_file(path: Path, resolved: Path) -> str:
    """Import one file under a module name that no other file gets, and return the name."""
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
    sys.modules[name] = module  # pydantic looks up the types that annotations name there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        line = _line_in(resolved, error)
        raise UserError(
            f"{path}{f':{line}' if line else ''}: cannot be imported: {_describe(error)}"
        ) from error
    return name


def _line_in(file: Path, error: BaseException) -> int | None:
    """The last line of `file` that ran before the error, or that is not valid Python; None if there is none."""
    if isinstance(error, SyntaxError) and error.filename == str(file):
        return error.lineno
    frames = traceback.extract_tb(error.__traceback__)
    return next((frame.lineno for frame in reversed(frames) if frame.filename == str(file)), None)


def _describe(error: BaseException) -> str:
    """An error in one line, with the name of its class where the message alone says too little."""
    message = " ".join((error.msg if isinstance(error, SyntaxError) else str(error)).split())
    if isinstance(error, UserError) or (type(error) is ValueError and message):
        return message
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
