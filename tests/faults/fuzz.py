"""Mutated recipes: each can be built, or is refused in one line that names its file."""

from __future__ import annotations

import copy
import random
import shutil
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from tally import Tally

RECIPES = Path(__file__).parents[2] / "recipes"
Keys = tuple[Any, ...]

NUMBERS = st.one_of(
    st.sampled_from([0, -1, 1, 2, 3, 7, 1e-9, 0.5, 1.0, 1e300, 2**31, 2**63, 10**40]),
    st.sampled_from([float("inf"), float("-inf"), float("nan")]),
    st.integers(-100, 10_000),
    st.floats(-10, 10),
)
NAMES = [
    "resnet18", "vit-tiny", "bert-tiny", "simclr", "mlm", "mae", "digits", "world", "knn", "probe",
    "finetune", "adamw", "best", "auto", "../up", "~", "~nobody", "hub:a/b", "a:b", "1:30", "010",
    "=1+1", "<<",
]  # fmt: skip
WORDS = st.one_of(
    st.sampled_from(NAMES),
    st.text(max_size=12),
)
KINDS = ("value", "number", "nudge", "nudge", "nudge", "remove", "name", "copy")
"""Kinds of changes to one value of a recipe."""
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, WORDS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(WORDS, inner, max_size=3)),
    max_leaves=4,
)


def places(value: Any, keys: Keys = ()) -> Iterator[Keys]:
    """The keys of every value inside a recipe, from outside to inside."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*keys, key)
        if isinstance(inner, dict | list):
            yield from places(inner, (*keys, key))


def at(value: Any, keys: Keys) -> Any:
    for key in keys:
        value = value[key]
    return value


@st.composite
def mutated(draw: Any, originals: dict[str, Any]) -> tuple[str, str]:
    """A shipped recipe with one to three changes: its name, and its text."""
    name = draw(st.sampled_from(sorted(originals)))
    recipe = copy.deepcopy(originals[name])
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        keys = draw(st.sampled_from(list(places(recipe)) or [()]))
        if keys:
            _change(draw, recipe, keys)
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
    if draw(st.integers(0, 9)) == 0:  # the text itself
        start = draw(st.integers(0, len(text)))
        end = start + draw(st.integers(0, 8))
        text = text[:start] + draw(st.text(max_size=4)) + text[end:]
    return name, text


def _change(draw: Any, recipe: Any, keys: Keys) -> None:
    """Replace, remove, rename or copy the value under `keys`."""
    *outer, last = keys
    parent = at(recipe, tuple(outer))
    kind = draw(st.sampled_from(KINDS))
    old = parent[last]
    is_number = isinstance(old, int | float) and not isinstance(old, bool)
    if kind == "nudge" and is_number:
        parent[last] = type(old)(old * draw(st.sampled_from([-1, 0, 2, 10, 0.1, 100])))
    elif kind == "value":
        parent[last] = draw(VALUES)
    elif kind == "number":
        parent[last] = draw(NUMBERS)
    elif kind == "remove":
        del parent[last]
    elif kind == "name" and isinstance(parent, dict):
        parent[draw(WORDS)] = parent.pop(last)
    elif kind == "copy":
        parent[last] = copy.deepcopy(at(recipe, draw(st.sampled_from(list(places(recipe))))))


@contextmanager
def _on_meta() -> Iterator[None]:
    """Build networks without memory for their weights."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def build(path: Path, row: int) -> None:
    """Load a recipe and build what `sslrun check` builds of one of its rows, without measuring."""
    from sslrun.recipe import load_sweep
    from sslrun.stages.check import Budget, estimate
    from sslrun.stages.sweep import Plan
    from sslrun.training.device import Compute

    sweep = load_sweep(path)
    Plan.of(sweep, path.parent / "runs")
    names = list(sweep.rows)
    if names:
        name = names[row % len(names)]
        with _on_meta():
            estimate(name, sweep.rows[name], Compute(torch.device("meta")), Budget(seconds=0))


def run(cases: int, seed: int, folder: Path, tally: Tally, names: set[str]) -> None:
    """Try `cases` mutated recipes."""
    from sslrun.errors import UserError

    copied = Path(shutil.copytree(RECIPES, folder / "fuzz"))  # sweeps name other recipes as bases
    originals = {
        str(path.relative_to(copied)): yaml.safe_load(path.read_text())
        for path in sorted(copied.rglob("*.yaml"))
        if path.parent.name != "claims" and (not names or path.stem in names)
    }
    rows = random.Random(seed)

    @seeded(seed)
    @settings(
        max_examples=cases, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(mutated(originals))
    def attempt(case: tuple[str, str]) -> None:
        name, text = case
        path = (copied / name).with_name("mutated.yaml")
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        try:
            build(path, rows.randrange(100))
        except UserError as error:
            lines = str(error).splitlines()
            if len(lines) != 1 or not str(error).isprintable():
                tally.find("fuzz", f"not one printable line: {str(error)[:200]!r}", _keep(path))
            elif not str(error).startswith(str(path)):
                tally.add("fuzz", "refused in one line, without its place")
            else:
                tally.add("fuzz", "refused in one line, with file and line")
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            own = [f for f in traceback.extract_tb(error.__traceback__) if "sslrun/" in f.filename]
            where = f"{own[-1].filename.rpartition('sslrun/')[2]}:{own[-1].lineno}" if own else ""
            text = f"{type(error).__name__} at {frame.name} from {where}: {str(error)[:100]}"
            tally.find("fuzz", text, _keep(path))
        else:
            tally.add("fuzz", "builds")

    attempt()


def _keep(path: Path) -> str:
    """Copy a recipe of a finding to a name of its own, and return that."""
    number = len(list(path.parent.glob("finding-*")))
    kept = path.with_name(f"finding-{number:03d}.yaml")
    kept.write_bytes(path.read_bytes())
    return str(kept)
