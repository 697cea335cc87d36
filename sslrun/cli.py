"""The command line: parse, call a stage, print. Each command imports what is slow to import when it runs."""

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

RecipeFile = Annotated[
    Path,
    typer.Argument(
        help="A recipe: a YAML file, or the name of one that ships (see `sslrun recipes`).",
        metavar="RECIPE",
        show_default=False,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Changes to the recipe, such as pretrain.epochs=5.",
        metavar="[KEY=VALUE]...",
        show_default=False,
    ),
]
Device = Annotated[str, typer.Option(help="Device to run on: auto, cpu, cuda, cuda:1 or mps.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of all random numbers.")]
Runs = Annotated[Path, typer.Option(envvar="SSLRUN_RUNS", help="Folder that runs are kept in.")]
Fresh = Annotated[
    bool,
    typer.Option("--fresh", help="Delete what these runs have already computed, and start again."),
]
Profile = Annotated[
    bool,
    typer.Option(
        "--profile",
        help="Write a torch profiler trace of ten training steps to trace.json in the run's folder.",
    ),
]
From = Annotated[
    Path | None,
    typer.Option(
        "--from",
        help="Start from this backbone: a pretraining run's folder or a .safetensors file.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Imports = Annotated[
    list[str] | None,
    typer.Option(
        "--import",
        metavar="FILE.py",
        help="Import a Python file that registers components of your own; may be given several times. "
        "SSLRUN_IMPORT=FILE:FILE does the same.",
        show_default=False,
    ),
]
"""Declared by every command that reads recipes; `main` has imported the files before any command is
parsed."""

DEBUG = "SSLRUN_DEBUG"
"""Environment variable: 1 prints the traceback of a user's mistake after the line about it."""
WIDE = 200
"""Width in columns of printed tables if stdout is not a terminal."""
COMMAND_LINE_ERROR: type[Any] = typer.BadParameter.__mro__[2]
"""ClickException: click's own, or the one of the copy of click inside newer versions of typer."""


@app.callback(invoke_without_command=True)
def sslrun(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, help="Print the version.")
    ] = False,
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
    profile: Profile = False,
    imports: Imports = None,
) -> None:
    """Stage 1: train the backbone of a recipe on its pretext task, without labels."""
    from sslrun import distributed
    from sslrun.recipe import load
    from sslrun.stages.context import Context
    from sslrun.stages.pretrain import Pretraining

    loaded = load(recipe, overrides or ())
    if loaded.pretext is None:
        raise UserError(
            f"{recipe}: has no pretext task, so there is nothing to pretrain; add one, such as `pretext: simclr`"
        )
    job = Pretraining(loaded, seed, runs)
    job.execute(Context.open(device, runs, fresh, profile))
    if distributed.is_main():
        typer.echo(job.run.path)


