"""Commands that train: pretrain, sweep."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sslrun.cli.base import app
from sslrun.cli.options import Device, Fresh, Imports, Overrides, Profile, RecipeFile, Runs, Seed
from sslrun.cli.output import print_table
from sslrun.cli.workers import worker_options
from sslrun.errors import UserError

if TYPE_CHECKING:
    from sslrun.stages.sweep import Job


@app.command()
def pretrain(  # noqa: PLR0913 (typer makes each parameter an option)
    recipe: RecipeFile,
    overrides: Overrides = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            help="Start from this backbone, as pretrain.init does: a run's folder, a file of "
            "weights, or hub:OWNER/NAME.",
            show_default=False,
        ),
    ] = None,
    extend: Annotated[
        bool,
        typer.Option(
            "--extend",
            help="Continue the longest finished run of the recipe with a shorter schedule, by a "
            "warm restart from its last state.",
        ),
    ] = False,
    device: Device = "auto",
    seed: Seed = 0,
    runs: Runs = Path("runs"),
    fresh: Fresh = False,
    profile: Profile = False,
    imports: Imports = None,
) -> None:
    """Stage 1: train the backbone of a recipe on its pretext task, without labels."""
    from sslrun import distributed
    from sslrun.recipe import load
    from sslrun.stages.context import Context
    from sslrun.stages.pretrain import Pretraining

    if source is not None and extend:
        raise UserError("--from and --extend both say where to start: give one of them")
    init = [f"pretrain.init={json.dumps(source)}"] if source is not None else []
    loaded = load(recipe, [*(overrides or ()), *init])
    if loaded.pretext is None:
        raise UserError(
            f"{recipe}: has no pretext task, so there is nothing to pretrain; "
            "add one, such as `pretext: simclr`"
        )
    job = Pretraining(loaded, seed, runs)
    if extend:
        job = job.extending()
    job.execute(Context.open(device, runs, fresh, profile))
    if distributed.is_main():
        typer.echo(job.run.path)


@app.command()
def sweep(
    recipes: Annotated[
        list[Path],
        typer.Argument(
            help="Sweeps or recipes: YAML files, or names of those that ship.", metavar="SWEEP..."
        ),
    ],
    change: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Change every base recipe, such as pretrain.epochs=5; may be given several times.",
        ),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of worker processes that share the runs, each on its own GPU if there are "
            "several; default: the sweep's own.",
        ),
    ] = None,
    slurm: Annotated[
        str | None,
        typer.Option(
            help="Submit the workers as a Slurm array with these options of sbatch.",
            metavar="OPTIONS",
        ),
    ] = None,
    device: Device = "auto",
    runs: Runs = Path("runs"),
    fresh: Fresh = False,
    imports: Imports = None,
) -> None:
    """Run all stages, rows and seeds of sweeps, skip what is finished, and print the tables."""
    from sslrun.recipe import load_sweep
    from sslrun.stages.context import Context
    from sslrun.stages.sweep import Plan, describe_failures, launch

    for name in map(str, recipes):
        if "=" in name and not Path(name).exists():
            raise UserError(
                f"{name}: no such file; a change to the recipes of a sweep is written "
                f"--set {shlex.quote(name)}"
            )
    plans = [Plan.of(load_sweep(path, change or ()), runs) for path in recipes]
    jobs = jobs or max(plan.sweep.jobs for plan in plans)
    changes = [f"--set={text}" for text in change or ()]
    arguments = ["sweep", *map(str, recipes), *worker_options(runs, device), *changes]
    if slurm is not None:
        if fresh:
            raise UserError(
                "--fresh does not go with --slurm, whose workers would delete each other's runs; "
                "remove the runs yourself"
            )
        _submit([job for plan in plans for job in plan.jobs], arguments, jobs, slurm)
        return
    failures = launch(plans, Context.open(device, runs, fresh), jobs, arguments)
    for plan in plans:
        if plan.finished:
            table, comparison = plan.write_tables()
            print_table(table)
            if comparison is not None:
                print_table(comparison)
    if failures:
        raise UserError(describe_failures(failures, plans))


def _submit(jobs: Sequence[Job], arguments: Sequence[str], workers: int, options: str) -> None:
    """Submit a sweep's workers to Slurm, and report which data are missing on this machine.

    Missing data are no error, because the nodes may have them.
    """
    from sslrun.launch.slurm import submit
    from sslrun.stages.reporting import Reporter
    from sslrun.stages.sweep import report_missing, without_data

    reporter = Reporter()
    report_missing(without_data(jobs, reporter), len(jobs), reporter)
    typer.echo(submit(arguments, workers, options))
