"""Feature checks during pretraining: do the features separate classes, or do they collapse?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from sslrun.data.examples import Batch, Examples
from sslrun.data.splits import Splits
from sslrun.errors import UserError
from sslrun.pretexts.base import Pretext
from sslrun.pretexts.guesses import MaskedText
from sslrun.protocols.features import extract
from sslrun.protocols.neighbors import KnnOptions, weighted_knn
from sslrun.recipe import Watch
from sslrun.tasks.base import tasks
from sslrun.tasks.diagnostics import (
    LEAST_WIDTH,
    Diagnostic,
    alpha_req,
    collapse,
    feature_std,
    lidar,
    rankme,
)
from sslrun.tasks.metrics import accuracy
from sslrun.training.device import Compute

T = TypeVar("T")

BATCH = 256
"""Batch size of the forward passes."""
LIDAR_IMAGES = 1000
"""Largest number of images that LiDAR compares, as in its paper."""
PICTURED = 8
"""Number of examples to draw pictures of, or to show as text."""
AT_FLOOR = 0.97
"""A held-out loss above this share of its floor means that nothing is learned from context."""
PATIENCE = 0.25
"""Share of the training after which a loss at its floor is reported."""


class FeatureCheck(NamedTuple):
    """The result of one feature check."""

    record: dict[str, float]
    """Keys: feature_std and rankme; alpha_req if the features are wide enough; lidar if the pretext
    compares views; knn (%) if there are labels; held_out_loss and floor if the pretext has them."""
    warning: str | None
    """The name of a collapse, or a message about a loss that stays at its floor."""


class Watcher:
    """Checks the features of the same few training and validation examples during pretraining.

    A check never changes a result. Validation examples are never trained on, except if the data's
    `pretrain_on` or `validation` says so; then there is no held-out loss, and the kNN accuracy is
    that of images whose labels alone were not seen.
    """

    def __init__(
        self, splits: Splits, pretext: Pretext, options: Watch, compute: Compute, seed: int
    ) -> None:
        self.compute = compute
        task = tasks[splits.source.default_task(splits.source.options)]
        self.task = task(task.Options(), splits.spec, splits.classes)
        self.classes = len(splits.classes)
        bank, queries = splits.monitored
        self.bank = _sample(bank, options.examples, seed)
        self.queries = _sample(queries, options.examples, seed)
        self.views = options.views
        self.held_out: Examples | None = None
        if splits.holds_out:
            self.held_out = _sample(pretext.arrange(splits.val, seed), options.examples, seed)
        self.floor = pretext.floor(splits.train)

    @property
    def has_labels(self) -> bool:
        """Whether the examples have classes, which the kNN accuracy needs."""
        labels = (self.queries.labels, self.bank.labels)
        return bool(self.classes) and all(
            label is not None and not label.is_floating_point() for label in labels
        )

    def require(self, pretext: Pretext, diagnostic: Diagnostic) -> None:
        """Check that feature checks compute a diagnostic that chooses the weights to keep.

        Raises:
            UserError: the data or the backbone do not allow it.
        """
        if diagnostic == "knn" and not self.has_labels:
            reason = "the data have no classes"
        elif diagnostic == "held_out_loss" and self.held_out is None:
            reason = "no examples are held out from pretraining"
        elif diagnostic == "alpha_req" and pretext.kept.width < LEAST_WIDTH:
            reason = f"it needs features of at least {LEAST_WIDTH} numbers"
        else:
            return
        raise UserError(
            f"pretrain.keep_by: feature checks cannot compute {diagnostic}, because {reason}: "
            "choose another diagnostic, such as rankme"
        )

    def check(
        self, pretext: Pretext, progress: float, metrics: Mapping[str, Tensor] | None = None
    ) -> FeatureCheck:
        """Check the backbone of a pretext task, which is left in eval mode.

        `progress` is the share of the training that is done, in [0, 1]. `metrics` are those of the
        last step.
        """
        pretext.eval()
        queries = self._features(pretext, self.queries)
        bank = self._features(pretext, self.bank)
        record = {"feature_std": feature_std(queries), "rankme": rankme(queries)}
        if (exponent := alpha_req(queries)) is not None:
            record["alpha_req"] = exponent
        record |= self._lidar(pretext)
        if self.has_labels:
            assert self.bank.labels is not None
            assert self.queries.labels is not None
            known = self.bank.labels.to(self.compute.device)
            truth = self.queries.labels.to(self.compute.device)
            votes = KnnOptions()
            scores = weighted_knn(bank, known, queries, votes.k, votes.temperature, self.classes)
            record["knn"] = accuracy(scores, truth)
        record |= self._held_out(pretext)
        logged = {name: value.item() for name, value in (metrics or {}).items()}
        failure = pretext.diagnose(logged | record)
        if self.floor is None or "held_out_loss" not in record:
            return FeatureCheck(record, failure or collapse(queries))
        # For a model of tokens the floor says more than the features of whole sequences, which it
        # does not have to separate.
        record["floor"] = self.floor
        if failure is not None:
            return FeatureCheck(record, failure)
        stuck = progress >= PATIENCE and record["held_out_loss"] > AT_FLOOR * self.floor
        warning = _describe_stuck(record["held_out_loss"], self.floor) if stuck else None
        return FeatureCheck(record, warning)

    def pictures(self, pretext: Pretext) -> dict[str, Tensor]:
        """The task's pictures of a few held-out images; see `_show`."""
        return self._show(pretext, pretext.pictures)

    def samples(self, pretext: Pretext) -> list[str]:
        """The task's lines of text on a few held-out texts; see `_show`."""
        return self._show(pretext, pretext.samples)

    def guesses(self, pretext: Pretext) -> list[MaskedText]:
        """The task's guesses at hidden tokens of a few held-out texts; see `_show`."""
        return self._show(pretext, pretext.guesses)

    @torch.inference_mode()
    def _show(self, pretext: Pretext, render: Callable[[Batch, torch.Generator], T]) -> T:
        """Render a few held-out examples, always with the same draws.

        The pretext task is left in eval mode.
        """
        generator, device = self.compute.generator(), self.compute.device
        generator.manual_seed(0)
        examples = self.queries if self.held_out is None else self.held_out
        indices = torch.arange(min(PICTURED, len(examples)))
        pretext.eval()
        (batch,) = examples.batches([indices], device)
        with self.compute.autocast():
            return render(batch, generator)

    @torch.inference_mode()
    def _lidar(self, pretext: Pretext) -> dict[str, float]:
        """Compute LiDAR on held-out images, always with the same random views.

        Empty if the task compares no views. Measured on the features that are kept, not on those of
        the task's head.
        """
        if self.views is None or not pretext.measures("lidar"):
            return {}
        generator, device = self.compute.generator(), self.compute.device
        generator.manual_seed(0)
        parts = torch.arange(min(LIDAR_IMAGES, len(self.queries))).split(BATCH)
        rows = []
        for batch in self.queries.batches(parts, device):
            columns: list[Tensor] = []
            while len(columns) < self.views:
                with self.compute.autocast():
                    views = pretext.positives(batch, generator)
                    columns += [pretext.kept(view).pooled.float() for view in views]
            rows.append(torch.stack(columns[: self.views], dim=1))
        return {"lidar": lidar(torch.cat(rows))}

    @torch.inference_mode()
    def _held_out(self, pretext: Pretext) -> dict[str, float]:
        """Compute the pretext task's metrics on held-out examples, always with the same draws."""
        if self.held_out is None:
            return {}
        generator, device = self.compute.generator(), self.compute.device
        generator.manual_seed(0)
        totals: dict[str, float] = {}
        parts = torch.arange(len(self.held_out)).split(BATCH)
        for part, batch in zip(parts, self.held_out.batches(parts, device), strict=True):
            with self.compute.autocast():
                metrics = pretext.held_out(batch, generator)
            share = len(part) / len(self.held_out)
            for name, value in metrics.items():
                totals[name] = totals.get(name, 0.0) + value.item() * share
        return totals

    def _features(self, pretext: Pretext, examples: Examples) -> Tensor:
        def inputs(batch: Batch) -> Any:
            return pretext.watched_inputs(self.task.inputs(batch))

        device = self.compute.device
        with self.compute.autocast():
            return extract(pretext.kept, examples, inputs, device, BATCH, self.task.vector)


def _describe_stuck(loss: float, floor: float) -> str:
    digits = ".2f" if floor >= 1 else ".3g"
    return (
        f"the held-out loss, {loss:{digits}}, is not clearly below {floor:{digits}}, which needs "
        "no context: the frequencies of tokens, colors or classes, or the mean image, reach it. "
        "Give more steps, a longer warmup, a lower lr or a larger batch; in a corpus, look for "
        "repeated lines"
    )


def _sample(examples: Examples, count: int, seed: int) -> Examples:
    """Draw at most `count` of the examples; the draw follows from the seed."""
    if len(examples) <= count:
        return examples
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed))
    return examples.subset(order[:count].sort().values)
