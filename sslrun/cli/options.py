"""Arguments and options that several commands share."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from sslrun.files import expand_home
from sslrun.seeds import LARGEST_SEED

path_option = partial(typer.Option, parser=expand_home, metavar="PATH")
"""An option that is a path; `~` is expanded."""
path_argument = partial(typer.Argument, parser=expand_home)
"""An argument that is a path, or a name; `~` is expanded."""

RecipeFile = Annotated[
    Path,
    path_argument(
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

Targets = Annotated[
    list[Path] | None,
    path_argument(
        help="Sweeps, or folders of runs; default: all runs in --runs.",
        metavar="[SWEEP|RUN]...",
        show_default=False,
    ),
]

Change = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="Change the recipe, such as pretext=null; may be given several times."
    ),
]

Device = Annotated[str, typer.Option(help="Device to run on: auto, cpu, cuda, cuda:1 or mps.")]

Seed = Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of all random numbers.")]

Runs = Annotated[
    Path,
    path_option(envvar="SSLRUN_RUNS", help="Folder of the runs."),
]

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
    path_option(
        "--from",
        help="Start from this backbone: a pretraining run's folder or a .safetensors file.",
        show_default=False,
    ),
]

Engine = Annotated[
    str,
    typer.Option(
        help="Where to run: local, slurm or ray; see `sslrun show engine`.", metavar="NAME"
    ),
]

EngineOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--engine-option",
        "-E",
        metavar="KEY=VALUE",
        help="An option of the engine, such as partition=gpu or time=4h; may be given several "
        "times.",
        show_default=False,
    ),
]

Worker = Annotated[
    float | None,
    typer.Option(
        hidden=True, help="Work as one of several workers; end after this many idle minutes."
    ),
]
"""Given by engines only."""

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
