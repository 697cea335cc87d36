"""Two-layer linear networks against theorems and closed forms."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from sslrun.claims.theory import distortion
from sslrun.claims.theory.distortion import (
    Network,
    Problem,
    fit_head,
    make_table,
    plot,
    solve_flow,
    train_all,
)
from sslrun.claims.verdict import Inequality
from sslrun.errors import UserError
from sslrun.metric import Metric
from sslrun.results.address import Column, Row
from sslrun.results.formats import to_markdown


def problem(noise=0.0, seed=0, **sizes):
    return Problem.random(
        noise, seed=seed, **{"dimensions": 30, "features": 4, "span": 12, "examples": 24, **sizes}
    )


def plane(degrees, head):
    """Return two dimensions and one feature: truth (cos, sin), example (1, 0), perfect features."""
    angle = np.radians(degrees)
    truth = np.array([[np.cos(angle), np.sin(angle)]])
    return Problem(
        np.array([[1.0, 0.0]]), Network(truth, np.array([1.0])), Network(truth, np.array([head]))
    )


@pytest.mark.parametrize(("degrees", "head"), [(30, 0.1), (45, 2.0), (60, 0.5), (60, -1.5)])
def test_in_two_dimensions_fine_tuning_ends_at_the_conserved_quantitys_solution(degrees, head):
    # v² - b² stays v0² - cos², and at the end v b = cos: a quadratic equation for v².
    case = plane(degrees, head)
    cosine, sine = case.truth.features[0]
    constant = head**2 - cosine**2
    end = ((constant + (constant**2 + 4 * cosine**2) ** 0.5) / 2) ** 0.5
    end *= np.sign(head) if constant > 0 else 1
    tuned = solve_flow(case, case.start).end
    assert tuned.head[0] == pytest.approx(end, abs=1e-8)
    assert case.error_ood(tuned) == pytest.approx(sine**2 * (1 - end) ** 2, abs=1e-8)
    assert case.error_ood(fit_head(case)) < 1e-28


def test_the_flow_is_the_limit_of_gradient_descent():
    case = problem(0.1)
    end = solve_flow(case, case.start).end
    gaps = []
    for lr in (0.02, 0.01, 0.005):
        features, head = case.start.features.copy(), case.start.head.copy()
        for _ in range(round(60 / lr)):
            gradient = 2 * case.moment @ (features.T @ head - case.truth.weight)
            features, head = (
                features - lr * np.outer(head, gradient),
                head - lr * features @ gradient,
            )
        gaps.append(np.abs(features.T @ head - end.weight).max())
    assert gaps[0] < 0.05
    assert [gaps[0] / gaps[1], gaps[1] / gaps[2]] == pytest.approx([2, 2], rel=0.1)


def test_features_of_inputs_orthogonal_to_the_examples_never_change():
    case = problem(0.3)
    for trajectory in (solve_flow(case, case.start), solve_flow(case, fit_head(case))):
        in_span, orthogonal = case.feature_change(trajectory.end)
        assert in_span > 1e-3
        assert orthogonal < 1e-13
    # Equal to the bit if the span consists of axes: the gradient's other entries are exact zeros.
    examples = np.random.default_rng(0).standard_normal((24, 30)) * (np.arange(30) < 12)
    axes = Problem(examples, case.truth, case.start)
    end = solve_flow(axes, axes.start).end
    assert np.array_equal(end.features[:, 12:], axes.start.features[:, 12:])
    assert not np.array_equal(end.features[:, :12], axes.start.features[:, :12])


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_the_flow_conserves_the_balance_and_fits_the_examples(noise):
    case = problem(noise)
    trajectory = solve_flow(case, case.start)
    assert trajectory.drift < 1e-9
    assert np.abs(trajectory.end.head - case.start.head).max() > 0.1
    assert np.mean((case.examples @ (trajectory.end.weight - case.truth.weight)) ** 2) < 2e-20
    assert case.error_id(trajectory.end) < 1e-16


@pytest.mark.parametrize("seed", range(5))
def test_perfect_features_up_to_a_rotation(seed):
    case = problem(seed=seed)
    assert not np.allclose(case.start.features, case.truth.features, atol=0.1)
    assert case.feature_error < 1e-13
    trajectories = train_all(case)
    assert case.error_ood(trajectories["LP"].end) < 1e-25
    assert max(case.error_ood(network) for network in trajectories["LP-FT"].networks) < 1e-25
    assert case.bound > 1e-4
    assert min(case.error_ood(network) for network in trajectories["FT"].networks) > case.bound
    assert case.feature_change(trajectories["LP"].end) == (0, 0)


@pytest.mark.parametrize("seed", range(5))
def test_the_bound_holds_at_all_times_also_near_perfect_features(seed):
    case = problem(0.005, seed)
    assert 0 < case.feature_error < 0.02
    assert 0 < case.bound < problem(0.0, seed).bound * 1.01
    assert (
        min(case.error_ood(network) for network in solve_flow(case, case.start).networks)
        > case.bound
    )


def closed_form(case):
    """The lower bound of the OOD error as the paper states it (Theorem 3.2)."""
    cosine = np.linalg.svd(case.truth.features @ case.bases[1], compute_uv=False)[-1]
    norm, phi = np.linalg.norm(case.truth.weight), case.head_error
    aligned = min(phi, phi**2 / norm) / len(case.truth.head) ** 0.5
    return max(0.0, cosine * aligned / (1 + norm) ** 2 - case.feature_error) ** 2


def end_of_one_feature(case):
    """The OOD error that FT ends at with k = 1, by what the flow conserves.

    v² - |P b|² stays as it is, v P b = P w* at the end, and b outside S stays as it is. The head
    keeps its sign if v² > |P b|²; else P b never vanishes, and the head ends with the features'
    sign.
    """
    (features,), (head,) = case.start.features, case.start.head
    inside, outside = case.bases
    constant = head**2 - np.sum((inside.T @ features) ** 2)
    square = constant**2 + 4 * np.sum((inside.T @ case.truth.weight) ** 2)
    end = ((constant + square**0.5) / 2) ** 0.5
    kept, truth = outside.T @ features, outside.T @ case.truth.weight
    end *= np.sign(head if constant > 0 else features @ case.truth.weight)
    return np.sum((end * kept - truth) ** 2)


def draw(features, seed, heads):
    """A random problem with random sizes; the theorem's condition k < m < d - k holds."""
    generator = np.random.default_rng([features, seed])
    span = int(generator.integers(features + 1, 9))
    return Problem.random(
        generator.choice([0, 0.001, 0.01, 0.05]),
        dimensions=int(generator.integers(span + features + 1, 20)),
        features=features,
        span=span,
        examples=4 * span,
        head=generator.choice(heads),
        seed=seed,
    )


