"""Augmentations: equal to torchvision's for equal parameters, and parameter distributions."""

import pytest
import torch
import torchvision.transforms.functional as reference
from torchvision.transforms import RandomResizedCrop

from sslrun.data.image import augment
from sslrun.data.image.augment import Augmentation


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def images(generator):
    return torch.rand(48, 3, 32, 32, generator=generator)


def apply_to_each(function, images, *parameters):
    return torch.stack(
        [function(image, *rest) for image, *rest in zip(images, *parameters, strict=True)]
    )


@pytest.mark.parametrize("size", [11, 32, 48])
def test_resized_crop(images, generator, size):
    boxes = augment.draw_crop_boxes(48, 32, 32, (0.08, 1.0), (3 / 4, 4 / 3), generator)
    expected = apply_to_each(
        lambda x, b: reference.resized_crop(x, *b, [size, size], antialias=True),
        images,
        boxes.tolist(),
    )
    torch.testing.assert_close(
        augment.crop_resize(images, boxes, size), expected, atol=1e-5, rtol=0
    )
    mirrored = augment.crop_resize(images, boxes, size, torch.ones(48, dtype=torch.bool))
    torch.testing.assert_close(mirrored, expected.flip(3), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_color(images, generator, name):
    parameters = torch.rand(48, generator=generator) * (1.0 if name == "hue" else 1.8) - (
        0.5 if name == "hue" else 0
    )
    function = getattr(reference, f"adjust_{name}")
    for some in (
        images,
        (images * 6).round() / 6,
    ):  # coarse levels: many pixels have no unique largest channel
        expected = apply_to_each(function, some, parameters.tolist())
        torch.testing.assert_close(
            getattr(augment, f"adjust_{name}")(some, parameters), expected, atol=3e-6, rtol=0
        )


def test_jitter_equals_torchvisions_in_the_drawn_order(images, generator):
    factors, order = augment.draw_jitter(48, (0.4, 0.4, 0.4, 0.1), generator)
    functions = [
        reference.adjust_brightness,
        reference.adjust_contrast,
        reference.adjust_saturation,
    ]

    def one(image, position, values, others):
        names = list(others)
        names.insert(position // 12, 3)
        for name in names:
            image = [*functions, reference.adjust_hue][name](image, values[name])
        return image

    expected = apply_to_each(one, images, range(48), factors.tolist(), order.tolist())
    torch.testing.assert_close(
        augment.apply_jitter(images, factors, order), expected, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("kernel", [3, 5])
def test_blur(images, generator, kernel):
    sigma = torch.rand(48, generator=generator) * 1.9 + 0.1
    expected = apply_to_each(
        lambda x, s: reference.gaussian_blur(x, [kernel, kernel], [s, s]), images, sigma.tolist()
    )
    torch.testing.assert_close(
        augment.gaussian_blur(images, sigma, kernel), expected, atol=1e-6, rtol=0
    )
    none = torch.zeros(48, dtype=torch.bool)
    torch.testing.assert_close(augment.gaussian_blur(images, sigma, kernel, none), images)


def test_gray_solarize_and_flip_apply_to_drawn_images_only(images):
    mask = torch.arange(48) % 2 == 0
    for ours, expected in (
        (augment.grayscale(images, mask), lambda x: reference.rgb_to_grayscale(x, 3)),
        (augment.solarize(images, 0.5, mask), lambda x: reference.solarize(x, 0.5)),
        (augment.flip(images, mask), reference.hflip),
    ):
        torch.testing.assert_close(ours[mask], apply_to_each(expected, images[mask]))
        assert torch.equal(ours[~mask], images[~mask])


def test_quarter_turns_are_exact_and_four_are_the_identity(images):
    turns = torch.arange(48) % 4
    expected = apply_to_each(lambda x, k: x.rot90(k, (1, 2)), images, turns.tolist())
    assert torch.equal(augment.quarter_turns(images, turns), expected)
    one, whole = torch.ones_like(turns), images
    for _ in range(4):
        whole = augment.quarter_turns(whole, one)
    assert torch.equal(whole, images)


def test_patches_pad_crop_and_cutout(images, generator):
    corners = torch.randint(0, 20, (48, 2), generator=generator)
    expected = apply_to_each(
        lambda x, c: x[:, c[0] : c[0] + 9, c[1] : c[1] + 9], images, corners.tolist()
    )
    assert torch.equal(augment.patches(images, corners, 9), expected)
    assert augment.pad_crop(images, 4, generator).shape == images.shape
    assert torch.equal(augment.pad_crop(images, 0, generator), images)
    blanked = (augment.cutout(images + 1, 8, generator) == 0).float().mean()
    assert 0.03 < blanked < 64 / 1024  # clipped at the border


def test_crops_have_the_distribution_of_torchvisions(generator):
    torch.manual_seed(0)
    ours = augment.draw_crop_boxes(4000, 40, 24, (0.2, 1.0), (3 / 4, 4 / 3), generator).float()
    image = torch.empty(3, 40, 24)
    draws = [RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)]
    expected = torch.tensor(draws).float()
    assert (ours[:, :2] + ours[:, 2:]).amax(dim=0).tolist() == [40, 24]
    for statistic in (torch.mean, torch.std):
        torch.testing.assert_close(statistic(ours, 0), statistic(expected, 0), rtol=0.05, atol=0.3)


def test_orders_of_the_jitter_are_equally_likely(generator):
    _, order = augment.draw_jitter(6000, (0.4, 0.4, 0.4, 0.1), generator)
    counts = (order * torch.tensor([9, 3, 1])).sum(1).bincount()
    assert counts[counts > 0].tolist() == pytest.approx([1000] * 6, rel=0.12)


def test_policies_have_their_documented_parameters(generator):
    images = torch.randint(0, 256, (400, 3, 16, 16), dtype=torch.uint8, generator=generator)
    whole = augment.to_float(images)
    assert torch.equal(Augmentation()(images, 16, generator), whole)
    gray_images = Augmentation(gray=0.25)(images, 16, generator)
    assert (gray_images[:, 0] == gray_images[:, 1]).all(
        dim=(1, 2)
    ).float().mean().item() == pytest.approx(0.25, abs=0.08)
    jittered = Augmentation(jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.5)(images, 16, generator)
    assert (jittered != whole).any(dim=3).any(dim=2).any(
        dim=1
    ).float().mean().item() == pytest.approx(0.5, abs=0.1)
    for policy in (
        Augmentation.simclr(),
        Augmentation.byol_second(),
        Augmentation(padding=2, cutout=4, flip=0.5),
    ):
        views = policy(images, 16, generator)
        assert views.shape == (400, 3, 16, 16)
        assert views.dtype == torch.float32
        assert views.min() >= -1e-5
        assert views.max() <= 1 + 1e-5  # resampling rounds
        assert not torch.equal(views, policy(images, 16, generator))
    again = [Augmentation.simclr()(images, 16, torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(*again)
