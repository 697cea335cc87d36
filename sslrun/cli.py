"""The command line: parse, call a stage, print. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from sslrun.errors import UserError

app = typer.Typer(
    name="sslrun",
    help="Pretrain without labels, evaluate with few: recipes in, checkpoints and comparable tables out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeFile = Annotated[Path, typer.Argument(help="A recipe (YAML).", metavar="RECIPE", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Changes to the recipe, as pretrain.epochs=5.", metavar="[KEY=VALUE]...", show_default=False),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of everything random.")]
Runs = Annotated[Path, typer.Option(envvar="SSLRUN_RUNS", help="Where runs are kept.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Forget what was done before and start anew.")]
From = Annotated[
    Path | None,
    typer.Option("--from", help="A pretrained backbone: a run's folder or a .safetensors file.", show_default=False),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

WIDE = 200
"""Columns of what is printed where there is no terminal whose width it must fit."""
COMMAND_LINE_ERROR: type[Any] = typer.BadParameter.__mro__[2]
"""ClickException: click's own, or that of the copy inside newer typers, which click's does not catch."""


@app.callback(invoke_without_command=True)
def sslrun(
    version: Annotated[bool, typer.Option("--version", is_eager=True, help="Print the version.")] = False,
) -> None:
    if version:
        from sslrun import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.command()
def pretrain(
    recipe: RecipeFile,
    overrides: Overrides = None,
    device: Device = "auto",
    seed: Seed = 0,
    runs: Runs = Path("runs"),
    fresh: Fresh = False,
) -> None:
    """Stage 1: train the recipe's backbone on its pretext task, without labels."""
    from sslrun import distributed
    from sslrun.recipe import load
    from sslrun.stages.context import Context
    from sslrun.stages.pretrain import Pretraining

    loaded = load(recipe, overrides or ())
    if loaded.pretext is None:
        raise UserError(f"{recipe}: names no pretext task, so there is nothing to pretrain")
    job = Pretraining(loaded, seed, runs)
    job.execute(Context.open(device, runs, fresh))
    if distributed.is_main():
        typer.echo(job.run.path)


def add_protocol_commands(app: typer.Typer) -> None:
    """Add a command for every registered protocol that has none yet.

    May be called again after plug-ins were imported. A protocol with the name of another command gets
    none: it runs from recipes and sweeps.
    """
    from sslrun.protocols import protocols

    taken = _command_names(app)
    for name in protocols.in_order:
        if name not in taken:
            _add_protocol_command(app, name, protocols[name].about())


def _command_names(app: typer.Typer) -> set[str]:
    commands = app.registered_commands
    return {each.name or each.callback.__name__ for each in commands if each.callback is not None}


def _add_protocol_command(app: typer.Typer, protocol: str, about: str) -> None:
    def command(
        recipe: RecipeFile,
        overrides: Overrides = None,
        source: From = None,
        device: Device = "auto",
        seed: Seed = 0,
        runs: Runs = Path("runs"),
        fresh: Fresh = False,
    ) -> None:
        from sslrun import distributed
        from sslrun.recipe import load
        from sslrun.results.table import Table
        from sslrun.stages.context import Context
        from sslrun.stages.evaluate import cells

        loaded = load(recipe, overrides or ())
        if not loaded.evaluate:
            raise UserError(f"{recipe}: names no task under 'evaluate'")
        context = Context.open(device, runs, fresh)
        jobs = cells(loaded, seed, runs, [protocol], source)
        if not all(job.origin.exists for job in jobs):
            raise UserError(
                f"no pretrained checkpoint for {recipe} (seed {seed}): "
                f"run `{_again('pretrain', recipe, overrides, seed, runs)}` first, or pass --from"
            )
        made = Table.from_results([job.execute(context) for job in jobs], loaded.name)
        if distributed.is_main():
            _print_table(made)

    panel = "Protocols (stage 2: learn a task from the backbone)"
    app.command(name=protocol, help=about, rich_help_panel=panel)(command)


