"""Commands that show runs: report, watch, compare."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from sslrun.cli.base import app
from sslrun.cli.options import AsJson, Imports, Runs, Targets, path_argument, path_option
from sslrun.cli.output import print_json_or
from sslrun.cli.plans import show_plans
from sslrun.errors import UserError


@app.command()
def report(
    targets: Targets = None,
    output: Annotated[
        Path,
        path_option("--output", "-o", help="File of HTML to write."),
    ] = Path("report.html"),
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
    from sslrun.report.build import write_report
    from sslrun.shipped import sweep_or_folder
    from sslrun.stages.reporting import Reporter

    chosen = [sweep_or_folder(target) for target in targets or [runs]]
    command = ["sslrun", *sys.argv[1:]]
    typer.echo(write_report(chosen, runs, output, looks, command, Reporter().say))


@app.command()
def watch(
    targets: Targets = None,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port on this machine; 0: any.")
    ] = 8765,
    terminal: Annotated[
        bool,
        typer.Option(
            "--terminal", help="Show the runs of sweeps in the terminal, not in a browser."
        ),
    ] = False,
    runs: Runs = Path("runs"),
    imports: Imports = None,
) -> None:
    """Show the report in a browser on this machine, and keep it up to date while runs go on."""
    from sslrun.report.serve import Site, serve
    from sslrun.shipped import sweep_or_folder

    if terminal:
        _watch_in_terminal(targets or [], runs)
        return
    chosen = [sweep_or_folder(target) for target in targets or [runs]]
    site = Site(chosen, runs, ["sslrun", *sys.argv[1:]])
    serve(site, port, typer.echo)


def _watch_in_terminal(sweeps: list[Path], runs: Path) -> None:
    """Follow the runs of sweeps in the terminal, as `sweep --status` does."""
    from sslrun.recipe import load_sweep
    from sslrun.stages.sweep import Plan

    if not sweeps:
        raise UserError("watch --terminal: name one or more sweeps")
    show_plans([Plan.of(load_sweep(path), runs) for path in sweeps], 1, None, False)


@app.command()
def compare(
    first: Annotated[
        Path,
        path_argument(
            help="A run, or a folder of runs.",
            metavar="RUN",
            show_default=False,
        ),
    ],
    second: Annotated[
        Path,
        path_argument(help="What to compare it with.", metavar="RUN", show_default=False),
    ],
    as_json: AsJson = False,
) -> None:
    """Show what differs between two runs: recipe, environment, and metrics with paired intervals.

    Two runs are paired over test examples, folders of runs over seeds.
    """
    from sslrun.report.comparison import compare_runs

    result = compare_runs(first, second)
    print_json_or(result.as_dict() if as_json else None, result.render())
