"""Protocols on a frozen backbone; its features are computed once and shared."""

from __future__ import annotations

import copy
from typing import Any, ClassVar, Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn

from sslrun.backbones.base import Backbone
from sslrun.errors import UserError
from sslrun.protocols.base import TRAIN_AND_VAL, Bench, Protocol, Scores, protocols
from sslrun.protocols.features import FeatureOptions
from sslrun.protocols.layers import (
    Fitted,
    Group,
    LayerOptions,
    LayerReader,
    as_scores,
    check_layers,
    fit_layers,
    read_layers,
    score_group,
    splits_of,
)
from sslrun.protocols.least_squares import FewshotOptions, RidgeRegression, least_squares
from sslrun.protocols.logistic import LinearFit, LogisticOptions, LogisticRegression
from sslrun.protocols.neighbors import KnnOptions, knn_regression, weighted_knn
from sslrun.tasks.base import Task, TaskLearner, TaskOptions
from sslrun.training.device import Precision
from sslrun.training.schedule import Schedule

NEEDS = "needs one vector and one class per example"
REMEDY = "take probe, finetune, lpft or scratch"


def refuse_decoder(task: type[Task]) -> str | None:
    """Explain, as words after a protocol's name, that a task needs a decoder; None if it does not.

    A decoder is trained together with the backbone only.
    """
    if task.decodes:
        return f"trains no decoder, which the task '{task.name}' needs: take finetune or scratch"
    return None


class VectorProtocol(Protocol):
    """Base class of protocols that classify one frozen vector per example."""

    Options: ClassVar[type[FeatureOptions]] = FeatureOptions
    options: FeatureOptions
    numbers: ClassVar[bool] = False
    """Whether it also predicts numbers."""

    @property
    def precision(self) -> Precision:
        return self.options.precision

    def refit_obstacle(self) -> str | None:
        return None

    @classmethod
    def supports(cls, task: type[Task], options: TaskOptions) -> str | None:
        if options.linear:
            return None
        if reason := refuse_decoder(task):
            return reason
        return f"{NEEDS}, which the task '{task.name}' does not have: {REMEDY}"

    def run(self, bench: Bench) -> Scores:
        """Check the task, then `classify`.

        Raises UserError for a task whose labels are not classes: some tasks learn only from the
        data that their labels are numbers.
        """
        task = bench.task
        if not task.linear or (task.numbers and not self.numbers):
            labels = "numbers" if task.numbers or not task.classes else "no classes"
            raise UserError(
                f"{self.name} {NEEDS}, but the labels of '{task.name}' are {labels} here: {REMEDY}"
            )
        return self.classify(bench)

    def classify(self, bench: Bench) -> Scores:
        """Fit a classifier to the training vectors and score it."""
        raise NotImplementedError


class LayerProtocol(Protocol):
    """Base class of protocols with the option `layers`."""

    Options: ClassVar[type[LayerOptions]] = LayerOptions
    options: LayerOptions

    def needs(self) -> tuple[str, ...]:
        return () if self.options.layers is None else ("layers",)

    def check_backbone(self, backbone: Backbone) -> None:
        check_layers(self.name, self.options.layers, backbone)

    def read_layers(self, count: int) -> tuple[int, ...]:
        return read_layers(self.options.layers, count, f"{self.name}.layers: the backbone")

    def chooses_layer(self) -> str | None:
        """Name the layer as what it chooses on validation; None if it chooses none."""
        return f"its layer ({self.name}.layers: best)" if self.options.layers == "best" else None


