"""The recipes that ship with sslrun: found by name from any folder."""

from __future__ import annotations

import re
from pathlib import Path

import sslrun
from sslrun.errors import UserError
from sslrun.registry import did_you_mean

CLAIMS = "claims"
"""The folder of claims, next to the recipes; claims are not recipes."""


def folder() -> Path:
    """Return the folder of the shipped recipes: in the package, or beside it in a source tree."""
    package = Path(sslrun.__file__).parent
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def names() -> dict[str, Path]:
    """List the shipped recipes and sweeps: name, such as `image/simclr-cifar10` -> file, sorted."""
    files = {
        path.relative_to(folder()).with_suffix("").as_posix(): path
        for path in folder().rglob("*.yaml")
    }
    return {name: files[name] for name in sorted(files) if not name.startswith(f"{CLAIMS}/")}


def find(path: Path) -> Path:
    """Return the file at `path`, or else the file of the shipped recipe of that name.

    The name is `image/simclr-cifar10`, or only `simclr-cifar10`. A path with a suffix is returned
    unchanged: the function that reads it reports a missing file. Raises UserError if there is no
    such recipe, or if a short name is ambiguous.
    """
    if path.exists() or path.suffix in (".yaml", ".yml"):
        return path
    shipped = names()
    name = path.as_posix()
    if name in shipped:
        return shipped[name]
    same = [full for full in shipped if full.rpartition("/")[2] == name]
    if len(same) == 1:
        return shipped[same[0]]
    if same:
        raise UserError(
            f"{name}: several recipes that ship have this name: {', '.join(same)}; name one in full"
        )
    hint = did_you_mean(name, [*shipped, *(full.rpartition("/")[2] for full in shipped)])
    if len(hint) > 100:  # no similar name: the list would fill the screen
        hint = " `sslrun recipes` lists those that ship."
    raise UserError(f"{name}: no such file, and no recipe of this name ships with sslrun.{hint}")


def summary(path: Path) -> str:
    """Return the first sentence of a recipe's leading comment; empty if there is none."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("#").strip())
    text = " ".join(lines)
    # The period of "et al." or "vs." does not end a sentence.
    ends = (match.end() for match in re.finditer(r"(?<!\bal)(?<!\bvs)[.?]\s", text))
    return text[: next(ends, len(text))].strip()


def claims_folder() -> Path:
    """Return the folder of claims: ./recipes/claims if it exists, else the shipped one."""
    here = Path("recipes", CLAIMS)
    return here if here.is_dir() else folder() / CLAIMS


def sweep_or_folder(target: Path) -> Path:
    """Return a folder of runs or a file as it is, or the file of the shipped sweep of that name."""
    is_shipped = target.name in {name.rpartition("/")[2] for name in names()}
    return find(target) if is_shipped else target
