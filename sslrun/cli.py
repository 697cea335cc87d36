"""The command line: parse arguments, call a stage, print the result.

Commands import slow modules only when they run.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sslrun.errors import UserError
from sslrun.seeds import LARGEST_SEED

if TYPE_CHECKING:
    from sslrun.stages.sweep import Job

app = typer.Typer(
    name="sslrun",
    help="Pretrain without labels, evaluate with few: recipes in, checkpoints and comparable "
    "tables out.",
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
Seed = Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of all random numbers.")]
Runs = Annotated[Path, typer.Option(envvar="SSLRUN_RUNS", help="Folder of the runs.")]
Fresh = Annotated[
    bool,
    typer.Option("--fresh", help="Delete what these runs have already computed, and start again."),
]
Profile = Annotated[
    bool,
    typer.Option(
        "--profile",
        help="Write a torch profiler trace of ten training steps to trace.json in the run's "
        "folder.",
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
        help="Import a Python file that registers your own components; may be given several "
        "times. SSLRUN_IMPORT=FILE:FILE does the same.",
        show_default=False,
    ),
]
"""Declared by every command that reads recipes. The commands do not use the value: `main` imports
the files before it parses the command."""

DEBUG = "SSLRUN_DEBUG"
"""Environment variable; 1 also prints the traceback of a user's mistake."""
WIDE = 200
"""Width of printed tables in columns if stdout is not a terminal."""
COMMAND_LINE_ERROR: type[Any] = typer.BadParameter.__mro__[2]
"""ClickException of click, or of the copy of click inside newer versions of typer."""


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


def add_protocol_commands(app: typer.Typer) -> None:
    """Add a command for every registered protocol without one.

    May be called again after plug-ins are imported. A protocol with the name of another command
    gets no command of its own, but recipes and sweeps can still use it.
    """
    from sslrun.protocols import protocols
    from sslrun.registry import first_line

    taken = _command_names(app)
    for name in protocols.in_order:
        if name not in taken:
            _add_protocol_command(app, name, first_line(protocols[name]))


def _command_names(app: typer.Typer) -> set[str]:
    """Return the names of an app's commands."""
    names = set()
    for command in app.registered_commands:
        if command.callback is not None:
            names.add(command.name or command.callback.__name__)
    return names


