"""Commands that show runs: report, watch, compare."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from sslrun.cli.base import app
from sslrun.cli.options import AsJson, Imports, Runs
from sslrun.cli.output import print_json_or


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


@app.command()
def watch(
    targets: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Sweeps, or folders of runs; default: all runs in --runs.",
            metavar="[SWEEP|RUN]...",
            show_default=False,
        ),
    ] = None,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port on this machine; 0: any.")
    ] = 8765,
    runs: Runs = Path("runs"),
    imports: Imports = None,
) -> None:
    """Show the report in a browser on this machine, and keep it up to date while runs go on."""
    from sslrun.recipe.shipped import sweep_or_folder
    from sslrun.report.serve import Site, serve

    chosen = [sweep_or_folder(target) for target in targets or [runs]]
    site = Site(chosen, runs, ["sslrun", *sys.argv[1:]])
    serve(site, port, typer.echo)


@app.command()
def compare(
    first: Annotated[
        Path, typer.Argument(help="A run, or a folder of runs.", metavar="RUN", show_default=False)
    ],
    second: Annotated[
        Path, typer.Argument(help="What to compare it with.", metavar="RUN", show_default=False)
    ],
    as_json: AsJson = False,
) -> None:
    """Show what differs between two runs: recipe, environment, and metrics with paired intervals.

    Two runs are paired over test examples, folders of runs over seeds.
    """
    from sslrun.report.comparison import compare_runs

    result = compare_runs(first, second)
    print_json_or(result.as_dict() if as_json else None, result.render())
