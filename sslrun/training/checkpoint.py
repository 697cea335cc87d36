"""Checkpoints of a training: written atomically, and verified by checksums when read."""

from __future__ import annotations

import errno
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model

from sslrun.errors import UserError, disk_is_full
from sslrun.files import checksum, replacing, sync
from sslrun.training.loop import Training

WEIGHTS, STATE, MANIFEST = "learner.safetensors", "training.pt", "manifest.json"
"""Files of a checkpoint: the learner's weights, everything else to resume from, and checksums."""
UNFINISHED = ".unfinished"
"""Folder that a checkpoint is written to before it is renamed."""
KEPT = 2
"""Number of checkpoints to keep: the last, and the one before it in case the last is damaged."""


def save(training: Training[Any], folder: Path) -> Path:
    """Write the checkpoint `folder`/step-N, remove all but the last `KEPT`, and return its path.

    Raises:
        UserError: the disk is full.
    """
    target = folder / f"step-{training.step:09d}"
    try:
        _write(training, folder, target)
    except (OSError, RuntimeError) as error:
        if not disk_is_full(error):
            raise
        raise UserError(
            f"{folder}: the disk is full; the last checkpoint is kept. "
            "Free some space and give the same command again"
        ) from None
    for older in sorted(folder.glob("step-*"))[:-KEPT]:
        shutil.rmtree(older, ignore_errors=True)
    return target


def _write(training: Training[Any], folder: Path, target: Path) -> None:
    """Write a checkpoint to a temporary folder, then rename the folder to `target`."""
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / UNFINISHED
    shutil.rmtree(unfinished, ignore_errors=True)  # left by a process that was killed
    unfinished.mkdir()
    try:
        with replacing(unfinished / WEIGHTS) as file:
            save_model(training.learner, str(file))
        with replacing(unfinished / STATE) as file:
            _save_state(training, file)
        sums = {name: checksum(unfinished / name) for name in (WEIGHTS, STATE)}
        with replacing(unfinished / MANIFEST) as file:
            file.write_text(json.dumps({"step": training.step, "sha256": sums}))
        if target.exists():
            shutil.rmtree(target)
        os.replace(unfinished, target)
        sync(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _save_state(training: Training[Any], path: Path) -> None:
    """Write the training's state; torch does not report a full disk as one, so look at the disk.

    It is looked at before the half of the file is removed, which makes space again.
    """
    try:
        torch.save(training.state_dict(), path)
    except RuntimeError as error:
        if shutil.disk_usage(path.parent).free < 2**20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise


def latest(folder: Path) -> Path | None:
    """Find the newest intact checkpoint in `folder`, and skip damaged ones with a warning."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        if _intact(path):
            return path
        warnings.warn(
            f"{path}: damaged (its checksum is wrong); using the one before it", stacklevel=2
        )
    return None


def restore(training: Training[Any], path: Path) -> None:
    """Load a checkpoint into a training with the same options."""
    load_model(training.learner, str(path / WEIGHTS))
    training.load_state_dict(
        torch.load(path / STATE, map_location=training.compute.device, weights_only=True)
    )


def _intact(path: Path) -> bool:
    """Whether all files of a checkpoint are there and have the recorded checksums."""
    try:
        sums = json.loads((path / MANIFEST).read_text())["sha256"]
        return all(checksum(path / name) == expected for name, expected in sums.items())
    except (OSError, ValueError, KeyError):
        return False
