"""The recipes that ship with sslrun: found by name from any folder."""

from __future__ import annotations

import re
from pathlib import Path

import sslrun
from sslrun.errors import UserError
from sslrun.registry import did_you_mean

CLAIMS = "claims"
"""The folder of claims, which are no recipes but lie beside them."""


def folder() -> Path:
    """The folder of the recipes that ship: inside the installed package, or beside it in a source tree."""
    package = Path(sslrun.__file__).parent
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def names() -> dict[str, Path]:
    """The recipes and sweeps that ship, as `image/simclr-cifar10`, in alphabetical order, with their files."""
    files = {
        path.relative_to(folder()).with_suffix("").as_posix(): path
        for path in folder().rglob("*.yaml")
    }
    return {name: files[name] for name in sorted(files) if not name.startswith(f"{CLAIMS}/")}


def find(path: Path) -> Path:
    """The file at `path`, or else the shipped recipe of that name: `image/simclr-cifar10`, or `simclr-cifar10` alone.

    A path with a suffix is returned as it is: the function that reads it reports if it is missing.
    UserError: no such recipe, or several of that last name.
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
    if len(hint) > 100:  # not near to any: the list would fill the screen
        hint = " `sslrun recipes` lists those that ship."
    raise UserError(f"{name}: no such file, and no recipe of this name ships with sslrun.{hint}")


def summary(path: Path) -> str:
    """The first sentence of a recipe's leading comment; empty if it has none."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("#").strip())
    text = " ".join(lines)
    ends = (
        match.end() for match in re.finditer(r"(?<!\bal)(?<!\bvs)[.?]\s", text)
    )  # et al. ends no sentence
    return text[: next(ends, len(text))].strip()


def claims_folder() -> Path:
    """Where claims are looked for: `recipes/claims` where sslrun is called, or else those that ship."""
    here = Path("recipes", CLAIMS)
    return here if here.is_dir() else folder() / CLAIMS
