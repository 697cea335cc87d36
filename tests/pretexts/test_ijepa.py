"""I-JEPA: its blocks, its loss, what hides patches, its teacher, its collapse, and mistakes."""

import math

import pytest
import torch
import torch.nn.functional as F

from sslrun.backbones import build_backbone
from sslrun.data.examples import Batch
from sslrun.data.specs import ImageSpec
from sslrun.errors import UserError
from sslrun.pretexts.base import pretexts
from sslrun.pretexts.ijepa import (
    COLLAPSED,
    block_loss,
    draw_blocks,
    largest_area,
    smallest_side,
    take_blocks,
)

SIZE, PATCH = 32, 4
SIDE = SIZE // PATCH
IJEPA = pretexts["ijepa"]


def build(registers=0, patch=PATCH, **options):
    torch.manual_seed(0)
    shape = {
        "patch": patch, "depth": 2, "width": 24, "heads": 3, "registers": registers,
        "pool": "mean",
    }  # fmt: skip
    backbone = build_backbone("vit-tiny", shape, ImageSpec(SIZE))
    return IJEPA(IJEPA.Options(**{"depth": 1, "width": 16, "heads": 2, **options}), backbone)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def images(count=6):
    return torch.rand(count, 3, SIZE, SIZE, generator=generator(1))


def is_rectangle(patches, side):
    rows, columns = ({f(patch, side) for patch in patches} for f in (int.__floordiv__, int.__mod__))
    return (
        len(set(patches)) == len(patches) == len(rows) * len(columns)
        and max(rows) - min(rows) + 1 == len(rows)
        and max(columns) - min(columns) + 1 == len(columns)
    )


@pytest.mark.parametrize("side", [8, 14])
def test_blocks_are_rectangles_of_one_size_and_disjoint_from_the_context(side):
    options = IJEPA.Options()
    largest = largest_area(side, options.target_scale, options.target_aspect)
    sizes, corners, contexts = set(), set(), []
    for seed in range(30):
        context, blocks, real = draw_blocks(7, side, largest, options, generator(seed))
        assert context.shape == (7, side**2)
        assert blocks.shape == (7, 4, largest)
        area = int(real.sum())
        assert real[:area].all()
        sizes.add(area)
        for image in range(7):
            hidden = set()
            for block in blocks[image, :, real].tolist():
                assert is_rectangle(block, side)
                hidden |= set(block)
                corners |= {block[0], block[-1]}
            seen = set(context[image].nonzero()[:, 0].tolist())
            assert not seen & hidden
            contexts.append(len(seen))
            # The context is a square without the targets: all others of its rows and columns.
            rows, columns = {patch // side for patch in seen}, {patch % side for patch in seen}
            inside = {
                row * side + column
                for row in range(min(rows), max(rows) + 1)
                for column in range(min(columns), max(columns) + 1)
            }
            assert inside - seen <= hidden
        assert blocks.min() >= 0
        assert blocks.max() < side**2
    shares = [round(side**2 * share) for share in (0.15, 0.2)]
    assert shares[0] - side / 2 <= min(sizes) < max(sizes) <= shares[1] + side / 2
    assert max(sizes) <= largest
    assert {0, side**2 - 1} <= corners  # blocks reach the first and the last patch
    assert min(contexts) >= options.least


def test_the_largest_and_the_smallest_block_are_those_that_can_be_drawn():
    for side, scale, aspect in ((8, 0.2, (0.75, 1.5)), (14, 0.2, (0.75, 1.5)), (5, 0.3, (1, 3))):
        area = math.floor(side**2 * scale)
        ratios = torch.linspace(*aspect, 5000, dtype=torch.float64)
        heights = (area * ratios).sqrt().round().clamp(1, side)
        widths = (area / ratios).sqrt().round().clamp(1, side)
        assert largest_area(side, (0.1, scale), aspect) == int((heights * widths).max())
    assert smallest_side(8, 0.85) == 7
    assert smallest_side(14, 0.85) == 13


def test_the_pictures_of_one_generator_are_equal_and_blocks_vary_between_images():
    context, blocks, _ = draw_blocks(9, 8, 12, IJEPA.Options(), generator())
    assert len({tuple(row) for row in context.tolist()}) > 4
    again = draw_blocks(9, 8, 12, IJEPA.Options(), generator())
    assert torch.equal(blocks, again[1])
    drawn = build().pictures(Batch(images(), None), generator())
    assert list(drawn) == ["image", "context", "targets"]
    gray = [(drawn[name] == 0.5).all(dim=1) for name in ("context", "targets")]
    assert (gray[0] | gray[1]).all()  # no pixel is both context and target
    assert not gray[0].all()
    shown = ~gray[1]
    assert torch.equal(drawn["targets"].movedim(1, 3)[shown], images().movedim(1, 3)[shown])


@pytest.mark.parametrize("registers", [0, 2])
def test_hiding_patches_by_a_mask_equals_dropping_them(registers):
    backbone = build(registers).backbone
    context, _, _ = draw_blocks(6, SIDE, 12, IJEPA.Options(), generator())
    patches = backbone.embed(images())
    hidden = backbone.encode(patches, context)
    first = 1 + registers
    for image in range(6):
        kept = backbone.encode(patches[image : image + 1, context[image]])[0]
        torch.testing.assert_close(hidden[image, :first], kept[:first], rtol=0, atol=1e-5)
        torch.testing.assert_close(
            hidden[image, first:][context[image]], kept[first:], rtol=0, atol=1e-5
        )


def test_predictions_do_not_depend_on_the_pixels_of_targets():
    pretext = build()
    views = pretext.views(Batch(images(), None), generator())
    first, context, blocks, real = views
    pixels = context.view(-1, 1, SIDE, SIDE).repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)
    changed = torch.where(pixels, first, torch.rand(first.shape, generator=generator(3)))

    def predict(x):
        tokens = pretext.backbone.encode(pretext.backbone.embed(x), context)[:, 1:]
        return pretext.predictor(tokens, context, blocks, real)[:, :, real]

    torch.testing.assert_close(predict(first), predict(changed), rtol=0, atol=1e-5)


