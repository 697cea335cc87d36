"""Collapse diagnostics on features that are healthy or collapsed by construction."""

import pytest
import torch

from sslrun.tasks.diagnostics import collapse, feature_std, rankme


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
