"""Classifiers on cached features, compared with naive loops and scikit-learn."""

import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression as SklearnLogistic
from sklearn.linear_model import Ridge
from torch import Tensor, nn

from sslrun.backbones.base import Backbone, Features
from sslrun.data.examples import Batch, TensorExamples
from sslrun.data.specs import ImageSpec
from sslrun.errors import UserError
from sslrun.metric import Metric
from sslrun.protocols import logistic as logistic_module
from sslrun.protocols import neighbors, protocols
from sslrun.protocols.classical import fit_best
from sslrun.protocols.features import extract
from sslrun.protocols.least_squares import least_squares
from sslrun.protocols.logistic import LogisticOptions, LogisticRegression, logistic
from sslrun.protocols.neighbors import KnnOptions, weighted_knn
from sslrun.registry import Options

CLASSICAL = ("nearest-neighbors", "logistic-regression", "random-forest", "svm")
CPU = torch.device("cpu")


class Tiny(Backbone):
    def __init__(self) -> None:
        super().__init__(None, ImageSpec(4))
        self.width = 5
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(48, 5), nn.BatchNorm1d(5), nn.Dropout(0.5))

    def forward(self, inputs: Tensor) -> Features:
        return Features(self.net(inputs))


def as_float(batch: Batch) -> Tensor:
    return batch.inputs.float() / 255


def examples(count: int, labels: bool = True) -> TensorExamples:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, 4, 4), generator=generator, dtype=torch.uint8)
    return TensorExamples(
        images, torch.arange(count) % 3 if labels else None, ("a", "b", "c"), ImageSpec(4)
    )


def clusters(
    count: int, width: int, classes: int, spread: float = 1.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return overlapping Gaussian classes, off center, with unequal variances."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(
        classes, width, generator=torch.Generator().manual_seed(99), dtype=torch.float64
    )
    y = torch.randint(classes, (count,), generator=generator)
    x = centers[y] + spread * torch.randn(count, width, generator=generator, dtype=torch.float64)
    return 3 + x * torch.logspace(0, -1.5, width, dtype=torch.float64), y


def test_features_are_computed_in_eval_mode_independently_of_the_batch() -> None:
    backbone, data = Tiny(), examples(10)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    x = extract(backbone, data, as_float, CPU, batch=4)
    assert backbone.training
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, before[name]), name
    backbone.eval()
    torch.testing.assert_close(x, backbone(data.inputs.float() / 255).pooled)
    # The features can be trained on.
    nn.Linear(5, 3)(x).sum().backward()


def test_features_are_float32_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        x = extract(Tiny(), examples(6), as_float, CPU, batch=6)
    assert x.dtype == torch.float32


def test_unlabeled_examples_have_features() -> None:
    assert extract(Tiny(), examples(6, labels=False), as_float, CPU, batch=4).shape == (6, 5)


def test_a_diverged_backbone_is_reported() -> None:
    backbone = Tiny()
    nn.init.constant_(backbone.net[1].weight, torch.nan)
    with pytest.raises(UserError, match="not finite"):
        extract(backbone, examples(4), as_float, CPU, batch=4)


def test_weighted_knn_equals_the_vote_of_wu_et_al(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbors, "CHUNK", 1)  # several chunks of 256 rows
    train_x, train_y = clusters(60, 8, 4)
    test_x, _ = clusters(300, 8, 4, seed=1)
    k, temperature = 7, 0.1
    scores = weighted_knn(train_x, train_y, test_x, k, temperature, 4)
    for query, score in zip(test_x, scores, strict=True):
        similarities = [float(F.cosine_similarity(query, other, dim=0)) for other in train_x]
        votes = torch.zeros(4, dtype=torch.float64)
        for i in sorted(range(60), key=lambda i: -similarities[i])[:k]:
            votes[train_y[i]] += torch.tensor(
                similarities[i] / temperature, dtype=torch.float64
            ).exp()
        torch.testing.assert_close(score, votes / votes.sum())


def test_weighted_knn_is_capped_at_the_examples_and_stays_finite() -> None:
    train_x, train_y = clusters(5, 8, 3)
    scores = weighted_knn(train_x.float(), train_y, train_x.float(), 200, 1e-3, 3)
    assert torch.equal(scores.argmax(1), train_y)
    torch.testing.assert_close(scores.sum(1), torch.ones(5))


def sklearn_logistic(x: Tensor, y: Tensor, l2: float) -> tuple[Tensor, Tensor]:
    """Return scikit-learn's solution of the same objective for raw features."""
    mean, deviation = x.mean(), x.std()
    model = SklearnLogistic(C=1 / (l2 * len(x)), tol=1e-10, max_iter=5000).fit(
        ((x - mean) / deviation).numpy(), y
    )
    weight = torch.from_numpy(model.coef_) / deviation
    return weight, torch.from_numpy(model.intercept_) - weight.sum(1) * mean


