"""Image pretexts: losses against formulas in float64, and which parameters learn."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from sslrun.backbones import build_backbone
from sslrun.backbones.base import backbones
from sslrun.data.examples import Batch
from sslrun.data.specs import ImageSpec
from sslrun.errors import UserError
from sslrun.pretexts.barlow import barlow_loss
from sslrun.pretexts.base import pretexts
from sslrun.pretexts.byol import byol_loss
from sslrun.pretexts.moco import info_nce
from sslrun.pretexts.position import NEIGHBORS, drop_colors, project_colors
from sslrun.pretexts.simclr import nt_xent
from sslrun.pretexts.simsiam import simsiam_loss
from sslrun.pretexts.vicreg import vicreg_terms
from sslrun.training.device import compute
from sslrun.training.loop import Schedule, Training, train
from sslrun.training.norm import SplitBatchNorm, split_norms

SIZE = 32
IMAGE_PRETEXTS = [
    name
    for name in pretexts
    if pretexts[name].reads is ImageSpec and "palette" not in pretexts[name].needs
]
CHEAP = {
    "byol": {"hidden": 32},
    "barlow": {"width": 32},
    "vicreg": {"width": 32},
    "moco": {"queue": 48, "momentum": 0.9},
    "simsiam": {"hidden": 32, "bottleneck": 8},
    "position": {"hidden": 32},
    "simclr": {"temperature": 0.5},
    "dino": {"hidden": 32, "bottleneck": 8, "outputs": 64, "center": None},  # else targets move
    "mae": {"depth": 1, "width": 16, "heads": 2},
    "ijepa": {"depth": 1, "width": 16, "heads": 2},
    "lejepa": {"hidden": 32, "directions": 16},
    "swav": {"hidden": 32, "projection": 16, "prototypes": 16},
    "mocov3": {"hidden": 32, "projection": 16},
    "nnclr": {"hidden": 32, "predictor": 32, "projection": 16, "queue": 48},
    "colorize": {"hidden": 16},
    "autoencoder": {"channels": 32},
}


def build(name, backbone="resnet18", stem="small", **options):
    torch.manual_seed(0)
    shape = (
        {"channels": 8, "stem": stem}
        if backbone == "resnet18"
        else {"patch": 4, "depth": 1, "width": 24, "heads": 3}
    )
    cls = pretexts[name]
    built = build_backbone(backbone, shape, ImageSpec(SIZE))
    return cls(cls.Options(**{**CHEAP.get(name, {}), **options}), built)


def batch(count=16):
    """Return images to learn from: each has its own color gradient."""
    generator = torch.Generator().manual_seed(1)
    ramp = torch.linspace(0, 1, SIZE)
    color = torch.rand(count, 3, 3, 1, 1, generator=generator)
    images = color[:, 0] * ramp[:, None] + color[:, 1] * ramp + 0.5 * color[:, 2]
    return Batch((images * 120).byte(), None)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pair(count=6, width=5):
    return torch.randn(2, count, width, dtype=torch.float64, generator=generator(2)).unbind()


@pytest.mark.parametrize("name", IMAGE_PRETEXTS)
def test_every_pretext_learns_on_every_backbone(name):
    for backbone in ("resnet18", "vit-tiny"):
        if not set(pretexts[name].needs) <= backbones[backbone].offers:
            continue
        pretext = build(name, backbone, stem="imagenet")
        learned = [parameter for parameter in pretext.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(learned, lr=0.003)
        losses = []
        # With the same views each time, the loss can fall by learning only.
        views = pretext.views(batch(8), generator())
        for step in range(10):
            output = pretext(views)
            output.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            pretext.after_step((step + 1) / 10)
            losses.append(output.loss.item())
            assert all(not metric.requires_grad for metric in output.metrics.values())
        if name != "moco":  # moco's queue gets harder negatives meanwhile
            assert losses[-1] < losses[0], (backbone, losses)
        assert all(math.isfinite(loss) for loss in losses)


@pytest.mark.parametrize("name", IMAGE_PRETEXTS)
def test_views_depend_on_the_generator_and_not_on_the_global_one(name):
    needs = set(pretexts[name].needs)
    pretext = build(name, "resnet18" if needs <= backbones["resnet18"].offers else "vit-tiny")
    first, again, other = (pretext.views(batch(4), generator(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert (
        not all(torch.equal(a, b) for a, b in zip(first, other, strict=True)) or name == "rotation"
    )


def test_nt_xent_equals_its_formula():
    a, b = pair()
    z = torch.cat([a, b])
    total = 0.0
    for i in range(12):
        similar = [F.cosine_similarity(z[i], z[k], dim=0) / 0.3 for k in range(12)]
        positive = similar[(i + 6) % 12]
        total -= math.log(
            math.exp(positive) / sum(math.exp(s) for k, s in enumerate(similar) if k != i)
        )
    assert nt_xent(a, b, 0.3)[0].item() == pytest.approx(total / 12, rel=1e-5)
    order = torch.randperm(6)
    torch.testing.assert_close(nt_xent(a[order], b[order], 0.3)[0], nt_xent(a, b, 0.3)[0])
    assert nt_xent(a, a, 0.01)[1] == 1


def test_info_nce_equals_its_formula():
    q, k = (F.normalize(view, dim=1) for view in pair())
    queue = F.normalize(torch.randn(9, 5, dtype=torch.float64, generator=generator(4)), dim=1)
    total = 0.0
    for i in range(6):
        positive = math.exp(float(q[i] @ k[i]) / 0.2)
        total -= math.log(
            positive / (positive + sum(math.exp(float(q[i] @ n) / 0.2) for n in queue))
        )
    assert info_nce(q, k, queue, 0.2)[0].item() == pytest.approx(total / 6)


def test_prediction_losses_equal_their_formulas_and_stop_the_gradient():
    a, b = pair()
    cosine = sum(float(a[i] @ b[i] / (a[i].norm() * b[i].norm())) for i in range(6)) / 6
    distance = (
        sum(float((a[i] / a[i].norm() - b[i] / b[i].norm()).square().sum()) for i in range(6)) / 6
    )
    p, z = a.float().requires_grad_(), b.float().requires_grad_()
    assert byol_loss(p, z).item() == pytest.approx(distance, rel=1e-5)
    assert simsiam_loss(p, z).item() == pytest.approx(-cosine, rel=1e-5)
    (byol_loss(p, z) + simsiam_loss(p, z)).backward()
    assert z.grad is None
    assert p.grad.abs().sum() > 0


def test_barlow_equals_its_formula():
    a, b = pair(count=8, width=3)
    expected = 0.0
    for i, j in itertools.product(range(3), repeat=2):
        x, y = (
            (view[:, column] - view[:, column].mean())
            / (view[:, column].var(correction=0) + 1e-5).sqrt()
            for view, column in ((a, i), (b, j))
        )
        c = float((x * y).mean())
        expected += (1 - c) ** 2 if i == j else 0.0051 * c**2
    assert barlow_loss(a, b, 0.0051).item() == pytest.approx(expected, rel=1e-5)


def test_vicreg_equals_its_formula():
    a, b = pair(count=8, width=3)
    invariance = sum(float((a[i] - b[i]).square().sum()) for i in range(8)) / 24
    variance = covariance = 0.0
    for z in (a, b):
        centered = z - z.mean(0)
        for i in range(3):
            deviation = math.sqrt(float(centered[:, i].square().sum()) / 7 + 1e-4)
            variance += max(0.0, 1 - deviation) / 3 / 2
            covariance += (
                sum(float(centered[:, i] @ centered[:, j] / 7) ** 2 for j in range(3) if j != i) / 3
            )
    terms = vicreg_terms(a, b)
    assert [term.item() for term in terms] == pytest.approx(
        [invariance, variance, covariance], rel=1e-5
    )


def test_barlow_scales_its_loss_and_gradient():
    losses, gradients = [], []
    for scale in (1.0, 0.1):
        pretext = build("barlow", scale=scale)
        loss = pretext(pretext.views(batch(), generator())).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append(pretext.projector[0].weight.grad)
    assert losses[1] == pytest.approx(0.1 * losses[0], rel=1e-5)
    torch.testing.assert_close(gradients[1], 0.1 * gradients[0], rtol=1e-4, atol=1e-6)


def test_decorrelated_views_have_zero_loss():
    hadamard = torch.tensor(
        [[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], dtype=torch.float64
    )
    assert barlow_loss(hadamard, hadamard, 0.0051).item() == pytest.approx(0, abs=1e-8)
    assert [term.item() for term in vicreg_terms(hadamard, hadamard)] == pytest.approx(
        [0, 0, 0], abs=1e-8
    )


@pytest.mark.parametrize("name", ["byol", "moco"])
def test_teachers_follow_their_closed_form_without_gradient(name):
    pretext = build(name, momentum=0.5)
    assert not any(parameter.requires_grad for parameter in pretext.teacher.parameters())
    pretext(pretext.views(batch(), generator())).loss.backward()
    assert all(parameter.grad is None for parameter in pretext.teacher.parameters())
    before = pretext.teacher.backbone.conv1.weight.clone()
    with torch.no_grad():
        pretext.backbone.conv1.weight.add_(1.0)
    pretext.after_step(0.5)
    momentum = 0.5 if name == "moco" else 1 - 0.5 * (math.cos(math.pi * 0.5) + 1) / 2
    expected = momentum * before + (1 - momentum) * pretext.backbone.conv1.weight
    torch.testing.assert_close(pretext.teacher.backbone.conv1.weight, expected.detach())


def test_queue_is_first_in_first_out():
    pretext = build("moco", queue=40, projection=4)
    for number in range(4):
        pretext._keys = [torch.full((8, 4), float(number))] * 2  # a batch of two parts
        pretext.after_step(1.0)
    # 64 keys in 40 places: none of the first batch is left, 8 of the second, all of the third and
    # fourth.
    assert sorted(pretext.queue[:, 0].tolist()) == [1.0] * 8 + [2.0] * 16 + [3.0] * 16
    assert int(pretext.place) == 64 % 40


def test_the_queue_takes_the_keys_of_training_batches_only():
    pretext = build("moco", queue=48, projection=4)
    for part in range(2):
        pretext(pretext.views(batch(8), generator(part)))
    pretext.eval()
    pretext(pretext.views(batch(8), generator()))
    pretext.after_step(0.5)
    assert int(pretext.place) == 16


@pytest.mark.parametrize("shape", [(12, 5), (12, 5, 4, 3)])
def test_split_batch_norm_is_one_batch_norm_for_each_part(shape):
    torch.manual_seed(0)
    plain = (torch.nn.BatchNorm1d if len(shape) == 2 else torch.nn.BatchNorm2d)(5)
    torch.nn.init.normal_(plain.weight)
    torch.nn.init.normal_(plain.bias)
    split = torch.nn.Sequential(copy.deepcopy(plain))
    split_norms(split, 3)
    parts = [copy.deepcopy(plain) for _ in range(3)]
    x, upstream = torch.randn(2, *shape).unbind()
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = torch.empty(shape)
    for each, norm in enumerate(parts):
        expected[each::3] = norm(theirs[each::3])
    found = split(ours)
    torch.testing.assert_close(found, expected)
    (found * upstream).sum().backward()
    (expected * upstream).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    torch.testing.assert_close(split[0].weight.grad, sum(norm.weight.grad for norm in parts))
    for name in ("running_mean", "running_var"):
        mean = sum(norm.get_buffer(name) for norm in parts) / 3
        torch.testing.assert_close(split[0].get_buffer(name), mean)
    assert int(split[0].num_batches_tracked) == 1
    assert list(split[0].state_dict()) == list(plain.state_dict())
    plain.load_state_dict(split[0].state_dict())
    torch.testing.assert_close(split.eval()(x[:4]), plain.eval()(x[:4]))


def test_moco_with_split_batch_norm_encodes_each_part_by_itself_and_keys_in_another_order():
    options = {"queue": 48, "projection": 4, "augmentation": {}}
    pretext = build("moco", norm_splits=4, **options)
    images, keyed, order = pretext.views(batch(), generator())
    assert torch.equal(keyed, images[order])
    assert not torch.equal(order, torch.arange(16))
    found = pretext((images, keyed, order)).loss
    student = build("moco", **options)
    queries, keys = torch.empty(16, 4), torch.empty(16, 4)
    for part in range(4):
        teacher = build("moco", **options).teacher
        keys[order[part::4]] = F.normalize(teacher(keyed[part::4]), dim=1)
        queries[part::4] = F.normalize(
            student.head(student.backbone(images[part::4]).pooled), dim=1
        )
    expected, _ = info_nce(queries, keys, student.queue, student.options.temperature)
    torch.testing.assert_close(found, expected)
    found.backward()
    expected.backward()
    torch.testing.assert_close(
        pretext.backbone.conv1.weight.grad, student.backbone.conv1.weight.grad, rtol=1e-4, atol=1e-6
    )
    pretext.after_step(0.5)
    torch.testing.assert_close(pretext.queue[:16], keys)
    norms = [each for each in pretext.teacher.modules() if isinstance(each, SplitBatchNorm)]
    assert len(norms) == 20  # both encoders have them
    assert len(build("moco", **options).views(batch(), generator())) == 2  # nothing to hide


def test_moco_has_the_heads_of_both_versions():
    first = [each.weight.shape for each in build("moco", head="linear", projection=4).head]
    assert first == [(4, 64)]
    second = build("moco", projection=4).head
    assert [tuple(second[at].weight.shape) for at in (0, 2)] == [(64, 64), (4, 64)]


def test_mistakes_with_split_batch_norm():
    with pytest.raises(ValueError, match="contradict each other"):
        build("moco", norm_splits=8, sync_norm=True)
    with pytest.raises(UserError, match="'vit-tiny' has no batch norm to split"):
        build("moco", "vit-tiny", norm_splits=8)
    schedule = Schedule(steps=1, batch=24, accumulate=2)
    training = Training(build("moco", norm_splits=8), schedule, compute("cpu"))
    with pytest.raises(UserError, match=r"batch of 24 .* multiple of 16"):
        next(train(training, None, seed=0))


def test_a_batch_has_all_rotations_of_every_image():
    pretext = build("rotation", augmentation={})
    turned, targets = pretext.views(batch(4), generator())
    for image, target in zip(turned, targets, strict=True):
        back = image.rot90(-int(target), (1, 2))
        assert any(torch.equal(back, image.float() / 255) for image in batch(4).inputs)
    assert targets.bincount().tolist() == [4, 4, 4, 4]
    halves = build("rotation", turns=2, augmentation={}).views(batch(4), generator())
    assert torch.equal(halves[0][4:], halves[0][:4].flip(2, 3))


def test_position_crops_the_neighbor_of_its_label():
    pretext = build("position", patch=6, gap=4, jitter=1, color="none", neighbors=8)
    column = torch.arange(SIZE).repeat(SIZE, 1)
    place = torch.stack([column.T, column, column]).byte().repeat(5, 1, 1, 1)
    crops, targets = pretext.views(Batch(place, None), generator())
    corners = (crops[:, :2, 0, 0] * 255).round().unflatten(0, (9, 5))
    for image, position in itertools.product(range(5), range(8)):
        row, column = NEIGHBORS[targets[image, position]]
        offset = corners[1 + position, image] - corners[0, image]
        expected = torch.tensor([(row - 1) * 10.0, (column - 1) * 10.0])
        assert (offset - expected).abs().max() <= 2  # both patches have jitter
    # Exchanging the patches of a pair gives the opposite neighbor.
    assert all(
        (2 - r, 2 - c) == NEIGHBORS[7 - position] for position, (r, c) in enumerate(NEIGHBORS)
    )


def test_kernels_of_the_last_stage_learn_only_from_enlarged_patches():
    """A patch of 7 pixels has one position in the last stage; padding surrounds it."""
    for enlarge, learns in ((1, False), (3, True)):
        pretext = build("position", enlarge=enlarge)
        views = pretext.views(batch(), generator())
        assert views[0].shape[2:] == (7 * enlarge, 7 * enlarge)
        pretext(views).loss.backward()
        last = [
            module
            for module in pretext.backbone.modules()
            if getattr(module, "kernel_size", None) == (3, 3)
        ][-1]
        around = last.weight.grad.flatten(2)[:, :, torch.arange(9) != 4]
        assert bool(around.abs().sum() > 0) == learns


def test_color_options_hide_cues_to_a_patchs_position():
    image = torch.rand(64, 3, 8, 8, generator=generator())
    projected = project_colors(image)
    axis = torch.tensor([-1.0, 2.0, -1.0])[:, None, None]
    assert (projected * axis).sum(1).abs().max() < 1e-6
    torch.testing.assert_close(project_colors(projected), projected)
    # Aberration shifts red against green by a pixel; dropping channels leaves no pair to
    # compare.
    shifted = torch.cat([image[:, :1].roll(1, 3), image[:, :1], image[:, :1]], dim=1)
    dropped = drop_colors(shifted, generator())
    deviations = dropped.std(dim=(2, 3)).sort(dim=1).values
    assert (deviations[:, 1] < 0.02 * deviations[:, 2]).all()
    assert len({int(channel) for channel in dropped.std(dim=(2, 3)).argmax(1)}) == 3


@pytest.mark.parametrize(
    ("backbone", "options", "words"),
    [
        ("resnet18", {"patch": 12}, "take"),
        ("resnet18", {"patch": 4, "gap": 20}, "no 3x3 grid"),
        ("vit-tiny", {"patch": 7}, "take 4"),
    ],
)
def test_grids_that_do_not_fit_are_errors(backbone, options, words):
    with pytest.raises(UserError, match=words):
        build("position", backbone, **options)
