"""Metrics against scikit-learn."""

import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    f1_score,
    matthews_corrcoef,
    top_k_accuracy_score,
)

from sslrun.tasks import metrics
from sslrun.tasks.metrics import accuracy, macro_f1, mean_class_accuracy, top_k_accuracy


@pytest.fixture
def predictions() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(12, (300,), generator=generator) ** 2 // 12  # unbalanced
    scores = torch.randn(300, 12, generator=generator)
    scores[torch.arange(300), labels] += 1
    return scores, labels


def test_metrics_equal_those_of_scikit_learn(
    predictions: tuple[torch.Tensor, torch.Tensor],
) -> None:
    scores, labels = predictions
    guess = scores.argmax(1)
    assert accuracy(scores, labels) == pytest.approx(100 * accuracy_score(labels, guess))
    assert macro_f1(scores, labels) == pytest.approx(100 * f1_score(labels, guess, average="macro"))
    for k in (1, 5):
        expected = top_k_accuracy_score(labels, scores, k=k, labels=range(12))
        assert top_k_accuracy(scores, labels, k) == pytest.approx(100 * expected)


@pytest.mark.filterwarnings("ignore:y_pred contains classes")
def test_classes_without_examples_do_not_change_class_means(
    predictions: tuple[torch.Tensor, torch.Tensor],
) -> None:
    scores, labels = predictions
    kept = (labels != 0) & (labels != 3)
    scores, labels = scores[kept], labels[kept]
    guess = scores.argmax(1)
    assert mean_class_accuracy(scores, labels) == pytest.approx(
        100 * balanced_accuracy_score(labels, guess)
    )
    assert macro_f1(scores, labels) == pytest.approx(100 * f1_score(labels, guess, average="macro"))


def test_matthews_and_f1_equal_those_of_scikit_learn(
    predictions: tuple[torch.Tensor, torch.Tensor],
) -> None:
    scores, labels = predictions
    assert metrics.matthews(scores, labels) == pytest.approx(
        100 * matthews_corrcoef(labels, scores.argmax(1))
    )
    binary, guess = labels % 2, scores[:, :2].argmax(1)
    assert metrics.matthews(scores[:, :2], binary) == pytest.approx(
        100 * matthews_corrcoef(binary, guess)
    )
    assert metrics.f1(scores[:, :2], binary) == pytest.approx(100 * f1_score(binary, guess))
    constant = torch.tensor([[1.0, 0.0]]).repeat(len(labels), 1)
    assert metrics.matthews(constant, binary) == metrics.f1(constant, binary) == 0
    assert metrics.f1(constant, torch.zeros_like(binary)) == 0


def test_correlations_equal_those_of_scipy() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 26, (400,), generator=generator) / 5  # many ties, as STS-B has
    guess = (truth + torch.randn(400, generator=generator)).round(decimals=1)
    assert metrics.pearson(guess, truth) == pytest.approx(100 * pearsonr(guess, truth).statistic)
    assert metrics.spearman(guess, truth) == pytest.approx(100 * spearmanr(guess, truth).statistic)
    assert metrics.spearman(guess.exp(), truth) == pytest.approx(
        metrics.spearman(guess, truth), abs=1e-3
    )
    assert metrics.pearson(torch.ones(400), truth) == metrics.spearman(torch.ones(400), truth) == 0


def test_entities_match_by_span_and_type() -> None:
    truth = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-ORG", "B-ORG", "I-ORG"]]
    assert metrics.entities(truth, truth) == {
        "f1": 100,
        "precision": 100,
        "recall": 100,
        "accuracy": 100,
    }
    guess = [["B-PER", "I-PER", "O", "B-PER"], ["O", "B-ORG", "I-ORG", "I-ORG"]]
    # Correct: PER 0-2. Also predicted: PER 3-4, ORG 1-4. Missed: LOC 3-4, ORG 1-2, ORG 2-4.
    scores = metrics.entities(guess, truth)
    assert (scores["precision"], scores["recall"]) == (pytest.approx(100 / 3), 25)
    assert scores["f1"] == pytest.approx(200 / 7)
    assert scores["accuracy"] == 75
    # As in conlleval, an I after O or after another type begins an entity. A guess of only O
    # scores 0.
    without_b = [["I-PER", "I-PER", "O", "I-LOC"], ["O", "B-ORG", "B-ORG", "I-ORG"]]
    assert metrics.entities(without_b, truth)["f1"] == 100
    assert metrics.entities([["I-PER", "I-LOC"]], [["B-PER", "B-LOC"]])["f1"] == 100
    assert metrics.entities([["O"] * 4] * 2, truth)["f1"] == 0
    assert metrics.entities([["O"]], [["O"]])["f1"] == 0


def test_any_of_several_labels_is_correct_and_unlabeled_images_do_not_count(
    predictions: tuple[torch.Tensor, torch.Tensor],
) -> None:
    scores, labels = predictions
    alone = labels[:, None]
    assert metrics.multi_label_accuracy(scores, alone) == pytest.approx(accuracy(scores, labels))
    padded = torch.cat([alone, torch.full((300, 3), -1)], dim=1)
    assert metrics.multi_label_accuracy(scores, padded) == pytest.approx(accuracy(scores, labels))
    guess = scores.argmax(1)
    either = torch.stack([labels, guess], dim=1)
    assert metrics.multi_label_accuracy(scores, either) == 100
    padded[:100] = -1
    assert metrics.multi_label_accuracy(scores, padded) == pytest.approx(
        accuracy(scores[100:], labels[100:])
    )
