"""Looks at the features while pretraining goes on: do they tell classes apart, and are they collapsing?"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sslrun.backbones.base import Backbone
from sslrun.data.examples import Examples
from sslrun.data.splits import Splits
from sslrun.recipe import DEFAULT_TASK, Watch
from sslrun.tasks.base import tasks
from sslrun.tasks.diagnostics import collapse, feature_std, rankme
from sslrun.tasks.frozen import KnnOptions, extract, weighted_knn
from sslrun.tasks.metrics import accuracy
from sslrun.training.device import Compute

BATCH = 256
"""Examples run at a time."""


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
        task = tasks[DEFAULT_TASK[splits.spec.modality]]
        self.inputs = task(task.Options(), splits.spec, splits.classes).inputs
        self.classes = len(splits.classes)
        self.bank, self.queries = (_some(each, options.examples, seed) for each in (splits.train, splits.val))

    def look(self, backbone: Backbone) -> Look:
        queries, bank = (self._features(backbone, each) for each in (self.queries, self.bank))
        record = {"feature_std": feature_std(queries), "rankme": rankme(queries)}
        if self.queries.labels is not None and self.bank.labels is not None:
            known, truth = self.bank.labels.to(self.compute.device), self.queries.labels.to(self.compute.device)
            votes = KnnOptions()
            scores = weighted_knn(bank, known, queries, votes.k, votes.temperature, self.classes)
            record["knn"] = accuracy(scores, truth)
        return Look(record, collapse(queries))

    def _features(self, backbone: Backbone, examples: Examples) -> Tensor:
        with self.compute.autocast():
            return extract(backbone, examples, self.inputs, self.compute.device, BATCH)


def _some(examples: Examples, count: int, seed: int) -> Examples:
    """At most `count` of the examples, chosen by the seed."""
    if len(examples) <= count:
        return examples
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed))
    return examples.subset(order[:count].sort().values)
