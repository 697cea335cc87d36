"""Where a pretraining starts: from random weights, from other weights, or from a shorter run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sslrun.backbones.weights import WEIGHTS
from sslrun.errors import UserError
from sslrun.files import expand_home
from sslrun.hub import reach_hub
from sslrun.recipe.schema import HUB
from sslrun.runs import Run, hash_contents

EXTENDS = "extends"
"""Key of an identity: the hash of the run that a longer one continues."""
HUB_FILE = "model.safetensors"
"""File of a repository on the hub that holds its weights."""


def init_identity(init: str | None) -> dict[str, Any]:
    """Return what `pretrain.init` adds to a run's identity: a hash of the file, or the hub's name.

    Raises UserError if the file is gone.
    """
    if init is None:
        return {}
    if init.startswith(HUB):
        return {"init": init}
    path = find_init(init)
    digest = hash_contents(path)
    if digest is None:
        raise UserError(f"pretrain.init: {path}: no such file")
    return {"init": digest}


def find_init(init: str) -> Path:
    """Return the file of weights that `pretrain.init` names, downloaded if it is on the hub.

    Raises UserError if the hub cannot be reached, or has no such weights.
    """
    if not init.startswith(HUB):
        path = expand_home(init)
        return path / WEIGHTS if path.is_dir() else path
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name = init.removeprefix(HUB)
    online = reach_hub()
    try:
        return Path(hf_hub_download(name, HUB_FILE))
    except LocalEntryNotFoundError:
        raise UserError(
            f"pretrain.init: {name} is not on this machine"
            f"{'' if online else ' and the hub cannot be reached'}: name a file instead"
        ) from None
    except (HfHubHTTPError, HFValidationError) as error:
        cause = " ".join(str(error).split())[:200]
        raise UserError(f"pretrain.init: {name} has no {HUB_FILE}: {cause}") from None


def find_shorter(run: Run) -> Run | None:
    """Find the longest finished run that differs from `run` in a shorter schedule only."""
    length = _length(run.identity)
    if not length:  # a budget of time is not extended
        return None
    shorter = [
        other
        for other in _finished_beside(run)
        if _apart_from_length(other.identity) == _apart_from_length(run.identity)
        and _length(other.identity).keys() == length.keys()
        and all(_length(other.identity)[unit] < value for unit, value in length.items())
    ]
    return max(shorter, key=lambda other: max(_length(other.identity).values()), default=None)


def find_extended(run: Run) -> Run | None:
    """Find the parent of a finished run that extends a shorter one to the length of `run`."""
    finished = {other.hash: other for other in _finished_beside(run)}
    for other in finished.values():
        identity = dict(other.identity)
        parent = identity.pop(EXTENDS, None)
        if parent in finished and identity == run.identity:
            return finished[parent]
    return None


def _finished_beside(run: Run) -> Iterator[Run]:
    """List the finished runs of the same recipe and stage."""
    for folder in sorted(run.path.parent.glob(f"{run.stage}-*")):
        path = folder / "identity.json"
        if path.is_file() and (folder / "result.json").is_file():
            identity = json.loads(path.read_text(encoding="utf-8"))
            identity.pop("stage", None)
            yield Run(run.root, run.recipe, run.stage, identity)


def _length(identity: Mapping[str, Any]) -> dict[str, float]:
    """The length of the schedule: {"epochs": E} or {"steps": N}."""
    schedule = identity["pretrain"]
    return {unit: schedule[unit] for unit in ("epochs", "steps") if schedule.get(unit) is not None}


def _apart_from_length(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The identity without the length of its schedule and without the run that it extends."""
    rest = {key: value for key, value in identity.items() if key != EXTENDS}
    schedule = {k: v for k, v in identity["pretrain"].items() if k not in ("epochs", "steps")}
    return {**rest, "pretrain": schedule}
