"""DINO and iBOT: losses against loops over pairs, what learns, both collapses, and mistakes."""

import itertools
import logging
import math

import pytest
import torch
import torch.nn.functional as F

from sslrun import distributed
from sslrun.backbones import build_backbone
from sslrun.backbones.transformer import DropPath
from sslrun.data.examples import Batch, TensorExamples
from sslrun.data.image.augment import Augmentation
from sslrun.data.source import sources
from sslrun.data.specs import ImageSpec
from sslrun.data.splits import load_splits
from sslrun.errors import UserError
from sslrun.pretexts import dino
from sslrun.pretexts.base import pretexts
from sslrun.pretexts.blockwise import block_masks
from sslrun.pretexts.dino import DINO, dino_loss, koleo, soften
from sslrun.recipe import Watch
from sslrun.stages.watch import Watcher
from sslrun.training.checkpoint import restore, save
from sslrun.training.device import compute
from sslrun.training.loop import Schedule, Training, train

SIZE, PATCH = 16, 4
CROPPED = Augmentation(crop=(0.4, 1.0), flip=0.5)
SMALL = {
    "outputs": 32,
    "hidden": 24,
    "bottleneck": 8,
    "augmentation": CROPPED,
    "second": CROPPED,
    "crops": {"count": 2, "size": 8},
}
"""Options of a task that learns in seconds."""


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def build(backbone="vit-tiny", shape=None, **options):
    torch.manual_seed(0)
    shapes = {
        "vit-tiny": {"patch": PATCH, "depth": 2, "width": 24, "heads": 2},
        "resnet18": {"channels": 8, "stem": "small"},
    }
    network = build_backbone(backbone, {**shapes[backbone], **(shape or {})}, ImageSpec(SIZE))
    return DINO(DINO.Options(**{**SMALL, **options}), network)


def batch(count=6):
    coarse = torch.randint(0, 256, (count, 3, 4, 4), generator=generator(1)).float()
    return Batch(F.interpolate(coarse, (SIZE, SIZE), mode="bilinear").byte(), None)


def views_of(pretext, count=6):
    return pretext.views(batch(count), generator())


def training(steps, pretext=None, count=64, **schedule):
    pretext = build() if pretext is None else pretext
    settings = {"batch": 16, "lr": 0.003, "precision": "fp32", "clip_each": 3.0, **schedule}
    examples = TensorExamples(batch(count).inputs, None, (), ImageSpec(SIZE))
    return Training(pretext, Schedule(steps=steps, **settings), compute("cpu")), examples


def random_outputs(views=5, globals_=2, count=4, outputs=7):
    draws = torch.randn(
        views + globals_, count, outputs, dtype=torch.float64, generator=generator(3)
    )
    return draws[:views].clone(), draws[views:].clone()


def test_the_loss_equals_a_loop_over_pairs_of_different_views():
    scores, teacher = random_outputs(views=5, globals_=3)
    center, temperature = torch.linspace(-1, 1, 7).double(), torch.tensor(0.5)
    expected, pairs = 0.0, 0
    for q, v in itertools.product(range(3), range(5)):
        if v == q:
            continue
        pairs += 1
        for image in range(4):
            target = ((teacher[q, image] - center) / 0.5).exp()
            target = target / target.sum()
            student = (scores[v, image] / 0.1).exp()
            expected -= float((target * (student / student.sum()).log()).sum()) / 4
    assert pairs == 3 * 5 - 3
    found = dino_loss(scores, soften(teacher, center, temperature), 0.1)
    assert found.item() == pytest.approx(expected / pairs, rel=1e-6)
    found = dino_loss(scores.float(), soften(teacher.float(), center.float(), temperature), 0.1)
    assert found.item() == pytest.approx(expected / pairs, rel=1e-6)


def test_a_pair_of_the_same_view_does_not_count():
    """With two global views, the first view's student learns from the second's teacher alone."""
    scores, teacher = random_outputs(views=2)
    targets = soften(teacher, torch.zeros(7), torch.tensor(0.5))
    gradients = []
    for changed in (targets, torch.stack([targets[0].roll(1, dims=-1), targets[1]])):
        student = scores.clone().requires_grad_()
        dino_loss(student, changed, 0.1).backward()
        gradients.append(student.grad)
    torch.testing.assert_close(gradients[0][0], gradients[1][0])
    assert (gradients[0][1] - gradients[1][1]).abs().max() > 0.01


