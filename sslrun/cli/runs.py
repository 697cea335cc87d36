"""Commands about the runs on this machine: runs ls, show, rm, prune."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sslrun.cli.base import app
from sslrun.cli.options import AsJson, Runs
from sslrun.cli.output import console
from sslrun.errors import UserError

if TYPE_CHECKING:
    from sslrun.stages.archive import Leftover

runs_app = typer.Typer(
    help="List, show and delete runs, and reclaim their disk.", no_args_is_help=True
)
app.add_typer(runs_app, name="runs")

DETAIL_WIDTH = 80
"""Characters of the last column."""

Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")]
Older = Annotated[
    str | None,
    typer.Option(
        help="Only runs that last changed before this time, such as 7d, 12h or 30m.",
        show_default=False,
    ),
]
Name = Annotated[
    str,
    typer.Argument(help="A run: its folder, or the beginning of its name or hash.", metavar="RUN"),
]


@runs_app.command("ls")
def list_runs(
    name: Annotated[
        str | None,
        typer.Argument(
            help="Only runs whose name holds this text.", metavar="[TEXT]", show_default=False
        ),
    ] = None,
    failed: Annotated[bool, typer.Option("--failed", help="Only runs that failed.")] = False,
    older: Older = None,
    runs: Runs = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """List runs: name, seed, state, main number, age and size."""
    from sslrun.stages import archive

    age = None if older is None else archive.parse_age(older)
    entries = archive.select(archive.find_entries(runs), name, failed, age)
    rows = [entry.as_dict() for entry in entries]
    typer.echo(json.dumps(rows, indent=2) if as_json else _format_list(rows))


def _format_list(rows: Sequence[dict[str, Any]]) -> str:
    """Format runs as aligned columns. A table of rich takes ten times as long."""
    lines = [("run", "seed", "state", "age", "size", "")]
    for row in rows:
        seed = "" if row["seed"] is None else str(row["seed"])
        detail = row.get("failure") or row.get("text", "")
        printable = "".join(letter for letter in detail if letter.isprintable())
        size, age = _size(row["bytes"]), _age(row["age_seconds"])
        lines.append((row["run"], seed, row["state"], age, size, printable[:DETAIL_WIDTH]))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    run, seeds, state, ages, sizes, _ = widths
    return "\n".join(
        f"{line[0]:{run}}  {line[1]:>{seeds}}  {line[2]:{state}}  "
        f"{line[3]:>{ages}}  {line[4]:>{sizes}}  {line[5]}".rstrip()
        for line in lines
    )


@runs_app.command("show")
def show_run(name: Name, runs: Runs = Path("runs"), as_json: AsJson = False) -> None:
    """Show a run: recipe, lineage, environment, last record of the log, and files."""
    from sslrun.stages import archive

    entries = archive.find_entries(runs)
    description = archive.describe_entry(archive.find_entry(entries, name), entries)
    if as_json:
        typer.echo(json.dumps(description, indent=2))
        return
    state = (description[key] for key in ("state", "text", "failure") if key in description)
    facts = {
        "run": description["folder"],
        "state": " · ".join(map(str, filter(None, state))),
        "computed from": ", ".join(description["parents"]) or "no other run",
        "used by": ", ".join(description["used_by"]) or "no other run",
        "environment": _pairs(description["environment"]),
        "last record": _pairs(description["last_record"]) or "none",
        "size": _size(description["bytes"]),
    }
    lines = [f"{key}: {value}" for key, value in facts.items()]
    lines += [f"  {_size(size):>10}  {file}" for file, size in description["files"].items()]
    console().print("\n".join([*lines, "", description["recipe_yaml"]]), markup=False)


@runs_app.command("rm")
def remove_runs(
    names: Annotated[
        list[str],
        typer.Argument(
            help="Runs: their folders, or the beginnings of their names or hashes.",
            metavar="RUN...",
        ),
    ],
    force: Annotated[
        bool, typer.Option("--force", help="Delete runs that other runs were computed from.")
    ] = False,
    yes: Yes = False,
    runs: Runs = Path("runs"),
) -> None:
    """Delete runs, unless other runs need them or a process works on them."""
    from sslrun.stages import archive

    entries = archive.find_entries(runs)
    found = [archive.find_entry(entries, name) for name in names]
    chosen = list({entry.folder: entry for entry in found}.values())
    archive.check_removal(chosen, entries, force)
    for entry in chosen:
        typer.echo(f"{entry.name}  {_size(entry.size)}")
    _confirm(f"Delete {len(chosen)} runs?", yes)
    for entry in chosen:
        archive.remove(entry)


@runs_app.command("prune")
def prune_runs(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be deleted; delete nothing.")
    ] = False,
    older: Older = None,
    caches: Annotated[
        bool,
        typer.Option(
            "--caches", help="Also delete cached data (SSLRUN_CACHE) not read for 30 days."
        ),
    ] = False,
    yes: Yes = False,
    runs: Runs = Path("runs"),
) -> None:
    """Delete what no result needs: failed and stopped runs, optimizer states, temporary files.

    A stopped run could go on from its checkpoint, and `pretrain --extend` needs the optimizer's
    state of a finished one: --older keeps what is recent.
    """
    from sslrun.stages import archive

    leftovers = archive.find_leftovers(runs, None if older is None else archive.parse_age(older))
    if caches:
        leftovers += archive.find_unread_caches()
    if not leftovers:
        typer.echo("nothing to delete")
        return
    for leftover in leftovers if dry_run else ():
        typer.echo(f"{_size(leftover.size):>10}  {leftover.path}")
    typer.echo(_summarize(leftovers))
    if dry_run:
        return
    _confirm("Delete them?", yes)
    for leftover in leftovers:
        leftover.delete()


def _summarize(leftovers: Sequence[Leftover]) -> str:
    """Describe how many leftovers of each kind there are, and their bytes."""
    counts = Counter(leftover.kind for leftover in leftovers)
    kinds = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    total = sum(leftover.size for leftover in leftovers)
    return f"{kinds}: {_size(total)} ({total:,} bytes)"


def _confirm(question: str, yes: bool) -> None:
    """Ask on a terminal. Raises UserError without one, and Abort if the answer is no."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise UserError("add --yes to delete without a question on the terminal")
    typer.confirm(question, abort=True)


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items() if value not in (None, {}))


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