def test_one_feature_ends_above_the_bound_and_sometimes_below_the_papers_formula():
    cases = [draw(1, seed, [0, 0.01, 0.3, 1, 2, 4]) for seed in range(150)]
    for case in cases[:4]:
        reached = case.error_ood(solve_flow(case, case.start).end)
        assert end_of_one_feature(case) == pytest.approx(reached, abs=1e-8)
    ends = np.array([end_of_one_feature(case) for case in cases])
    bounds = np.array([case.bound for case in cases])
    assert (ends >= bounds).all()
    assert (bounds > 0).mean() > 0.6  # it says something
    assert np.median((bounds / ends)[bounds > 0]) > 0.05
    formulas = np.array([closed_form(case) for case in cases])
    assert (ends < formulas).mean() > 0.01


@pytest.mark.parametrize("features", [1, 2, 3, 4])
def test_the_bound_holds_at_all_times_for_random_problems(features, monkeypatch):
    monkeypatch.setattr(distortion, "FITTED", 1e-10)
    bounds = []
    for seed in range(8):
        case = draw(features, seed, [0.3, 1, 2])
        errors = map(case.error_ood, solve_flow(case, case.start).networks)
        assert min(errors) >= case.bound
        bounds.append(case.bound)
    assert sum(bound > 0 for bound in bounds) >= 4


