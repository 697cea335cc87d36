"""Corruptions: monotonic in severity, deterministic, and equal to torchvision's."""

import itertools

import pytest
import torch
import torchvision.transforms.functional as TF

from sslrun.data.examples import TensorExamples
from sslrun.data.image.corruptions import CORRUPTIONS, CorruptedExamples, corrupt
from sslrun.data.specs import ImageSpec
from sslrun.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images():
    """Images (40, 3, 32, 32): smooth with an edge, as in photographs."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(40, 3, 5, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, 32, mode="bicubic").clamp(0, 1)
    smooth[:, :, 7:19, 9:21] = 1 - smooth[:, :, 7:19, 9:21]
    return (smooth * 255).to(torch.uint8)


def corrupt_images(images, name, severity, seed=0):
    return corrupt(images, name, severity, torch.Generator().manual_seed(seed))


def distance(a, b):
    return (a.float() - b.float()).abs().mean().item()


@pytest.mark.parametrize("name", list(CORRUPTIONS))
def test_each_severity_is_further_from_the_image_and_keeps_its_shape(images, name):
    corrupted = [corrupt_images(images, name, severity) for severity in range(1, 6)]
    assert all(image.shape == images.shape and image.dtype == torch.uint8 for image in corrupted)
    far = [distance(image, images) for image in corrupted]
    assert all(after > 0.97 * before for before, after in itertools.pairwise(far)), (
        far
    )  # whether a pixel falls on an edge depends on rounding
    assert 0 < 1.2 * far[0] < far[4] < 150
    gray_images = corrupt_images(images[:3, :1], name, 3)
    assert gray_images.shape == (3, 1, 32, 32)


@pytest.mark.parametrize("name", list(CORRUPTIONS))
def test_corruptions_are_deterministic_and_accept_small_images(images, name):
    small = images[:, :, :8, :8].contiguous()
    assert torch.equal(corrupt_images(small, name, 4), corrupt_images(small, name, 4))


def test_each_example_has_its_own_corruption_which_is_always_the_same():
    same = torch.full((40, 3, 8, 8), 128, dtype=torch.uint8)
    plain = TensorExamples(same, torch.arange(40) % 2, ("a", "b"), ImageSpec(8))
    shifted = CorruptedExamples(plain, "gaussian-noise", 5)
    places = torch.arange(40).split(16)
    first, again = (
        torch.cat([batch.inputs for batch in shifted.batches(places, CPU)]) for _ in range(2)
    )
    assert torch.equal(first, again)
    assert (
        len({image.numpy().tobytes() for image in first}) == 40
    )  # no draw is used twice, within or across batches
    assert first.float().std().item() == pytest.approx(25.5, rel=0.05)
    assert [batch.labels.tolist() for batch in shifted.batches(places[:1], CPU)] == [
        plain.labels[:16].tolist()
    ]
    weaker = next(CorruptedExamples(plain, "gaussian-noise", 1).batches(places, CPU)).inputs
    assert 0 < weaker.float().std() < first.float().std() / 2
    assert plain.inputs.float().std() == 0


def test_motion_blur_is_smooth_in_larger_images_too():
    lit = torch.zeros(8, 3, 128, 128, dtype=torch.uint8)
    lit[:, :, :, 60] = 255  # a blurred line must fade evenly, without ghost copies
    row = corrupt_images(lit, "motion-blur", 5)[:, 0, 64].int()
    assert (row[:, 61:96].diff(dim=1) < 5).all()
    assert (row[:, 70] > 0).all()


def test_inversion_ends_in_the_negative_and_contrast_in_the_mean(images):
    assert torch.equal(corrupt_images(images, "inversion", 5), 255 - images)
    flat = corrupt_images(images, "contrast", 5).float()
    ratio = flat.std(dim=(2, 3)) / images.float().std(dim=(2, 3))
    torch.testing.assert_close(ratio, torch.full_like(ratio, 0.15), atol=0.01, rtol=0)


def test_rotations_and_blurs_equal_those_of_torchvision(images):
    corrupted = corrupt_images(images, "rotation", 5)
    for before, after in zip(images, corrupted, strict=True):
        by = [
            TF.rotate(before.float(), degrees, TF.InterpolationMode.BILINEAR)[:, 10:22, 10:22]
            for degrees in (30, -30)
        ]
        assert min((image - after[:, 10:22, 10:22]).abs().max().item() for image in by) < 2
    blurred = TF.gaussian_blur(images.float(), [9, 9], [1.0, 1.0])
    assert (corrupt_images(images, "gaussian-blur", 5).float() - blurred).abs().max() < 1.01


def test_fog_is_smooth_and_motion_is_along_a_line(images):
    black = torch.zeros(20, 3, 32, 32, dtype=torch.uint8)
    black[:, :, 16, 16] = 255
    fog = corrupt_images(torch.full_like(black, 90), "fog", 3).float()
    assert (fog[..., 1:] - fog[..., :-1]).abs().mean() < 0.2 * fog.std(dim=(1, 2, 3)).mean()
    lit = corrupt_images(black, "motion-blur", 5)[:, 0] > 0
    assert (lit.sum(dim=(1, 2)) < 40).all()
    assert lit[:, :, 17:].any()
    assert not lit[:, :, :15].any()


@pytest.mark.parametrize(
    ("name", "severity", "message"),
    [
        ("gausian-noise", 1, "Did you mean 'gaussian-noise'"),
        ("fog", 0, "severity 0"),
        ("fog", 6, "severity 6"),
    ],
)
def test_unknown_corruptions_and_severities_are_one_line_errors(images, name, severity, message):
    with pytest.raises(UserError, match=message):
        corrupt_images(images, name, severity)
