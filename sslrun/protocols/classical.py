"""Classical classifiers of scikit-learn on frozen features, on the CPU.

scikit-learn is imported at first use: the import takes a second, and no other protocol needs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sslrun.protocols.base import Bench, Scores, protocols
from sslrun.protocols.frozen import VectorProtocol
from sslrun.tasks.base import TaskOptions


class Candidates(NamedTuple):
    """One classifier with several values of its most important hyperparameter."""

    option: str
    """scikit-learn's name of the hyperparameter."""
    classifiers: Mapping[float, Any]
    """Value -> unfitted classifier, in the order of trial."""


class ClassicalFit(NamedTuple):
    """The scores of the chosen scikit-learn classifier, and how it was chosen."""

    scores: Tensor
    """(M, C) for the test examples; -inf for a class without training examples."""
    chosen: dict[str, float]
    """The hyperparameter with the highest validation accuracy (ties: the first)."""
    accuracy: float
    """Its validation accuracy, in percent."""


def _standardized(classifier: Any) -> Any:
    """Standardize each feature before the classifier."""
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), classifier)


def fit_best(
    candidates: Candidates,
    train: tuple[Tensor, Tensor],
    val: tuple[Tensor, Tensor],
    test_x: Tensor,
    classes: int,
    refit: tuple[Tensor, Tensor] | None = None,
) -> ClassicalFit:
    """Fit all candidates and use the one with the highest validation accuracy.

    `train` and `val` are inputs (N, ...) and class ids (N,). `test_x` has shape (M, ...). Inputs
    are flattened. `refit` holds the inputs and class ids that the best candidate is fitted to once
    more before the test.
    """
    x, x_val, x_test = (_as_rows(inputs) for inputs in (train[0], val[0], test_x))
    y, y_val = train[1].cpu().numpy(), val[1].cpu().numpy()
    from threadpoolctl import threadpool_limits

    best: tuple[float, Any, float] | None = None
    for value, classifier in candidates.classifiers.items():
        # Without this limit, BLAS starts a thread per core of the machine; with other workers the
        # threads would wait for each other.
        with threadpool_limits(torch.get_num_threads()):
            fitted = classifier.fit(x, y)
            accuracy = 100 * fitted.score(x_val, y_val)
        if best is None or accuracy > best[0]:
            best = accuracy, fitted, value
    assert best is not None
    accuracy, fitted, chosen = best
    if refit is not None:
        with threadpool_limits(torch.get_num_threads()):
            fitted = fitted.fit(_as_rows(refit[0]), refit[1].cpu().numpy())
    scores = torch.full((len(x_test), classes), -torch.inf)
    scores[:, torch.from_numpy(fitted.classes_)] = _scores(fitted, x_test)
    return ClassicalFit(scores, {candidates.option: chosen}, accuracy)


def _as_rows(inputs: Tensor) -> Any:
    """Flatten inputs (N, ...) to a NumPy array (N, D) float32."""
    return inputs.flatten(1).float().cpu().numpy()


def _scores(fitted: Any, x: Any) -> Tensor:
    """Compute scores (M, C) float32 for the classes that a fitted classifier knows, in order."""
    if hasattr(fitted, "predict_proba"):
        return torch.as_tensor(fitted.predict_proba(x), dtype=torch.float32)
    scores = torch.as_tensor(fitted.decision_function(x), dtype=torch.float32)
    # For two classes, a support vector machine returns only the score of the second one.
    return scores if scores.ndim == 2 else torch.stack([-scores, scores], dim=1)


class ClassicalProtocol(VectorProtocol):
    """Base class of scikit-learn's classifiers; with the backbone `pixels` they read raw pixels."""

    def candidates(self, count: int, seed: int) -> Candidates:
        """Return the unfitted classifiers to choose from, for `count` training examples."""
        raise NotImplementedError

    def chooses(self, options: TaskOptions) -> str | None:
        return "its hyperparameter"

    def classify(self, bench: Bench) -> Scores:
        """Fit all candidates, choose by validation accuracy, and score the tests."""
        train, val = bench.features("train"), bench.features("val")
        tests = [bench.vectors(split) for split in bench.tests]
        candidates = self.candidates(len(train[0]), bench.seed)
        refit = bench.features(bench.learned) if bench.refit else None
        fit = fit_best(candidates, train, val, torch.cat(tests), len(bench.task.classes), refit)
        metrics = {"val": {"accuracy": fit.accuracy}}
        outputs: tuple[Tensor, ...] = fit.scores.split([len(vectors) for vectors in tests])
        for split, scores in zip(bench.tests, outputs, strict=True):
            metrics[split] = bench.score(split, scores)
        return Scores(metrics, {"chosen": fit.chosen})


@protocols.register("nearest-neighbors")
class NearestNeighbors(ClassicalProtocol):
    """Classify the frozen features by k-nearest neighbors (scikit-learn); k by validation."""

    def candidates(self, count: int, seed: int) -> Candidates:
        from sklearn.neighbors import KNeighborsClassifier

        values = [k for k in (1, 5, 20) if k <= count]
        return Candidates(
            "n_neighbors", {k: _standardized(KNeighborsClassifier(n_neighbors=k)) for k in values}
        )


@protocols.register("logistic-regression")
class SklearnLogisticRegression(ClassicalProtocol):
    """Classify the frozen features by logistic regression (scikit-learn); C by validation."""

    def candidates(self, count: int, seed: int) -> Candidates:
        from sklearn.linear_model import LogisticRegression

        values = (1e-3, 1e-2, 1e-1, 1.0)
        return Candidates(
            "C", {c: _standardized(LogisticRegression(max_iter=1000, C=c)) for c in values}
        )


@protocols.register("random-forest")
class RandomForest(ClassicalProtocol):
    """Classify the frozen features by a random forest (scikit-learn); leaves by validation."""

    def candidates(self, count: int, seed: int) -> Candidates:
        """Forests of 300 trees, on features that are not standardized."""
        from sklearn.ensemble import RandomForestClassifier

        def forest(leaf: int) -> Any:
            return RandomForestClassifier(
                n_estimators=300, random_state=seed, n_jobs=-1, min_samples_leaf=leaf
            )

        return Candidates("min_samples_leaf", {leaf: forest(leaf) for leaf in (1, 5)})


@protocols.register("svm")
class SupportVectorMachine(ClassicalProtocol):
    """Classify the frozen features by an SVM with RBF kernel (scikit-learn); C by validation."""

    def candidates(self, count: int, seed: int) -> Candidates:
        from sklearn.svm import SVC

        return Candidates("C", {c: _standardized(SVC(C=c)) for c in (0.1, 1.0, 10.0)})
