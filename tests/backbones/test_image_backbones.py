"""Image backbones: equal to torchvision's, and invariants of their parts."""

import pytest
import torch
import torchvision
from torch import nn

from sslrun.backbones import build_backbone, load_into, save_backbone
from sslrun.backbones.base import backbones
from sslrun.backbones.transformer import Attention, Block, BlockStyle, DropPath
from sslrun.backbones.vit import interpolate_positions
from sslrun.data.examples import TensorExamples
from sslrun.data.specs import ImageSpec
from sslrun.errors import UserError

SMALL_VIT = {"patch": 8, "depth": 2, "width": 24, "heads": 3}
SMALL = {
    "resnet18": {"channels": 8},
    "resnet34": {"channels": 4},
    "resnet50": {"channels": 4},
    "mlp": {"width": 16},
    "mixer": {"patch": 8, "width": 16, "depth": 2},
    "pixels": {},
    **{
        f"igpt-{size}": {"side": 8, "depth": 2, "width": 24, "heads": 3}
        for size in ("tiny", "small")
    },
    **{f"vit-{size}": SMALL_VIT for size in ("tiny", "small", "base", "large", "huge")},
}


@pytest.fixture
def images():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


LIBRARIES = {"hf-image", "timm", "torchvision"}
"""Backbones of other libraries: tests/backbones/test_libraries.py."""


@pytest.mark.parametrize(
    "name",
    [name for name in backbones if backbones[name].takes is ImageSpec and name not in LIBRARIES],
)
def test_features_have_the_documented_shapes(name, images):
    backbone = build_backbone(name, SMALL[name], ImageSpec(32)).eval()
    features = backbone(images)
    assert features.pooled.shape == (2, backbone.width)
    if features.grid is not None:
        assert features.grid.shape[:2] == (2, backbone.width)
        assert torch.equal(features.grid.flatten(2).transpose(1, 2), features.tokens)
    listed = [id(parameter) for layer in backbone.layers() for parameter in layer]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(parameter) for parameter in backbone.parameters()}


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_resnet_equals_torchvisions(name, images):
    reference = getattr(torchvision.models, name)().eval()
    ours = build_backbone(name, {}, ImageSpec(32)).eval()
    path_like = {
        key: value for key, value in reference.state_dict().items() if not key.startswith("fc.")
    }
    ours.load_state_dict(path_like, strict=False)
    reference.fc = nn.Identity()
    torch.testing.assert_close(
        ours(images).pooled, reference(ours.normalize(images)), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("name", "options", "size", "millions"),
    [
        ("resnet50", {}, 224, 23.5),
        ("resnet18", {}, 224, 11.2),
        ("vit-base", {}, 224, 85.8),
        ("vit-small", {}, 224, 21.7),
    ],
)
def test_parameter_counts_are_the_published_ones(name, options, size, millions):
    with torch.device("meta"):
        backbone = build_backbone(name, options, ImageSpec(size))
    assert sum(parameter.numel() for parameter in backbone.parameters()) / 1e6 == pytest.approx(
        millions, abs=0.06
    )


def test_small_stem_keeps_the_resolution(images):
    grids = [
        build_backbone("resnet18", {"stem": stem, "channels": 8}, ImageSpec(32))(images).grid
        for stem in ("small", "imagenet")
    ]
    assert [grid.shape[-1] for grid in grids] == [4, 1]


def test_vit_equals_torchvisions(images):
    reference = torchvision.models.VisionTransformer(32, 8, 2, 3, 24, 96).eval()
    ours = build_backbone("vit-tiny", SMALL_VIT, ImageSpec(32)).eval()
    names = {
        "class_token": "cls_token",
        "encoder.pos_embedding": "pos_embed",
        "conv_proj": "patch_embed.proj",
        "encoder.layers.encoder_layer_": "blocks.",
        "ln_1": "norm1",
        "ln_2": "norm2",
        "mlp.0": "mlp.fc1",
        "mlp.3": "mlp.fc2",
        "self_attention.in_proj_": "attn.qkv.",
        "self_attention.out_proj": "attn.proj",
        "encoder.ln": "norm",
    }
    state = {}
    for name, tensor in reference.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        state[name] = tensor
    del state["heads.head.weight"], state["heads.head.bias"]
    ours.load_state_dict(state, strict=False)
    reference.heads = nn.Identity()
    torch.testing.assert_close(
        ours(images).pooled, reference(ours.normalize(images)), atol=1e-5, rtol=1e-5
    )


