"""Properties of graphs: ROC-AUC, errors of numbers, unknown labels, heads in units, mistakes."""

import math

import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.metrics import roc_auc_score

from sslrun.data.specs import GraphSpec
from sslrun.errors import UserError
from sslrun.protocols.least_squares import RidgeRegression
from sslrun.protocols.logistic import LogisticOptions
from sslrun.protocols.neighbors import knn_regression
from sslrun.tasks.graph import GraphProperties
from sslrun.tasks.metrics import roc_auc

SPEC = GraphSpec((1,), (), 7)
NAN = math.nan


def task(classes=(), **options):
    return GraphProperties(GraphProperties.Options(**options), SPEC, classes)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_roc_auc_equals_scikit_learns_with_ties():
    scores = (draw(200) * 3).round()
    positive = draw(200, seed=1) + scores / 3 > 0.5
    expected = 100 * roc_auc_score(positive.numpy(), scores.numpy())
    assert roc_auc(scores, positive) == pytest.approx(expected, abs=1e-9)
    assert roc_auc(torch.tensor([1.0, 2.0]), torch.tensor([False, True])) == 100
    assert roc_auc(torch.zeros(10), torch.arange(10) < 3) == 50


def test_roc_auc_of_one_class_is_a_mistake_in_one_line():
    with pytest.raises(UserError, match=r"needs both classes, but all 5 .* task\.metric: accuracy"):
        task(("no", "yes")).measure(draw(5, 2), torch.ones(5).long())


def test_metrics_and_their_directions():
    numbers = task(unit="eV")
    assert [(m.name, m.better, m.unit) for m in numbers.metrics] == [
        ("mae", "lower", "eV"), ("rmse", "lower", "eV"),
    ]  # fmt: skip
    assert task(metric="rmse").primary.name == "rmse"
    assert task(("a", "b")).primary.name == "roc_auc"
    assert task(("a", "b"), metric="accuracy").primary.better == "higher"
    assert [metric.name for metric in task(("a", "b", "c")).metrics] == [
        "accuracy", "mean_class_accuracy",
    ]  # fmt: skip
    values = numbers.measure(torch.tensor([[1.0], [4.0]]), torch.tensor([[2.0], [2.0]]))
    assert values == {"mae": 1.5, "rmse": pytest.approx(math.sqrt(2.5))}


@pytest.mark.parametrize(
    ("classes", "options", "message"),
    [
        ((), {"metric": "roc_auc"}, "metric roc_auc does not suit these labels: .*mae, rmse"),
        (("a", "b"), {"metric": "mae"}, "metric mae does not suit"),
        (("a", "b", "c"), {"metric": "roc_auc"}, "metric roc_auc does not suit"),
        (("a", "b", "c"), {"columns": 2}, "2 columns of labels need two classes, not 3"),
    ],
)
def test_unsuitable_options_are_one_line(classes, options, message):
    with pytest.raises(UserError, match=message):
        task(classes, **options)


def test_a_wrong_number_of_columns_is_one_line():
    with pytest.raises(UserError, match=r"have 3 labels each: set task\.columns to 3, not 1"):
        task().fit_labels(draw(4, 3))
    with pytest.raises(UserError, match="label column 1 is empty"):
        task(columns=2).fit_labels(torch.tensor([[1.0, NAN], [2.0, NAN]]))
    with pytest.raises(ValueError, match="loss: l1 is for numbers"):
        GraphProperties.Options(loss="l1", metric="accuracy")


