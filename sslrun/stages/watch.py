"""Looks at the features while pretraining goes on: do they tell classes apart, and are they collapsing?"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sslrun.backbones.base import Backbone
from sslrun.data.examples import Examples
from sslrun.data.splits import Splits
from sslrun.pretexts.base import Pretext
from sslrun.protocols.features import extract
from sslrun.protocols.neighbors import KnnOptions, weighted_knn
from sslrun.recipe import Watch
from sslrun.tasks.base import tasks
from sslrun.tasks.diagnostics import collapse, feature_std, rankme
from sslrun.tasks.metrics import accuracy
from sslrun.training.device import Compute

BATCH = 256
"""Examples run at a time."""


AT_FLOOR = 0.97
"""A held-out loss above this share of its floor has learned nothing from context."""
PATIENCE = 0.25
"""Share of training after which a loss at its floor is called out."""


class Look(NamedTuple):
    """What one look saw."""

    record: dict[str, float]
    """knn (%; where there are labels), feature_std, rankme; held_out_loss and its floor, where the pretext has them."""
    warning: str | None
    """A collapse by name, or a loss that does not leave its floor."""


class Watcher:
    """Reads the same few examples at every look: training ones, and held-out ones that train and select nothing."""

    def __init__(self, splits: Splits, pretext: Pretext, options: Watch, compute: Compute, seed: int) -> None:
        self.compute = compute
        task = tasks[splits.source.task]
        self.inputs = task(task.Options(), splits.spec, splits.classes).inputs
        self.classes = len(splits.classes)
        self.bank, self.queries = (_some(each, options.examples, seed) for each in (splits.train, splits.val))
        self.held_out = _some(pretext.arrange(splits.val, seed), options.examples, seed)
        self.floor = pretext.floor(splits.train)

    def look(self, learner: Any, progress: float) -> Look:
        """What the learner, in eval mode from here on, has come to after a share of its training."""
        learner.eval()
        queries, bank = (self._features(learner.backbone, each) for each in (self.queries, self.bank))
        record = {"feature_std": feature_std(queries), "rankme": rankme(queries)}
        if self.classes and self.queries.labels is not None and self.bank.labels is not None:
            known, truth = self.bank.labels.to(self.compute.device), self.queries.labels.to(self.compute.device)
            votes = KnnOptions()
            scores = weighted_knn(bank, known, queries, votes.k, votes.temperature, self.classes)
            record["knn"] = accuracy(scores, truth)
        record |= self._held_out(learner)
        if self.floor is None or "held_out_loss" not in record:
            return Look(record, collapse(queries))
        # Where there is a floor it tells more: what names tokens need not tell whole sequences apart.
        record["floor"] = self.floor
        return Look(record, self._stuck(record["held_out_loss"], self.floor) if progress >= PATIENCE else None)

    @staticmethod
    def _stuck(loss: float, floor: float) -> str | None:
        if loss <= AT_FLOOR * floor:
            return None
        return (
            f"the held-out loss, {loss:.2f}, is not clearly below {floor:.2f}, what the tokens' frequencies alone come to: "
            "nothing is learned from context yet. Give more steps, a longer warmup or a lower lr, or a larger batch; and "
            "look for repeated lines in the corpus"
        )

    @torch.inference_mode()
    def _held_out(self, learner: Any) -> dict[str, float]:
        """The pretext's metrics on held-out examples, under the same conditions each time."""
        generator, device = self.compute.generator(), self.compute.device
        generator.manual_seed(0)
        totals: dict[str, float] = {}
        places = torch.arange(len(self.held_out)).split(BATCH)
        for place, batch in zip(places, self.held_out.batches(places, device), strict=True):
            with self.compute.autocast():
                found = learner.held_out(batch, generator)
            for name, value in found.items():
                totals[name] = totals.get(name, 0.0) + value.item() * len(place) / len(self.held_out)
        return totals

    def _features(self, backbone: Backbone, examples: Examples) -> Tensor:
        with self.compute.autocast():
            return extract(backbone, examples, self.inputs, self.compute.device, BATCH)


def _some(examples: Examples, count: int, seed: int) -> Examples:
    """At most `count` of the examples, chosen by the seed."""
    if len(examples) <= count:
        return examples
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed))
    return examples.subset(order[:count].sort().values)