def test_uniform_teacher_and_student_have_the_loss_ln_k():
    uniform = torch.full((2, 4, 7), 1 / 7)
    assert dino_loss(torch.zeros(5, 4, 7), uniform, 0.1).item() == pytest.approx(math.log(7))


def test_a_constant_added_to_outputs_and_center_changes_nothing():
    scores, teacher = random_outputs()
    center = torch.randn(7, dtype=torch.float64, generator=generator(4))
    losses = [
        dino_loss(scores, soften(teacher + shift, center + shift, torch.tensor(0.04)), 0.1)
        for shift in (0.0, 3.0, torch.arange(7.0))
    ]
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(losses[2], losses[0])


def test_metrics_equal_their_definitions_and_the_center_is_the_moving_mean():
    pretext = build(center=0.75)
    views = views_of(pretext)
    pretext.center.copy_(torch.linspace(0, 1, 32))
    before = pretext.center.clone()
    with torch.no_grad():
        outputs = torch.stack([pretext.teacher(view) for view in views[:2]])
        scores = torch.stack([pretext.head(pretext.backbone(view).pooled) for view in views])
    result = pretext(views)
    q = ((outputs - before) / 0.04).softmax(-1)
    entropy = -(q * q.log()).sum(-1).mean()
    kl = torch.stack([
        F.kl_div((scores[v] / 0.1).log_softmax(-1), q[t], reduction="batchmean")
        for t, v in itertools.product(range(2), range(4))
        if t != v
    ]).mean()  # fmt: skip
    torch.testing.assert_close(result.metrics["teacher_entropy"], entropy)
    torch.testing.assert_close(result.metrics["kl"], kl, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result.loss.detach(), entropy + kl)
    torch.testing.assert_close(pretext.center, 0.75 * before + 0.25 * outputs.mean(dim=(0, 1)))
    torch.testing.assert_close(result.metrics["center_std"], pretext.center.std())
    moved = pretext.center.clone()
    pretext.eval()(views)
    assert torch.equal(pretext.center, moved)


def test_the_center_is_the_mean_over_devices(monkeypatch):
    """Another device with the same images, shifted by 2: the mean over both is shifted by 1."""
    alone, shared = build(), build()
    views = views_of(alone)
    alone(views)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "add_up", lambda mean: mean.mul_(2).add_(2.0))
    shared(views)
    torch.testing.assert_close(shared.center, alone.center + 0.1)


def test_without_centering_the_center_stays_zero():
    pretext = build(center=None)
    pretext(views_of(pretext))
    assert not pretext.center.any()


@pytest.mark.parametrize("ibot", [False, True])
def test_the_teacher_gets_no_gradient_and_equals_the_student_after_a_step_with_momentum_0(ibot):
    job, examples = training(2, build(momentum=0.0, ibot=ibot))
    pretext = job.learner
    assert not any(parameter.requires_grad for parameter in pretext.teacher.parameters())
    steps = train(job, examples, 0)
    next(steps)
    # Half a cosine from 0: the first of two steps moves by half, so compare the closed form.
    student = dict(pretext.backbone.named_parameters())
    start = dict(build(momentum=0.0, ibot=ibot).backbone.named_parameters())
    for name, weight in pretext.teacher.backbone.named_parameters():
        assert weight.grad is None
        expected = (start[name] + student[name]) / 2
        torch.testing.assert_close(weight, expected.detach(), rtol=1e-5, atol=1e-7)
    pretext.after_step(0.0)  # momentum 0
    for module, teacher in (
        (pretext.backbone, pretext.teacher.backbone),
        (pretext.head, pretext.teacher.head),
    ):
        for ours, theirs in zip(module.parameters(), teacher.parameters(), strict=True):
            torch.testing.assert_close(theirs, ours.detach(), rtol=0, atol=1e-6)
    assert pretext.kept is pretext.teacher.backbone


@pytest.mark.parametrize("ibot", [False, True])
def test_local_views_never_reach_the_teacher(ibot):
    pretext = build(ibot=ibot)
    seen = []
    layer = pretext.teacher.backbone.patch_embed
    layer.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    views = views_of(pretext)
    assert [view.shape[-1] for view in views[:4]] == [SIZE, SIZE, 8, 8]
    pretext(views)
    assert seen == [(12, 3, SIZE, SIZE)]