def add_protocol_commands(app: typer.Typer) -> None:
    """Add a command for every registered protocol that has none yet.

    May be called again after plug-ins were imported. A protocol with the name of another command
    gets none: it runs from recipes and sweeps.
    """
    from sslrun.protocols import protocols
    from sslrun.registry import first_line

    taken = _command_names(app)
    for name in protocols.in_order:
        if name not in taken:
            _add_protocol_command(app, name, first_line(protocols[name]))


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
        profile: Profile = False,
        imports: Imports = None,
    ) -> None:
        from sslrun import distributed
        from sslrun.recipe import load
        from sslrun.results.record import RunRecord
        from sslrun.results.table import Table
        from sslrun.stages.context import Context
        from sslrun.stages.evaluate import cells

        loaded = load(recipe, overrides or ())
        if not loaded.evaluate:
            raise UserError(f"{recipe}: names no task under 'evaluate'")
        context = Context.open(device, runs, fresh, profile)
        jobs = cells(loaded, seed, runs, [protocol], source)
        if not all(job.origin.exists for job in jobs):
            raise UserError(
                f"no pretrained checkpoint for {recipe} (seed {seed}): "
                f"run `{_again('pretrain', recipe, overrides, seed, runs)}` first, or pass --from"
            )
        for job in jobs:
            job.execute(context)
        if context.profile:
            context.reporter.say(
                "--profile: nothing was trained in steps, so that there is no trace"
            )
        if distributed.is_main():
            _print_table(Table.from_records([RunRecord(job.run.path) for job in jobs], loaded.name))

    panel = "Protocols (stage 2: learn a task from the backbone)"
    app.command(name=protocol, help=about, rich_help_panel=panel)(command)


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
            help="Number of worker processes that share the runs, each on a GPU of its own if there are several; "
            "default: the sweep's own.",
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
    """Run every stage of every row and seed of sweeps, skip what is finished, and print the tables."""
    from sslrun.launch.slurm import submit
    from sslrun.recipe import load_sweep
    from sslrun.stages.context import Context
    from sslrun.stages.reporting import Reporter
    from sslrun.stages.sweep import Plan, describe_failures, launch, report_missing, without_data

    for each in map(str, recipes):
        if "=" in each and not Path(each).exists():
            raise UserError(
                f"{each}: no such file; a change to the recipes of a sweep is written --set {shlex.quote(each)}"
            )
    plans = [Plan.of(load_sweep(path, change or ()), runs) for path in recipes]
    jobs = jobs or max(plan.sweep.jobs for plan in plans)
    again = [
        "sweep",
        *map(str, recipes),
        *_of_worker(runs, device),
        *(f"--set={each}" for each in change or ()),
    ]
    if slurm is not None:
        if fresh:
            raise UserError(
                "--fresh does not go with --slurm, whose workers would delete each other's runs; remove the runs yourself"
            )
        planned, reporter = [job for plan in plans for job in plan.jobs], Reporter()
        report_missing(
            without_data(planned, reporter), len(planned), reporter
        )  # no error: a node may have the data
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
        raise UserError(describe_failures(failures, plans))


@app.command()
def table(
    targets: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Sweeps, or folders of runs; default: all runs in --runs.",
            metavar="[SWEEP|RUN]...",
        ),
    ] = None,
    output: Annotated[
        list[Path] | None,
        typer.Option(
            "--output",
            "-o",
            help="Write the table to a .md, .tex, .csv or .json file; may be given several times.",
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            help="Print this published table beside it, or a group of them (vit, lpft, ...); see `sslrun show table`."
        ),
    ] = None,
    compute: Annotated[
        bool, typer.Option("--compute", help="Add what each row cost: FLOPs and hours.")
    ] = False,
    distortion: Annotated[
        bool,
        typer.Option(
            "--distortion",
            help="Print how far fine-tuning moved the features, in distribution and out of distribution, instead.",
        ),
    ] = False,
    runs: Runs = Path("runs"),
    imports: Imports = None,
    as_json: AsJson = False,
) -> None:
    """Print the table of finished runs: mean ± standard deviation over seeds."""
    from sslrun.results.compute import add_compute
    from sslrun.results.published import published_as
    from sslrun.results.table import Table
    from sslrun.stages.sweep import table_of

    if distortion and (against or compute):
        raise UserError("--distortion prints a table of its own: leave out --against and --compute")
    beside = published_as(against) if against else None
    made: Any = table_of([_sweep_or_folder(target) for target in targets or [runs]], runs)
    if distortion:
        made = Table.of_distortion(made.records, made.title)
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
        typer.Argument(
            help="Names or files of claims; default: all.", metavar="[NAME]...", show_default=False
        ),
    ] = None,
    budget: Annotated[
        float,
        typer.Option(
            help="Minutes that each claim may take; its largest variant that fits is run.", min=0
        ),
    ] = 15.0,
    output: Annotated[
        list[Path] | None,
        typer.Option(
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
        typer.Option(
            help="Folder of the claims; default: ./recipes/claims, or else those that ship.",
            show_default=False,
        ),
    ] = None,
    listed: Annotated[
        bool, typer.Option("--list", help="List the claims and their variants, and run nothing.")
    ] = False,
    imports: Imports = None,
    as_json: AsJson = False,
) -> None:
    """Test the claims of the lecture: run what is missing, and print whether each is supported."""
    from sslrun.claims.report import check_ending, render, write
    from sslrun.claims.run import Trial, made_by
    from sslrun.claims.schema import listing, load_claims
    from sslrun.recipe.shipped import claims_folder
    from sslrun.stages.context import Context
    from sslrun.stages.sweep import Plan, describe_failures, launch

    recipes = recipes or claims_folder()
    found = load_claims(names or (), recipes)
    if listed:
        _print_json_or([each.describe() for each in found] if as_json else None, listing(found))
        return
    for path in output or []:
        check_ending(path)  # before hours of runs
    context = Context.open(device, runs, fresh)
    cuda = context.compute.device.type == "cuda"
    trials = [Trial.within(budget, cuda, each, runs) for each in found]
    plans = [each.plan for each in trials if each.plan is not None]
    jobs = jobs or max((plan.sweep.jobs for plan in plans if isinstance(plan, Plan)), default=1)
    again = [
        "claims",
        *(names or ()),
        f"--budget={budget}",
        f"--recipes={recipes}",
        *_of_worker(runs, device),
    ]
    failures = launch(plans, context, jobs, again)
    outcomes = [each.outcome() for each in trials]
    for path in output or []:
        write(outcomes, path, made_by(trials, ["sslrun", *sys.argv[1:]]))
    _print_json_or(
        [each.as_dict() for each in outcomes] if as_json else None,
        render(outcomes, tables=bool(names)),
    )
    if failures:
        raise UserError(describe_failures(failures, plans))


