"""The application that the modules of this package add their commands to."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(
    name="sslrun",
    help="Pretrain without labels, evaluate with few: recipes in, checkpoints and comparable "
    "tables out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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
