"""Looks at the features while pretraining goes on: do they tell classes apart, and are they collapsing?"""

from __future__ import annotations

from typing import NamedTuple

import torch

from sslrun.backbones.base import Backbone
from sslrun.data.examples import Examples
from sslrun.data.splits import Splits
from sslrun.recipe import Watch
from sslrun.tasks.diagnostics import collapse, feature_std, rankme
from sslrun.tasks.frozen import features, weighted_knn
from sslrun.tasks.metrics import accuracy
from sslrun.training.device import Compute


class Look(NamedTuple):
    """What one look saw."""

    record: dict[str, float]
    """knn (%; where there are labels), feature_std, rankme."""
    collapse: str | None
    """A collapse by name."""


class Watcher:
    """Reads the same few examples at every look: training ones, and held-out ones that train and select nothing."""

    def __init__(self, splits: Splits, options: Watch, compute: Compute, seed: int) -> None:
        self.compute = compute
        self.bank, self.queries = (_some(each, options.examples, seed) for each in (splits.train, splits.val))

    def look(self, backbone: Backbone) -> Look:
        queries, labels = features(backbone, self.queries, self.compute)
        record = {"feature_std": feature_std(queries), "rankme": rankme(queries)}
        if labels is not None:
            bank, known = features(backbone, self.bank, self.compute)
            record["knn"] = accuracy(weighted_knn(bank, known, queries), labels)
        return Look(record, collapse(queries))


def _some(examples: Examples, count: int, seed: int) -> Examples:
    """At most `count` of the examples, chosen by the seed."""
    if len(examples) <= count:
        return examples
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed))
    return examples.subset(order[:count].sort().values)