@protocols.register("knn")
class Knn(LayerProtocol, VectorProtocol):
    """Classify by a weighted vote of the nearest frozen features (Wu et al. 2018)."""

    Options = KnnOptions
    options: KnnOptions
    synonyms = ("k-NN",)
    numbers = True

    def chooses(self, options: TaskOptions) -> str | None:
        return self.chooses_layer()

    def classify(self, bench: Bench) -> Scores:
        k, temperature, classes = self.options.k, self.options.temperature, len(bench.task.classes)

        def fit(group: Group, refit: bool) -> Fitted:
            bank, labels = bench.features(TRAIN_AND_VAL if refit else "train", group)

            def vote(x: Tensor) -> Tensor:
                if bench.task.numbers:
                    return knn_regression(bank, labels, x, k, temperature)
                return weighted_knn(bank, labels, x, k, temperature, classes)

            return Fitted(score_group(bench, group, vote, splits_of(bench, refit)), {})

        return as_scores(fit_layers(bench, self.options.layers, fit))


class ProbeOptions(LogisticOptions, LayerOptions):
    """Options of a linear classifier on a frozen backbone."""

    solver: Literal["lbfgs", "sgd"] = "lbfgs"
    """lbfgs: L2-regularized multinomial regression on cached features, with the strength chosen on
    validation. sgd: train a head with the schedule `probe.sgd` on augmented examples. Tasks whose
    head is not linear always use sgd."""
    sgd: Schedule = Schedule(epochs=90, batch=256, optimizer="sgd", nesterov=True, lr=0.1)
    """Schedule of `solver: sgd`; default: linear evaluation of SimCLR (Chen et al. 2020, B.6)."""
    norm: bool = False
    """Normalize what the head of `solver: sgd` reads by batch norm without scale and shift, as in
    MAE (He et al. 2022, A.1). Features of masked models have small and unequal deviations."""

    @model_validator(mode="after")
    def _norm_with_sgd(self) -> ProbeOptions:
        if self.norm and self.solver != "sgd":
            raise ValueError("norm: true needs solver: sgd: set it, or leave norm out")
        return self


