"""Looks at the features during pretraining: do they separate classes, and are they collapsing?"""

from __future__ import annotations

from typing import NamedTuple

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
"""Examples that run through the network at a time."""
AT_FLOOR = 0.97
"""A held-out loss above this share of its floor has learned nothing from context."""
PATIENCE = 0.25
"""Share of training after which a loss at its floor is reported."""


class Look(NamedTuple):
    """The outcome of one look."""

    record: dict[str, float]
    """knn (%; where there are labels), feature_std, rankme; held_out_loss and its floor, where the
    pretext has them."""
    warning: str | None
    """A collapse by name, or a loss that does not leave its floor."""


class Watcher:
    """Evaluates the same few examples at every look: training ones, and held-out ones that are never trained on.

    They choose nothing: a look changes no result.
    """

    def __init__(
        self, splits: Splits, pretext: Pretext, options: Watch, compute: Compute, seed: int
    ) -> None:
        self.compute = compute
        task = tasks[splits.source.task]
        self.task = task(task.Options(), splits.spec, splits.classes)
        self.classes = len(splits.classes)
        self.bank = _sample(splits.train, options.examples, seed)
        self.queries = _sample(splits.val, options.examples, seed)
        self.held_out = _sample(pretext.arrange(splits.val, seed), options.examples, seed)
        self.floor = pretext.floor(splits.train)

    def look(self, pretext: Pretext, progress: float) -> Look:
        """Evaluate a pretext task's backbone after a share of training. Leaves it in eval mode."""
        pretext.eval()
        queries, bank = (self._features(pretext.kept, each) for each in (self.queries, self.bank))
        record = {"feature_std": feature_std(queries), "rankme": rankme(queries)}
        if self.classes and self.queries.labels is not None and self.bank.labels is not None:
            known = self.bank.labels.to(self.compute.device)
            truth = self.queries.labels.to(self.compute.device)
            votes = KnnOptions()
            scores = weighted_knn(bank, known, queries, votes.k, votes.temperature, self.classes)
            record["knn"] = accuracy(scores, truth)
        record |= self._held_out(pretext)
        if self.floor is None or "held_out_loss" not in record:
            return Look(record, collapse(queries))
        # A floor says more than the features of whole sequences, which a model of tokens need not
        # tell apart.
        record["floor"] = self.floor
        stuck = progress >= PATIENCE and record["held_out_loss"] > AT_FLOOR * self.floor
        return Look(record, _stuck(record["held_out_loss"], self.floor) if stuck else None)

    @torch.inference_mode()
    def _held_out(self, pretext: Pretext) -> dict[str, float]:
        """The pretext task's metrics on held-out examples, with the same random draws at every look."""
        generator, device = self.compute.generator(), self.compute.device
        generator.manual_seed(0)
        totals: dict[str, float] = {}
        places = torch.arange(len(self.held_out)).split(BATCH)
        for place, batch in zip(places, self.held_out.batches(places, device), strict=True):
            with self.compute.autocast():
                metrics = pretext.held_out(batch, generator)
            share = len(place) / len(self.held_out)
            for name, value in metrics.items():
                totals[name] = totals.get(name, 0.0) + value.item() * share
        return totals

    def _features(self, backbone: Backbone, examples: Examples) -> Tensor:
        with self.compute.autocast():
            return extract(
                backbone, examples, self.task.inputs, self.compute.device, BATCH, self.task.vector
            )


def _stuck(loss: float, floor: float) -> str:
    return (
        f"the held-out loss, {loss:.2f}, is not clearly below {floor:.2f}, which the tokens' frequencies alone reach: "
        "nothing is learned from context yet. Give more steps, a longer warmup, a lower lr or a larger batch, and "
        "look for repeated lines in the corpus"
    )


def _sample(examples: Examples, count: int, seed: int) -> Examples:
    """At most `count` of the examples, chosen by the seed."""
    if len(examples) <= count:
        return examples
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed))
    return examples.subset(order[:count].sort().values)
