"""Commands that draw what a backbone sees: attend, track."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sslrun.cli.base import app
from sslrun.cli.options import Change, Device, Imports, Runs, Seed, path_argument, path_option
from sslrun.errors import UserError


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
    output: Annotated[
        Path,
        path_option("--output", "-o", help="Folder of the pictures."),
    ] = Path("attention"),
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
    change: Change = None,
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
        path_argument(
            help="A film, or a folder with a picture for each frame.",
            metavar="VIDEO",
            show_default=False,
        ),
    ],
    mask: Annotated[
        Path,
        path_option(
            help="Mask of the first frame: a PNG whose pixels are 0 or the number of an object.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        path_option(
            "--output",
            "-o",
            help="Film to write; or a contact sheet, as in sheet.png.",
        ),
    ] = Path("tracked.mp4"),
    masks: Annotated[
        Path | None,
        path_option(
            help="Folder for the masks of all frames, as PNG.",
            show_default=False,
        ),
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
    change: Change = None,
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