def test_unknown_labels_do_not_count_in_loss_metrics_and_scale():
    labels = torch.tensor([[1.0, NAN], [3.0, 10.0], [5.0, NAN], [NAN, 30.0]])
    numbers = task(columns=2, loss="l2")
    numbers.fit_labels(labels)
    assert numbers.mean.tolist() == [3, 20]
    assert numbers.deviation.tolist() == [pytest.approx(math.sqrt(8 / 3)), 10]
    outputs = torch.zeros(4, 2, requires_grad=True)
    loss = numbers.loss(outputs, labels)
    assert loss.item() == pytest.approx((35 / (8 / 3) + 1000 / 100) / 5)
    loss.backward()
    assert torch.equal(outputs.grad == 0, labels.isnan())
    assert numbers.measure(torch.zeros(4, 2), labels)["mae"] == pytest.approx((3 + 20) / 2)

    truth = torch.tensor([[1.0, 1.0], [0.0, NAN], [NAN, 1.0], [1.0, 1.0]])
    scores = torch.tensor([[2.0, 1.0], [3.0, 1.0], [9.0, 1.0], [4.0, 1.0]])
    several = task(("0", "1"), columns=2)
    assert several.measure(scores, truth)["roc_auc"] == 50  # the second column has one class only
    assert not several.linear
    with pytest.raises(UserError, match="no label column has both classes"):
        several.measure(scores, torch.ones(4, 2))
    outputs = torch.zeros(4, 2, requires_grad=True)
    several.loss(outputs, truth).backward()
    assert torch.equal(outputs.grad == 0, truth.isnan())


def test_heads_return_units_and_a_saved_head_keeps_them():
    numbers = task()
    labels = draw(50) * 7 + 100
    numbers.fit_labels(labels)
    head = numbers.head(4).eval()
    vectors = draw(50, 4)
    raw = torch.nn.functional.linear(vectors, head.weight, head.bias)
    torch.testing.assert_close(
        head(vectors), raw * labels.std(correction=0) + labels.mean(), rtol=1e-5, atol=1e-4
    )
    fresh = task().head(4)
    fresh.load_state_dict(head.state_dict())
    assert torch.equal(fresh.eval()(vectors), head(vectors))
    linear = torch.nn.Linear(4, 1)
    torch.testing.assert_close(
        numbers.as_head(linear)(vectors), linear(vectors), rtol=1e-5, atol=1e-4
    )


def test_the_scale_of_labels_does_not_change_learning():
    losses = []
    for scale in (1.0, 1000.0):
        numbers = task(loss="l2")
        labels = draw(50) * scale + 5 * scale
        numbers.fit_labels(labels)
        torch.manual_seed(0)
        head = numbers.head(4)
        losses.append(numbers.loss(head(draw(50, 4)), labels).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_probe_of_numbers_is_ridge_regression_on_known_labels():
    x = draw(60, 5) * torch.tensor([1.0, 10, 0.1, 3, 1])
    y = torch.stack([x @ draw(5, seed=1) + 30, draw(60, seed=2)], dim=1)
    y[::3, 1] = NAN
    head = RidgeRegression(LogisticOptions()).fit_one((x, y), 0, 0.1)
    for column, rows in enumerate(~y.isnan().T):
        known = x[rows].double()
        mean, deviation = known.mean(dim=0), known.std(dim=0, correction=0) + 1e-5
        reference = Ridge(alpha=0.1 * int(rows.sum()))
        reference.fit(((known - mean) / deviation).numpy(), y[rows, column].numpy())
        expected = torch.from_numpy(reference.predict(((x.double() - mean) / deviation).numpy()))
        torch.testing.assert_close(head(x)[:, column].double(), expected, rtol=1e-4, atol=1e-4)


def test_the_strength_with_the_lowest_error_is_chosen():
    x, noise = draw(300, 40), draw(300, seed=1)
    y = x[:, :1] + 3 * noise[:, None]
    numbers = task()
    fit = RidgeRegression(LogisticOptions(l2_min=1e-6, l2_max=1e3)).fit(
        (x[:60], y[:60]),
        (x[60:], y[60:]),
        0,
        lambda outputs, targets: numbers.measure(outputs, targets)["mae"],
        numbers.primary,
    )
    assert fit.scores[fit.l2] == min(fit.scores.values()) < max(fit.scores.values())
    assert fit.l2 > 1e-6


def test_neighbors_predict_weighted_means_of_known_numbers():
    bank = torch.eye(4)
    numbers = torch.tensor([[1.0, 1.0], [3.0, NAN], [5.0, 9.0], [7.0, NAN]])
    query = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 1.0, 0.0, 1.0]])
    predicted = knn_regression(bank, numbers, query, 2, 0.1)
    torch.testing.assert_close(predicted, torch.tensor([[2.0, 1.0], [5.0, 5.0]]))
