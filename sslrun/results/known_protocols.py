"""What help and tables need to know of protocols, without importing torch.

A protocol is unknown if it belongs to a plug-in that is not imported.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from sslrun.registry import Registry, first_line


class Facts(NamedTuple):
    """Facts about a protocol."""

    about: str
    """The first line of its docstring."""
    synonyms: tuple[str, ...] = ()
    """Its names in papers."""
    per_class: bool = False
    """Whether its labels are always numbers per class."""

    @classmethod
    def of(cls, protocol: Any) -> Facts:
        """Return the facts about a protocol's class."""
        return cls(first_line(protocol), tuple(protocol.synonyms), protocol.per_class)


SHIPPED = {
    "knn": Facts(
        "Classify by a weighted vote of the nearest frozen features (Wu et al. 2018).", ("k-NN",)
    ),
    "probe": Facts(
        "Train a linear classifier on the frozen features (linear evaluation, linear probing).",
        ("LP", "lin", "linear", "linear probe", "linear probing"),
    ),
    "fewshot": Facts(
        "Fit least squares to frozen features of few examples per class (Dosovitskiy et al. 2021).",
        ("few-shot", "few-shot linear"),
        per_class=True,
    ),
    "attentive": Facts(
        "Train a head that attends to the frozen tokens (attentive probing).",
        ("EP", "attentive probe", "attentive probing", "efficient probing"),
    ),
    "finetune": Facts(
        "Train all parameters on the labels, from the pretrained ones and a new head.",
        ("FT", "fine-tune", "fine-tuning"),
    ),
    "lpft": Facts(
        "Train a linear probe, then fine-tune all parameters from its head (Kumar et al. 2022).",
        ("LP-FT",),
    ),
    "scratch": Facts(
        "Train all parameters on the labels, from random initial weights without pretraining.",
        ("from scratch",),
    ),
    "nearest-neighbors": Facts(
        "Classify the frozen features by k-nearest neighbors (scikit-learn); k by validation."
    ),
    "logistic-regression": Facts(
        "Classify the frozen features by logistic regression (scikit-learn); C by validation."
    ),
    "random-forest": Facts(
        "Classify the frozen features by a random forest (scikit-learn); leaves by validation."
    ),
    "svm": Facts(
        "Classify the frozen features by an SVM with RBF kernel (scikit-learn); C by validation."
    ),
    "attend": Facts(
        "Find objects by the last layer's [CLS] attention, with nothing trained (DINO, Fig. 4)."
    ),
    "copy": Facts("Copy the labels of the first frame, unmoved: the baseline of `propagate`."),
    "propagate": Facts(
        "Follow masks or points through films by the similarity of frozen features (Jabri 2020)."
    ),
    "rollout": Facts("Act in the environment, asked for several returns, with nothing trained."),
    "random-actions": Facts(
        "Take the random actions that random data are made of: the baseline of `rollout`."
    ),
    "practice": Facts(
        "Practice reaching imagined goals with a frozen encoder, then reach those of test pictures."
    ),
    "zero-shot": Facts("Compare the likelihoods of sentences, with nothing trained."),
}
"""The protocols of this package, in the order of tables. Tests compare them with the classes, whose
import takes seconds."""


def known_protocols() -> dict[str, Facts]:
    """Return the protocols of this package, and then those of the imported plug-ins."""
    known = dict(SHIPPED)
    if registry := Registry.kinds.get("protocol"):  # none before something imports the protocols
        for name in registry.in_order:
            if name not in SHIPPED:
                known[name] = Facts.of(registry[name])
    return known


def protocol_rank(name: str) -> int:
    """Return the position of a protocol in tables; unknown protocols come last."""
    known = list(known_protocols())
    return known.index(name) if name in known else len(known)


def protocol_synonyms(name: str) -> tuple[str, ...]:
    """Return the names of a protocol in papers."""
    known = known_protocols()
    return known[name].synonyms if name in known else ()


def counts_per_class(name: str) -> bool:
    """Return whether a protocol's labels are always numbers per class."""
    known = known_protocols()
    return name in known and known[name].per_class
