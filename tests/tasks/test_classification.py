"""Image classification: training views, mixup and cutmix, losses, metrics."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sslrun.backbones import build_backbone
from sslrun.data.examples import Batch, TensorExamples
from sslrun.data.image.lab import lightness
from sslrun.data.specs import ImageSpec
from sslrun.tasks.base import tasks
from sslrun.tasks.classification import Classification, mix

SPEC = ImageSpec(8)


def task(classes: int = 3, **options: object) -> Classification:
    names = tuple(str(i) for i in range(classes))
    return Classification(Classification.Options.model_validate(options), SPEC, names)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(count: int = 16) -> Batch:
    images = torch.randint(256, (count, 3, 8, 8), generator=seeded(), dtype=torch.uint8)
    return Batch(images, torch.arange(count) % 3)


def flat_images(count: int) -> tuple[Tensor, Tensor]:
    """Return images, where image i has the constant value i, and one-hot labels of class i."""
    return torch.arange(count).float()[:, None, None, None].expand(-1, 3, 16, 16), torch.eye(count)


def test_it_is_registered() -> None:
    assert tasks["classification"] is Classification
    assert Classification.reads is ImageSpec


def test_a_new_head_is_zero_unless_init_is_random() -> None:
    images = batch()
    zeros, random = task().head(5), task(init="random").head(5)
    assert task().loss(zeros(torch.randn(16, 5)), images.labels).item() == pytest.approx(
        math.log(3)
    )
    assert random.weight.std() > 0.1
    assert zeros.weight.shape == (3, 5)


def test_the_loss_is_smoothed_cross_entropy_for_labels_and_probabilities() -> None:
    outputs, labels = (
        torch.randn(6, 3, generator=seeded(), dtype=torch.float64),
        torch.arange(6) % 3,
    )
    target = 0.9 * F.one_hot(labels, 3).double() + 0.1 / 3
    naive = -(target * outputs.log_softmax(1)).sum(1).mean()
    smoothed = task(label_smoothing=0.1)
    torch.testing.assert_close(smoothed.loss(outputs, labels), naive)
    torch.testing.assert_close(smoothed.loss(outputs, F.one_hot(labels, 3).double()), naive)


def test_views_depend_on_the_generator_and_inputs_are_deterministic() -> None:
    mixing = task(mixup=0.4, cutmix=1.0)
    (images, targets), (same_images, same_targets) = (
        mixing.views(batch(), seeded()) for _ in range(2)
    )
    other_images, _ = mixing.views(batch(), seeded(1))
    assert torch.equal(images, same_images)
    assert torch.equal(targets, same_targets)
    assert not torch.equal(images, other_images)
    assert torch.equal(mixing.inputs(batch()), batch().inputs.float() / 255)


def test_without_mixing_targets_are_the_labels() -> None:
    images, targets = task().views(batch(), seeded())
    assert images.shape == (16, 3, 8, 8)
    assert not torch.equal(images, task().inputs(batch()))
    assert torch.equal(targets, torch.arange(16) % 3)


def test_the_augmentation_is_the_configured_one() -> None:
    plain, mirrored = task(augmentation={}), task(augmentation={"flip": 1.0})
    assert torch.equal(plain.views(batch(), seeded())[0], plain.inputs(batch()))
    assert torch.equal(mirrored.views(batch(), seeded())[0], plain.inputs(batch()).flip(3))


def test_images_are_resized_to_the_configured_size() -> None:
    large = task(size=12)
    assert large.inputs(batch()).shape == (16, 3, 12, 12)
    assert large.views(batch(), seeded())[0].shape == (16, 3, 12, 12)


def test_mixup_blends_images_and_labels_by_one_weight_per_image() -> None:
    count, alpha = 4000, 0.3
    images, shares = flat_images(count)
    mixed, targets = mix(images[:, :, :1, :1], shares, mixup=alpha, cutmix=0, generator=seeded())
    torch.testing.assert_close(
        mixed[:, 0, 0, 0].double(), targets.double() @ torch.arange(count).double()
    )
    torch.testing.assert_close(targets.sum(1), torch.ones(count))
    own = targets.diagonal()
    assert own.mean().item() == pytest.approx(0.5, abs=0.03)
    assert own.var().item() == pytest.approx(
        1 / (4 * (2 * alpha + 1)), rel=0.05
    )  # variance of Beta(alpha, alpha)


def test_cutmix_pastes_one_box_and_weights_labels_by_its_area() -> None:
    count = 200
    images, shares = flat_images(count)
    mixed, targets = mix(images, shares, mixup=0, cutmix=1.0, generator=seeded())
    torch.testing.assert_close(targets.sum(1), torch.ones(count))
    sizes = []
    for i in range(count):
        pasted = mixed[i, 0] != i
        assert torch.equal(mixed[i, 0], mixed[i, 2])
        if not pasted.any():
            continue
        assert len(mixed[i][:, pasted].unique()) == 1
        rows, columns = pasted.any(1).nonzero(), pasted.any(0).nonzero()
        box = (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
        assert pasted.sum() == box
        assert targets[i, i].item() == pytest.approx(1 - box.item() / 256)
        sizes.append(box.item() / 256)
    assert min(sizes) < 0.1 < 0.6 < max(sizes)


def test_with_mixup_and_cutmix_each_image_gets_one_of_them() -> None:
    images, shares = flat_images(200)
    mixed, _ = mix(images, shares, mixup=1.0, cutmix=1.0, generator=seeded())
    values = torch.tensor([len(image.unique()) for image in mixed])
    whole = torch.tensor([bool((image == i).all()) for i, image in enumerate(mixed)])
    assert 40 < (values == 2).sum() < 130
    assert 60 < ((values == 1) & ~whole).sum() < 140


def test_the_primary_metric_is_the_configured_one_and_top_five_needs_ten_classes() -> None:
    outputs, labels = torch.randn(30, 10, generator=seeded()), torch.arange(30) % 7
    scores = task(10, metric="mean_class_accuracy").measure(outputs, labels)
    assert set(scores) == {"accuracy", "mean_class_accuracy", "macro_f1", "top5_accuracy"}
    assert scores["accuracy"] < scores["top5_accuracy"]
    assert "top5_accuracy" not in task(3).measure(outputs[:, :3], labels % 3)
    for metric in ("accuracy", "mean_class_accuracy", "macro_f1"):
        assert task(metric=metric).primary.name == metric
        assert metric in scores


# ---------------------------------------------------------------- lightness


def test_lightness_is_what_training_and_evaluation_show_to_the_backbone() -> None:
    plain, gray = task(augmentation={}), task(color="lightness", augmentation={})
    expected = lightness(plain.inputs(batch()))
    assert torch.equal(gray.inputs(batch()), expected)
    images, _ = gray.views(batch(), seeded())
    assert torch.equal(images, expected)
    mixed, _ = task(color="lightness", augmentation={}, mixup=0.4).views(batch(), seeded())
    assert torch.equal(mixed[:, 0], mixed[:, 2])
    assert not torch.equal(mixed, expected)


def test_normalization_is_fitted_to_what_the_backbone_sees() -> None:
    images = batch(64).inputs.clone()
    images[:, 0] //= 2  # little red
    examples = TensorExamples(images, None, (), SPEC)
    for color in ("rgb", "lightness"):
        backbone = build_backbone("resnet18", {"channels": 8}, SPEC)
        chosen = task(color=color)
        chosen.fit_inputs(backbone, examples)
        shown = chosen.inputs(Batch(images, None))
        torch.testing.assert_close(
            backbone.mean, shown.mean(dim=(0, 2, 3)), atol=1e-3, rtol=0, msg=color
        )
        torch.testing.assert_close(
            backbone.std, shown.std(dim=(0, 2, 3)), atol=1e-3, rtol=0, msg=color
        )


def test_color_changes_the_identity_only_if_it_is_not_rgb() -> None:
    assert Classification.Options(color="rgb").non_defaults() == {}
    assert Classification.Options(color="lightness").non_defaults() == {"color": "lightness"}
