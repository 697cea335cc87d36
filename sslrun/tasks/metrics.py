"""Metrics, in percent. Metrics of classification compare scores (N, C) with labels (N,) int64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sslrun.errors import UserError


def accuracy(scores: Tensor, labels: Tensor) -> float:
    """Share of examples whose highest score is that of their label."""
    return top_k_accuracy(scores, labels, 1)


def top_k_accuracy(scores: Tensor, labels: Tensor, k: int) -> float:
    """Share of examples whose label is among the `k` highest scores."""
    hits = scores.topk(k, dim=1).indices == labels[:, None]
    return 100 * hits.any(dim=1).double().mean().item()


def multi_label_accuracy(scores: Tensor, labels: Tensor) -> float:
    """Share of examples whose highest score is that of one of their labels (N, K), padded with -1.

    Examples without labels do not count (ImageNet ReaL, Beyer et al. 2020). NaN if no example has
    labels.
    """
    counted = (labels >= 0).any(dim=1)
    hits = (scores.argmax(dim=1, keepdim=True) == labels).any(dim=1)
    return 100 * hits[counted].double().mean().item()


def mean_class_accuracy(scores: Tensor, labels: Tensor) -> float:
    """Mean over classes of the accuracy on each (balanced accuracy).

    Oxford Pets and Flowers report it. Classes without examples do not count.
    """
    hits, truth, _ = _counts(scores, labels)
    present = truth > 0
    return 100 * (hits[present] / truth[present]).mean().item()


def macro_f1(scores: Tensor, labels: Tensor) -> float:
    """Mean F1 over classes. Classes that are neither predicted nor present do not count."""
    hits, truth, predicted = _counts(scores, labels)
    total = truth + predicted
    return 100 * (2 * hits[total > 0] / total[total > 0]).mean().item()


def _counts(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each class, the numbers (C,) float64 of correct predictions, examples and predictions."""
    classes = scores.shape[1]
    predicted = scores.argmax(dim=1)
    hits = torch.bincount(labels[predicted == labels], minlength=classes)
    truth = torch.bincount(labels, minlength=classes)
    return hits.double(), truth.double(), torch.bincount(predicted, minlength=classes).double()


def f1(scores: Tensor, labels: Tensor) -> float:
    """F1 of class 1 of two, which GLUE reports for MRPC and QQP.

    0 if class 1 is neither predicted nor present.
    """
    hits, truth, predicted = _counts(scores, labels)
    return 100 * (2 * hits[1] / (truth[1] + predicted[1]).clamp_min(1)).item()


def matthews(scores: Tensor, labels: Tensor) -> float:
    """Matthews' correlation of predictions and labels, which CoLA reports.

    For more than two classes it is Gorodkin's R_K. 0 if only one class is predicted or present.
    """
    hits, truth, predicted = _counts(scores, labels)
    count, right = truth.sum(), hits.sum()
    covariance = right * count - (truth * predicted).sum()
    spread = ((count**2 - (predicted**2).sum()) * (count**2 - (truth**2).sum())).sqrt()
    return 100 * (covariance / spread).item() if spread > 0 else 0.0


def pearson(values: Tensor, truth: Tensor) -> float:
    """Correlation of two vectors (N,), in percent; 0 if one is constant."""
    both = torch.stack([values.double(), truth.double()])
    both = both - both.mean(dim=1, keepdim=True)
    spread = both.norm(dim=1).prod()
    return 100 * ((both[0] * both[1]).sum() / spread).item() if spread > 0 else 0.0


def spearman(values: Tensor, truth: Tensor) -> float:
    """Correlation of the ranks of two vectors (N,), in percent; ties have their mean rank."""
    return pearson(_ranks(values), _ranks(truth))


def roc_auc(scores: Tensor, positive: Tensor) -> float:
    """Area under the ROC curve, in percent, of scores (N,) for labels (N,) bool.

    It is the share of pairs of a positive and a negative example that the scores order rightly;
    ties count half (Hanley and McNeil 1982).

    Raises:
        UserError: All examples have the same label.
    """
    count = int(positive.sum())
    if count in (0, len(positive)):
        raise UserError(
            f"ROC-AUC needs both classes, but all {len(positive)} examples have one: add others, "
            "or choose another metric, as in task.metric: accuracy"
        )
    wins = _ranks(scores)[positive].sum().item() - count * (count + 1) / 2
    return 100 * wins / (count * (len(positive) - count))


def _ranks(values: Tensor) -> Tensor:
    """Ranks (N,) of a vector, from 1; ties have their mean rank."""
    _, group, counts = values.double().unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0)
    return (last - (counts - 1) / 2)[group]


def entities(guess: Sequence[Sequence[str]], truth: Sequence[Sequence[str]]) -> dict[str, float]:
    """F1, precision and recall of entities, and the accuracy of tags, in percent.

    Tag sequences are in BIO format, one per sentence. A predicted entity is right if its span and
    its type are (conlleval). An I tag after another type, or after O, begins an entity.
    """
    predicted, expected = _collect_entities(guess), _collect_entities(truth)
    right = len(predicted & expected)
    words, same = 0, 0
    for guessed_tags, true_tags in zip(guess, truth, strict=True):
        words += len(true_tags)
        same += sum(a == b for a, b in zip(guessed_tags, true_tags, strict=True))
    return {
        "f1": 200 * right / max(1, len(predicted) + len(expected)),
        "precision": 100 * right / max(1, len(predicted)),
        "recall": 100 * right / max(1, len(expected)),
        "accuracy": 100 * same / max(1, words),
    }


def _collect_entities(sentences: Sequence[Sequence[str]]) -> set[tuple[int, int, int, str]]:
    """All entities: the index of the sentence, the first word, one past the last word, the type."""
    return {
        (index, *entity) for index, tags in enumerate(sentences) for entity in _parse_entities(tags)
    }


def _parse_entities(tags: Sequence[str]) -> Iterator[tuple[int, int, str]]:
    """Yield the entities of a sentence: first word, one past the last word, and type."""
    start, kind = 0, ""
    for index, tag in enumerate([*tags, "O"]):
        mark, _, name = tag.partition("-")
        if kind and (mark != "I" or name != kind):
            yield start, index, kind
            kind = ""
        if mark in ("B", "I") and not kind:
            start, kind = index, name