def _add_protocol_command(app: typer.Typer, protocol: str, about: str) -> None:
    """Add the command of a protocol, with the help `about`."""

    def command(  # noqa: PLR0913 (typer makes each parameter an option)
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
            first = _command_line("pretrain", recipe, overrides, seed, runs)
            raise UserError(
                f"no pretrained checkpoint for {recipe} (seed {seed}): "
                f"run `{first}` first, or pass --from"
            )
        for job in jobs:
            job.execute(context)
        if context.profile:
            context.reporter.say("--profile: nothing was trained in steps, so there is no trace")
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
    arguments = ["sweep", *map(str, recipes), *_worker_options(runs, device), *changes]
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
            plan.write_tables()
            comparison = plan.comparison()
            _print_table(plan.table())
            if comparison is not None:
                _print_table(comparison)
    if failures:
        raise UserError(describe_failures(failures, plans))


@app.command()
def table(  # noqa: PLR0913 (typer makes each parameter an option)
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
    from sslrun.results.compute import add_compute
    from sslrun.results.published import published_as
    from sslrun.results.table import Table
    from sslrun.stages.sweep import table_of

    if (distortion or layers) and (against or compute or (distortion and layers)):
        option = "--distortion" if distortion else "--layers"
        raise UserError(f"{option} prints a table of its own: leave out the other options")
    published = published_as(against) if against else None
    results: Any = table_of([_sweep_or_folder(target) for target in targets or [runs]], runs)
    if distortion:
        results = Table.of_distortion(results.records, results.title)
    elif layers:
        results = Table.of_layers(results.records, results.title)
    elif published or compute:
        add_compute(results)
    if published:
        from sslrun.results.compare import compare_all

        results = compare_all(results, published)
    for path in output or []:
        results.write(path)
    if as_json:
        typer.echo(results.to_json())
    elif not output:
        _print_table(results)


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
    """Test the claims of the lecture: run what is missing, and print which claims are supported."""
    from sslrun.claims.report import check_ending, render, write
    from sslrun.claims.run import Trial, describe_origin
    from sslrun.claims.schema import load_claims, render_list
    from sslrun.recipe.shipped import claims_folder
    from sslrun.stages.context import Context
    from sslrun.stages.sweep import Plan, describe_failures, launch

    recipes = recipes or claims_folder()
    selected = load_claims(names or (), recipes)
    if listed:
        descriptions = [claim.describe() for claim in selected] if as_json else None
        _print_json_or(descriptions, render_list(selected))
        return
    for path in output or []:
        check_ending(path)  # before hours of runs
    context = Context.open(device, runs, fresh)
    cuda = context.compute.device.type == "cuda"
    trials = [Trial.within_budget(budget, cuda, claim, runs) for claim in selected]
    plans = [trial.plan for trial in trials if trial.plan is not None]
    jobs = jobs or max((plan.sweep.jobs for plan in plans if isinstance(plan, Plan)), default=1)
    where = [f"--budget={budget}", f"--recipes={recipes}", *_worker_options(runs, device)]
    failures = launch(plans, context, jobs, ["claims", *(names or ()), *where])
    outcomes = [trial.judge() for trial in trials]
    for path in output or []:
        write(outcomes, path, describe_origin(trials, ["sslrun", *sys.argv[1:]]))
    verdicts = [outcome.as_dict() for outcome in outcomes] if as_json else None
    _print_json_or(verdicts, render(outcomes, tables=bool(names)))
    if failures:
        raise UserError(describe_failures(failures, plans))


@app.command()
def init(
    name: Annotated[
        str,
        typer.Argument(help="Name of the recipe, which is written to NAME.yaml.", metavar="[NAME]"),
    ] = "my-experiment",
    text: Annotated[
        bool, typer.Option("--text", help="Write a recipe for text instead of images.")
    ] = False,
    source: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="Write the recipe for your own data: a folder of images, text files, or a table "
            "(CSV, TSV, JSON, parquet) of texts or of paths of images.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write a commented starter recipe, for your own data or for data that need no download."""
    from sslrun.stages.init import write_starter

    path = write_starter(name, text, source)
    typer.echo(f"{path}: written. Read it, then:")
    check, sweep = (shlex.join(["sslrun", stage, str(path)]) for stage in ("check", "sweep"))
    typer.echo(f"  {check}    # estimate the cost, without training")
    typer.echo(f"  {sweep}    # pretrain, evaluate, and print the table")


@app.command()
def recipes(as_json: AsJson = False) -> None:
    """List the recipes that ship with sslrun; commands take them by name, from any folder."""
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
    to: Annotated[
        str,
        typer.Option(help="What to write: transformers, timm, torchvision or onnx."),
    ] = "transformers",
    imports: Imports = None,
) -> None:
    """Write a run's backbone as a folder that another library loads, or as an ONNX graph."""
    from sslrun.stages.export import export

    export(source, folder, to)


@app.command()
def push(
    run: Annotated[
        Path, typer.Argument(help="A finished run's folder.", metavar="RUN", show_default=False)
    ],
    repo: Annotated[
        str,
        typer.Argument(help="Repository on the hub: OWNER/NAME.", metavar="REPO"),
    ],
    to: Annotated[
        str | None,
        typer.Option(help="Also export to transformers, timm, torchvision or onnx."),
    ] = None,
    license: Annotated[
        str | None, typer.Option(help="License for the model card, such as mit; default: none.")
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Create the repository as private.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Also keep what is uploaded in this folder."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write the folder of --output and upload nothing.")
    ] = False,
    imports: Imports = None,
) -> None:
    """Upload a run's backbone to the Hugging Face hub, with a model card."""
    from sslrun.stages.push import push

    typer.echo(
        push(run, repo, to=to, license=license, private=private, output=output, upload=not dry_run)
    )


@app.command()
def attend(  # noqa: PLR0913 (typer makes each parameter an option)
    run: Annotated[
        str,
        typer.Argument(
            help="A run's folder, a file of weights, a recipe whose pretraining is finished, or "
            "a backbone of another library, as in hf:NAME.",
            metavar="RUN",
            show_default=False,
        ),
    ],
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            help="Images, or folders of images; sentences for a backbone of text.",
            metavar="[IMAGE|SENTENCE]...",
            show_default=False,
        ),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="A sentence; may be given several times.", show_default=False),
    ] = None,
    examples: Annotated[
        int, typer.Option(min=0, help="Draw this many images of the recipe's test split.")
    ] = 0,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the pictures.")] = Path(
        "attention"
    ),
    size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Side of the images, in pixels; default: that of training.",
            show_default=False,
        ),
    ] = None,
    mass: Annotated[
        float, typer.Option(help="Share of a head's attention that its mask holds.")
    ] = 0.6,
    change: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Change the recipe, such as pretext=null; may be given several times."
        ),
    ] = None,
    seed: Seed = 0,
    runs: Runs = Path("runs"),
    device: Device = "auto",
    imports: Imports = None,
) -> None:
    """Draw the attention of the last layer: of [CLS] on images, of every token on a sentence.

    Recipes and sweeps measure it: see `sslrun show protocol attend`.
    """
    from sslrun.stages.attend import Request
    from sslrun.stages.attend import attend as draw
    from sslrun.training.device import compute

    if not 0 < mass <= 1:
        raise UserError(f"--mass {mass:g}: should be a share in (0, 1]")
    request = Request(
        run, tuple(inputs or ()), output, examples, size, mass, seed, runs, tuple(change or ()),
        tuple(text or ()),
    )  # fmt: skip
    for line in draw(request, compute(device)):
        typer.echo(line)