def test_logistic_regression_equals_scikit_learns_for_every_strength() -> None:
    x, y = clusters(200, 12, 4)
    strengths = [1e-3, 1e-1, 10.0]
    weights, biases = logistic(x, y, 4, strengths, iterations=500, tolerance=1e-10)
    for l2, weight, bias in zip(strengths, weights, biases, strict=True):
        expected_weight, expected_bias = sklearn_logistic(x, y, l2)
        torch.testing.assert_close(weight, expected_weight, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(bias, expected_bias, rtol=1e-4, atol=1e-6)


def objective(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, l2: float) -> float:
    loss = F.cross_entropy(x @ weight.double().T + bias.double(), y)
    return float(loss + l2 / 2 * (weight.double() * x.std()).square().sum())


def test_logistic_regression_in_float32_reaches_the_default_tolerance() -> None:
    x, y = clusters(200, 12, 4)
    strengths = [1e-4, 1e-2, 1.0]
    for l2, weight, bias in zip(strengths, *logistic(x.float(), y, 4, strengths), strict=True):
        best = objective(x, y, *sklearn_logistic(x, y, l2), l2)
        assert objective(x, y, weight, bias, l2) == pytest.approx(best, abs=1e-6)


@pytest.mark.filterwarnings("ignore:lbfgs failed to converge")
def test_few_iterations_are_enough_for_features_of_very_unequal_variance() -> None:
    x, y = clusters(300, 20, 3, spread=3.0)
    x = (x - x.mean(0)) * torch.logspace(0, -2.5, 20, dtype=torch.float64)
    best, few = (
        objective(x, y, *(part[0] for part in logistic(x, y, 3, [1e-6], n, tolerance=1e-9)), 1e-6)
        for n in (2000, 30)
    )
    plain = SklearnLogistic(C=1e6 / 300, max_iter=30).fit((x / x.std()).numpy(), y)
    slow = objective(
        x, y, torch.from_numpy(plain.coef_) / x.std(), torch.from_numpy(plain.intercept_), 1e-6
    )
    assert 0 <= few - best < 1e-4
    assert slow - best > 100 * (few - best)


def test_logistic_regression_does_not_depend_on_how_the_rows_are_split(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, y = clusters(700, 6, 3)
    whole = logistic(x, y, 3, [1e-2, 1.0])
    monkeypatch.setattr(logistic_module, "CHUNK", 1)
    torch.testing.assert_close(whole, logistic(x, y, 3, [1e-2, 1.0]))


@pytest.mark.parametrize(
    "x", [torch.ones(30, 4), torch.randn(30, 40, generator=torch.Generator().manual_seed(0))]
)
def test_logistic_regression_stays_finite(x: Tensor) -> None:
    """Constant features, fewer examples than features, and a class without examples."""
    weights, biases = logistic(x, torch.arange(30) % 2, 3, [1e-6, 1.0])
    assert weights.isfinite().all()
    assert biases.isfinite().all()
    assert ((x @ weights[0].T + biases[0]).argmax(1) < 2).all()


def test_the_strength_with_the_best_validation_score_is_chosen() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = clusters(40, 2, 3)
    val_x, val_y = clusters(500, 2, 3, seed=1)
    x, val_x = (
        torch.cat([t, torch.randn(len(t), 60, generator=generator)], dim=1) for t in (x, val_x)
    )
    fit = LogisticRegression(LogisticOptions(l2_min=1e-6, l2_max=1e2, l2_count=9)).fit(
        (x, y), (val_x, val_y), 3
    )
    assert list(fit.scores) == pytest.approx([10.0**e for e in range(-6, 3)])
    assert fit.scores[fit.l2] == max(fit.scores.values()) > fit.scores[1e-6]
    with torch.no_grad():
        hits = fit.head(val_x).argmax(1) == val_y
    assert 100 * hits.double().mean() == pytest.approx(fit.scores[fit.l2])


def test_ties_choose_the_strongest_regularization_and_scores_are_configurable() -> None:
    x, y = clusters(40, 6, 3)
    fit = LogisticRegression().fit((x, y), (x, y), 3, score=lambda scores, labels: 1.0)
    assert fit.l2 == max(fit.scores) == pytest.approx(10)


def test_the_strength_with_the_lowest_score_is_chosen_if_lower_is_better() -> None:
    x, y = clusters(40, 6, 3)
    error, options = Metric("error", better="lower"), LogisticOptions(l2_count=5)

    def score(scores: Tensor, labels: Tensor) -> float:
        return F.cross_entropy(scores, labels).item()

    lowest = LogisticRegression(options).fit((x, y), (x, y), 3, score, error)
    highest = LogisticRegression(options).fit((x, y), (x, y), 3, score)
    assert lowest.scores[lowest.l2] == min(lowest.scores.values())
    assert highest.scores[highest.l2] == max(highest.scores.values())
    assert lowest.l2 < highest.l2


def test_the_solver_does_not_change_the_callers_precision() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        logistic(*clusters(20, 3, 2), 2, [1.0])
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_bounds_in_the_wrong_order_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"l2_min .* is above l2_max"):
        LogisticOptions(l2_min=1.0, l2_max=0.1)
    assert LogisticOptions(l2_min=0.1, l2_count=1).strengths() == pytest.approx([0.1])
    assert KnnOptions().k == 20


def classical(
    model: str, x: Tensor, y: Tensor, val: tuple[Tensor, Tensor], test_x: Tensor, classes: int
):
    candidates = protocols[model](Options()).candidates(len(x), 0)
    return fit_best(candidates, (x, y), val, test_x, classes)


@pytest.mark.parametrize("model", CLASSICAL)
def test_classical_classifiers_learn_and_keep_the_class_order(model: str) -> None:
    x, y = clusters(120, 6, 3, spread=0.5)
    test_x, test_y = clusters(60, 6, 3, spread=0.5, seed=1)
    fit = classical(model, x, 2 * y, (x[:30], 2 * y[:30]), test_x, classes=6)
    assert fit.scores.shape == (60, 6)
    assert torch.isneginf(fit.scores[:, 1::2]).all()
    assert (fit.scores.argmax(1) == 2 * test_y).double().mean() > 0.8
    assert fit.value > 80
    assert fit.chosen


def test_svm_scores_of_two_classes_are_in_class_order() -> None:
    x, y = clusters(80, 6, 2, spread=0.5)
    fit = classical("svm", x, y, (x, y), x, classes=2)
    assert (fit.scores.argmax(1) == y).double().mean() > 0.9


def test_the_solver_shortens_overshooting_steps_for_each_function_separately() -> None:
    """Minimize log cosh with a Hessian 100 times too small, so that full steps diverge."""
    centers = torch.tensor([[0.0], [5.0], [-40.0]], dtype=torch.float64)
    sharpness = torch.tensor([[1.0], [0.1], [3.0]], dtype=torch.float64)

    def value_and_gradient(points: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        offset = (points - centers[which]) * sharpness[which]
        return offset.cosh().log().sum(1), sharpness[which] * offset.tanh()

    start = torch.zeros(3, 1, dtype=torch.float64)
    minima = logistic_module._lbfgs(
        value_and_gradient, start, torch.full_like(start, 100.0), iterations=50, tolerance=1e-9
    )
    torch.testing.assert_close(minima, centers, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("count", "width"), [(60, 8), (6, 40)])
def test_few_shot_least_squares_equal_ridge_regression_onto_signs(count: int, width: int) -> None:
    x, y = clusters(count, width, 3)
    y[:3] = torch.arange(3)
    signs = torch.where(y[:, None] == torch.arange(3), 1.0, -1.0).double()
    deviation = x.std(dim=0, correction=0) + 1e-5
    reference = Ridge(7.5).fit(((x - x.mean(0)) / deviation).numpy(), signs.numpy())
    queries, _ = clusters(20, width, 3, seed=1)
    expected = torch.from_numpy(reference.predict(((queries - x.mean(0)) / deviation).numpy()))
    head = least_squares(x, y, 3, 7.5)
    torch.testing.assert_close(head(queries), expected, atol=1e-10, rtol=1e-10)
    # The normal equations with an unregularized column of ones.
    z = torch.cat([(x - x.mean(0)) / deviation, torch.ones(count, 1, dtype=torch.float64)], dim=1)
    penalty = torch.diag(torch.tensor([7.5] * width + [0.0], dtype=torch.float64))
    solved = torch.linalg.solve(z.T @ z + penalty, z.T @ signs)
    torch.testing.assert_close(
        head.weight, (solved[:-1] / deviation[:, None]).T, atol=1e-9, rtol=1e-9
    )
    # float32 input is solved in float64, too.
    torch.testing.assert_close(
        least_squares(x.float(), y, 3, 7.5)(queries.float()), expected.float(), atol=1e-4, rtol=0
    )


def test_a_constant_feature_changes_no_score() -> None:
    x, y = clusters(30, 5, 3)
    constant = torch.cat([x, torch.full((30, 1), 4.0, dtype=torch.float64)], dim=1)
    torch.testing.assert_close(
        least_squares(constant, y, 3, 1.0)(constant), least_squares(x, y, 3, 1.0)(x)
    )