def test_the_teacher_drops_nothing_and_its_batch_norms_train():
    pretext = build(shape={"dropout": 0.5, "drop_path": 0.5}).train()
    views = views_of(pretext)
    first, again = pretext.teacher(views[0]), pretext.teacher(views[0])
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert not torch.equal(pretext.backbone(views[0]).pooled, pretext.backbone(views[0]).pooled)
    assert any(isinstance(part, DropPath) and part.training for part in pretext.backbone.modules())
    resnet = build("resnet18").train()
    norm = resnet.teacher.backbone.bn1
    assert norm.training
    resnet(views_of(resnet))
    assert int(norm.num_batches_tracked) == 1
    assert not resnet.eval().teacher.backbone.bn1.training


def test_schedules_are_those_of_the_paper_and_in_buffers():
    pretext = build(teacher_temperature=(0.02, 0.06), warmup=0.5, momentum=0.9)
    temperatures = []
    for progress in (0.0, 0.25, 0.5, 0.75):
        pretext.before_step(progress)
        temperatures.append(float(pretext.teacher_temperature))
    assert temperatures == pytest.approx([0.02, 0.04, 0.06, 0.06])
    pretext.after_step(0.5)
    assert float(pretext.momentum) == pytest.approx(0.95)
    names = dict(pretext.named_buffers())
    assert {"teacher_temperature", "momentum", "center"} <= set(names)
    constant = build(teacher_temperature=(0.02, 0.06), warmup=0.0)
    constant.before_step(0.0)
    assert float(constant.teacher_temperature) == pytest.approx(0.06)


@pytest.mark.parametrize("ibot", [False, True])
def test_a_resumed_run_equals_one_never_stopped_bit_for_bit(ibot, tmp_path):
    options = {"ibot": ibot, "warmup": 0.9, "free_gain": True, "koleo": 0.1}
    schedule = {"freeze_last": 0.5, "weight_decay": 0.04, "weight_decay_end": 0.4}
    whole, examples = training(8, build(**options), **schedule)
    losses = [step.loss for step in train(whole, examples, 0)]
    for step in train(stopped := training(8, build(**options), **schedule)[0], examples, 0):
        if step.step == 5:
            save(stopped, tmp_path)
            break
    torch.manual_seed(9)
    resumed = training(8, build(**options), **schedule)[0]
    restore(resumed, next(tmp_path.glob("*")))
    for name in ("teacher_temperature", "momentum", "center"):
        assert torch.equal(resumed.learner.get_buffer(name), stopped.learner.get_buffer(name))
    rest = [step.loss for step in train(resumed, examples, 0)]
    assert torch.equal(torch.stack(rest), torch.stack(losses[5:]))
    for name, value in whole.learner.state_dict().items():
        assert torch.equal(resumed.learner.state_dict()[name], value), name


def test_the_last_layer_is_frozen_first_and_its_rows_keep_their_length():
    job, examples = training(6, freeze_last=1.0)
    before = job.learner.head.last.weight.clone()
    steps = train(job, examples, 0)
    for _ in range(4):  # an epoch
        next(steps)
    assert torch.equal(job.learner.head.last.weight, before)
    next(steps)
    assert not torch.equal(job.learner.head.last.weight, before)
    scaled = build().head
    vectors = torch.rand(3, 24, generator=generator())
    expected = scaled(vectors)
    with torch.no_grad():
        scaled.last.weight.mul_(7.0)
    torch.testing.assert_close(scaled(vectors), expected)
    assert expected.abs().max() <= 1
    free = build(free_gain=True)
    assert len(free.last_layer()) == 2
    with torch.no_grad():
        free.head.last.gain.mul_(3.0)
    torch.testing.assert_close(free.head(vectors), 3 * expected)


COLLAPSES = [
    ({"center": None}, "one output dominates"),
    ({"teacher_temperature": (0.1, 0.1)}, "targets are uniform"),
    ({}, None),
]


@pytest.mark.parametrize(("options", "failure"), COLLAPSES)
def test_without_centering_or_sharpening_it_collapses_and_the_collapse_is_named(options, failure):
    cheap = {"outputs": 64, "bottleneck": 16, "momentum": 0.9, "crops": None}
    pretext = build(shape={"patch": 8, "depth": 1}, **cheap, **options)
    job, examples = training(100, pretext)
    *_, last = train(job, examples, 0)
    splits = load_splits("digits", sources["digits"].Options())
    watcher = Watcher(splits, pretext, Watch(examples=64), compute("cpu"), 0)
    warning = watcher.check(pretext, 1.0, last.metrics).warning
    if failure is None:
        assert "dominates" not in (warning or "")
        assert "uniform" not in (warning or "")
    else:
        assert failure in warning
    assert pretext.diagnose({}) is None  # a check before the first step