def test_the_loss_equals_its_formula_and_stops_the_gradient():
    predicted = (3 * torch.randn(2, 3, 5, 4, generator=generator())).requires_grad_()
    targets = torch.randn(2, 3, 5, 4, generator=generator(1)).requires_grad_()
    real = torch.tensor([True, True, True, False, False])
    total = 0.0
    for image in range(2):
        for block in range(3):
            for patch in range(3):
                for value in range(4):
                    place = (image, block, patch, value)
                    gap = abs(float((predicted[place] - targets[place]).detach()))
                    total += 0.5 * gap**2 if gap < 1 else gap - 0.5
    loss = block_loss(predicted, targets, real)
    assert loss.item() == pytest.approx(total / (2 * 3 * 3 * 4), rel=1e-5)
    loss.backward()
    assert targets.grad is None
    assert predicted.grad[:, :, 3:].abs().max() == 0
    assert (predicted.grad[:, :, :3].abs() > 0).all()
    assert block_loss(targets, targets, real).item() == 0


def test_a_prediction_of_the_normalized_teacher_has_zero_loss(monkeypatch):
    pretext = build()
    views = pretext.views(Batch(images(), None), generator())
    targets = pretext.targets(views[0])
    torch.testing.assert_close(targets.mean(dim=2), torch.zeros(6, SIDE**2), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        targets.var(dim=2, correction=0), torch.ones(6, SIDE**2), rtol=0, atol=1e-3
    )
    features = pretext.teacher(views[0]).tokens  # the last norm has no scale and shift yet
    torch.testing.assert_close(targets, features, rtol=0, atol=1e-3)
    block = take_blocks(targets, views[2])
    assert torch.equal(block[1, 2, 0], targets[1, views[2][1, 2, 0]])
    monkeypatch.setattr(pretext.predictor, "forward", lambda *inputs: block)
    assert pretext(views).loss.item() == 0


def test_the_order_of_target_blocks_does_not_matter():
    pretext = build()
    first, context, blocks, real = pretext.views(Batch(images(), None), generator())
    tokens = pretext.backbone.encode(pretext.backbone.embed(first), context)[:, 1:]
    predicted = pretext.predictor(tokens, context, blocks, real)
    turned = pretext.predictor(tokens, context, blocks.flip(1), real)
    torch.testing.assert_close(turned, predicted.flip(1))


def test_the_teacher_follows_without_gradient_and_is_kept():
    pretext = build(momentum=0.5)
    assert pretext.kept is pretext.teacher
    pretext(pretext.views(Batch(images(), None), generator())).loss.backward()
    assert all(parameter.grad is None for parameter in pretext.teacher.parameters())
    learning = [*pretext.backbone.parameters(), *pretext.predictor.parameters()]
    assert all(parameter.grad is not None for parameter in learning)
    before = pretext.teacher.norm.weight.clone()
    with torch.no_grad():
        pretext.backbone.norm.weight.add_(1.0)
    pretext.after_step(0.5)
    expected = 0.75 * before + 0.25 * pretext.backbone.norm.weight.detach()
    torch.testing.assert_close(pretext.teacher.norm.weight, expected)
    pretext.after_step(1.0)
    torch.testing.assert_close(pretext.teacher.norm.weight, expected)  # the momentum is 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch": 8}, r"pretext.least: a target block of 4 patches in a context block of 16"),
        ({"target_scale": (0.9, 0.9)}, "leaves fewer than 10: lower least or target_scale"),
    ],
)
def test_blocks_that_leave_no_context_are_errors(options, message):
    with pytest.raises(UserError, match=message):
        build(**{"least": 13 if "patch" in options else 10, **options})


def test_bounds_in_the_wrong_order_are_errors():
    with pytest.raises(ValueError, match="give the smallest value first"):
        build(target_scale=(0.3, 0.2))
    with pytest.raises(ValueError, match=r"width \(18\) must be a multiple of 4 and of heads"):
        build(width=18)


def test_targets_that_learn_collapse_and_the_collapse_is_named():
    """Without a teacher and a stopped gradient, constant features are the easiest prediction."""
    pretext = build(patch=8, least=1)
    pretext.teacher = pretext.backbone
    targets_with_gradient = IJEPA.targets.__wrapped__
    optimizer = torch.optim.AdamW(pretext.parameters(), lr=0.01)
    batch = Batch(images(16), None)
    before = pretext(pretext.views(batch, generator())).metrics
    for step in range(24):
        first, context, blocks, real = pretext.views(batch, generator(step))
        tokens = pretext.backbone.encode(pretext.backbone.embed(first), context)[:, 1:]
        predicted = pretext.predictor(tokens, context, blocks, real)
        wanted = take_blocks(targets_with_gradient(pretext, first), blocks)
        F.smooth_l1_loss(predicted[:, :, real], wanted[:, :, real]).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = pretext(pretext.views(batch, generator())).metrics
    assert before["target_deviation"] > 10 * COLLAPSED
    assert after["target_deviation"] < COLLAPSED
    healthy, collapsed = (
        pretext.diagnose({name: value.item() for name, value in metrics.items()})
        for metrics in (before, after)
    )
    assert healthy is None
    assert "collapse of the targets" in collapsed
    assert pretext.diagnose({"rankme": 5.0}) is None
