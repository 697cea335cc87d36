"""Colorization: bins and weights, the sparse loss, gray images, decoding, and refusals."""

import math

import numpy as np
import pytest
import torch

from sslrun.backbones import build_backbone
from sslrun.data.examples import Batch, TensorExamples
from sslrun.data.image.lab import lab_to_rgb, lightness, rgb_to_lab
from sslrun.data.specs import ImageSpec
from sslrun.errors import UserError
from sslrun.pretexts.colorize import (
    Colorize,
    Palette,
    color_metrics,
    is_colored,
    soft_cross_entropy,
)
from sslrun.recipe import load

SIDE = 16
RECIPE = """\
name: x
backbone: {name: mlp}
pretext: {name: colorize}
data: {name: digits}
pretrain: {epochs: 1, lr: 0.001}
"""
RESNET = {"channels": 8, "stem": "small"}
VIT = {"patch": 4, "depth": 1, "width": 24, "heads": 3}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def build(name="resnet18", side=SIDE, shape=None, **options):
    torch.manual_seed(0)
    shape = shape or (RESNET if name == "resnet18" else VIT)
    backbone = build_backbone(name, shape, ImageSpec(side))
    return Colorize(Colorize.Options(**{"hidden": 8, **options}), backbone)


def images_of(lab):
    """Images (B, 3, SIDE, SIDE) of one Lab color each."""
    return lab_to_rgb(torch.tensor(lab)[:, :, None, None].expand(-1, -1, SIDE, SIDE))


def random_images(count=8, side=SIDE):
    """Smooth random images, since noise would have few saturated colors."""
    coarse = torch.rand(count, 3, 4, 4, generator=seeded())
    return torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear")


def examples(images):
    return TensorExamples((images * 255).round().byte(), None, (), ImageSpec(images.shape[-1]))


def dense(palette, bins, shares):
    target = torch.zeros(len(bins), len(palette), *bins.shape[2:])
    return target.scatter_add(1, bins, shares)


# ---------------------------------------------------------------- bins


def test_bins_of_srgb_are_those_of_its_cube():
    palette = Palette.of_srgb(10, 5, 0.5)
    levels = np.linspace(0, 1, 33)
    cube = torch.tensor(np.stack(np.meshgrid(levels, levels, levels), -1).reshape(-1, 3))
    ab = rgb_to_lab(cube.float()[:, :, None, None])[:, 1:, 0, 0]
    cells = {tuple(cell) for cell in np.rint(ab.numpy() / 10).astype(int).tolist()}
    assert {tuple(cell) for cell in (palette.centers / 10).int().tolist()} == cells


def test_soft_targets_sum_to_one_and_are_one_hot_for_a_small_sigma():
    ab = torch.randn(500, 2, generator=seeded()) * 30
    palette = Palette.of_pixels(ab, 10, 5, 0.5)
    bins, shares = palette.encode(ab, 5)
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(500))
    assert (shares.diff(dim=1) <= 1e-6).all()  # the nearest first
    rounded = (ab / 10).round() * 10
    assert torch.equal(palette.centers[bins[:, 0]], rounded)
    distances = (ab[:, None] - palette.centers[bins]).norm(dim=2).double()
    weights = torch.exp(-(distances**2) / 50)
    expected = (weights / weights.sum(dim=1, keepdim=True)).float()
    torch.testing.assert_close(shares, expected, atol=1e-4, rtol=0)
    _, sharp = Palette.of_pixels(ab, 10, 0.01, 0.5).encode(ab, 5)
    assert (sharp[:, 0] > 0.999).float().mean() > 0.99


def test_fewer_bins_than_neighbors_are_enough():
    palette = Palette.of_pixels(torch.tensor([[0.0, 0.0], [30.0, 0.0]]), 10, 5, 0.5)
    bins, shares = palette.encode(torch.zeros(3, 2), 5)
    assert bins.shape == shares.shape == (3, 2)


