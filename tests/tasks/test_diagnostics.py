"""Collapse diagnostics on features that are healthy or collapsed by construction."""

import math

import pytest
import torch

from sslrun.tasks.diagnostics import COSTS, alpha_req, collapse, feature_std, lidar, rankme


def gaussian(count: int, width: int) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(0))


def test_rankme_is_the_exponential_of_the_singular_values_entropy() -> None:
    features = gaussian(200, 20).double() * torch.linspace(1, 0.01, 20)
    shares = torch.linalg.svdvals(features)
    shares = shares / shares.sum() + 1e-7
    assert rankme(features) == pytest.approx(
        float((-(shares * shares.log()).sum()).exp()), rel=1e-5
    )


def test_rankme_of_orthogonal_features_is_their_number() -> None:
    assert rankme(torch.eye(64)[:, :16]) == pytest.approx(16, rel=1e-4)
    assert rankme(gaussian(500, 1) @ gaussian(1, 64)) == pytest.approx(1, rel=1e-3)


def test_feature_std_is_one_over_root_width_for_evenly_spread_directions() -> None:
    assert feature_std(gaussian(4000, 128)) == pytest.approx(128**-0.5, rel=0.01)
    assert feature_std(7 * torch.ones(100, 128)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("width", [16, 512])
def test_collapse_is_named_by_its_kind(width: int) -> None:
    healthy = gaussian(1000, width)
    line = gaussian(1000, 1) @ torch.ones(1, width)
    assert collapse(healthy) is None
    assert collapse(healthy.relu()) is None
    assert "complete" in (collapse(torch.ones(1000, width) + 1e-4 * healthy) or "")
    assert "dimensional" in (collapse(line + 1e-4 * healthy) or "")
    assert "complete" in (collapse(torch.zeros(1000, width)) or "")


def test_features_of_ten_points_are_not_called_collapsed() -> None:
    assert collapse(gaussian(10, 512).repeat(50, 1)) is None


def naive_lidar(views: torch.Tensor, delta: float, epsilon: float) -> float:
    """The formula of the paper, with loops and an inverse matrix root."""
    count, members, width = views.shape
    centers = [image.mean(dim=0) for image in views]
    center = sum(centers) / count
    between = sum(torch.outer(mean - center, mean - center) for mean in centers) / count
    within = delta * torch.eye(width, dtype=torch.float64)
    for image, mean in zip(views, centers, strict=True):
        for view in image:
            within += torch.outer(view - mean, view - mean) / (count * members)
    values, vectors = torch.linalg.eigh(within)
    root = vectors @ torch.diag(values**-0.5) @ vectors.T
    eigenvalues = torch.linalg.eigvalsh(root @ between @ root).clamp_min(0)
    shares = eigenvalues / eigenvalues.sum() + epsilon
    return math.exp(-sum(share * math.log(share) for share in shares.tolist()))


@pytest.mark.parametrize("count", [5, 40])
def test_lidar_is_the_effective_rank_of_the_linear_discriminants(count: int) -> None:
    scale = torch.linspace(2, 0.1, 12)
    images = gaussian(count, 12) * scale
    views = (images[:, None] + 0.3 * gaussian(count * 4, 12).view(count, 4, 12)).double()
    assert lidar(views, delta=1e-3, epsilon=1e-7) == pytest.approx(
        naive_lidar(views, 1e-3, 1e-7),
        rel=1e-4,  # epsilon for further zeros
    )


def test_lidar_does_not_count_directions_in_which_views_differ_as_images_do() -> None:
    signal = torch.zeros(600, 10, 16)
    signal[:, :, :4] = gaussian(600, 4)[:, None]
    noise = gaussian(6000, 16).view(600, 10, 16)
    noise[:, :, :4] *= 0.05
    views = signal + noise
    assert rankme(views[:, 0]) > 14
    assert lidar(views) == pytest.approx(4, abs=0.2)
    assert lidar(torch.ones(20, 3, 8)) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_alpha_req_is_the_exponent_of_a_constructed_spectrum(alpha: float) -> None:
    directions, _ = torch.linalg.qr(gaussian(400, 120).double())
    directions, _ = torch.linalg.qr(directions - directions.mean(dim=0))
    eigenvalues = torch.arange(1, 121, dtype=torch.float64) ** -alpha
    eigenvalues[:3] *= 50  # the first three are not fitted
    features = directions * eigenvalues.sqrt() + 7.0
    assert alpha_req(features) == pytest.approx(alpha, rel=1e-6)
    assert alpha_req(features.float()) == pytest.approx(alpha, rel=1e-3)


def test_alpha_req_is_undefined_for_few_directions() -> None:
    assert alpha_req(gaussian(100, 10)) is None
    assert alpha_req(gaussian(100, 11)) is not None
    assert alpha_req(gaussian(100, 5) @ gaussian(5, 64)) is None
    assert alpha_req(torch.zeros(100, 64)) is None


def test_costs_are_lower_for_better_features() -> None:
    assert COSTS["alpha_req"](0.9) < COSTS["alpha_req"](1.2) < COSTS["alpha_req"](0.7)
    for name in ("rankme", "lidar", "knn"):
        assert COSTS[name](3.0) < COSTS[name](2.0)
    assert COSTS["held_out_loss"](2.0) < COSTS["held_out_loss"](3.0)
