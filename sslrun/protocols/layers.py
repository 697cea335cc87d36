"""Probes of several layers: pooled features side by side, or the layer that is best on validation.

Masked and autoregressive models often have their best features in the middle (Chen et al., ICML
2020); linear evaluation of DINO reads the last four blocks (Caron et al., ICCV 2021).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from sslrun.backbones.base import Backbone, Features
from sslrun.errors import UserError
from sslrun.protocols.base import Bench, Scores
from sslrun.protocols.features import FeatureOptions

Layers = Literal["last4", "best"] | Annotated[tuple[int, ...], Field(min_length=1)]
Group = tuple[int, ...]
"""Layers to read side by side; () stands for the backbone's own pooled features."""


class LayerOptions(FeatureOptions):
    """Options of protocols that can read several layers."""

    layers: Layers | None = None
    """Layers whose pooled features are read; default: the backbone's own pooled features. last4:
    the last four, side by side. A list such as [3, 6, -1]: these, side by side; 0 is the first, -1
    the last. best: each layer alone; the one that is best on validation is tested."""


class Fitted(NamedTuple):
    """A classifier of some layers, and its scores."""

    metrics: dict[str, dict[str, float]]
    """Split -> metric -> value."""
    details: dict[str, Any]
    head: nn.Module | None = None


class LayerReader(Backbone):
    """A backbone whose pooled features are those of some layers of another one, side by side."""

    def __init__(self, backbone: Backbone, layers: Group) -> None:
        super().__init__(backbone.options, backbone.spec)
        self.inner = backbone
        self.indices = layers
        self.width = sum(backbone.layer_widths[layer] for layer in layers)

    def forward(self, inputs: Any) -> Features:
        """Only pooled features (B, D), D being the sum of the layers' widths."""
        vectors = self.inner.pooled_layers(inputs)
        return Features(torch.cat([vectors[layer] for layer in self.indices], dim=1))

    def layers(self) -> list[list[nn.Parameter]]:
        return self.inner.layers()


def read_layers(layers: Layers | None, count: int, user: str) -> Group:
    """List the layers, of `count`, whose features an option's value reads.

    Raises UserError for a layer that does not exist; `user` names the option and the backbone.
    """
    if layers is None:
        return ()
    if layers == "best":
        return tuple(range(count))
    wanted = (-4, -3, -2, -1) if layers == "last4" else layers
    for layer in wanted:
        if not -count <= layer < count:
            raise UserError(f"{user} has layers 0 to {count - 1}, but not {layer}")
    return tuple(layer % count for layer in wanted)


def check_layers(protocol: str, layers: Layers | None, backbone: Backbone) -> None:
    """Raise UserError if a protocol's option `layers` names a layer that a backbone lacks."""
    if layers is not None:
        backbone.require("layers", f"{protocol}.layers")
        count = len(backbone.layer_widths)
        read_layers(layers, count, f"{protocol}.layers: '{backbone.name}'")


def fit_layers(
    bench: Bench,
    layers: Layers | None,
    fit: Callable[[Group, bool], Fitted],
) -> Fitted:
    """Fit a classifier to the layers that the option's value names.

    `fit(group, refit)` fits to a group of layers, after choosing anything else on validation;
    `refit` makes the tested classifier learn from the training and the validation split. For
    `best`, each layer is fitted to the training split, and the layer with the best validation score
    (ties: the last) is tested. The scores of all are in `details`.
    """
    if layers != "best":
        return fit(read_layers(layers, len(bench.layer_widths), "layers"), bench.refit)
    primary = bench.task.primary
    best: tuple[float, Group, Fitted] | None = None
    curve: dict[str, dict[str, float]] = {}
    for layer in range(len(bench.layer_widths)):
        fitted = fit((layer,), False)
        scores: dict[str, float] = {}
        for split in ("val", "test"):
            if split in fitted.metrics:  # a trial of a search has no test
                scores[split] = fitted.metrics[split][primary.name]
        curve[str(layer)] = scores
        if best is None or primary.is_as_good(scores["val"], best[0]):
            best = scores["val"], (layer,), fitted
    assert best is not None
    _, group, fitted = best
    if bench.refit:
        val = fitted.metrics["val"]
        fitted = fit(group, True)
        fitted = fitted._replace(metrics={"val": val} | fitted.metrics)
    return fitted._replace(details={**fitted.details, "layer": group[0], "layers": curve})


def splits_of(bench: Bench, refit: bool) -> tuple[str, ...]:
    """The splits to score: the tests, and "val" unless the classifier learned from it."""
    return ("val", *bench.tests) if bench.has_val and not refit else bench.tests


def score_group(
    bench: Bench, group: Group, predict: Callable[[Tensor], Tensor], splits: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Score `predict`, from the vectors (N, D) of a group of layers to outputs (N, C)."""
    return {split: bench.score(split, predict(bench.vectors(split, group))) for split in splits}


def as_scores(fitted: Fitted) -> Scores:
    """What a protocol returns."""
    return Scores(fitted.metrics, fitted.details)
