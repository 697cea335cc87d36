"""Checkpoints: written whole or not at all, and known to be intact when read."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model

from sslrun.errors import UserError, disk_is_full
from sslrun.files import replacing, sync
from sslrun.training.loop import Training

WEIGHTS, STATE, MANIFEST = "learner.safetensors", "training.pt", "manifest.json"
UNFINISHED = ".unfinished"


def save(training: Training, folder: Path) -> Path:
    """Write `folder`/step-N and then remove older ones; returns it. UserError: the disk is full."""
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
        if not disk_is_full(error) and shutil.disk_usage(folder).free >= 2**20:  # torch.save does not always say
            raise
        raise UserError(
            f"{folder}: the disk is full, the last checkpoint stays; free some room and give the same command again"
        ) from None
    for older in folder.glob("step-*"):
        if older != target:
            shutil.rmtree(older, ignore_errors=True)
    return target


def latest(folder: Path) -> Path | None:
    """The newest intact checkpoint in `folder`; a damaged one is passed over with a warning."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        if _intact(path):
            return path
        warnings.warn(f"{path}: damaged (its checksum is wrong); passed over", stacklevel=2)
    return None


def restore(training: Training, path: Path) -> None:
    """Load a checkpoint into a training made with the same options."""
    load_model(training.learner, str(path / WEIGHTS))
    training.load_state_dict(torch.load(path / STATE, map_location=training.compute.device, weights_only=True))


def _intact(path: Path) -> bool:
    try:
        sums = json.loads((path / MANIFEST).read_text())["sha256"]
        return all(_checksum(path / name) == expected for name, expected in sums.items())
    except (OSError, ValueError, KeyError):
        return False


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
