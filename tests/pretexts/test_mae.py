"""MAE: patches, its loss, what its encoder sees, and mistakes."""

import pytest
import torch

from sslrun.backbones import build_backbone
from sslrun.data.examples import Batch, TensorExamples
from sslrun.data.specs import ImageSpec
from sslrun.errors import UserError
from sslrun.pretexts.base import pretexts
from sslrun.pretexts.mae import patchify, take, unpatchify
from sslrun.recipe import load

SIZE, PATCH = 32, 4
COUNT = (SIZE // PATCH) ** 2


def build(registers=0, patch=PATCH, **options):
    torch.manual_seed(0)
    shape = {"patch": patch, "depth": 2, "width": 24, "heads": 3, "registers": registers}
    backbone = build_backbone("vit-tiny", shape, ImageSpec(SIZE))
    cls = pretexts["mae"]
    return cls(cls.Options(**{"depth": 1, "width": 16, "heads": 2, **options}), backbone)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def images(count=6):
    return torch.rand(count, 3, SIZE, SIZE, generator=generator(1))


def order(count=6):
    return torch.rand(count, COUNT, generator=generator(2)).argsort(dim=1)


def test_patches_are_cut_row_by_row_and_put_together_again():
    cut = patchify(images(), PATCH)
    assert cut.shape == (6, COUNT, 3 * PATCH**2)
    third = images()[0, :, 8:12, 4:8]  # third row of patches, second column
    assert torch.equal(cut[0, 2 * 8 + 1], third.permute(1, 2, 0).flatten())
    assert torch.equal(unpatchify(cut, PATCH), images())
    torch.testing.assert_close(unpatchify(patchify(images(), 8), 8), images())


def test_an_order_shuffles_and_its_inverse_restores():
    cut = patchify(images(), PATCH)
    assert torch.equal(take(take(cut, order()), order().argsort(dim=1)), cut)


def test_a_quarter_of_the_patches_is_visible():
    drawn, shuffled = build().views(Batch((images() * 255).byte(), None), generator())
    assert drawn.shape == (6, 3, SIZE, SIZE)
    assert all(sorted(row) == list(range(COUNT)) for row in shuffled.tolist())
    assert build().encode(drawn, shuffled).shape == (6, 1 + 16, 24)
    assert build(registers=3).encode(drawn, shuffled).shape == (6, 1 + 16, 24)


@pytest.mark.parametrize("norm_pixels", [True, False])
def test_the_loss_is_the_mean_squared_error_of_hidden_patches(norm_pixels):
    pretext = build(norm_pixels=norm_pixels)
    pretext.eval()
    x, shuffled = images(), order()
    predicted = pretext.predict(x, shuffled).detach()
    normalized = (x - pretext.backbone.mean[:, None, None]) / pretext.backbone.std[:, None, None]
    total = 0.0
    for image in range(6):
        for number, place in enumerate(shuffled[image, 16:].tolist()):
            row, column = PATCH * (place // 8), PATCH * (place % 8)
            values = normalized[image, :, row : row + PATCH, column : column + PATCH]
            values = values.permute(1, 2, 0).flatten().double()
            if norm_pixels:
                mean = values.mean()
                variance = (values - mean).square().sum() / (len(values) - 1)
                values = (values - mean) / (variance + 1e-6).sqrt()
            error = predicted[image, number].double() - values
            total += float(error.square().mean())
    assert pretext((x, shuffled)).loss.item() == pytest.approx(total / (6 * 48), rel=1e-5)


def test_a_perfect_prediction_has_zero_loss_and_pictures_the_image(monkeypatch):
    pretext = build()
    monkeypatch.setattr(pretext, "predict", lambda x, shuffled: pretext.targets(x, shuffled)[0])
    assert pretext((images(), order())).loss.item() == 0
    drawn = pretext.pictures(Batch(images(), None), generator())
    assert list(drawn) == [
        "image",
        "visible",
        "reconstruction with true mean and deviation of each patch",
    ]
    torch.testing.assert_close(drawn[list(drawn)[2]], images(), rtol=0, atol=1e-4)
    hidden = (drawn["visible"] - images()).abs().amax(dim=1) > 1e-4
    shares = hidden.unflatten(1, (8, 4)).unflatten(3, (8, 4)).float().mean(dim=(2, 4))
    assert (shares > 0.5).flatten(1).sum(dim=1).tolist() == [48] * 6


def test_visible_patches_have_no_gradient_at_the_decoders_end():
    pretext = build()
    outputs = []
    pretext.decoder.blocks.register_forward_hook(
        lambda module, inputs, output: output.retain_grad() or outputs.append(output)
    )
    pretext((images(), order())).loss.backward()
    (tokens,) = outputs
    assert tokens.shape == (6, 1 + COUNT, 16)
    assert tokens.grad[:, :17].abs().max() == 0
    assert (tokens.grad[:, 17:].abs().amax(dim=2) > 0).all()
    assert all(parameter.grad is not None for parameter in pretext.parameters())


def test_the_encoder_does_not_see_hidden_patches():
    pretext = build(registers=2)
    shuffled = order()
    cut = patchify(images(), PATCH)
    noise = torch.rand(6, 48, 3 * PATCH**2, generator=generator(5))
    places = shuffled[:, 16:, None].expand(-1, -1, 3 * PATCH**2)
    changed = unpatchify(cut.scatter(1, places, noise), PATCH)
    assert not torch.equal(changed, images())
    assert torch.equal(pretext.encode(changed, shuffled), pretext.encode(images(), shuffled))


def test_with_all_patches_the_encoder_is_the_backbone():
    pretext = build(ratio=1e-9)
    features = pretext.backbone(images())
    pretext._visible_count = lambda count: count  # the option cannot say it
    shuffled = order()
    tokens = pretext.encode(images(), shuffled)
    torch.testing.assert_close(tokens[:, 0], features.pooled)
    torch.testing.assert_close(take(tokens[:, 1:], shuffled.argsort(dim=1)), features.tokens)
    rows = torch.arange(COUNT).expand(6, -1)
    torch.testing.assert_close(pretext.encode(images(), rows)[:, 1:], features.tokens)


def test_predictions_do_not_depend_on_the_order_of_visible_patches():
    pretext = build()
    shuffled = order()
    turned = torch.cat([shuffled[:, :16].flip(1), shuffled[:, 16:]], dim=1)
    torch.testing.assert_close(
        pretext.predict(images(), turned), pretext.predict(images(), shuffled)
    )


def test_mask_tokens_of_the_encoder_know_their_place_and_hide_pixels():
    pretext = build(mask_tokens="encoder")
    shuffled = order()
    tokens = pretext.encode(images(), shuffled)
    assert tokens.shape == (6, 1 + COUNT, 24)
    assert not torch.allclose(tokens[:, 20], tokens[:, 30])
    pretext((images(), shuffled)).loss.backward()
    assert all(parameter.grad is not None for parameter in pretext.parameters())
    assert pretext.encoder_mask.grad.abs().sum() > 0


def test_the_floor_is_the_loss_of_the_mean_patch():
    data = TensorExamples((images(20) * 255).byte(), None, (), ImageSpec(SIZE))
    pretext = build()
    pretext.backbone.fit_inputs(data)
    assert pretext.floor(data) == pytest.approx(1 - 1 / 48, abs=0.002)
    pretext = build(norm_pixels=False)
    cut = patchify(pretext.backbone.normalize(data.inputs.float() / 255), PATCH).flatten(0, 1)
    expected = (cut - cut.mean(dim=0)).square().mean().item()
    assert pretext.floor(data) == pytest.approx(expected, rel=1e-4)
    flat = TensorExamples(torch.full((4, 3, SIZE, SIZE), 7).byte(), None, (), ImageSpec(SIZE))
    assert build().floor(flat) < 0.1


def test_the_held_out_loss_has_the_draws_of_its_generator():
    pretext, batch = build().eval(), Batch((images() * 255).byte(), None)
    first, again, other = (
        pretext.held_out(batch, generator(seed))["held_out_loss"] for seed in (3, 3, 4)
    )
    assert first == again != other
    assert first.item() == pytest.approx(1, abs=0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.99}, r"pretext.ratio: 0.99 of 64 patches leaves 0 visible: change ratio"),
        ({"patch": 16, "ratio": 0.8}, "of 4 patches leaves 0 visible"),
    ],
)
def test_a_ratio_that_hides_everything_is_an_error(options, message):
    with pytest.raises(UserError, match=message):
        build(**options)


def test_widths_that_do_not_divide_are_errors():
    with pytest.raises(ValueError, match=r"width \(20\) must be a multiple of 4 and of heads"):
        build(width=20, heads=3)


@pytest.mark.parametrize("name", ["mae", "ijepa"])
def test_a_backbone_without_patches_is_an_error_of_the_recipe(name, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        f"name: mine\nbackbone: resnet18\npretext: {name}\ndata: {{name: cifar10}}\n"
        "pretrain: {epochs: 1}\n"
    )
    with pytest.raises(UserError, match=r"mine.yaml:3: .*needs a backbone with 'encode'.*vit-tiny"):
        load(recipe)
