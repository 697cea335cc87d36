"""CIE Lab: published values, round trips, lightness, and independence of autocast."""

import pytest
import torch

from sslrun.data.examples import TensorExamples
from sslrun.data.image.lab import LightnessExamples, lab_to_rgb, lightness, rgb_to_lab
from sslrun.data.image.whole import WholeImageExamples, locate
from sslrun.data.specs import ImageSpec

PUBLISHED = {
    "red": ((1.0, 0, 0), (53.24, 80.09, 67.20)),
    "green": ((0, 1.0, 0), (87.73, -86.18, 83.18)),
    "blue": ((0, 0, 1.0), (32.30, 79.19, -107.86)),
    "white": ((1.0, 1.0, 1.0), (100.0, 0.0, 0.0)),
    "black": ((0.0, 0.0, 0.0), (0.0, 0.0, 0.0)),
}


def colors(*values):
    return torch.tensor(values)[:, :, None, None]


def random_images(count=2000, side=1):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", PUBLISHED)
def test_primaries_have_their_published_values(name):
    rgb, lab = PUBLISHED[name]
    found = rgb_to_lab(colors(rgb))[0, :, 0, 0].tolist()
    assert found == pytest.approx(lab, abs=0.01)


def test_the_round_trip_returns_every_color():
    images = random_images()
    assert (lab_to_rgb(rgb_to_lab(images)) - images).abs().max() < 1e-5
    exact = images.double()
    assert (lab_to_rgb(rgb_to_lab(exact)) - exact).abs().max() < 1e-12


def test_colors_outside_srgb_are_clamped():
    strong = torch.tensor([50.0, 120.0, -120.0])[None, :, None, None]
    image = lab_to_rgb(strong)
    assert image.min() == 0
    assert 1 - 1e-6 < image.max() <= 1


def test_lightness_has_three_equal_channels_and_no_color():
    images = random_images(side=2)
    gray = lightness(images)
    assert gray.shape == images.shape
    assert torch.equal(gray[:, 0], gray[:, 1])
    assert torch.equal(gray[:, 0], gray[:, 2])
    torch.testing.assert_close(100 * gray[:, 0], rgb_to_lab(images)[:, 0], atol=1e-4, rtol=0)


def test_autocast_changes_nothing():
    images = random_images()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lab, back, gray = rgb_to_lab(images), lab_to_rgb(rgb_to_lab(images)), lightness(images)
    assert torch.equal(lab, rgb_to_lab(images))
    assert torch.equal(back, lab_to_rgb(rgb_to_lab(images)))
    assert torch.equal(gray, lightness(images))


def test_examples_of_lightness_are_bytes_for_square_and_whole_images():
    images = (random_images(6, 4) * 255).byte()
    expected = (lightness(images.float() / 255) * 255).round().byte()
    square = TensorExamples(images, torch.arange(6), ("a",) * 6, ImageSpec(4))
    indices = [torch.tensor([4, 1])]
    (batch,) = (
        LightnessExamples(square).subset(torch.arange(1, 6)).batches(indices, torch.device("cpu"))
    )
    assert torch.equal(batch.inputs, expected[[5, 2]])
    assert batch.labels.tolist() == [5, 2]

    pixels = images.permute(0, 2, 3, 1).reshape(-1, 3)
    places = locate(torch.full((6, 2), 4))
    whole = WholeImageExamples(pixels, places, torch.arange(6), ("a",) * 6, ImageSpec(4))
    (batch,) = LightnessExamples(whole).batches(indices, torch.device("cpu"))
    assert torch.equal(batch.inputs.centers(), expected[[4, 1]])
