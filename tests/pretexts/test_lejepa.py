"""LeJEPA: its statistic against known values and its definition, its loss, and its collapse."""

import math

import pytest
import torch
from scipy.integrate import quad

from sslrun.backbones import build_backbone
from sslrun.data.examples import Batch
from sslrun.data.specs import ImageSpec
from sslrun.pretexts.base import pretexts
from sslrun.pretexts.lejepa import epps_pulley, invariance, sigreg
from sslrun.tasks.diagnostics import collapse


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


def build(**options):
    torch.manual_seed(0)
    backbone = build_backbone("mlp", {"width": 32, "depth": 2}, ImageSpec(16))
    cls = pretexts["lejepa"]
    return cls(cls.Options(**{"hidden": 32, "directions": 16, **options}), backbone)


def batch(count=32):
    return Batch(torch.randint(0, 256, (count, 3, 16, 16), generator=generator()).byte(), None)


@pytest.mark.parametrize("count", [4, 64])
def test_normal_samples_have_the_same_expected_statistic_whatever_their_number(count):
    expected = math.sqrt(2 * math.pi) * math.erf(3 / math.sqrt(2)) - math.sqrt(
        2 * math.pi / 3
    ) * math.erf(3 * math.sqrt(1.5))
    assert expected == pytest.approx(1.053, abs=1e-3)
    mean = epps_pulley(normal(count, 20_000), 17).mean().item()
    assert mean == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("count", [3, 50])
def test_equal_samples_have_a_statistic_that_grows_with_their_number(count):
    assert epps_pulley(torch.zeros(count, 1), 17).item() == pytest.approx(0.402 * count, rel=2e-3)


def test_the_statistic_equals_the_integral():
    samples = normal(6, 1) * 1.5 + 0.3

    def integrand(t):
        cosine = sum(math.cos(t * x) for x in samples[:, 0].tolist()) / 6
        sine = sum(math.sin(t * x) for x in samples[:, 0].tolist()) / 6
        gaussian = math.exp(-t * t / 2)
        return ((cosine - gaussian) ** 2 + sine**2) * gaussian

    assert epps_pulley(samples, 17).item() == pytest.approx(6 * quad(integrand, -3, 3)[0], abs=1e-3)


def test_sigreg_is_the_mean_over_views_and_directions():
    projections, directions = normal(3, 7, 4), torch.nn.functional.normalize(normal(5, 4, seed=1))
    statistics = [
        epps_pulley((view @ direction)[:, None], 17).item()
        for view in projections
        for direction in directions
    ]
    found = sigreg(projections, directions, 17).item()
    assert found == pytest.approx(sum(statistics) / 15)
    # One sample of all views is another loss.
    together = sigreg(projections.flatten(0, 1)[None], directions, 17).item()
    assert together != pytest.approx(found, rel=1e-3)


def test_sigreg_does_not_depend_on_signs_nor_in_expectation_on_rotations():
    projections = normal(1, 9, 4) @ torch.diag(torch.tensor([2.0, 1, 0.5, 0.1]).double())
    directions = torch.nn.functional.normalize(normal(20_000, 4, seed=1))
    plain = sigreg(projections, directions, 17)
    torch.testing.assert_close(sigreg(-projections, directions, 17), plain)
    rotation = torch.linalg.qr(normal(4, 4, seed=2)).Q
    rotated = sigreg(projections @ rotation, directions, 17)
    assert rotated.item() == pytest.approx(plain.item(), rel=0.02)
    assert rotated.item() != plain.item()


def test_invariance_is_the_distance_to_the_mean_of_the_global_views():
    projections = normal(4, 5, 3)
    total = 0.0
    for view in range(4):
        for row in range(5):
            center = (projections[0, row] + projections[1, row]) / 2
            total += float((projections[view, row] - center).square().sum())
    assert invariance(projections, 2).item() == pytest.approx(total / (4 * 5 * 3))
    assert invariance(projections[:1], 1) == 0


def test_the_loss_weighs_invariance_and_sigreg_by_lambda():
    pretext = build(sigreg=0.1, views=2, crops={"count": 3, "size": 8})
    views = pretext.views(batch(), generator())
    assert [view.shape[-1] for view in views] == [16, 16, 8, 8, 8, 16]  # then 16 dimensions
    torch.testing.assert_close(views[-1].norm(dim=1), torch.ones(16))
    output = pretext(views)
    parts = output.metrics
    expected = 0.9 * parts["invariance"] + 0.1 * parts["sigreg"]
    torch.testing.assert_close(output.loss.detach(), expected)
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in pretext.parameters())


def test_directions_are_new_at_each_step_and_come_from_the_generator():
    pretext = build()
    first, again, other = (pretext.views(batch(), generator(seed))[-1] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def trained(**options):
    """The last step's metrics, and features of the images, after a short training."""
    pretext = build(augmentation={"crop": [0.3, 1.0], "flip": 0.5}, **options)
    optimizer = torch.optim.AdamW(pretext.parameters(), lr=0.01)
    for step in range(25):
        output = pretext(pretext.views(batch(), generator(step)))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    return pretext, {name: value.item() for name, value in output.metrics.items()}


def test_without_sigreg_the_projections_collapse_and_the_collapse_is_named():
    pretext, metrics = trained(sigreg=0.0)
    assert "complete collapse of the projections" in pretext.diagnose(metrics)
    pretext, metrics = trained(sigreg=0.05)
    assert pretext.diagnose(metrics) is None
    with torch.no_grad():
        assert collapse(pretext.backbone(batch().inputs / 255).pooled) is None
    assert pretext.diagnose({"knn": 10.0}) is None  # before the first step


def test_lambda_is_a_share():
    with pytest.raises(ValueError, match="less than or equal to 1"):
        pretexts["lejepa"].Options(sigreg=1.5)
