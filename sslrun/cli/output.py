"""Printing: tables, JSON, and the width of the terminal."""

from __future__ import annotations

import json
from typing import Any

import typer

WIDE = 200
"""Width of printed tables in columns if stdout is not a terminal."""


def print_json_or(value: Any, renderable: Any) -> None:
    """Print a value as JSON if it is not None, else a rich renderable."""
    if value is not None:
        typer.echo(json.dumps(value, indent=2))
        return
    console().print(renderable, markup=False)


def print_table(table: Any) -> None:
    console().print(table.render())


def console() -> Any:
    """Create a rich console on stdout, as wide as the terminal, or WIDE columns without one."""
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=WIDE)
