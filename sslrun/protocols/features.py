"""Features of a frozen backbone: computed in one pass, then shared by all classifiers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from sslrun.backbones.base import Backbone, Features
from sslrun.data.examples import Batch, Examples
from sslrun.errors import UserError
from sslrun.registry import Options
from sslrun.tasks.base import outputs_of
from sslrun.training.device import Precision

CHUNK = 2**24
"""Largest number of elements of an intermediate tensor (64 MiB of float32); larger ones are
computed in chunks of rows."""


class FeatureOptions(Options):
    """Options of every protocol that reads frozen features."""

    precision: Precision = "auto"
    """Precision of the backbone's forward pass. auto: bf16 autocast where the device multiplies
    natively in bf16, else fp32. The features are kept in fp32."""


def read_pooled(features: Features) -> Tensor:
    """Read the pooled features (B, D)."""
    return features.pooled


def extract(
    backbone: Backbone,
    examples: Examples,
    inputs: Callable[[Batch], Any],
    device: torch.device,
    batch: int,
    reads: Callable[[Features], Tensor] = read_pooled,
    counter: AbstractContextManager[Any] | None = None,
) -> Tensor:
    """Compute the features (N, D) float32 of all examples on `device`, in eval mode.

    `inputs` turns a raw batch into what the backbone takes, as `Task.inputs` does. `reads` turns
    the backbone's features into one vector per example, as `Task.vector` does. `counter` is entered
    around one batch, to count its FLOPs. The caller enables autocast. The backbone's training mode
    is restored at the end.

    Raises UserError if a feature is not finite.
    """
    training = backbone.training
    backbone.eval()
    with torch.inference_mode():
        (vectors,) = outputs_of(
            examples, lambda raw: (reads(backbone(inputs(raw))).float(),), device, batch, counter
        )
    features = vectors.clone()  # outside inference mode, so that heads may be trained on them
    backbone.train(training)
    if not features.isfinite().all():
        raise UserError(
            "the backbone's features are not finite: its training diverged; "
            "lower the learning rate there"
        )
    return features