def test_koleo_equals_its_formula():
    features = torch.randn(5, 3, dtype=torch.float64, generator=generator(5))
    units = features / features.norm(dim=1, keepdim=True)
    distances = torch.cdist(units, units).fill_diagonal_(math.inf)
    nearest = distances.amin(dim=1).tolist()
    expected = -sum(math.log(5 * distance) for distance in nearest) / 5
    assert koleo(features).item() == pytest.approx(expected, rel=1e-6)
    assert koleo(torch.ones(4, 3)).isfinite()
    plain, spread = build(), build(koleo=0.3)
    views = views_of(plain)
    with torch.no_grad():
        added = sum(koleo(plain.backbone(view).pooled) for view in views[:2])
    torch.testing.assert_close(spread(views).loss, plain(views).loss + 0.3 * added)


def test_masks_are_blocks_with_at_most_the_wanted_patches():
    targets = torch.arange(0, 99).clamp_max(98)
    masks = block_masks(targets, 14, 14, generator())
    counts = masks.sum(dim=(1, 2))
    assert (counts <= targets).all()
    assert counts[0] == 0
    wanted = targets > 30
    assert (counts[wanted] / targets[wanted]).mean() > 0.9
    # Blocks: most neighbors of a masked patch are masked, unlike in random masks of half of them.
    below = masks[60:, 1:] & masks[60:, :-1]
    assert below.sum() > 0.7 * masks[60:, :-1].sum()
    again = block_masks(targets, 14, 14, generator())
    assert torch.equal(masks, again)
    assert not block_masks(torch.zeros(3, dtype=torch.int64), 4, 4, generator()).any()


def test_ibot_masks_a_part_of_the_views_within_the_ratio():
    pretext = build(ibot=True, mask_ratio=(0.5, 0.75), unmasked=0.25)
    *_, masks = views_of(pretext, 10)
    assert masks.shape == (20, 16)
    counts = masks.sum(dim=1)
    assert (counts > 0).sum() <= 15
    assert (counts > 0).sum() >= 12  # a mask may stay empty if no block fits
    assert counts.max() <= 12


@pytest.mark.parametrize("masking", [{"mask_ratio": (0.0, 0.0)}, {"unmasked": 1.0}, {}])
def test_ibot_without_masked_patches_equals_dino(masking):
    plain, ibot = build(), build(ibot=True, **masking)
    *views, masks = views_of(ibot)
    masks = torch.zeros_like(masks) if not masking else masks
    assert not masks.any()
    expected, found = plain(tuple(views)), ibot((*views, masks))
    torch.testing.assert_close(found.loss, expected.loss)
    assert found.metrics["patch_loss"] == 0
    expected.loss.backward()
    found.loss.backward()
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(
                ibot.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-6
            )
    assert ibot.mask_token.grad is None or not ibot.mask_token.grad.any()


def test_the_patch_loss_equals_a_loop_and_ignores_patches_that_are_not_masked():
    pretext = build(ibot=True, mask_ratio=(0.0, 1.0), unmasked=0.0)
    student = torch.randn(4, 16, 24, generator=generator(1), requires_grad=True)
    teacher = torch.randn(4, 16, 24, generator=generator(2))
    masks = torch.rand(4, 16, generator=generator(3)) < 0.4
    masks[2] = False
    pretext.patch_center.copy_(torch.linspace(0, 1, 32))
    center = pretext.patch_center.clone()
    found = pretext._compare_patches(student, teacher, masks)
    expected = 0.0
    with torch.no_grad():
        scores, outputs = pretext.head(student), pretext.teacher.head(teacher)
        for view, patch in masks.nonzero().tolist():
            target = ((outputs[view, patch] - center) / 0.04).softmax(0)
            loss = -(target * (scores[view, patch] / 0.1).log_softmax(0)).sum()
            expected += float(loss) / int(masks[view].sum()) / 4
    assert found.item() == pytest.approx(expected, rel=1e-5)
    mean = outputs.mean(dim=(0, 1))
    torch.testing.assert_close(pretext.patch_center, 0.9 * center + 0.1 * mean)
    found.backward()
    assert (student.grad[~masks] == 0).all()
    assert (student.grad[masks].abs().sum(dim=-1) > 0).all()