def test_vit_takes_other_sizes_registers_and_means(images):
    backbone = build_backbone(
        "vit-tiny", {**SMALL_VIT, "registers": 2, "pool": "mean"}, ImageSpec(32)
    ).eval()
    larger = backbone(torch.rand(2, 3, 64, 48))
    assert larger.tokens.shape == (2, 48, 24)
    torch.testing.assert_close(larger.pooled, larger.tokens.mean(1))
    weights = backbone.attention(images)
    assert weights.shape == (2, 3, 19, 19)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 19))
    with pytest.raises(UserError, match="do not divide into patches"):
        backbone(torch.rand(1, 3, 30, 32))
    with pytest.raises(UserError, match="patch 5"):
        build_backbone("vit-tiny", {"patch": 5}, ImageSpec(32))


def test_positions_interpolate_smoothly():
    constant = torch.full((1, 16, 5), 2.5)
    torch.testing.assert_close(
        interpolate_positions(constant, 4, 7, 9), torch.full((1, 63, 5), 2.5)
    )
    ramp = torch.linspace(0, 1, 8).repeat(8, 1).reshape(1, 64, 1)
    there_and_back = interpolate_positions(interpolate_positions(ramp, 8, 16, 16), 16, 8, 8)
    torch.testing.assert_close(there_and_back, ramp, atol=0.03, rtol=0)


