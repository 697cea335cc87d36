"""Commands that give weights to others: export, push."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sslrun.cli.base import app
from sslrun.cli.options import Imports, path_argument, path_option


@app.command()
def export(
    source: Annotated[
        Path,
        path_argument(
            help="A run's folder, or its .safetensors file.",
            metavar="RUN",
            show_default=False,
        ),
    ],
    folder: Annotated[
        Path,
        path_argument(help="Folder to write to.", metavar="FOLDER", show_default=False),
    ],
    to: Annotated[
        str,
        typer.Option(help="What to write: transformers, timm, torchvision or onnx."),
    ] = "transformers",
    force: Annotated[
        bool, typer.Option("--force", help="Replace files that the folder holds already.")
    ] = False,
    imports: Imports = None,
) -> None:
    """Write a run's backbone as a folder that another library loads, or as an ONNX graph."""
    from sslrun.stages.export import export

    for line in export(source, folder, to, force):
        typer.echo(line)


@app.command()
def push(
    run: Annotated[
        Path,
        path_argument(help="A finished run's folder.", metavar="RUN", show_default=False),
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
        path_option(
            "--output",
            "-o",
            help="Also keep what is uploaded in this folder.",
        ),
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
