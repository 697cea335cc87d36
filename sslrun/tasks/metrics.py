"""Metrics of classification, in percent: scores (N, C), higher for likelier classes, against labels (N,) int64."""

from __future__ import annotations

import torch
from torch import Tensor


def accuracy(scores: Tensor, labels: Tensor) -> float:
    """Share of examples whose highest score is their label's."""
    return top_k_accuracy(scores, labels, 1)


def top_k_accuracy(scores: Tensor, labels: Tensor, k: int) -> float:
    """Share of examples whose label is among the `k` highest scores."""
    hits = scores.topk(k, dim=1).indices == labels[:, None]
    return 100 * hits.any(dim=1).double().mean().item()


def mean_class_accuracy(scores: Tensor, labels: Tensor) -> float:
    """Mean over classes of the accuracy on each (balanced accuracy), as Oxford Pets and Flowers report.

    Classes without an example are left out.
    """
    hits, truth, _ = _counts(scores, labels)
    present = truth > 0
    return 100 * (hits[present] / truth[present]).mean().item()


def macro_f1(scores: Tensor, labels: Tensor) -> float:
    """Mean over classes of F1. Classes neither predicted nor present are left out."""
    hits, truth, predicted = _counts(scores, labels)
    seen = truth + predicted
    return 100 * (2 * hits[seen > 0] / seen[seen > 0]).mean().item()


def _counts(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each class (C,): examples correctly predicted, examples, predictions; float64."""
    classes = scores.shape[1]
    predicted = scores.argmax(dim=1)
    hits = torch.bincount(labels[predicted == labels], minlength=classes)
    truth = torch.bincount(labels, minlength=classes)
    return hits.double(), truth.double(), torch.bincount(predicted, minlength=classes).double()