def test_attention_weights_reproduce_the_attention_output():
    attention = Attention(12, 3)
    x, memory = torch.randn(2, 5, 12), torch.randn(2, 7, 12)
    for other, causal in ((None, False), (None, True), (memory, False)):
        weights = attention.weights(x, other, causal=causal)
        values = attention._qkv(x, other)[2]
        expected = attention.proj((weights @ values).transpose(1, 2).flatten(2))
        torch.testing.assert_close(
            attention(x, other, causal=causal), expected, atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_blocks_attend_only_within_their_mask(norm):
    block = Block(12, 3, BlockStyle(norm=norm)).eval()
    x = torch.randn(1, 6, 12)
    changed = x.clone()
    changed[:, 4:] = torch.randn(1, 2, 12)
    assert torch.equal(block(x, causal=True)[:, :4], block(changed, causal=True)[:, :4])
    assert not torch.allclose(block(x)[:, :4], block(changed)[:, :4])
    mask = (torch.arange(6) < 4)[None]
    torch.testing.assert_close(block(x, mask=mask)[:, :4], block(changed, mask=mask)[:, :4])
    order = torch.randperm(6)
    torch.testing.assert_close(block(x[:, order]), block(x)[:, order], atol=1e-5, rtol=1e-5)
    cross = Block(12, 3, BlockStyle(norm=norm), cross=True).eval()
    assert not torch.allclose(cross(x, memory=x), cross(x, memory=changed))


def test_drop_path_keeps_the_expectation_and_is_off_in_evaluation():
    drop, x = DropPath(0.25), torch.ones(4000, 2)
    dropped = drop(x)
    assert set(dropped[:, 0].tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert dropped.mean().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(drop.eval()(x), x)


def test_normalization_comes_from_the_training_set_and_is_saved(tmp_path, images):
    pixels = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)
    examples = TensorExamples(pixels, None, (), ImageSpec(32))
    backbone = build_backbone("resnet18", {"channels": 8}, ImageSpec(32)).eval()
    backbone.fit_inputs(examples)
    values = pixels.double() / 255
    torch.testing.assert_close(backbone.mean.double(), values.mean((0, 2, 3)), atol=1e-4, rtol=0)
    torch.testing.assert_close(backbone.std.double(), values.std((0, 2, 3)), atol=1e-4, rtol=0)
    save_backbone(tmp_path / "a.safetensors", backbone)
    again = build_backbone("resnet18", {"channels": 8}, ImageSpec(32)).eval()
    load_into(again, tmp_path / "a.safetensors")
    assert torch.equal(again(images).pooled, backbone(images).pooled)


def test_checkpoints_of_other_libraries_and_sizes_load(tmp_path, images):
    reference = torchvision.models.resnet18().eval()
    torch.save(reference.state_dict(), tmp_path / "torchvision.pth")
    ours = build_backbone("resnet18", {}, ImageSpec(32)).eval()
    load_into(ours, tmp_path / "torchvision.pth")
    reference.fc = nn.Identity()
    torch.testing.assert_close(
        ours(images).pooled, reference(ours.normalize(images)), atol=1e-5, rtol=1e-5
    )
    small, large = (build_backbone("vit-tiny", SMALL_VIT, ImageSpec(size)) for size in (32, 64))
    save_backbone(tmp_path / "vit.safetensors", small)
    load_into(large, tmp_path / "vit.safetensors")
    torch.testing.assert_close(
        large.positions(4, 4), interpolate_positions(large.pos_embed[:, 1:], 8, 4, 4)
    )


def test_checkpoints_that_do_not_fit_are_errors(tmp_path):
    path = tmp_path / "vit.safetensors"
    save_backbone(path, build_backbone("vit-tiny", SMALL_VIT, ImageSpec(32)))
    resnet = build_backbone("resnet18", {"channels": 8}, ImageSpec(32))
    with pytest.raises(
        UserError, match=r"this checkpoint holds 'vit-tiny', but the recipe names 'resnet18'"
    ):
        load_into(resnet, path)
    with pytest.raises(UserError, match="in 'vit-tiny' as configured"):
        load_into(build_backbone("vit-tiny", {**SMALL_VIT, "width": 48}, ImageSpec(32)), path)
    path.write_bytes(b"not weights")
    with pytest.raises(UserError, match="not a checkpoint"):
        load_into(resnet, path)
    with pytest.raises(UserError, match="no such file"):
        load_into(resnet, tmp_path / "nothing.safetensors")


def test_images_that_are_no_multiple_of_the_patch_are_errors():
    backbone = build_backbone("vit-tiny", {**SMALL_VIT, "size": 32}, ImageSpec(20))
    with pytest.raises(
        UserError,
        match="vit-tiny: images of 20x20 pixels do not divide into patches of 8: choose a size",
    ):
        backbone(torch.rand(1, 3, 20, 20))


def test_bf16_gradients_of_a_resnet_on_one_pixel_images_are_deterministic():
    backbone = build_backbone("resnet18", {"stem": "small", "channels": 4}, ImageSpec(4)).train()
    images = torch.rand(16, 3, 4, 4, generator=torch.Generator().manual_seed(0))

    def gradients(bf16):
        backbone.zero_grad()
        dirt = [torch.full((count,), 1e30) for count in (5_000, 20_000, 100_000)]
        del dirt  # leaves garbage in freed memory
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            pooled = backbone(images).pooled
        pooled.float().square().sum().backward()
        return torch.cat([parameter.grad.flatten() for parameter in backbone.layer4.parameters()])

    first, exact = gradients(True), gradients(False)
    assert (first - exact).norm() < 0.5 * exact.norm()
    assert all(torch.equal(gradients(True), first) for _ in range(5))


def test_reflected_padding_hides_the_borders_and_exports_nowhere():
    """On images of one color every place of a reflecting network is alike."""
    plain = torch.full((1, 3, 16, 16), 0.3)
    options = {"channels": 4, "stem": "small", "strides": [1, 2, 1, 1]}
    for padding, is_alike in (("zeros", False), ("reflect", True)):
        torch.manual_seed(0)
        backbone = build_backbone("resnet18", {**options, "padding": padding}, ImageSpec(16)).eval()
        grid = backbone.dense(plain)
        assert torch.allclose(grid, grid[..., :1, :1].expand_as(grid), atol=1e-4) == is_alike
    with pytest.raises(UserError, match=r"grid of 2x2 places, but a side of 2 pixels"):
        backbone.dense(torch.zeros(1, 3, 2, 2))
    deep = build_backbone("resnet18", {"channels": 4, "padding": "reflect"}, ImageSpec(64))
    with pytest.raises(UserError, match="padding: reflect"):
        deep.export("torchvision")
