"""The command line: parse arguments, call a stage, print the result.

Commands import slow modules only when they run. `--help` lists them in the order of this file's
imports.
"""

# isort: off
from sslrun.cli.base import app
from sslrun.cli.protocols import add_protocol_commands
from sslrun.cli import train, tables, reports, recipes, weights, pictures, runs
from sslrun.cli.run import exit_code, main
# isort: on

__all__ = [
    "add_protocol_commands",
    "app",
    "exit_code",
    "main",
    "pictures",
    "recipes",
    "reports",
    "runs",
    "tables",
    "train",
    "weights",
]