@app.command()
def sweep(
    recipes: Annotated[list[Path], typer.Argument(help="Sweeps or recipes (YAML).", metavar="SWEEP...")],
    change: Annotated[
        list[str] | None, typer.Option("--set", help="A change to every base recipe, as pretrain.epochs=5.")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Worker processes that share the runs; default: the sweep's own.")
    ] = None,
    slurm: Annotated[
        str | None,
        typer.Option(help="Submit --jobs workers as a Slurm array, with these sbatch options.", metavar="OPTIONS"),
    ] = None,
    device: Device = "auto",
    runs: Runs = Path("runs"),
    fresh: Fresh = False,
) -> None:
    """Batch: every stage of every row and seed, in the order that shares most; what is done is skipped."""
    from sslrun.recipe import load_sweep
    from sslrun.stages.context import Context
    from sslrun.stages.reporting import Reporter
    from sslrun.stages.sweep import Plan, launch, say_failed, submit, told_failures, without_data

    for each in map(str, recipes):
        if "=" in each and not Path(each).exists():
            raise UserError(
                f"{each}: is no file; a change to the recipes of a sweep is written --set {shlex.quote(each)}"
            )
    plans = [Plan.of(load_sweep(path, change or ()), runs) for path in recipes]
    jobs = jobs or max(plan.sweep.jobs for plan in plans)
    again = [
        "sweep",
        *map(str, recipes),
        "--jobs=1",
        f"--runs={runs}",
        f"--device={device}",
        *(f"--set={each}" for each in change or ()),
    ]
    if slurm is not None:
        if fresh:
            raise UserError("--fresh: not with --slurm, whose workers would forget each other's work; remove the runs")
        planned, reporter = [job for plan in plans for job in plan.jobs], Reporter()
        say_failed(without_data(planned, reporter), len(planned), reporter)  # and no more: a node may have them
        typer.echo(submit(again, jobs, slurm))
        return
    failures = launch(plans, Context.open(device, runs, fresh), jobs, again)
    for plan in plans:
        if plan.finished:
            plan.write_tables()
            comparison = plan.comparison()
            _print_table(plan.table())
            if comparison is not None:
                _print_table(comparison)
    if failures:
        raise UserError(told_failures(failures, plans))


@app.command()
def table(
    targets: Annotated[
        list[Path] | None,
        typer.Argument(help="Sweep files, or folders of runs; default: all of --runs.", metavar="[SWEEP|RUN]..."),
    ] = None,
    output: Annotated[
        list[Path] | None, typer.Option("--output", "-o", help="Write to a .md, .tex, .csv or .json file.")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            help="A published table to print beside it, or those of vit, bert-ablation, lpft …; see `sslrun show table`."
        ),
    ] = None,
    compute: Annotated[bool, typer.Option("--compute", help="With what each row cost: FLOPs, hours.")] = False,
    distortion: Annotated[
        bool,
        typer.Option("--distortion", help="How far fine-tuning moved the features, in distribution and out of it."),
    ] = False,
    runs: Runs = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """The metric table of finished runs: mean ± standard deviation over seeds."""
    from sslrun.results.compute import add_compute
    from sslrun.results.published import published_as
    from sslrun.results.table import Table
    from sslrun.stages.sweep import table_of

    if distortion and (against or compute):
        raise UserError("--distortion is a table of its own: leave out --against and --compute")
    beside = published_as(against) if against else None
    made: Any = table_of(targets or [runs], runs)
    if distortion:
        made = Table.of_distortion(made.results, made.title)
    elif beside or compute:
        add_compute(made)
    if beside:
        from sslrun.results.compare import compare_all

        made = compare_all(made, beside)
    for path in output or []:
        made.write(path)
    if as_json:
        typer.echo(made.to_json())
    elif not output:
        _print_table(made)