def test_a_masked_patch_is_hidden_from_the_student_but_not_from_the_teacher():
    pretext = build(ibot=True, crops=None, mask_ratio=(0.0, 1.0), unmasked=0.0, patch_weight=0.0)
    first, second, _ = views_of(pretext)
    masks = torch.zeros(12, 16, dtype=torch.bool)
    masks[:6, 5] = True  # row 1, column 1 of the first views
    changed = first.clone()
    changed[:, :, 4:8, 4:8] = 0.5
    student = []
    encode = pretext.backbone.encode
    pretext.backbone.encode = lambda patches: student.append(encode(patches)) or student[-1]
    teacher = [
        pretext((view, second, masks)).metrics["teacher_entropy"] for view in (first, changed)
    ]
    torch.testing.assert_close(student[0], student[1])
    assert teacher[0] != teacher[1]


def test_defaults_follow_the_paper():
    alone, beside = DINO.Options(), DINO.Options(crops={"count": 8, "size": 96})
    assert alone.augmentation.crop == (0.14, 1.0)
    assert beside.augmentation.crop == beside.second.crop == (0.4, 1.0)
    assert (beside.augmentation.blur, beside.second.blur, beside.second.solarize) == (1, 0.1, 0.2)
    own = DINO.Options(crops={"count": 8}, augmentation={"crop": [0.3, 1.0]})
    assert own.augmentation.crop == (0.3, 1.0)
    pretext = build(augmentation=beside.augmentation)
    local = pretext.local_augmentation(pretext.options.crops)
    assert (local.crop, local.blur, local.solarize) == ((0.05, 0.4), 0.5, 0)
    plain = build(crops={"count": 1, "augmentation": {"flip": 0.5}})
    assert plain.local_augmentation(plain.options.crops) == Augmentation(flip=0.5)


@pytest.mark.parametrize("ibot", [False, True])
def test_pictures_show_attention_and_views(ibot):
    pretext = build(ibot=ibot).eval()
    columns = pretext.pictures(batch(3), generator())
    masked = ["masked 1", "masked 2"] if ibot else []
    names = ["image", "attention", "global 1", "global 2", *masked, "local 1", "local 2"]
    assert list(columns) == names
    for title, images in columns.items():
        side = 8 if title.startswith("local") else SIZE
        assert images.shape == (3, 3, side, side)
        assert images.min() >= 0
        assert images.max() <= 1
    weights = pretext.kept.attention(columns["image"]).mean(dim=1)[:, 0, 1:]
    expected = (weights / weights.amax(dim=1, keepdim=True)).view(3, 4, 4)
    torch.testing.assert_close(columns["attention"][:, 0, ::4, ::4], expected)
    assert "attention" not in build("resnet18").eval().pictures(batch(3), generator())


def test_large_crops_without_local_views_give_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        build()
        build(crops=None, augmentation={"crop": [0.2, 1.0]})
        assert not caplog.records
        build(crops=None)
    (record,) = caplog.records
    assert "show at least 0.4 of the image" in record.getMessage()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "resnet18", "ibot": True}, "'dino' with ibot: true needs a backbone with"),
        ({"crops": {"count": 2, "size": 10}}, "patches of 4: set size: 8"),
        ({"outputs": 10**12}, r"pretext.outputs: the last layer of 1,000,000,000,000 outputs"),
    ],
)
def test_mistakes_are_errors_of_one_line(options, message):
    with pytest.raises(UserError, match=message) as caught:
        build(**options)
    assert "\n" not in str(caught.value)


def test_the_named_limit_on_outputs_fits(monkeypatch):
    sizes = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000}
    monkeypatch.setattr(dino.os, "sysconf", sizes.__getitem__)
    with pytest.raises(UserError, match="to 16384 at most"):
        build(outputs=30000)
    build(outputs=16384)


def test_options_that_contradict_are_errors():
    with pytest.raises(ValueError, match="smallest value first"):
        DINO.Options(mask_ratio=(0.5, 0.1))
    assert pretexts["dino"] is DINO
    plain = DINO.Options(augmentation={}, second={})
    vit = type(build().backbone)
    assert not DINO.depends_on_devices(plain, vit, vit.Options())
    assert DINO.depends_on_devices(plain.model_copy(update={"ibot": True}), vit, vit.Options())
