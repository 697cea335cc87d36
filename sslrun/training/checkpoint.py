"""Checkpoints of a training: written atomically, and verified by checksums when read."""

from __future__ import annotations

import errno
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model

from sslrun import distributed
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

    All processes must call this for a sharded training, and each writes its part; else the first
    one writes.

    Raises:
        UserError: the disk is full.
    """
    target = folder / f"step-{training.step:09d}"
    if not (training.sharded or distributed.is_main()):
        return target
    try:
        _write(training, folder, target)
    except (OSError, RuntimeError) as error:
        if not disk_is_full(error):
            raise
        raise UserError(
            f"{folder}: the disk is full; the last checkpoint is kept. "
            "Free some space and give the same command again"
        ) from None
    if distributed.is_main():
        for older in sorted(folder.glob("step-*"))[:-KEPT]:
            shutil.rmtree(older, ignore_errors=True)
    return target


def _write(training: Training[Any], folder: Path, target: Path) -> None:
    """Write a checkpoint to a temporary folder, then rename the folder to `target`."""
    unfinished = folder / UNFINISHED
    if distributed.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(unfinished, ignore_errors=True)  # left by a process that was killed
        unfinished.mkdir()
    try:
        if training.sharded:
            from sslrun.training.shard_files import save_shards

            distributed.wait()  # until the folder is there
            save_shards(training, unfinished)
        if distributed.is_main():
            _complete(training, unfinished)
            if target.exists():
                shutil.rmtree(target)
            os.replace(unfinished, target)
            sync(folder)
        if training.sharded:
            distributed.wait()
    finally:
        if distributed.is_main():
            shutil.rmtree(unfinished, ignore_errors=True)


def _complete(training: Training[Any], folder: Path) -> None:
    """Write what no other process has written of a checkpoint, and the checksums of its files."""
    if not training.sharded:
        with replacing(folder / WEIGHTS) as file:
            save_model(training.learner, str(file))
    with replacing(folder / STATE) as file:
        _save_state(training.counters() if training.sharded else training.state_dict(), file)
    for path in folder.glob("*.safetensors"):
        sync(path)
    sums = {path.name: checksum(path) for path in sorted(folder.iterdir())}
    with replacing(folder / MANIFEST) as file:
        file.write_text(json.dumps({"step": training.step, "crc32": sums}))


def _save_state(state: Mapping[str, Any], path: Path) -> None:
    """Write a state; torch does not report a full disk as one, so look at the disk.

    It is looked at before the half of the file is removed, which makes space again.
    """
    try:
        torch.save(state, path)
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
    state = torch.load(path / STATE, map_location=training.compute.device, weights_only=True)
    if training.sharded:
        from sslrun.training.shard_files import load_shards

        load_shards(training, path)
        training.load_counters(state)
    else:
        load_model(training.learner, str(path / WEIGHTS))
        training.load_state_dict(state)


def _intact(path: Path) -> bool:
    """Whether all files of a checkpoint are there and have the recorded checksums."""
    try:
        sums = json.loads((path / MANIFEST).read_text())["crc32"]
        return all(checksum(path / name) == expected for name, expected in sums.items())
    except (OSError, ValueError, KeyError):
        return False