@app.command()
def claims(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Claims, or files of claims; default: all.", metavar="[NAME]...", show_default=False),
    ] = None,
    budget: Annotated[
        float, typer.Option(help="Minutes for each claim: of its variants the largest that fits is run.", min=0)
    ] = 15.0,
    output: Annotated[list[Path] | None, typer.Option("--output", "-o", help="Write to a .md or .json file.")] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Worker processes that share the runs; default: the sweeps' own.")
    ] = None,
    device: Device = "auto",
    runs: Runs = Path("runs"),
    fresh: Fresh = False,
    recipes: Annotated[Path, typer.Option(help="Where the claims are.")] = Path("recipes/claims"),
    listed: Annotated[bool, typer.Option("--list", help="Only say which claims and variants there are.")] = False,
    as_json: AsJson = False,
) -> None:
    """The lecture's sentences, tested: runs what is missing and says supported, contradicted or inconclusive."""
    from sslrun.claims.report import check_ending, rendered, write
    from sslrun.claims.run import Trial, made_by
    from sslrun.claims.schema import listing, load_claims
    from sslrun.stages.context import Context
    from sslrun.stages.sweep import Plan, launch, told_failures

    found = load_claims(names or (), recipes)
    if listed:
        _print_json_or([each.described() for each in found] if as_json else None, listing(found))
        return
    for path in output or []:
        check_ending(path)  # before hours of runs
    context = Context.open(device, runs, fresh)
    cuda = context.compute.device.type == "cuda"
    trials = [Trial.within(budget, cuda, each, runs) for each in found]
    plans = [each.plan for each in trials if each.plan is not None]
    jobs = jobs or max((plan.sweep.jobs for plan in plans if isinstance(plan, Plan)), default=1)
    again = ["claims", *(names or ()), f"--budget={budget}", "--jobs=1", f"--runs={runs}", f"--device={device}", f"--recipes={recipes}"]  # fmt: skip
    failures = launch(plans, context, jobs, again)
    outcomes = [each.outcome() for each in trials]
    for path in output or []:
        write(outcomes, path, made_by(trials, ["sslrun", *sys.argv[1:]]))
    _print_json_or([each.as_dict() for each in outcomes] if as_json else None, rendered(outcomes, tables=bool(names)))
    if failures:
        raise UserError(told_failures(failures, plans))


@app.command()
def export(
    source: Annotated[
        Path, typer.Argument(help="A run's folder, or its .safetensors file.", metavar="RUN", show_default=False)
    ],
    folder: Annotated[Path, typer.Argument(help="Where to write.", show_default=False)],
) -> None:
    """Weights of a bert or a gpt, with their tokenizer, as a folder that transformers loads."""
    from sslrun.stages.export import export

    export(source, folder)


@app.command()
def show(
    kind: Annotated[
        str | None, typer.Argument(help="backbone, pretext, data, corruption, task, measurement, protocol, table.")
    ] = None,
    name: Annotated[str | None, typer.Argument(help="One of the kind.")] = None,
    as_json: AsJson = False,
) -> None:
    """What there is, and every option with its default and its paper."""
    from sslrun.stages.show import described, shown

    found = described(kind, name)
    _print_json_or(found if as_json else None, shown(found))


@app.command()
def check(
    recipe: RecipeFile,
    overrides: Overrides = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """No training: validates, counts parameters, FLOPs and memory, estimates the time."""
    from sslrun.recipe import load_sweep
    from sslrun.stages.check import Budget, checked, shown
    from sslrun.training.device import compute

    recipes = load_sweep(recipe, overrides or ()).rows
    budget = Budget(sum(each.pretext is not None for each in recipes.values()))
    rows = [checked(row, each, compute(device), budget) for row, each in recipes.items()]
    _print_json_or(rows if as_json else None, shown(rows))


# ---------------------------------------------------------------- shared by the commands


def _again(command: str, recipe: Path, overrides: list[str] | None, seed: int, runs: Path) -> str:
    """A command line like the one given."""
    words = ["sslrun", command, str(recipe), *(overrides or ())]
    words += ["--seed", str(seed)] if seed else []
    words += ["--runs", str(runs)] if runs != Path("runs") else []
    return shlex.join(words)


def _print_json_or(value: Any, renderable: Any) -> None:
    """JSON where there is a value, else a rich renderable, on stdout; escape codes only on a terminal."""
    if value is not None:
        typer.echo(json.dumps(value, indent=2))
        return
    _console().print(renderable, markup=False)


def _print_table(made: Any) -> None:
    _console().print(made.render())


def _console() -> Any:
    """A rich console on stdout: as wide as the terminal; elsewhere wide enough that few tables are broken."""
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=WIDE)


def main() -> None:
    """Run the command line. A user's mistake is one line on stderr and exit code 2."""
    if not set(sys.argv[1:2]) & {*_command_names(app), "--version"}:  # they need no second to import torch
        add_protocol_commands(app)
    sys.exit(_exit_code(lambda: app(prog_name="sslrun", standalone_mode=False)))


def _exit_code(run: Callable[[], Any]) -> int:
    try:
        code = run()
        if code == 130:  # what newer typers make of a KeyboardInterrupt
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except COMMAND_LINE_ERROR as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            typer.echo(error.format_message())
            return 0
        error.show()
        return int(error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        typer.echo("sslrun: stopped; give the same command again to continue", err=True)
        return 130
    except UserError as error:
        typer.echo(f"sslrun: {error}", err=True)
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    main()
