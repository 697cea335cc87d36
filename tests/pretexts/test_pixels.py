"""Prediction of pixels: its loss against a formula, its masks, its sampling and its refusals."""

import math

import pytest
import torch

from sslrun.backbones import build_backbone
from sslrun.data.examples import Batch, TensorExamples
from sslrun.data.specs import ImageSpec
from sslrun.errors import UserError
from sslrun.pretexts.base import pretexts
from sslrun.pretexts.pixels import PixelViews
from sslrun.recipe import parse
from sslrun.recipe.places import Located

SIDE, COLORS = 6, 5
LEVELS = torch.tensor([0, 60, 120, 180, 240])


def images(count=16, seed=0):
    """Return uint8 images whose pixels mostly equal the one above."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(COLORS, (count, 1, SIDE), generator=generator).repeat(1, SIDE, 1)
    noise = torch.rand(ids.shape, generator=generator) < 0.1
    ids[noise] = torch.randint(COLORS, (int(noise.sum()),), generator=generator)
    return LEVELS[ids].byte()[:, None].repeat(1, 3, 1, 1)


def examples(count=64, seed=0):
    return TensorExamples(images(count, seed), None, (), ImageSpec(SIDE))


def build(order="causal", **options):
    torch.manual_seed(0)
    shape = {"side": SIDE, "width": 32, "heads": 2, "depth": 2, "colors": COLORS}
    backbone = build_backbone("igpt-tiny", {**shape, "causal": order == "causal"}, ImageSpec(SIDE))
    backbone.fit_inputs(examples())
    cls = pretexts["pixels"]
    return cls(cls.Options(order=order, **options), backbone)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randomize(pretext):
    torch.nn.init.normal_(pretext.head.weight, std=0.5)
    return pretext


def train(pretext, steps=60):
    optimizer = torch.optim.AdamW(pretext.parameters(), lr=0.003)
    for step in range(steps):
        batch = Batch(images(32, seed=step), None)
        pretext(pretext.views(batch, generator(step))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return pretext.eval()


@pytest.mark.parametrize("order", ["causal", "masked"])
def test_the_first_loss_is_that_of_a_uniform_guess(order):
    pretext = build(order)
    loss = pretext(pretext.views(Batch(images(), None), generator())).loss
    assert loss.item() == pytest.approx(math.log(COLORS), rel=1e-6)


@pytest.mark.parametrize("order", ["causal", "masked"])
def test_the_loss_equals_its_formula(order):
    pretext = randomize(build(order, rate=0.4))
    views = pretext.views(Batch(images(4), None), generator())
    tokens = pretext.backbone.encode_ids(*views)
    losses = []
    for b in range(4):
        for t in range(SIDE**2):
            if views.hidden is None or views.hidden[b, t]:
                logits = (pretext.head.weight.double() @ tokens[b, t].double()).tolist()
                total = sum(math.exp(value) for value in logits)
                losses.append(math.log(total) - logits[int(views.ids[b, t])])
    assert pretext(views).loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_pixels_that_are_not_hidden_give_no_gradient():
    pretext = randomize(build("masked"))
    kept = []
    pretext.head.register_forward_hook(
        lambda _, __, logits: (logits.retain_grad(), kept.append(logits))[1]
    )
    views = pretext.views(Batch(images(), None), generator())
    pretext(views).loss.backward()
    (logits,) = kept
    assert (logits.grad[~views.hidden] == 0).all()
    assert (logits.grad[views.hidden].abs().sum(dim=-1) > 0).all()


def test_a_batch_without_hidden_pixels_has_a_loss_of_zero():
    pretext = randomize(build("masked"))
    ids = torch.zeros(2, SIDE**2, dtype=torch.long)
    output = pretext(PixelViews(ids, torch.zeros_like(ids, dtype=torch.bool)))
    assert output.loss.item() == 0


def test_the_realized_share_of_hidden_pixels_is_the_rate():
    pretext = build("masked", rate=0.15)
    hidden = pretext.views(Batch(images(400), None), generator()).hidden
    deviation = (0.15 * 0.85 / hidden.numel()) ** 0.5
    assert abs(hidden.float().mean().item() - 0.15) < 3 * deviation


def test_views_follow_from_the_generator():
    pretext, batch = build("masked"), Batch(images(), None)
    first, again, other = (pretext.views(batch, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first.hidden, again.hidden)
    assert not torch.equal(first.hidden, other.hidden)


def test_the_floor_is_the_entropy_of_the_colors():
    pretext, data = build(), examples()
    counts = torch.stack([(data.inputs[:, 0] == level).sum() for level in LEVELS]).double()
    shares = counts / counts.sum()
    assert pretext.floor(data) == pytest.approx(float(-(shares * shares.log()).sum()))


@pytest.mark.parametrize("order", ["causal", "masked"])
def test_training_goes_below_the_floor_on_held_out_images(order):
    pretext = train(build(order))
    with torch.inference_mode():
        record = pretext.held_out(Batch(images(64, seed=999), None), generator())
    assert record["held_out_loss"] < 0.75 * pretext.floor(examples())
    assert record["held_out_accuracy"] > 0.5


def test_completions_keep_the_upper_half_and_follow_from_the_generator():
    pretext = train(build())
    batch = Batch(images(8, seed=7), None)
    first, again, other = (pretext.pictures(batch, generator(seed)) for seed in (1, 1, 2))
    assert list(first) == ["palette", "completion"]
    assert torch.equal(first["palette"], batch.inputs / 255)
    assert torch.equal(first["completion"], again["completion"])
    assert not torch.equal(first["completion"], other["completion"])
    upper = slice(0, SIDE // 2)
    assert torch.equal(first["completion"][:, :, upper], first["palette"][:, :, upper])
    # Columns continue, as in the data.
    below = first["completion"][:, :, SIDE // 2] == first["palette"][:, :, SIDE // 2 - 1]
    assert below.float().mean() > 0.5


def test_pictures_of_the_masked_order_fill_hidden_pixels_only():
    pretext = train(build("masked", rate=0.3))
    pictures = pretext.pictures(Batch(images(8), None), generator())
    hidden = (pictures["hidden"] == 0.5).all(dim=1, keepdim=True).expand(-1, 3, -1, -1)
    assert hidden.any()
    assert torch.equal(pictures["filled"][~hidden], pictures["palette"][~hidden])


def test_one_device_equals_several_unless_views_are_random():
    cls = pretexts["pixels"]
    depends = cls.depends_on_devices
    assert not depends(cls.Options(), None, None)
    assert depends(cls.Options(order="masked"), None, None)
    assert depends(cls.Options(augmentation={"flip": 0.5}), None, None)


def test_a_backbone_of_the_other_order_is_refused():
    cls = pretexts["pixels"]
    backbone = build().backbone
    with pytest.raises(UserError, match="order: masked needs a backbone with causal: false"):
        cls(cls.Options(order="masked"), backbone)


def test_a_backbone_without_a_palette_is_refused_in_the_recipe():
    source = {
        "name": "x",
        "backbone": {"name": "resnet18"},
        "pretext": {"name": "pixels"},
        "pretrain": {"epochs": 1},
        "data": {"name": "digits", "size": 8},
    }
    with pytest.raises(UserError, match=r"'pixels' needs .*'palette'.* igpt-small, igpt-tiny"):
        parse(Located(source, {(): "x.yaml:1"}))
