"""Corruptions: stronger with severity, the same for the same seed, and equal to torchvision's where it has them."""

import itertools

import pytest
import torch
import torchvision.transforms.functional as TF

from sslrun.data.corruptions import BLOCK, CORRUPTIONS, corrupted
from sslrun.errors import UserError


@pytest.fixture(scope="module")
def images():
    """(40, 3, 32, 32): smooth, with an edge, as photographs have both."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(40, 3, 5, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, 32, mode="bicubic").clamp(0, 1)
    smooth[:, :, 7:19, 9:21] = 1 - smooth[:, :, 7:19, 9:21]
    return (smooth * 255).to(torch.uint8)


def distance(a, b):
    return (a.float() - b.float()).abs().mean().item()


@pytest.mark.parametrize("name", list(CORRUPTIONS))
def test_each_severity_is_further_from_the_image_and_its_shape_stays(images, name):
    made = [corrupted(images, name, severity) for severity in range(1, 6)]
    assert all(each.shape == images.shape and each.dtype == torch.uint8 for each in made)
    far = [distance(each, images) for each in made]
    assert all(after > 0.97 * before for before, after in itertools.pairwise(far)), far  # pixels fall on edges or not
    assert 0 < 1.2 * far[0] < far[4] < 150
    grey = corrupted(images[:3, :1], name, 3)
    assert grey.shape == (3, 1, 32, 32)


@pytest.mark.parametrize("name", list(CORRUPTIONS))
def test_the_same_arguments_give_the_same_bits_and_small_images_are_fine(images, name):
    small = images[:, :, :8, :8].contiguous()
    assert torch.equal(corrupted(small, name, 4), corrupted(small, name, 4))
    assert corrupted(images[:0], name, 2).shape == (0, 3, 32, 32)


def test_draws_differ_by_seed_by_image_and_by_block():
    same = torch.full((BLOCK + 2, 3, 8, 8), 128, dtype=torch.uint8)
    made = corrupted(same, "gaussian-noise", 5)
    assert not torch.equal(made, corrupted(same, "gaussian-noise", 5, seed=1))
    assert not torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[BLOCK])
    # Images of a later block change nothing in an earlier one.
    assert torch.equal(made[:BLOCK], corrupted(same[:BLOCK], "gaussian-noise", 5))
    assert made.float().std().item() == pytest.approx(25.5, rel=0.02)


def test_inversion_ends_in_the_negative_and_contrast_in_the_mean(images):
    assert torch.equal(corrupted(images, "inversion", 5), 255 - images)
    flat = corrupted(images, "contrast", 5).float()
    ratio = flat.std(dim=(2, 3)) / images.float().std(dim=(2, 3))
    torch.testing.assert_close(ratio, torch.full_like(ratio, 0.15), atol=0.01, rtol=0)


def test_turns_and_blurs_as_torchvision(images):
    made = corrupted(images, "rotation", 5)
    for before, after in zip(images, made, strict=True):
        by = [
            TF.rotate(before.float(), degrees, TF.InterpolationMode.BILINEAR)[:, 10:22, 10:22] for degrees in (30, -30)
        ]
        assert min((each - after[:, 10:22, 10:22]).abs().max().item() for each in by) < 2
    blurred = TF.gaussian_blur(images.float(), [9, 9], [1.0, 1.0])
    assert (corrupted(images, "gaussian-blur", 5).float() - blurred).abs().max() < 1.01


def test_fog_is_smooth_and_motion_is_along_a_line(images):
    black = torch.zeros(20, 3, 32, 32, dtype=torch.uint8)
    black[:, :, 16, 16] = 255
    fog = corrupted(torch.full_like(black, 90), "fog", 3).float()
    assert (fog[..., 1:] - fog[..., :-1]).abs().mean() < 0.2 * fog.std(dim=(1, 2, 3)).mean()
    lit = corrupted(black, "motion-blur", 5)[:, 0] > 0
    assert (lit.sum(dim=(1, 2)) < 40).all()
    assert lit[:, :, 17:].any()
    assert not lit[:, :, :15].any()


@pytest.mark.parametrize(
    ("name", "severity", "told"),
    [("gausian-noise", 1, "Did you mean 'gaussian-noise'"), ("fog", 0, "severity 0"), ("fog", 6, "severity 6")],
)
def test_a_mistake_is_told_in_a_line(images, name, severity, told):
    with pytest.raises(UserError, match=told):
        corrupted(images, name, severity)