@app.command()
def track(  # noqa: PLR0913 (typer makes each parameter an option)
    run: Annotated[
        str,
        typer.Argument(
            help="A run's folder, a file of weights, a recipe whose pretraining is finished, or "
            "a backbone of another library, as in timm:NAME.",
            metavar="RUN",
            show_default=False,
        ),
    ],
    video: Annotated[
        Path,
        typer.Argument(
            help="A film, or a folder with a picture for each frame.",
            metavar="VIDEO",
            show_default=False,
        ),
    ],
    mask: Annotated[
        Path,
        typer.Option(
            help="Mask of the first frame: a PNG whose pixels are 0 or the number of an object.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="Film to write; or a contact sheet, as in sheet.png."),
    ] = Path("tracked.mp4"),
    masks: Annotated[
        Path | None,
        typer.Option(help="Folder for the masks of all frames, as PNG.", show_default=False),
    ] = None,
    layer: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Layer to read features of; default: that of propagate in the recipe, else the "
            "last.",
            show_default=False,
        ),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Shorter side of the frames for the backbone, in pixels; default: that of "
            "training.",
            show_default=False,
        ),
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option(min=1, help="Stop after this many frames.", show_default=False),
    ] = None,
    change: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Change the recipe, such as pretext=null; may be given several times."
        ),
    ] = None,
    seed: Seed = 0,
    runs: Runs = Path("runs"),
    device: Device = "auto",
    imports: Imports = None,
) -> None:
    """Follow the objects of a mask through a film by a backbone's features, and draw them.

    Labels propagate as in the protocol `propagate`, with the recipe's options for it.
    """
    from sslrun.stages.track import Request
    from sslrun.stages.track import track as draw
    from sslrun.training.device import compute

    request = Request(
        run, video, mask, output, masks, layer, size, frames, seed, runs, tuple(change or ())
    )
    for line in draw(request, compute(device)):
        typer.echo(line)


