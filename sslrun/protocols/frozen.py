"""Protocols on a frozen backbone; its features are computed once and shared."""

from __future__ import annotations

import copy
from typing import Any, ClassVar, Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn

from sslrun.errors import UserError
from sslrun.protocols.base import Bench, Protocol, Scores, protocols
from sslrun.protocols.features import FeatureOptions
from sslrun.protocols.least_squares import FewshotOptions, least_squares
from sslrun.protocols.logistic import LogisticFit, LogisticOptions, LogisticRegression
from sslrun.protocols.neighbors import KnnOptions, weighted_knn
from sslrun.tasks.base import Task, TaskLearner, TaskOptions
from sslrun.training.device import Precision
from sslrun.training.schedule import Schedule

NEEDS = "needs one vector and one class per example"
REMEDY = "take probe, finetune, lpft or scratch"


class VectorProtocol(Protocol):
    """Base class of protocols that classify one frozen vector per example."""

    Options: ClassVar[type[FeatureOptions]] = FeatureOptions
    options: FeatureOptions

    @property
    def precision(self) -> Precision:
        return self.options.precision

    def refit_obstacle(self) -> str | None:
        return None

    @classmethod
    def supports(cls, task: type[Task], options: TaskOptions) -> str | None:
        if options.linear:
            return None
        return f"{NEEDS}, which the task '{task.name}' does not have: {REMEDY}"

    def run(self, bench: Bench) -> Scores:
        """Check the task, then `classify`.

        Raises UserError for a task whose labels are not classes: some tasks learn only from the
        data that their labels are numbers.
        """
        if not bench.task.linear:
            raise UserError(
                f"{self.name} {NEEDS}, but the labels of '{bench.task.name}' are numbers here: "
                f"{REMEDY}"
            )
        return self.classify(bench)

    def classify(self, bench: Bench) -> Scores:
        """Fit a classifier to the training vectors and score it."""
        raise NotImplementedError


@protocols.register("knn")
class Knn(VectorProtocol):
    """Classify by a weighted vote of the nearest frozen features (Wu et al. 2018)."""

    Options = KnnOptions
    options: KnnOptions
    synonyms = ("k-NN",)

    def classify(self, bench: Bench) -> Scores:
        bank, labels = bench.features(bench.learned)
        k, temperature, classes = self.options.k, self.options.temperature, len(bench.task.classes)

        def vote(x: Tensor) -> Tensor:
            return weighted_knn(bank, labels, x, k, temperature, classes)

        return Scores(bench.score_vectors(vote))


class ProbeOptions(LogisticOptions):
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
class Probe(Protocol):
    """Train a linear classifier on the frozen features (linear evaluation, linear probing)."""

    Options = ProbeOptions
    version = 2  # a head trained by SGD runs in float32
    options: ProbeOptions
    synonyms = ("LP", "lin", "linear", "linear probe", "linear probing")

    def trains(self, options: TaskOptions) -> bool:
        """L-BFGS has one solution; SGD depends on the first head and the order of the data."""
        return self.options.solver == "sgd" or not options.linear

    def chooses(self, options: TaskOptions) -> str | None:
        if self.trains(options) or self.options.l2_count == 1:
            return None
        return f"its L2 strength (probe.l2_count: {self.options.l2_count})"

    def refit_obstacle(self) -> str | None:
        return None

    @property
    def precision(self) -> Precision:
        return self.options.precision

    def run(self, bench: Bench) -> Scores:
        if self.options.solver == "sgd" or not bench.task.linear:
            return self._train(bench)
        regression, classes = LogisticRegression(self.options), len(bench.task.classes)
        chosen = self._choose(bench, regression) if self.chooses(bench.task.options) else None
        if chosen is not None and not bench.refit:
            head, l2, metrics = chosen.head, chosen.l2, {}
        else:
            l2 = self.options.strengths()[0] if chosen is None else chosen.l2
            head = regression.fit_one(bench.features(bench.learned), classes, l2)
            metrics = {} if chosen is None else {"val": self._score_val(bench, chosen)}
        bench.keep_head(head)
        with torch.inference_mode():
            return Scores(metrics | bench.score_vectors(head), {"l2": l2})

    @staticmethod
    def _choose(bench: Bench, regression: LogisticRegression) -> LogisticFit:
        """Fit all strengths to the training features and choose one on validation."""
        primary = bench.task.primary
        return regression.fit(
            bench.features("train"),
            bench.features("val"),
            len(bench.task.classes),
            lambda outputs, targets: bench.task.measure(outputs, targets)[primary.name],
            primary,
        )

    @staticmethod
    @torch.inference_mode()
    def _score_val(bench: Bench, chosen: LogisticFit) -> dict[str, float]:
        return bench.score("val", chosen.head(bench.vectors("val")))

    def _train(self, bench: Bench) -> Scores:
        learner = TaskLearner(bench.backbone(), bench.task, frozen=True)
        if self.options.norm:
            learner.head = NormalizedHead(self._linear_head(learner, bench.task))
        learner = bench.train(learner, self.options.sgd, "probe", split=bench.learned)
        if isinstance(learner.head, NormalizedHead):
            learner.head = learner.head.folded()
        bench.keep_head(learner.head)
        return Scores({split: bench.evaluate(learner, split) for split in bench.scored})

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
