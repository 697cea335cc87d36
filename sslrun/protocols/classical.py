"""Classical models of scikit-learn on frozen features, on the CPU.

scikit-learn is imported at first use: the import takes a second, and no other protocol needs it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from sslrun.errors import UserError
from sslrun.metric import Metric
from sslrun.protocols.base import Bench, Scores, protocols
from sslrun.protocols.frozen import VectorProtocol
from sslrun.protocols.logistic import ACCURACY
from sslrun.tasks.base import TaskOptions

Result = TypeVar("Result")


class Candidates(NamedTuple):
    """One classifier with several values of its most important hyperparameter."""

    option: str
    """scikit-learn's name of the hyperparameter."""
    classifiers: Mapping[float, Any]
    """Value -> unfitted classifier, in the order of trial."""


class ClassicalFit(NamedTuple):
    """The scores of the chosen scikit-learn model, and how it was chosen."""

    scores: Tensor
    """(M, C) for the test examples, -inf for a class without training examples; or numbers
    (M, 1)."""
    chosen: dict[str, float]
    """The hyperparameter with the best validation score (ties: the first)."""
    value: float
    """Its validation score."""


class Judge(NamedTuple):
    """How candidates are compared."""

    metric: Metric
    score: Callable[[Tensor], float] | None = None
    """Validation outputs (N, C) -> value of the metric; None: scikit-learn's own accuracy."""


def answering_signals(work: Callable[[], Result]) -> Result:
    """Return `work()`, computed in a thread of its own.

    Python answers signals in the main thread, between two steps of Python. A fit in C code has none
    for minutes, so the main thread waits beside it. A signal then ends the process, and the fit
    with it.
    """
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future.result()


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
    judge: Judge | None = None,
) -> ClassicalFit:
    """Fit all candidates and use the one with the best validation score.

    `train` and `val` are inputs (N, ...) and class ids (N,), or numbers (N,) if `classes` is 0.
    `test_x` has shape (M, ...). Inputs are flattened. `refit` holds the inputs and targets that the
    best candidate is fitted to once more before the test.
    """
    x, x_val, x_test = (_as_rows(inputs) for inputs in (train[0], val[0], test_x))
    y, y_val = train[1].cpu().numpy(), val[1].cpu().numpy()
    judge = judge or Judge(ACCURACY)
    from threadpoolctl import threadpool_limits

    best: tuple[float, Any, float] | None = None
    for value, classifier in candidates.classifiers.items():
        # Without this limit, BLAS starts a thread per core of the machine; with other workers the
        # threads would wait for each other.
        with threadpool_limits(torch.get_num_threads()):
            fitted = classifier.fit(x, y)
            if judge.score is None:
                score = 100 * fitted.score(x_val, y_val)
            else:
                score = judge.score(_outputs(fitted, x_val, classes))
        if best is None or judge.metric.gain(score, best[0]) > 0:
            best = score, fitted, value
    assert best is not None
    score, fitted, chosen = best
    if refit is not None:
        with threadpool_limits(torch.get_num_threads()):
            fitted = fitted.fit(_as_rows(refit[0]), refit[1].cpu().numpy())
    return ClassicalFit(_outputs(fitted, x_test, classes), {candidates.option: chosen}, score)


def _outputs(fitted: Any, x: Any, classes: int) -> Tensor:
    """Compute scores (M, C) of all classes, or numbers (M, 1) if `classes` is 0."""
    if not classes:
        return torch.as_tensor(fitted.predict(x), dtype=torch.float32)[:, None]
    scores = torch.full((len(x), classes), -torch.inf)
    scores[:, torch.from_numpy(fitted.classes_)] = _scores(fitted, x)
    return scores


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

    def regressors(self, seed: int) -> Candidates:
        """Return the unfitted models to choose from if labels are numbers; see `numbers`."""
        raise NotImplementedError

    def classify(self, bench: Bench) -> Scores:
        """Fit all candidates, choose by the validation score, and score the tests."""
        primary, numbers = bench.task.primary, bench.task.numbers
        train, val = self._learn(bench, "train"), bench.features("val")
        tests = bench.tests or ("val",)  # trials of a search have no tests
        vectors = [bench.vectors(split) for split in tests]
        candidates = (
            self.regressors(bench.seed) if numbers else self.candidates(len(train[0]), bench.seed)
        )
        refit = self._learn(bench, bench.learned) if bench.refit else None
        judge = Judge(ACCURACY)
        if primary.name in DIRECT:
            judge = Judge(primary, lambda outputs: bench.score("val", outputs)[primary.name])
        classes = len(bench.task.classes)
        fit = answering_signals(
            partial(fit_best, candidates, train, val, torch.cat(vectors), classes, refit, judge)
        )
        metrics = {"val": {judge.metric.name: fit.value}}
        outputs: tuple[Tensor, ...] = fit.scores.split(list(map(len, vectors)))
        for split, scores in zip(tests, outputs, strict=True):
            metrics[split] = bench.score(split, scores)
        return Scores(metrics, {"chosen": fit.chosen})

    @staticmethod
    def _learn(bench: Bench, split: str) -> tuple[Tensor, Tensor]:
        """The features of a split and its labels; of numbers (N, 1) those that are known, (M,).

        Raises UserError if there are several numbers for each example.
        """
        x, y = bench.features(split)
        if not bench.task.numbers:
            return x, y
        if y.shape[1] > 1:
            raise UserError(f"predicts one number, but there are {y.shape[1]} for each example")
        known = ~y[:, 0].isnan()
        return x[known], y[known, 0]


DIRECT = ("roc_auc", "mae", "rmse")
"""Metrics by which candidates are chosen; for any other task it is accuracy."""


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
    """Classify the frozen features by a random forest (scikit-learn); leaves by validation.

    Numbers are predicted by the mean of the trees.
    """

    numbers = True

    def candidates(self, count: int, seed: int) -> Candidates:
        """Forests of 300 trees, on features that are not standardized."""
        from sklearn.ensemble import RandomForestClassifier

        def forest(leaf: int) -> Any:
            return RandomForestClassifier(
                n_estimators=300, random_state=seed, n_jobs=-1, min_samples_leaf=leaf
            )

        return Candidates("min_samples_leaf", {leaf: forest(leaf) for leaf in (1, 5)})

    def regressors(self, seed: int) -> Candidates:
        """Forests of 300 trees; each split sees a third of the features (Breiman 2001)."""
        from sklearn.ensemble import RandomForestRegressor

        def forest(leaf: int) -> Any:
            return RandomForestRegressor(
                n_estimators=300,
                random_state=seed,
                n_jobs=-1,
                min_samples_leaf=leaf,
                max_features=1 / 3,
            )

        return Candidates("min_samples_leaf", {leaf: forest(leaf) for leaf in (1, 5)})


@protocols.register("svm")
class SupportVectorMachine(ClassicalProtocol):
    """Classify the frozen features by an SVM with RBF kernel (scikit-learn); C by validation."""

    def candidates(self, count: int, seed: int) -> Candidates:
        from sklearn.svm import SVC

        return Candidates("C", {c: _standardized(SVC(C=c)) for c in (0.1, 1.0, 10.0)})
