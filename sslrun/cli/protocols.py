"""A command for every protocol: probe, finetune, knn, ..."""

from __future__ import annotations

from pathlib import Path

import typer

from sslrun.cli.options import (
    Device,
    Fresh,
    From,
    Imports,
    Overrides,
    Profile,
    RecipeFile,
    Runs,
    Seed,
)
from sslrun.cli.output import print_table
from sslrun.cli.workers import command_line
from sslrun.errors import UserError


def add_protocol_commands(app: typer.Typer) -> None:
    """Add a command for every protocol without one.

    May be called again after plug-ins are imported. A protocol with the name of another command
    gets no command of its own, but recipes and sweeps can still use it.
    """
    from sslrun.results.known_protocols import known_protocols

    taken = _command_names(app)
    for name, facts in known_protocols().items():
        if name not in taken:
            _add_protocol_command(app, name, facts.about)


def _command_names(app: typer.Typer) -> set[str]:
    """Return the names of an app's commands, and of its groups of commands."""
    names = {str(group.name) for group in app.registered_groups}
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
            first = command_line("pretrain", recipe, overrides, seed, runs)
            raise UserError(
                f"no pretrained checkpoint for {recipe} (seed {seed}): "
                f"run `{first}` first, or pass --from"
            )
        for job in jobs:
            job.execute(context)
        if context.profile:
            context.reporter.say("--profile: nothing was trained in steps, so there is no trace")
        if distributed.is_main():
            print_table(Table.from_records([RunRecord(job.run.path) for job in jobs], loaded.name))

    panel = "Protocols (stage 2: learn a task from the backbone)"
    app.command(name=protocol, help=about, rich_help_panel=panel)(command)
