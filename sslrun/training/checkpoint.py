"""Checkpoints: written whole or not at all, and verified by checksums when read."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model

from sslrun.errors import UserError, disk_is_full
from sslrun.files import replacing, sync
from sslrun.training.loop import Training

WEIGHTS, STATE, MANIFEST = "learner.safetensors", "training.pt", "manifest.json"
UNFINISHED = ".unfinished"


KEPT = 2
"""Checkpoints that are kept: the last one, and one to fall back to where that is damaged."""


def save(training: Training[Any], folder: Path) -> Path:
    """Write `folder`/step-N, remove all but the last `KEPT`, and return the new one. UserError: the disk is full."""
    target = folder / f"step-{training.step:09d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / UNFINISHED
        shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
        unfinished.mkdir()
        try:
            with replacing(unfinished / WEIGHTS) as file:
                save_model(training.learner, str(file))
            with replacing(unfinished / STATE) as file:
                torch.save(training.state_dict(), file)
            sums = {name: _checksum(unfinished / name) for name in (WEIGHTS, STATE)}
            with replacing(unfinished / MANIFEST) as file:
                file.write_text(json.dumps({"step": training.step, "sha256": sums}))
            if target.exists():
                shutil.rmtree(target)
            os.replace(unfinished, target)
            sync(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    except (OSError, RuntimeError) as error:
        if (
            not disk_is_full(error) and shutil.disk_usage(folder).free >= 2**20
        ):  # torch.save does not always say
            raise
        raise UserError(
            f"{folder}: the disk is full; the last checkpoint is kept. Free some space and give the same command again"
        ) from None
    for older in sorted(folder.glob("step-*"))[:-KEPT]:
        shutil.rmtree(older, ignore_errors=True)
    return target


def latest(folder: Path) -> Path | None:
    """The newest intact checkpoint in `folder`; a damaged one is skipped with a warning."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        if _intact(path):
            return path
        warnings.warn(
            f"{path}: damaged (its checksum is wrong); using the one before it", stacklevel=2
        )
    return None


def restore(training: Training[Any], path: Path) -> None:
    """Load a checkpoint into a training that was made with the same options."""
    load_model(training.learner, str(path / WEIGHTS))
    training.load_state_dict(
        torch.load(path / STATE, map_location=training.compute.device, weights_only=True)
    )


def _intact(path: Path) -> bool:
    try:
        sums = json.loads((path / MANIFEST).read_text())["sha256"]
        return all(_checksum(path / name) == expected for name, expected in sums.items())
    except (OSError, ValueError, KeyError):
        return False


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