@app.command()
def init(
    name: Annotated[
        str, typer.Argument(help="Name of the recipe: NAME.yaml is written.", metavar="[NAME]")
    ] = "my-experiment",
    text: Annotated[
        bool, typer.Option("--text", help="Write a recipe for text in place of images.")
    ] = False,
    source: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="Look at your data and fill them in: a folder of images, text files, or a table "
            "(CSV, TSV, JSON, parquet) of texts or of paths of images.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write a commented starter recipe, for your own data or for data that need no download."""
    from sslrun.stages.init import write_starter

    path = write_starter(name, text, source)
    typer.echo(f"{path}: written. Read it, then:")
    typer.echo(
        f"  {shlex.join(['sslrun', 'check', str(path)])}    # no training: what it will cost"
    )
    typer.echo(
        f"  {shlex.join(['sslrun', 'sweep', str(path)])}    # pretrain, evaluate, and print the table"
    )


@app.command()
def recipes(as_json: AsJson = False) -> None:
    """List the recipes that ship with sslrun; every command takes them by name, from any folder."""
    from sslrun.recipe import shipped
    from sslrun.stages.show import grid

    about = {name: shipped.summary(path) for name, path in shipped.names().items()}
    rows = [{"name": name, "about": text} for name, text in about.items()]
    _print_json_or(rows if as_json else None, grid(about.items(), one_line=True))


@app.command()
def export(
    source: Annotated[
        Path,
        typer.Argument(
            help="A run's folder, or its .safetensors file.", metavar="RUN", show_default=False
        ),
    ],
    folder: Annotated[
        Path, typer.Argument(help="Folder to write to.", metavar="FOLDER", show_default=False)
    ],
) -> None:
    """Write the weights and tokenizer of a bert or gpt backbone as a folder that transformers can load."""
    from sslrun.stages.export import export

    export(source, folder)


@app.command()
def show(
    kind: Annotated[
        str | None,
        typer.Argument(
            help="backbone, pretext, data, task, protocol, corruption, measurement, section, table or schema.",
            metavar="[KIND]",
            show_default=False,
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Argument(help="The name of one of them.", metavar="[NAME]", show_default=False),
    ] = None,
    imports: Imports = None,
    as_json: AsJson = False,
) -> None:
    """Show what a recipe can name, and every option with its default; `show schema` prints a JSON schema for editors."""
    import sslrun.claims.measurements  # noqa: F401 (registers the measurements)
    from sslrun.stages.show import describe, render

    found = describe(kind, name)
    if as_json or kind == "schema":
        typer.echo(json.dumps(found, indent=2))
    else:
        _console().print(render(found), markup=False)


@app.command()
def check(
    recipe: RecipeFile,
    overrides: Overrides = None,
    device: Device = "auto",
    imports: Imports = None,
    as_json: AsJson = False,
) -> None:
    """Validate a recipe and estimate its parameters, FLOPs, memory and time, without training."""
    from sslrun.recipe import load_sweep
    from sslrun.stages.check import Budget, estimate, render
    from sslrun.training.device import compute

    recipes = load_sweep(recipe, overrides or ()).rows
    budget = Budget(sum(each.pretext is not None for each in recipes.values()))
    rows = [estimate(row, each, compute(device), budget) for row, each in recipes.items()]
    _print_json_or(rows if as_json else None, render(rows))


# ---------------------------------------------------------------- shared by the commands


def _again(command: str, recipe: Path, overrides: list[str] | None, seed: int, runs: Path) -> str:
    """A command line with the same options as the one that was given."""
    words = ["sslrun", command, str(recipe), *(overrides or ())]
    words += ["--seed", str(seed)] if seed else []
    words += ["--runs", str(runs)] if runs != Path("runs") else []
    return shlex.join([*words, *_imported()])


def _sweep_or_folder(target: Path) -> Path:
    """A target of `table`: a path that is there, or else the shipped sweep of that name."""
    from sslrun.recipe import shipped

    return (
        shipped.find(target)
        if target.name in {name.rpartition("/")[2] for name in shipped.names()}
        else target
    )


def _of_worker(runs: Path, device: str) -> list[str]:
    """The options that the commands of all worker processes share."""
    return ["--jobs=1", f"--runs={runs}", f"--device={device}", *_imported()]


def _imported() -> list[str]:
    """The options by which another process imports the same plug-ins."""
    from sslrun import plugins

    return [f"--import={path}" for path in plugins.list_loaded()]


def _load_plugins(arguments: list[str]) -> None:
    """Import the plug-ins that the command line, the environment and installed packages name."""
    from sslrun import plugins

    files = plugins.list_requested(arguments)
    if files or plugins.are_installed():
        # The package's own components first: a name that is taken is then the plug-in's mistake.
        import sslrun.claims.measurements
        import sslrun.recipe  # noqa: F401
    plugins.load_entry_points()
    plugins.load_files(files)


def _print_json_or(value: Any, renderable: Any) -> None:
    """Print a value as JSON if there is one, else a rich renderable; escape codes only on a terminal."""
    if value is not None:
        typer.echo(json.dumps(value, indent=2))
        return
    _console().print(renderable, markup=False)


def _print_table(made: Any) -> None:
    _console().print(made.render())


def _console() -> Any:
    """A rich console on stdout: as wide as the terminal, or WIDE columns if there is none."""
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=WIDE)


def main() -> None:
    """Run the command line. A user's mistake is one line on stderr and exit code 2."""
    sys.exit(_exit_code(_run))


def _run() -> Any:
    from sslrun import plugins

    _load_plugins(sys.argv[1:])
    light = set(sys.argv[1:2]) & {
        *_command_names(app),
        "--version",
    }  # these need no second to import torch
    if plugins.list_loaded() or not light:
        add_protocol_commands(app)
    return app(prog_name="sslrun", standalone_mode=False)


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
        if os.environ.get(DEBUG, "0") not in ("", "0"):
            _print_traceback(error)
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _print_traceback(error: BaseException) -> None:
    """Print an error with all that led to it, also what `raise ... from None` hides."""
    import traceback

    cause: BaseException | None = error
    while cause is not None:
        cause.__suppress_context__ = False
        cause = cause.__cause__ or cause.__context__
    typer.echo("".join(traceback.format_exception(error)), err=True, nl=False)


if __name__ == "__main__":
    main()