def test_the_papers_formula_is_no_bound_for_one_feature():
    case = plane(10, 0.0)
    end = case.error_ood(solve_flow(case, case.start).end)
    assert case.head_error == pytest.approx(1)
    assert closed_form(case) == pytest.approx((np.sin(np.radians(10)) / 4) ** 2)
    assert 0.4 * closed_form(case) < case.bound < end < 0.8 * closed_form(case)


def test_the_bound_is_the_solution_of_its_inequality():
    # In the plane, at 30 degrees: c = sin = 1/2, b = s = cos; h = 2e.
    case = plane(30, 0.1)
    assert case.head_error == pytest.approx(0.99**0.5)
    root, cosine = case.bound**0.5, 0.75**0.5
    head = 2 * root
    moved = root + head * (cosine**2 + (1 + head) ** 2) ** 0.5
    assert 2 * head + head**2 + 2 * cosine * moved + moved**2 == pytest.approx(0.99, abs=1e-9)
    # Nothing in it depends on how the features are turned, with their head.
    near = problem(0.002)
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((4, 4)))[0]
    turned = Problem(
        near.examples, near.truth, Network(turn @ near.start.features, turn @ near.start.head)
    )
    assert (turned.bound, turned.head_error) == pytest.approx(
        (near.bound, near.head_error), rel=1e-9
    )
    # No room for the features outside the span, or features far from perfect: it says nothing.
    assert problem(span=28, examples=40).bound == 0
    assert problem(0.7).bound == 0


def test_the_table_agrees_with_the_paper():
    results = make_table(
        seeds=range(3), noise={"good": 0.1}, dimensions=30, features=4, span=12, examples=24
    )
    assert [row.protocol for row in results.rows] == ["LP", "FT", "LP-FT"]
    ood, identical = (Column(metric=Metric(name)) for name in ("OOD error", "ID error"))
    worse = Inequality((Row("good", "FT"), ood), (Row("good", "LP"), ood))
    assert all(
        results.cells[worse.greater].values[seed] > results.cells[worse.lesser].values[seed]
        for seed in ("0", "1", "2")
    )
    assert (
        results.cells[Row("good", "LP"), identical].mean
        > 1e3 * results.cells[Row("good", "FT"), identical].mean
    )
    assert (
        results.cells[Row("good", "LP-FT"), ood].mean < results.cells[Row("good", "LP"), ood].mean
    )
    assert "conserves, drifted by at most" in to_markdown(results)


def test_a_flow_that_does_not_converge_is_an_error(monkeypatch):
    monkeypatch.setattr(distortion, "MAX_TIME", 0.1)
    with pytest.raises(
        UserError, match=r"does not fit the examples by time 0\.1; .*take more examples"
    ):
        solve_flow(problem(), problem().start)


def test_a_plot_is_drawn_or_its_absence_reported(tmp_path, monkeypatch):
    if importlib.util.find_spec("matplotlib") is not None:
        import matplotlib.figure

        honest, drawn = matplotlib.figure.Figure.savefig, []
        monkeypatch.setattr(
            matplotlib.figure.Figure,
            "savefig",
            lambda self, *a, **k: (drawn.append(self), honest(self, *a, **k)),
        )
        sizes = {"dimensions": 30, "features": 4, "span": 12, "examples": 24}
        assert plot(tmp_path / "a.png", 0.005, **sizes) == f"{tmp_path}/a.png: drawn"
        assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
        lines = {
            (axes.get_title(), line.get_label()): line.get_ydata()
            for axes in drawn[0].axes
            for line in axes.lines
        }
        bound = lines["OOD error", "lower bound of FT"][0]
        assert bound == pytest.approx(problem(0.005).bound)
        assert min(lines["OOD error", "FT"]) > bound > max(lines["OOD error", "LP, at its end"])
        assert max(lines["feature change", "FT, inputs orthogonal to S"]) < 1e-13
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "matplotlib isn't installed" in plot(Path("b.png"))
    assert not Path("b.png").exists()
