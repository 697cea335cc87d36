"""Commands that show runs: report."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from sslrun.cli.base import app
from sslrun.cli.options import Imports, Runs


@app.command()
def report(
    targets: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Sweeps, or folders of runs; default: all runs in --runs.",
            metavar="[SWEEP|RUN]...",
            show_default=False,
        ),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="File of HTML to write.")] = Path(
        "report.html"
    ),
    looks: Annotated[
        int,
        typer.Option(
            min=0,
            help="Draw neighbors, maps and attention of this many pretrainings, and mistakes of "
            "this many evaluations.",
        ),
    ] = 3,
    runs: Runs = Path("runs"),
    imports: Imports = None,
) -> None:
    """Write one page with tables, curves and pictures of runs, to look at in a browser."""
    from sslrun.recipe.shipped import sweep_or_folder
    from sslrun.report.build import write_report
    from sslrun.stages.reporting import Reporter

    chosen = [sweep_or_folder(target) for target in targets or [runs]]
    command = ["sslrun", *sys.argv[1:]]
    typer.echo(write_report(chosen, runs, output, looks, command, Reporter().say))
