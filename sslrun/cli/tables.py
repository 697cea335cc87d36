"""Commands that lay results side by side: table, claims."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from sslrun.cli.base import app
from sslrun.cli.options import AsJson, Device, Fresh, Imports, Runs, Targets, Worker, path_option
from sslrun.cli.output import print_json_or, print_table
from sslrun.cli.workers import build_workers, run_as_worker, run_workers
from sslrun.errors import UserError


@app.command()
def table(  # noqa: PLR0913 (typer makes each parameter an option)
    targets: Targets = None,
    output: Annotated[
        list[Path] | None,
        path_option(
            "--output",
            "-o",
            help="Write the table to a .md, .tex, .csv or .json file; may be given several times.",
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            help="Compare with this published table, or with a group of them (vit, lpft, ...); "
            "see `sslrun show table`."
        ),
    ] = None,
    compute: Annotated[
        bool, typer.Option("--compute", help="Add the cost of each row: FLOPs and hours.")
    ] = False,
    distortion: Annotated[
        bool,
        typer.Option(
            "--distortion",
            help="Print instead how far fine-tuning moved the features, in distribution and out of "
            "distribution.",
        ),
    ] = False,
    layers: Annotated[
        bool,
        typer.Option(
            "--layers",
            help="Print instead the score of each layer, from `probe.layers: best` or "
            "`knn.layers: best`.",
        ),
    ] = False,
    runs: Runs = Path("runs"),
    imports: Imports = None,
    as_json: AsJson = False,
) -> None:
    """Print the table of finished runs: mean ± standard deviation over seeds."""
    from sslrun.results.formats import table_formats
    from sslrun.results.published import published_as
    from sslrun.results.table import Table
    from sslrun.shipped import sweep_or_folder
    from sslrun.stages.tables import table_of

    if (distortion or layers) and (against or compute or (distortion and layers)):
        option = "--distortion" if distortion else "--layers"
        raise UserError(f"{option} prints a table of its own: leave out the other options")
    for path in output or []:
        table_formats.check(path)  # before thousands of runs are read
    published = published_as(against) if against else None
    results: Any = table_of([sweep_or_folder(target) for target in targets or [runs]], runs)
    if distortion:
        results = Table.of_distortion(results.records, results.title)
    elif layers:
        results = Table.of_layers(results.records, results.title)
    elif published or compute:
        from sslrun.results.compute import add_compute

        add_compute(results)
    if published:
        from sslrun.results.compare import compare_all

        results = compare_all(results, published)
    for path in output or []:
        results.write(path)
    if as_json:
        typer.echo(results.to_json())
    elif not output:
        print_table(results)


@app.command()
def claims(  # noqa: PLR0913 (typer makes each parameter an option)
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="Names or files of claims; default: all.", metavar="[NAME]...", show_default=False
        ),
    ] = None,
    budget: Annotated[
        float,
        typer.Option(
            help="Minutes per claim; the largest variant of the claim that fits is run.", min=0
        ),
    ] = 15.0,
    output: Annotated[
        list[Path] | None,
        path_option(
            "--output",
            "-o",
            help="Write the verdicts to a .md or .json file; may be given several times.",
        ),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1, help="Number of worker processes that share the runs; default: the sweeps' own."
        ),
    ] = None,
    device: Device = "auto",
    runs: Runs = Path("runs"),
    fresh: Fresh = False,
    recipes: Annotated[
        Path | None,
        path_option(
            help="Folder of the claims; default: ./recipes/claims, or else those that ship.",
            show_default=False,
        ),
    ] = None,
    listed: Annotated[
        bool, typer.Option("--list", help="List the claims and their variants, and run nothing.")
    ] = False,
    imports: Imports = None,
    as_json: AsJson = False,
    worker: Worker = None,
) -> None:
    """Test the claims of the lecture: run what is missing, and print which claims are supported."""
    from sslrun import launch
    from sslrun.claims.report import check_place, render, write
    from sslrun.claims.run import Trial, describe_origin
    from sslrun.claims.schema import load_claims, render_list
    from sslrun.shipped import claims_folder
    from sslrun.stages.sweep import Plan, describe_failures
    from sslrun.training.device import compute

    recipes = recipes or claims_folder()
    selected = load_claims(names or (), recipes)
    if listed:
        descriptions = [claim.describe() for claim in selected] if as_json else None
        print_json_or(descriptions, render_list(selected))
        return
    for path in output or []:
        check_place(path)  # before hours of runs
    cuda = compute(device).device.type == "cuda"
    trials = [Trial.within_budget(budget, cuda, claim, runs) for claim in selected]
    plans = [trial.plan for trial in trials if trial.plan is not None]
    if worker is not None:
        run_as_worker(plans, device, runs, worker)
        return
    jobs = jobs or max((plan.sweep.jobs for plan in plans if isinstance(plan, Plan)), default=1)
    command = ["claims", *(names or ()), f"--budget={budget}", f"--recipes={recipes}"]
    workers = build_workers(command, "claims", runs, jobs, device)
    failures = run_workers(plans, launch.build("local", ()), workers, runs, fresh)
    outcomes = [trial.judge() for trial in trials]
    for path in output or []:
        write(outcomes, path, describe_origin(trials, ["sslrun", *sys.argv[1:]]))
    verdicts = [outcome.as_dict() for outcome in outcomes] if as_json else None
    print_json_or(verdicts, render(outcomes, tables=bool(names)))
    if failures:
        raise UserError(describe_failures(failures, plans))