def test_weights_follow_their_formula_and_have_mean_one():
    ab = torch.randn(2000, 2, generator=seeded()) * 20
    palette = Palette.of_pixels(ab, 10, 5, 0.5)
    cells, counts = np.unique(np.rint(ab.numpy() / 10), axis=0, return_counts=True)
    centers, p = cells * 10, counts / counts.sum()
    kernel = np.exp(-((centers[:, None] - centers) ** 2).sum(-1) / 50)
    p = (kernel / kernel.sum(axis=0)) @ p
    w = 1 / (0.5 * p + 0.5 / len(p))
    w /= (p * w).sum()
    np.testing.assert_allclose(palette.frequencies, p, rtol=1e-4)
    np.testing.assert_allclose(palette.rarity, w, rtol=1e-4)
    assert (palette.frequencies * palette.rarity).sum().item() == pytest.approx(1, abs=1e-5)
    common, rare = palette.frequencies.argmax(), palette.frequencies.argmin()
    assert palette.rarity[rare] > 1 > palette.rarity[common]


def test_the_annealed_mean_is_the_mode_at_zero_and_the_mean_at_one():
    palette = Palette.of_srgb(10, 5, 0.5)
    scores = torch.randn(2, len(palette), 3, 3, generator=seeded())
    modes = palette.centers[scores.argmax(dim=1)].permute(0, 3, 1, 2)
    torch.testing.assert_close(palette.decode(scores, 1e-4), modes, atol=1e-2, rtol=0)
    mean = torch.einsum("bqhw,qc->bchw", scores.softmax(dim=1), palette.centers)
    torch.testing.assert_close(palette.decode(scores, 1.0), mean, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------- the loss


def test_the_sparse_loss_equals_the_dense_formula():
    pretext = build()
    targets = pretext._targets(random_images())
    scores = torch.randn(8, len(pretext.palette), 4, 4, generator=seeded(1))
    target = dense(pretext.palette, targets.bins, targets.shares)
    naive = -(target * scores.log_softmax(dim=1)).sum(dim=1)
    found = soft_cross_entropy(scores, targets.bins, targets.shares)
    torch.testing.assert_close(found, naive, atol=1e-5, rtol=1e-5)


def test_the_weighted_loss_is_a_mean_over_pixels_of_colored_images():
    """Gray images change neither the sum of errors nor the number that it is divided by."""
    colored, gray = random_images(6), images_of([[40.0, 1.0, 2.0], [70.0, 0.0, 0.0]])
    pretext = build(augmentation={}).eval()
    pretext.fit(examples(colored))
    views = pretext.views(Batch(torch.cat([colored, gray]), None), seeded())
    output = pretext(views)
    scores = pretext._scores(lightness(colored))
    target = dense(pretext.palette, views.bins[:6], views.shares[:6])
    errors = -(target * scores.log_softmax(dim=1)).sum(dim=1)
    weights = pretext.palette.rarity[target.argmax(dim=1)]
    assert output.loss.item() == pytest.approx((errors * weights).mean().item(), rel=1e-5)
    assert output.metrics["unweighted"].item() == pytest.approx(errors.mean().item(), rel=1e-5)


def test_without_rebalancing_all_pixels_weigh_the_same():
    images = random_images()
    pretext = build(augmentation={}, balance=0).eval()
    pretext.fit(examples(images))
    views = pretext.views(Batch(images, None), seeded())
    errors = soft_cross_entropy(pretext._scores(views.inputs), views.bins, views.shares)
    assert pretext(views).loss.item() == pytest.approx(errors.mean().item(), rel=1e-5)


def test_the_baseline_on_ab_is_the_squared_error():
    images = random_images()
    pretext = build(augmentation={}, target="ab").eval()
    pretext.fit(examples(images))
    views = pretext.views(Batch(images, None), seeded())
    predicted = pretext.colors(pretext._scores(views.inputs))
    truth = rgb_to_lab(images)[:, 1:, ::4, ::4]
    naive = ((predicted - truth) ** 2).sum(dim=1).mean() / 100
    assert pretext(views).loss.item() == pytest.approx(naive.item(), rel=1e-4)


@pytest.mark.parametrize("target", ["bins", "ab"])
def test_gray_images_give_no_gradient(target):
    pretext = build(target=target)
    gray = images_of([[20.0, 4.0, -4.0], [50.0, 0.0, 0.0], [80.0, 0.0, 4.9]])
    loss = pretext(pretext.views(Batch(gray, None), seeded())).loss
    loss.backward()
    assert loss.item() == 0
    for parameter in pretext.parameters():
        assert parameter.grad is None or not parameter.grad.any()
    assert not is_colored(rgb_to_lab(gray)[:, 1:]).any()
    pretext(pretext.views(Batch(images_of([[50.0, 9.0, 0.0]]).expand(2, -1, -1, -1), None),
                          seeded())).loss.backward()  # fmt: skip
    assert pretext.last.bias.grad.any()


def test_the_backbone_sees_lightness_alone():
    color = [[50.0, 20.0, -10.0], [60.0, -15.0, 12.0]]
    twin = [[light, -a, -b] for light, a, b in color]
    pretext = build(augmentation={})
    views, other = (pretext.views(Batch(images_of(lab), None), seeded()) for lab in (color, twin))
    torch.testing.assert_close(views.inputs, other.inputs, atol=1e-6, rtol=0)
    torch.testing.assert_close(views.ab, -other.ab, atol=1e-3, rtol=0)
    assert torch.equal(views.inputs, pretext.watched_inputs(images_of(color)))


def test_targets_are_sampled_at_every_fourth_pixel():
    images = random_images()
    views = build(augmentation={}).views(Batch(images, None), seeded())
    torch.testing.assert_close(views.ab, rgb_to_lab(images)[:, 1:, ::4, ::4])


# ---------------------------------------------------------------- fitting, records, pictures


def test_bins_and_normalization_are_fitted_to_the_training_images():
    images = random_images(200)
    pretext = build()
    all_bins = len(pretext.palette)
    pretext.fit(examples(images))
    assert 1 < len(pretext.palette) < all_bins
    assert pretext.last.weight.shape[0] == len(pretext.palette)
    assert {"palette.centers", "palette.frequencies", "palette.rarity"} <= set(pretext.state_dict())
    normalized = pretext.backbone.normalize(lightness(examples(images).inputs.float() / 255))
    assert normalized.mean().abs() < 0.01
    assert normalized.std().item() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("balance", [0.0, 0.5])
def test_the_floor_is_the_unweighted_loss_of_the_mean_target(balance):
    images = random_images(50)
    pretext = build(balance=balance)
    pretext.fit(examples(images))
    targets = pretext._targets(examples(images).inputs.float() / 255)
    target = dense(pretext.palette, targets.bins, targets.shares)
    target = target.permute(0, 2, 3, 1).flatten(0, 2).double()
    weights = torch.ones(len(target), 1, dtype=torch.float64)
    if balance:
        weights = pretext.palette.rarity[target.argmax(dim=1)][:, None].double()
    answer = (target * weights).sum(dim=0) / weights.sum()
    naive = -(target * answer.clamp(min=1e-30).log()).sum(dim=1).mean().item()
    assert pretext.floor(examples(images)) == pytest.approx(naive, rel=1e-4)
    ab = targets.ab.transpose(0, 1).flatten(1) / 10
    baseline = build(target="ab")
    assert baseline.floor(examples(images)) == pytest.approx(
        ab.var(dim=1, correction=0).sum().item(), rel=1e-4
    )


def test_color_metrics_equal_their_definitions():
    truth = torch.randn(4, 2, 3, 3, generator=seeded()) * 40
    predicted = truth + torch.randn(4, 2, 3, 3, generator=seeded(1)) * 40
    rarity = torch.rand(4, 3, 3, generator=seeded(2))
    metrics = color_metrics(predicted, truth, rarity)
    distance = ((predicted - truth) ** 2).sum(dim=1).sqrt()
    within = [(distance <= threshold).float() for threshold in range(151)]
    plain = 100 * sum(hits.mean() for hits in within) / 151
    weighted = 100 * sum((hits * rarity).sum() / rarity.sum() for hits in within) / 151
    assert metrics["auc"].item() == pytest.approx(plain.item(), rel=1e-5)
    assert metrics["weighted_auc"].item() == pytest.approx(weighted.item(), rel=1e-5)
    assert metrics["ab_error"].item() == pytest.approx(distance.mean().item(), rel=1e-5)


@pytest.mark.parametrize("target", ["bins", "ab"])
def test_it_learns_colors_that_follow_from_lightness(target):
    """Dark images are red, light ones blue: the held-out loss falls far below its floor."""
    dark, light = [30.0, 40.0, 20.0], [60.0, 5.0, -40.0]
    images = images_of([dark, light] * 4)
    pretext = build(target=target, balance=0.5)
    pretext.fit(examples(images))
    optimizer = torch.optim.Adam(pretext.parameters(), lr=0.01)
    for step in range(40):
        pretext(pretext.views(Batch(images, None), seeded(step))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        record = pretext.eval().held_out(Batch(images, None), seeded())
        gray = record["true_chroma"]
        pictures = pretext.pictures(Batch(images[:2], None), seeded())
    _, shares = pretext.palette.encode(
        torch.tensor([dark[1:], light[1:]]), pretext.options.neighbors
    )
    # The lowest loss of bins is the entropy of the soft targets.
    least = torch.special.entr(shares).sum(dim=1).mean().item() if target == "bins" else 0.0
    floor = pretext.floor(examples(images))
    assert record["held_out_loss"].item() - least < 0.3 * (floor - least)
    assert record["ab_error"] < 0.4 * gray
    assert record["auc"] > record["auc_of_gray"]
    assert list(pictures) == ["gray", "colorized", "original"]
    assert (pictures["colorized"] - images[:2]).abs().mean() < 0.15
    assert torch.equal(pictures["original"], images[:2])


def test_a_prediction_without_context_has_the_floor_as_its_loss():
    """The collapse to one brown is named by the watcher: the loss is at its floor."""
    images = random_images(50)
    pretext = build(balance=0).eval()
    pretext.fit(examples(images))
    targets = pretext._targets(examples(images).inputs.float() / 255)
    mean = dense(pretext.palette, targets.bins, targets.shares).mean(dim=(0, 2, 3))
    with torch.no_grad():
        pretext.last.weight.zero_()
        pretext.last.bias.copy_(mean.clamp(min=1e-12).log())
        record = pretext.held_out(Batch(examples(images).inputs, None), seeded())
    floor = pretext.floor(examples(images))
    assert record["held_out_loss"].item() == pytest.approx(floor, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "side", "shape"),
    [
        ("resnet18", 32, {"channels": 8, "stem": "small"}),
        ("resnet18", 44, {"channels": 8, "stem": "imagenet"}),
        ("vit-tiny", 32, VIT),
        ("vit-tiny", 32, {**VIT, "patch": 16}),
        ("vit-tiny", 32, {**VIT, "patch": 2}),
        ("vit-tiny", 28, {**VIT, "patch": 14}),
    ],
)
def test_scores_have_a_quarter_of_the_side_on_every_backbone(name, side, shape):
    pretext = build(name, side, shape)
    scores = pretext._scores(lightness(random_images(2, side)))
    assert scores.shape == (2, len(pretext.palette), side // 4, side // 4)
    output = pretext(pretext.views(Batch(random_images(2, side), None), seeded()))
    assert math.isfinite(output.loss.item())


# ---------------------------------------------------------------- refusals


def test_gray_data_are_an_error():
    gray = examples(random_images()[:, :1].expand(-1, 3, -1, -1))
    with pytest.raises(UserError, match=r"all of the 8 images .* are gray: choose a data set"):
        build().fit(gray)


@pytest.mark.parametrize(
    ("side", "options", "words"),
    [(18, {}, "set data.size: 20"), (16, {"size": 30}, "set pretext.size: 32")],
)
def test_a_side_that_is_no_multiple_of_four_is_an_error(side, options, words):
    with pytest.raises(UserError, match=f"not a multiple of 4.*{words}"):
        build(side=side, **options)


def test_a_backbone_without_a_grid_is_an_error_of_the_recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    with pytest.raises(
        UserError, match=r"recipe.yaml:3: .*'colorize' needs a backbone with 'grid'"
    ):
        load(path)
