"""Image GPT: its palette, its causality, its block against a naive one, and its layers."""

import math

import pytest
import torch
import torch.nn.functional as F

from sslrun.backbones import build_backbone, load_into, save_backbone
from sslrun.backbones.igpt import UNUSED
from sslrun.data.examples import TensorExamples
from sslrun.data.specs import ImageSpec
from sslrun.errors import UserError
from sslrun.recipe import parse
from sslrun.recipe.places import Located

SIDE = 6


def build(size=SIDE, **options):
    torch.manual_seed(0)
    shape = {"side": SIDE, "width": 24, "heads": 3, "depth": 3, "colors": 9}
    return build_backbone("igpt-tiny", {**shape, **options}, ImageSpec(size)).eval()


def examples(images):
    return TensorExamples(images, None, (), ImageSpec(images.shape[-1]))


def painted(palette, count=20, seed=0):
    """Return uint8 images (N, 3, SIDE, SIDE) of the colors (K, 3), which all occur."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(len(palette), (count, SIDE, SIDE), generator=generator)
    ids.view(-1)[: len(palette)] = torch.arange(len(palette))
    return palette[ids].permute(0, 3, 1, 2).byte()


def random_colors(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3), generator=generator)


def test_few_colors_are_kept_exactly_and_decode_to_the_same_image():
    backbone, colors = build(), random_colors(7)
    images = painted(colors)
    backbone.fit_inputs(examples(images))
    distinct = {tuple(color) for color in (backbone.palette[:7] * 255).round().long().tolist()}
    assert distinct == {tuple(color) for color in colors.tolist()}
    assert (backbone.palette[7:] == UNUSED).all()
    ids = backbone.color_ids(images / 255)
    assert ids.max() < 7
    assert torch.equal((backbone.decode(ids) * 255).round(), images.float())


def test_neighboring_levels_are_told_apart():
    levels = torch.arange(256)[:, None].repeat(1, 3)
    backbone = build(colors=256)
    images = painted(levels, 60)
    backbone.fit_inputs(examples(images))
    assert torch.equal(backbone.color_ids(images / 255), images[:, 0].flatten(1).long())


def test_the_palette_is_of_colors_not_of_channels():
    gray = torch.tensor([[0, 0, 0], [80, 80, 80], [255, 255, 255]])
    backbone = build()
    backbone.fit_inputs(examples(painted(gray)))
    assert (backbone.palette != UNUSED).all(dim=1).sum() == 3


def test_many_colors_are_clustered_to_the_same_palette_each_time():
    generator = torch.Generator().manual_seed(3)
    centers = random_colors(9, seed=5)
    images = painted(centers, 40).float()
    noise = torch.randint(-4, 5, images.shape, generator=generator)
    images = (images + noise).clamp(0, 255).byte()
    palettes = []
    for _ in range(2):
        backbone = build()
        backbone.fit_inputs(examples(images))
        palettes.append(backbone.palette.clone())
    assert torch.equal(*palettes)
    distance = torch.cdist(centers / 255, palettes[0]).min(dim=1).values
    assert distance.max() < 5 / 255  # each cluster's center is found


def test_the_palette_is_saved_with_the_weights(tmp_path):
    backbone = build()
    backbone.fit_inputs(examples(painted(random_colors(5))))
    save_backbone(tmp_path / "b.safetensors", backbone)
    other = build()
    load_into(other, tmp_path / "b.safetensors")
    assert torch.equal(other.palette, backbone.palette)


@pytest.mark.parametrize("place", [0, 13, SIDE**2 - 1])
def test_features_depend_on_earlier_pixels_only(place):
    backbone = build()
    ids = torch.randint(9, (2, SIDE**2), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[:, place] = (changed[:, place] + 1) % 9
    before, after = backbone.encode_ids(ids), backbone.encode_ids(changed)
    # The token of a pixel has not seen the pixel itself.
    assert torch.equal(before[:, : place + 1], after[:, : place + 1])
    if place + 1 < SIDE**2:
        assert not torch.equal(before[:, place + 1], after[:, place + 1])
    torch.testing.assert_close(
        backbone.encode_ids(ids[:, : place + 1]), before[:, : place + 1], atol=1e-5, rtol=1e-5
    )


def test_without_causality_every_token_sees_every_pixel():
    backbone = build(causal=False)
    ids = torch.zeros(1, SIDE**2, dtype=torch.long)
    changed = ids.clone()
    changed[:, -1] = 3
    assert not torch.equal(backbone.encode_ids(ids)[:, 0], backbone.encode_ids(changed)[:, 0])
    hidden = torch.zeros_like(ids, dtype=torch.bool)
    hidden[:, -1] = True
    assert torch.equal(backbone.encode_ids(ids, hidden), backbone.encode_ids(changed, hidden))


def naive_norm(x, gain):
    return gain * x / (x.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()


def test_a_block_equals_the_formulas_of_the_paper():
    backbone = build().double()
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    block = backbone.blocks[0]
    x = torch.randn(5, 24, dtype=torch.float64)
    y = naive_norm(x, block.norm1.weight)
    q, k, v = ((y @ part.T).view(5, 3, 8) for part in block.attn.qkv.weight.chunk(3))
    mixed = torch.zeros(5, 3, 8, dtype=torch.float64)
    for head in range(3):
        for t in range(5):
            scores = (k[: t + 1, head] @ q[t, head]) / math.sqrt(8)
            mixed[t, head] = scores.softmax(0) @ v[: t + 1, head]
    attended = x + mixed.flatten(1) @ block.attn.proj.weight.T
    hidden = naive_norm(attended, block.norm2.weight) @ block.mlp.fc1.weight.T
    expected = attended + (hidden * torch.sigmoid(1.702 * hidden)) @ block.mlp.fc2.weight.T
    torch.testing.assert_close(block(x[None], causal=True)[0], expected)


def test_there_are_no_biases_and_initial_weights_are_the_authors():
    backbone = build_backbone("igpt-tiny", {"width": 256, "heads": 4}, ImageSpec(32))
    names = [name for name, _ in backbone.named_parameters()]
    assert not [name for name in names if name.endswith("bias")]
    block = backbone.blocks[0]
    assert block.attn.qkv.weight.std().item() == pytest.approx(256**-0.5, rel=0.02)
    assert block.attn.proj.weight.std().item() == pytest.approx((256 * 4) ** -0.5, rel=0.02)
    assert block.mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert backbone.pos_embed.std().item() == pytest.approx(0.01, rel=0.02)


def test_pooled_features_are_the_middle_layer_unless_read_says_otherwise():
    images = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    for read, layer in ((None, 1), (0, 0), (3, 3)):
        backbone = build(read=read)
        layers = backbone.pooled_layers(images)
        features = backbone(images)
        assert len(layers) == 4 == len(backbone.layer_widths)
        assert torch.equal(features.pooled, layers[layer])
        assert torch.equal(features.tokens.mean(dim=1), layers[3])
        assert torch.equal(features.grid.flatten(2).transpose(1, 2), features.tokens)


def test_layer_l_is_the_normed_input_of_block_l():
    backbone, seen = build(), []
    for block in backbone.blocks:
        block.attn.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    layers = backbone.pooled_layers(torch.rand(2, 3, SIDE, SIDE))
    for layer, inputs in zip(layers, seen, strict=False):
        torch.testing.assert_close(layer, inputs.mean(dim=1))


def test_the_paper_s_small_size():
    with torch.device("meta"):
        backbone = build_backbone("igpt-small", {}, ImageSpec(32))
    # 24 blocks of 12 * 512^2, and tables of 512 colors and 1,024 positions.
    expected = 24 * 12 * 512**2 + (512 + 1024) * 512
    count = sum(parameter.numel() for parameter in backbone.parameters())
    assert count == pytest.approx(expected, rel=1e-3)


def recipe(**backbone):
    return Located(
        {
            "name": "x",
            "backbone": {"name": "igpt-tiny", **backbone},
            "data": {"name": "digits", "size": 8},
            "evaluate": {"digits": {"protocols": ["knn"]}},
        },
        {(): "x.yaml:1"},
    )


def test_impossible_options_are_refused_before_anything_is_read():
    with pytest.raises(UserError, match="4096 pixels, more than the 1024 positions"):
        parse(recipe(side=64))
    with pytest.raises(UserError, match="colors"):
        parse(recipe(colors=1))
    with pytest.raises(UserError, match=r"read is 9, but the last layer is 3"):
        build(read=9)
    with pytest.raises(UserError, match="not a multiple of heads"):
        build(heads=5)


def test_rounding_to_the_palette_needs_no_gradient():
    backbone = build()
    images = torch.rand(2, 3, SIDE, SIDE, requires_grad=True)
    F.mse_loss(backbone(images).pooled, torch.zeros(2, 24)).backward()
    assert images.grad is None
    assert backbone.color_embed.weight.grad.abs().sum() > 0