@app.command()
def show(
    kind: Annotated[
        str | None,
        typer.Argument(
            help="One of backbone, pretext, data, task, protocol, corruption, measurement, "
            "section, table or schema.",
            metavar="[KIND]",
            show_default=False,
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Argument(help="Name of one of that kind.", metavar="[NAME]", show_default=False),
    ] = None,
    imports: Imports = None,
    as_json: AsJson = False,
) -> None:
    """Show what a recipe can name, and all options with their defaults.

    `show schema` prints a JSON schema for editors.
    """
    import sslrun.claims.measurements  # noqa: F401 (registers the measurements)
    from sslrun.stages.show import describe, render

    description = describe(kind, name)
    if as_json or kind == "schema":
        typer.echo(json.dumps(description, indent=2))
    else:
        _console().print(render(description), markup=False)


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
    budget = Budget(sum(row.pretext is not None for row in recipes.values()))
    costs = [estimate(name, row, compute(device), budget) for name, row in recipes.items()]
    _print_json_or(costs if as_json else None, render(costs))


# ---------------------------------------------------------------- shared by the commands


def _command_line(
    command: str, recipe: Path, overrides: list[str] | None, seed: int, runs: Path
) -> str:
    """Build the command line of another command with the same options."""
    words = ["sslrun", command, str(recipe), *(overrides or ())]
    words += ["--seed", str(seed)] if seed else []
    words += ["--runs", str(runs)] if runs != Path("runs") else []
    return shlex.join([*words, *_import_options()])


def _sweep_or_folder(target: Path) -> Path:
    """Return a target of `table`: a path, or the file of the shipped sweep of that name."""
    from sslrun.recipe import shipped

    is_shipped = target.name in {name.rpartition("/")[2] for name in shipped.names()}
    return shipped.find(target) if is_shipped else target


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


def _worker_options(runs: Path, device: str) -> list[str]:
    """Return the options that the commands of all workers share."""
    return ["--jobs=1", f"--runs={runs}", f"--device={device}", *_import_options()]


def _import_options() -> list[str]:
    """Return the options that make another process import the same plug-ins."""
    from sslrun import plugins

    return [f"--import={path}" for path in plugins.list_loaded()]


def _load_plugins(arguments: list[str]) -> None:
    """Import the plug-ins of the command line, the environment and installed packages."""
    from sslrun import plugins

    files = plugins.list_requested(arguments)
    if files or plugins.are_installed():
        # The package's own components first, so that a name clash is the plug-in's error.
        import sslrun.claims.measurements
        import sslrun.recipe  # noqa: F401
    plugins.load_entry_points()
    plugins.load_files(files)


def _print_json_or(value: Any, renderable: Any) -> None:
    """Print a value as JSON if it is not None, else a rich renderable."""
    if value is not None:
        typer.echo(json.dumps(value, indent=2))
        return
    _console().print(renderable, markup=False)


def _print_table(table: Any) -> None:
    _console().print(table.render())


def _console() -> Any:
    """Create a rich console on stdout, as wide as the terminal, or WIDE columns without one."""
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=WIDE)


def main() -> None:
    """Run the command line. A user's mistake prints one line to stderr and exits with code 2."""
    sys.exit(_exit_code(_run))


def _run() -> Any:
    from sslrun import plugins

    _load_plugins(sys.argv[1:])
    # Importing the protocols imports torch, which takes a second; known commands do not need it.
    is_known = bool(set(sys.argv[1:2]) & {*_command_names(app), "--version"})
    if plugins.list_loaded() or not is_known:
        add_protocol_commands(app)
    return app(prog_name="sslrun", standalone_mode=False)


def _exit_code(run: Callable[[], Any]) -> int:
    try:
        code = run()
        if code == 130:  # newer versions of typer return this after a KeyboardInterrupt
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
    """Print an error with all its causes, including those that `raise ... from None` hides."""
    import traceback

    cause: BaseException | None = error
    while cause is not None:
        cause.__suppress_context__ = False
        cause = cause.__cause__ or cause.__context__
    typer.echo("".join(traceback.format_exception(error)), err=True, nl=False)


if __name__ == "__main__":
    main()
