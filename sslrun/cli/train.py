"""Commands that train: pretrain, sweep."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sslrun.cli.base import app
from sslrun.cli.options import (
    AsJson,
    Device,
    Engine,
    EngineOptions,
    Fresh,
    Imports,
    Overrides,
    Profile,
    RecipeFile,
    Runs,
    Seed,
    Worker,
    path_argument,
)
from sslrun.cli.output import print_table
from sslrun.cli.plans import show_plans
from sslrun.cli.workers import build_workers, run_as_worker, run_workers
from sslrun.errors import UserError

if TYPE_CHECKING:
    from sslrun import launch
    from sslrun.results.compare import Comparisons
    from sslrun.results.table import Table
    from sslrun.stages.pretrain import Pretraining
    from sslrun.stages.sweep import Plan


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
    gpus: Annotated[
        int,
        typer.Option(
            min=1,
            help="Number of GPUs to train on together, each by a process of torchrun; with "
            "--device cpu, of processes on the CPU, to test it.",
        ),
    ] = 1,
    device: Device = "auto",
    engine: Engine = "local",
    engine_options: EngineOptions = None,
    seed: Seed = 0,
    runs: Runs = Path("runs"),
    fresh: Fresh = False,
    profile: Profile = False,
    imports: Imports = None,
) -> None:
    """Stage 1: train the backbone of a recipe on its pretext task, without labels."""
    from sslrun import distributed, launch
    from sslrun.launch.torchrun import train_together
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
    place = launch.build(engine, engine_options or ())
    if place.name != "local":
        _check_engine(engine, gpus, fresh, profile)
    started = distributed.device_count()
    if gpus > 1 and started == 1:
        train_together(sys.argv[1:], gpus, device)
        return
    if gpus not in (1, started):
        raise UserError(f"--gpus {gpus}: torchrun has started {started} processes: leave it out")
    command = ["pretrain", str(recipe), *(overrides or ()), f"--seed={seed}"]
    command += [f"--from={source}"] if source is not None else []
    command += ["--extend"] if extend else []
    workers = build_workers(command, loaded.name, runs, 1, device, is_sweep=False)
    job = Pretraining(loaded, seed, runs, place.count_devices(workers))
    if extend:
        job = job.extending()
    if place.name == "local":
        context = Context.open(device, runs, fresh, profile)
        job.reopen(context)
        job.execute(context)
    elif not _run_elsewhere(job, place, workers, runs):
        return
    if distributed.is_main():
        typer.echo(job.run.path)


def _run_elsewhere(
    job: Pretraining, engine: launch.Engine, workers: launch.Workers, runs: Path
) -> bool:
    """Pretrain by an engine; return whether it is done, and not only submitted."""
    from sslrun.stages.context import Context
    from sslrun.stages.sweep import JobList

    job.reopen(Context.open("cpu", runs))
    failures = run_workers([JobList(job.title, (job,))], engine, workers, runs, fresh=False)
    if failures:
        raise UserError(failures[0])
    return failures is not None


def _check_engine(engine: str, gpus: int, fresh: bool, profile: bool) -> None:
    """Raise UserError for options of a pretraining that only this machine has."""
    if gpus > 1:
        raise UserError(f"--gpus {gpus}: with --engine {engine} write -E gpus={gpus}")
    if fresh or profile:
        raise UserError(
            f"--fresh and --profile do not go with --engine {engine}, which may start the "
            "training several times"
        )


@app.command()
def sweep(  # noqa: PLR0913 (typer makes each parameter an option)
    recipes: Annotated[
        list[Path],
        path_argument(
            help="Sweeps or recipes: YAML files, or names of those that ship.",
            metavar="SWEEP...",
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
    per_gpu: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of workers that share one GPU of this machine; without --jobs, every GPU "
            "gets as many.",
        ),
    ] = None,
    engine: Engine = "local",
    engine_options: EngineOptions = None,
    device: Device = "auto",
    runs: Runs = Path("runs"),
    fresh: Fresh = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print which runs are left and how long they take; run nothing."
        ),
    ] = False,
    status: Annotated[
        bool,
        typer.Option(
            "--status",
            help="Print the state of every run, and run nothing; on a terminal, follow the workers "
            "until none is left.",
        ),
    ] = False,
    imports: Imports = None,
    as_json: AsJson = False,
    worker: Worker = None,
) -> None:
    """Run all stages, rows and seeds of sweeps, skip what is finished, and print the tables."""
    from sslrun import launch
    from sslrun.recipe import load_sweep
    from sslrun.stages.sweep import Plan, describe_failures

    _check_names(recipes)
    plans = [Plan.of(load_sweep(path, change or ()), runs) for path in recipes]
    if worker is not None:
        run_as_worker(plans, device, runs, worker)
        _write_tables(plans)
        return
    place = launch.build(engine, engine_options or ())
    if per_gpu is not None and place.name != "local":
        raise UserError(f"--per-gpu does not go with --engine {engine}")
    jobs = jobs or launch.local.places(device, per_gpu) or max(plan.sweep.jobs for plan in plans)
    if dry_run and status:
        raise UserError("--dry-run and --status print different tables: give one of them")
    if dry_run or status:
        show_plans(plans, jobs, device if dry_run else None, as_json)
        return
    if as_json:
        raise UserError("--json goes with --dry-run or --status; tables: `sslrun table --json`")
    changes = [f"--set={text}" for text in change or ()]
    command = ["sweep", *map(str, recipes), *changes]
    workers = build_workers(command, plans[0].name, runs, jobs, device, per_gpu=per_gpu)
    failures = run_workers(plans, place, workers, runs, fresh)
    if failures is None:
        return
    for table, comparison in _write_tables(plans):
        print_table(table)
        if comparison is not None:
            print_table(comparison)
    if failures:
        raise UserError(describe_failures(failures, [plan.again() for plan in plans]))


def _check_names(recipes: Sequence[Path]) -> None:
    """Raise UserError for a change of the recipe among the names of sweeps."""
    for name in map(str, recipes):
        if "=" in name and not Path(name).exists():
            raise UserError(
                f"{name}: no such file; a change to the recipes of a sweep is written "
                f"--set {shlex.quote(name)}"
            )


def _write_tables(plans: Sequence[Plan]) -> list[tuple[Table, Comparisons | None]]:
    """Write and return the tables and comparisons of the plans that have any finished cell.

    They have the rows that searches have chosen.
    """
    planned = [plan.again() for plan in plans]
    return [plan.write_tables() for plan in planned if plan.finished]