@protocols.register("probe")
class Probe(LayerProtocol):
    """Train a linear classifier on the frozen features (linear evaluation, linear probing)."""

    Options = ProbeOptions
    version = 2  # a head trained by SGD runs in float32
    options: ProbeOptions
    synonyms = ("LP", "lin", "linear", "linear probe", "linear probing")

    @classmethod
    def supports(cls, task: type[Task], options: TaskOptions) -> str | None:
        return refuse_decoder(task)

    def trains(self, options: TaskOptions) -> bool:
        """L-BFGS has one solution; SGD depends on the first head and the order of the data."""
        return self.options.solver == "sgd" or not options.linear

    def chooses(self, options: TaskOptions) -> str | None:
        chosen = [self.chooses_layer()]
        if not self.trains(options) and self.options.l2_count > 1:
            chosen.append(f"its L2 strength (probe.l2_count: {self.options.l2_count})")
        return " and ".join(name for name in chosen if name) or None

    def head_obstacle(self) -> str | None:
        if self.options.layers is None:
            return None
        return "does not read the backbone's pooled features: leave out probe.layers"

    def refit_obstacle(self) -> str | None:
        return None

    @property
    def precision(self) -> Precision:
        return self.options.precision

    def run(self, bench: Bench) -> Scores:
        """Fit or train the head, and keep it; see `fit_layers` for several layers."""
        sgd = self.options.solver == "sgd" or not bench.task.linear

        def fit(group: Group, refit: bool) -> Fitted:
            return self._train(bench, group, refit) if sgd else self._regress(bench, group, refit)

        fitted = fit_layers(bench, self.options.layers, fit)
        assert fitted.head is not None
        bench.keep_head(fitted.head)
        return as_scores(fitted)

    def _regress(self, bench: Bench, group: Group, refit: bool) -> Fitted:
        """Fit a regression to a group of layers, with the strength chosen on validation."""
        regression, classes = self._regression(bench.task), len(bench.task.classes)
        chosen = self._choose(bench, group, regression) if self.options.l2_count > 1 else None
        val: dict[str, dict[str, float]] = {}
        if chosen is not None and not refit:
            head, l2 = chosen.head, chosen.l2
        else:
            l2 = self.options.strengths()[0] if chosen is None else chosen.l2
            learned = TRAIN_AND_VAL if refit else "train"
            head = regression.fit_one(bench.features(learned, group), classes, l2)
        kept = bench.task.as_head(head)
        with torch.inference_mode():
            if chosen is not None and refit:
                val = score_group(bench, group, chosen.head, ["val"])
            tested = score_group(bench, group, kept, splits_of(bench, refit))
        return Fitted(val | tested, {"l2": l2}, kept)

    def _regression(self, task: Task) -> LogisticRegression | RidgeRegression:
        return (RidgeRegression if task.numbers else LogisticRegression)(self.options)

    @staticmethod
    def _choose(
        bench: Bench, group: Group, regression: LogisticRegression | RidgeRegression
    ) -> LinearFit:
        """Fit all strengths to the training features and choose one on validation."""
        primary = bench.task.primary
        return regression.fit(
            bench.features("train", group),
            bench.features("val", group),
            len(bench.task.classes),
            lambda outputs, targets: bench.task.measure(outputs, targets)[primary.name],
            primary,
        )

    def _train(self, bench: Bench, group: Group, refit: bool) -> Fitted:
        """Train a head on a group of layers by the schedule `sgd`."""
        backbone = bench.backbone()
        if group:
            backbone = LayerReader(backbone, group).to(bench.device)
        attempt = "probe"
        if self.options.layers == "best":
            attempt += f"-layer-{group[0]}" + ("-refit" if refit else "")
        learner = TaskLearner(backbone, bench.task, frozen=True)
        if self.options.norm:
            learner.head = NormalizedHead(self._linear_head(learner, bench.task))
        split = TRAIN_AND_VAL if refit else "train"
        learner = bench.train(learner, self.options.sgd, attempt, split=split)
        if isinstance(learner.head, NormalizedHead):
            learner.head = learner.head.folded()
        scores = {split: bench.evaluate(learner, split) for split in splits_of(bench, refit)}
        return Fitted(scores, {}, learner.head)

    @staticmethod
    def _linear_head(learner: TaskLearner, task: Task) -> nn.Linear:
        """Return the learner's head. Raises UserError if it is not a linear map of one vector."""
        if not isinstance(learner.head, nn.Linear) or not task.linear:
            raise UserError(
                f"probe.norm needs a linear head on one vector per example, which the task "
                f"'{task.name}' does not have: leave it out"
            )
        return learner.head


class NormalizedHead(nn.Module):
    """A linear head below which batch norm without scale and shift normalizes the features."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(linear.in_features, eps=1e-6, affine=False)
        self.linear = linear

    def forward(self, vectors: Tensor) -> Tensor:
        return self.linear(self.norm(vectors))

    @torch.no_grad()
    def folded(self) -> nn.Linear:
        """Return the linear map that gives the same outputs in eval mode, without batch norm."""
        mean, variance = self.norm.running_mean, self.norm.running_var
        assert mean is not None
        assert variance is not None
        folded = copy.deepcopy(self.linear)
        folded.weight.div_((variance + self.norm.eps).sqrt())
        folded.bias.sub_(folded.weight @ mean)
        return folded


@protocols.register("fewshot")
class Fewshot(VectorProtocol):
    """Fit least squares to frozen features of few examples per class (Dosovitskiy et al. 2021)."""

    Options = FewshotOptions
    options: FewshotOptions
    synonyms = ("few-shot", "few-shot linear")
    per_class = True

    def labels(self, labels: tuple[float, ...]) -> tuple[float, ...]:
        return self.options.shots

    def identity(self) -> dict[str, Any]:
        """Return the options without `shots`: each number of shots has its own run."""
        return self.options.non_defaults(exclude={"shots"})

    def classify(self, bench: Bench) -> Scores:
        head = least_squares(
            *bench.features(bench.learned), len(bench.task.classes), self.options.l2
        )
        bench.keep_head(head)
        with torch.inference_mode():
            return Scores(bench.score_vectors(head))
