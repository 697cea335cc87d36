"""Protocols that train the whole backbone: fine-tuning, LP-FT, and training from scratch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from sslrun.protocols.base import Bench, Protocol, Scores, protocols
from sslrun.tasks.base import TaskLearner, TaskOptions
from sslrun.training.device import Precision
from sslrun.training.loop import NonFinite
from sslrun.training.schedule import Schedule

Rate = Annotated[float, Field(gt=0)]


class FinetuneOptions(Schedule):
    """Options of training all parameters on the labels.

    The defaults are ViT's fine-tuning (Dosovitskiy et al. 2021, B.1.1, arXiv:2010.11929) for small
    data sets: SGD with momentum, cosine, no weight decay, 500 steps. Deviations: batches of 128 in
    place of 512, and no clipping; the paper clips gradients at norm 1, which is `clip: 1.0`.
    """

    steps: int | None = Field(500, ge=1)
    """Optimizer steps; give this or `epochs`."""
    batch: int = Field(128, ge=1)
    """Examples per optimizer step, over all devices."""
    optimizer: Literal["adamw", "sgd", "lars", "muon"] = "sgd"
    """muon: Muon (Jordan et al. 2024) for hidden matrices, AdamW for everything else."""
    lr: Rate | Annotated[tuple[Rate, ...], Field(min_length=1)] = 0.01  # type: ignore[assignment]
    """Peak learning rate; of several, the one with the best validation score is kept."""
    drop_path: float | None = Field(None, ge=0, lt=1)
    """Rate of stochastic depth during fine-tuning, for backbones that support it; default: the
    backbone's own."""
    keep: Literal["last", "best"] = "last"
    """Weights to test: "last" of the last step, or "best" of the epoch with the best validation
    score (the early stopping of Kumar et al. 2022)."""
    frozen_norm: bool = False
    """Use the pretrained statistics of batch norm and keep them, as Kumar et al. (2022) do. Without
    it, training normalizes by each batch."""

    @model_validator(mode="before")
    @classmethod
    def _epochs_replace_default_steps(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("epochs") is not None and "steps" not in values:
            return {**values, "steps": None}
        return values

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rates to try."""
        return self.lr if isinstance(self.lr, tuple) else (self.lr,)


class Tuned(NamedTuple):
    """A fine-tuned learner, its learning rate, and its validation scores."""

    learner: TaskLearner
    lr: float
    val: dict[str, float] | None
    """None if there is no validation split, or if the learner learned from it."""


InitialHead = Callable[[str], Mapping[str, Tensor]]
"""Split to learn from -> weights of the head to start from."""


@protocols.register("finetune")
class Finetune(Protocol):
    """Train all parameters on the labels, from the pretrained ones and a new head."""

    Options = FinetuneOptions
    version = 3  # gradients are not clipped unless `clip` says so
    options: FinetuneOptions
    synonyms: ClassVar[tuple[str, ...]] = ("FT", "fine-tune", "fine-tuning")

    def trains(self, options: TaskOptions) -> bool:
        return True

    @property
    def precision(self) -> Precision:
        return self.options.precision

    def chooses(self, options: TaskOptions) -> str | None:
        if len(self.options.rates) > 1:
            rates = ", ".join(f"{rate:g}" for rate in self.options.rates)
            return f"its learning rate ({self.inherits or self.name}.lr: [{rates}])"
        if self.options.keep == "best":
            return f"its best epoch ({self.inherits or self.name}.keep: best)"
        return None

    def refit_obstacle(self) -> str | None:
        if self.options.keep == "best":
            return "has no validation left to choose its best epoch: take keep: last"
        return None

    def run(self, bench: Bench) -> Scores:
        return self.tune(bench)

    def tune(self, bench: Bench, head: InitialHead | None = None) -> Scores:
        """Fine-tune once per learning rate and test the one with the best validation score.

        Ties go to the last one. `head` gives the weights of a head to start from; default: a new
        head. Rates at which training diverges are skipped. Raises NonFinite if it diverges at
        all of them.
        """
        if self.chooses(bench.task.options):
            best, tried = self._choose_rate(bench, head)
            if bench.refit:
                best = best._replace(learner=self._train(bench, best.lr, head, bench.learned))
        else:
            best, tried = self._train_at(bench, self.options.rates[0], head)
        bench.keep_backbone(best.learner.backbone)
        bench.keep_head(best.learner.head)
        details: dict[str, Any] = {
            "lr": best.lr,
            "tried": {f"{lr:g}": score for lr, score in tried.items()},
        }
        metrics, distances = self.test(bench, best.learner)
        if distances:
            by_shift = bench.by_shift(distances)
            details["distortion"] = {name: shift["distance"] for name, shift in by_shift.items()}
            details["feature_length"] = distances["test"]["length"]
        return Scores({**({"val": best.val} if best.val else {}), **metrics}, details)

    def _train_at(
        self, bench: Bench, lr: float, head: InitialHead | None
    ) -> tuple[Tuned, dict[float, float | None]]:
        """Train at the only learning rate, with nothing to choose; see `_choose_rate`."""
        learner = self._train(bench, lr, head, bench.learned)
        if "val" not in bench.scored:
            return Tuned(learner, lr, None), {}
        val = bench.evaluate(learner, "val")
        return Tuned(learner, lr, val), {lr: val[bench.task.primary.name]}

    def _choose_rate(
        self, bench: Bench, head: InitialHead | None
    ) -> tuple[Tuned, dict[float, float | None]]:
        """Train once per learning rate; return the best and the validation score of each rate.

        The score of a rate at which training diverges is None.
        """
        primary = bench.task.primary
        tried: dict[float, float | None] = {}
        best: Tuned | None = None
        best_score = 0.0
        diverged: NonFinite | None = None
        for lr in self.options.rates:
            try:
                learner = self._train(bench, lr, head, "train")
            except NonFinite as error:
                diverged, tried[lr] = error, None
                continue
            val = bench.evaluate(learner, "val")
            tried[lr] = score = val[primary.name]
            if best is None or primary.is_as_good(score, best_score):
                best, best_score = Tuned(learner, lr, val), score
        if best is None:
            assert diverged is not None
            raise diverged
        return best, tried

    def _train(self, bench: Bench, lr: float, head: InitialHead | None, split: str) -> TaskLearner:
        backbone = bench.backbone(self.options.drop_path)
        torch.manual_seed(bench.seed)
        learner = bench.task.learner(backbone, frozen_norm=self.options.frozen_norm)
        if head is not None:
            learner.head.load_state_dict(head(split))
        elif name := bench.task.starts_from:
            kept = bench.kept()
            if kept is not None and name in kept.modules:
                hint = f"; or set task.{name}: new"
                kept.load_into(name, learner.head, bench.task.name, hint)
        schedule = self.options.model_copy(update={"lr": lr})
        attempt = f"lr-{lr:g}" if split == "train" else f"refit-lr-{lr:g}"
        keep_best = self.options.keep == "best"
        return bench.train(learner, schedule, attempt, split=split, keep_best=keep_best)

    def test(
        self, bench: Bench, learner: TaskLearner
    ) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
        """Score the learner on every test, and measure how far training moved the features there.

        The distance is the mean Euclidean distance between an example's features before and after
        training (Kumar et al., ICLR 2022, section 4.3). The length is the mean norm of the features
        before training. Neither is measured if training started from random weights.
        """
        metrics, distances = {}, {}
        for split in bench.tests:
            outputs, after = bench.outputs(split, learner.predict_and_read)
            metrics[split] = bench.score(split, outputs)
            if not self.initial:
                before = bench.vectors(split)
                distances[split] = {
                    "distance": (after - before).norm(dim=1).mean().item(),
                    "length": before.norm(dim=1).mean().item(),
                }
        return metrics, distances


class LpftOptions(FinetuneOptions):
    """As of `finetune`, which `lpft` inherits, except that batch norm keeps its statistics."""

    frozen_norm: bool = True
    """Use the pretrained statistics of batch norm and keep them, as Kumar et al. (2022) do.
    Otherwise the features move away from the head that was fitted to them, whatever the rate."""


@protocols.register("lpft")
class LinearProbeThenFinetune(Finetune):
    """Train a linear probe, then fine-tune all parameters from its head (Kumar et al. 2022).

    At a learning rate of 0 it gives the probe's own scores. Kumar et al. choose the rate on
    validation, and one fixed rate may spoil what the probe has learned from few labels: give `lr`
    at least three.
    """

    Options = LpftOptions
    synonyms = ("LP-FT",)
    inherits = "finetune"
    follows = "probe"

    def run(self, bench: Bench) -> Scores:
        return self.tune(bench, bench.head)


@protocols.register("scratch")
class Scratch(Finetune):
    """Train all parameters on the labels, from random initial weights without pretraining."""

    synonyms = ("from scratch",)
    inherits = "finetune"
    initial = True
