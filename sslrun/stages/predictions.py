"""Keep what models predicted, to show it in reports and to compare evaluations."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic_core import to_json
from safetensors.torch import save_file
from torch import Tensor

from sslrun.data.examples import Examples
from sslrun.files import replacing
from sslrun.results.record import PREDICTIONS
from sslrun.tasks.base import Task

Predictions = Mapping[str, Tensor]
"""`truth` and `predicted`, classes by index, and `margin`, by how much the output of the predicted
class exceeds the next; each (N,)."""


def predictions_of(task: Task, outputs: Tensor, examples: Examples) -> Predictions | None:
    """Read predictions from a task's outputs (N, C); None if an example has not exactly one class.

    Margins are comparable within a run only: protocols differ in what their outputs mean.
    """
    classes = len(task.classes)
    if classes < 2 or outputs.ndim != 2 or outputs.shape[1] != classes:
        return None
    targets = task.targets(examples)
    if targets.is_floating_point():
        return None
    truth = targets if targets.ndim == 1 else targets[:, 0]  # then reassessed labels follow
    best = outputs.float().topk(2, dim=1)
    return {
        "truth": truth.to(torch.int32).cpu(),
        "predicted": best.indices[:, 0].to(torch.int32).cpu(),
        "margin": (best.values[:, 0] - best.values[:, 1]).cpu(),
    }


def write_predictions(folder: Path, predictions: Predictions, classes: tuple[str, ...]) -> None:
    """Write predictions and the names of classes into a run's folder."""
    tensors = {name: tensor.contiguous() for name, tensor in predictions.items()}
    with replacing(folder / PREDICTIONS) as temporary:
        save_file(tensors, temporary, {"classes": json.dumps(classes)})


def write_shown(path: Path, entries: Sequence[Any]) -> None:
    """Write dataclasses, all of one class, as JSON; `RunRecord.read_shown` reads them."""
    with replacing(path) as temporary:
        temporary.write_bytes(to_json(list(entries)))
