"""Commands for writing recipes: init, recipes, show, check."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

from sslrun.cli.base import app
from sslrun.cli.options import AsJson, Device, Imports, Overrides, RecipeFile, path_option
from sslrun.cli.output import console, print_json_or


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
        path_option(
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
    from sslrun import shipped
    from sslrun.results.layout import two_columns

    about = {name: shipped.summary(path) for name, path in shipped.names().items()}
    rows = [{"name": name, "about": text} for name, text in about.items()]
    print_json_or(rows if as_json else None, two_columns(about.items(), one_line=True))


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
        console().print(render(description), markup=False)


@app.command()
def check(
    recipe: RecipeFile,
    overrides: Overrides = None,
    device: Device = "auto",
    imports: Imports = None,
    gpus: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Also estimate pretraining on this many A100s, which need not be there, by "
            "stated assumptions.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Validate a recipe and estimate its parameters, FLOPs, memory and time, without training."""
    from sslrun.recipe import load_sweep
    from sslrun.stages.check import Budget, estimate, render
    from sslrun.training.device import compute

    recipes = load_sweep(recipe, overrides or ()).rows
    budget = Budget(sum(row.pretext is not None for row in recipes.values()))
    costs = [estimate(name, row, compute(device), budget) for name, row in recipes.items()]
    if gpus is not None:
        from sslrun.stages import scale

        forecasts = [scale.forecast(cost, gpus) for cost in costs]
        for cost, forecast in zip(costs, forecasts, strict=True):
            cost["on_gpus"] = None if forecast is None else forecast.as_dict()
    print_json_or(costs if as_json else None, render(costs))
    if gpus is not None and not as_json:
        for line in scale.describe_all(costs, gpus):
            typer.echo(line)
