"""The protocols, ways in which a task is learned from a backbone, and the options of each."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sslrun.protocols.frozen_math import FewshotOptions, KnnOptions, LogisticOptions
from sslrun.registry import Options
from sslrun.training.schedule import Schedule


class Probe(LogisticOptions):
    """A linear classifier on a frozen backbone."""

    solver: Literal["lbfgs", "sgd"] = "lbfgs"
    """lbfgs: L2-regularised multinomial regression on cached features, strength chosen on validation.
    sgd: a linear head trained by `probe.sgd`, the backbone run on augmented images."""
    sgd: Schedule = Schedule(epochs=90, batch=256, optimizer="sgd", nesterov=True, lr=0.1)
    """The schedule of `solver: sgd`; default: linear evaluation of SimCLR (Chen et al. 2020, B.6)."""


Rate = Annotated[float, Field(gt=0)]


class Finetune(Schedule):
    """All parameters free."""

    lr: Rate | Annotated[tuple[Rate, ...], Field(min_length=1)] = 0.01  # type: ignore[assignment]
    """Highest learning rate; of several, the one with the best validation score is kept."""
    drop_path: float | None = Field(None, ge=0, lt=1)
    """Rate of stochastic depth while fine-tuning, for backbones that have it; default: the backbone's own."""
    keep: Literal["last", "best"] = "last"
    """Which weights are tested: those of the last step, or of whichever epoch's end is best on validation (the early
    stopping of Kumar et al. 2022)."""
    frozen_norm: bool = False
    """Keep batch norm's statistics as pretrained (Kumar et al. 2022)."""


FINETUNE = Finetune(steps=500, batch=128, optimizer="sgd", clip=1.0)
"""Fine-tuning of ViT (Dosovitskiy et al. 2021, B.1.1) for small sets: SGD with momentum, cosine, no weight decay,
gradients clipped at norm 1, 500 steps; the batch is 512 there."""


class Protocols(Options):
    """The options of every protocol."""

    knn: KnnOptions = KnnOptions()
    probe: Probe = Probe()
    fewshot: FewshotOptions = FewshotOptions()
    finetune: Finetune = FINETUNE
    lpft: Finetune = FINETUNE
    """What is not given is as in `finetune`."""
    scratch: Finetune = FINETUNE
    """What is not given is as in `finetune`."""


CLASSICAL = {
    "nearest-neighbours": "scikit-learn's k-nearest neighbours on the frozen features, k chosen on validation.",
    "logistic-regression": "scikit-learn's logistic regression on the frozen features, C chosen on validation.",
    "random-forest": "scikit-learn's random forest on the frozen features.",
    "svm": "scikit-learn's support vector machine (RBF) on the frozen features, C chosen on validation.",
}
"""Learning before deep learning; where the backbone is `pixels`, on raw pixels."""

PROTOCOLS = {
    "knn": "Weighted vote of the nearest labelled neighbours in the frozen features (Wu et al. 2018).",
    "probe": "A linear classifier on the frozen features: linear evaluation, linear probing.",
    "fewshot": "Least squares in closed form on the frozen features of a few examples a class (Dosovitskiy et al. 2021).",
    "finetune": "All parameters learn from the labels, starting from the pretrained ones and a fresh head.",
    "lpft": "Linear probing, then fine-tuning from the probe's head (Kumar et al. 2022).",
    "scratch": "All parameters learn from the labels, starting from random ones: no pretraining.",
    **CLASSICAL,
}
"""Every protocol, with a line about it."""
