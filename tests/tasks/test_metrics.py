"""Metrics against scikit-learn."""

import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, top_k_accuracy_score

from sslrun.tasks.metrics import accuracy, macro_f1, mean_class_accuracy, top_k_accuracy


@pytest.fixture
def predictions() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(12, (300,), generator=generator) ** 2 // 12  # unbalanced
    scores = torch.randn(300, 12, generator=generator)
    scores[torch.arange(300), labels] += 1
    return scores, labels


def test_metrics_equal_scikit_learns(predictions: tuple[torch.Tensor, torch.Tensor]) -> None:
    scores, labels = predictions
    guess = scores.argmax(1)
    assert accuracy(scores, labels) == pytest.approx(100 * accuracy_score(labels, guess))
    assert macro_f1(scores, labels) == pytest.approx(100 * f1_score(labels, guess, average="macro"))
    for k in (1, 5):
        expected = top_k_accuracy_score(labels, scores, k=k, labels=range(12))
        assert top_k_accuracy(scores, labels, k) == pytest.approx(100 * expected)


@pytest.mark.filterwarnings("ignore:y_pred contains classes")
def test_classes_without_examples_leave_the_class_means_alone(predictions: tuple[torch.Tensor, torch.Tensor]) -> None:
    scores, labels = predictions
    kept = (labels != 0) & (labels != 3)
    scores, labels = scores[kept], labels[kept]
    guess = scores.argmax(1)
    assert mean_class_accuracy(scores, labels) == pytest.approx(100 * balanced_accuracy_score(labels, guess))
    assert macro_f1(scores, labels) == pytest.approx(100 * f1_score(labels, guess, average="macro"))
