"""Image backbones of timm, torchvision and transformers: their features are the library's own."""

import json

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torchvision.transforms import Normalize

from sslrun.backbones import build_backbone, build_empty, load_backbone, load_into, save_backbone
from sslrun.backbones.image import IMAGENET_MEAN, IMAGENET_STD
from sslrun.backbones.library import switch_off_dropout
from sslrun.data.examples import TensorExamples
from sslrun.data.specs import ImageSpec
from sslrun.errors import UserError
from sslrun.recipe import parse
from sslrun.recipe.places import Located

MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)


def build(name, **options):
    torch.manual_seed(0)
    return build_backbone(name, options, ImageSpec(32)).eval()


def randomized(network):
    """Return a network whose parameters and statistics are random, none of them zero."""
    torch.manual_seed(1)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    for name, buffer in network.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(std=0.1)
    return network.eval()


@pytest.fixture
def images():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def check_parameters(backbone):
    """The groups for layer decay hold every parameter once."""
    listed = [id(parameter) for group in backbone.layers() for parameter in group]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(parameter) for parameter in backbone.parameters()}


def check_attention(backbone, images, tokens):
    weights = backbone.attention(images)
    assert weights.shape[0] == len(images)
    assert weights.shape[2:] == (tokens, tokens)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:-1]))
    return weights


# ---------------------------------------------------------------- transformers


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers")


def vit_config(transformers, **changes):
    return transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=48,
        image_size=32, patch_size=8, hidden_dropout_prob=0.3, **changes,
    )  # fmt: skip


def save_model(model, folder, **preprocessor):
    model.save_pretrained(folder)
    if preprocessor:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return model


def test_a_vit_of_transformers_has_its_tokens_and_its_last_cls(transformers, tmp_path, images):
    reference = save_model(
        randomized(transformers.ViTModel(vit_config(transformers))),
        tmp_path, image_mean=MEAN, image_std=STD,
    )  # fmt: skip
    ours = build("hf-image", model=str(tmp_path))
    reference.set_attn_implementation("eager")
    with torch.no_grad():
        expected = reference(Normalize(MEAN, STD)(images), output_attentions=True)
        features = ours(images)
    torch.testing.assert_close(features.tokens, expected.last_hidden_state[:, 1:])
    torch.testing.assert_close(features.pooled, expected.last_hidden_state[:, 0])
    assert features.grid.shape == (2, 24, 4, 4)
    torch.testing.assert_close(features.grid.flatten(2).transpose(1, 2), features.tokens)
    torch.testing.assert_close(check_attention(ours, images, 17), expected.attentions[-1])
    check_parameters(ours)
    assert [len(group) for group in ours.layers()] == [4, 16, 16, 18]
    assert not any("pooler" in name for name in ours.state_dict())
    with torch.no_grad():  # no dropout in training, although the configuration has it
        torch.testing.assert_close(ours.train()(images).pooled, features.pooled)


def test_registers_are_not_part_of_the_tokens(transformers, tmp_path, images):
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, mlp_ratio=2, image_size=32,
        patch_size=8, num_register_tokens=4,
    )  # fmt: skip
    reference = save_model(randomized(transformers.Dinov2WithRegistersModel(config)), tmp_path)
    ours = build("hf-image", model=str(tmp_path))
    with torch.no_grad():
        expected = reference(Normalize(IMAGENET_MEAN, IMAGENET_STD)(images)).last_hidden_state
        features = ours(images)
    torch.testing.assert_close(features.tokens, expected[:, 5:])
    torch.testing.assert_close(features.pooled, expected[:, 0])
    check_attention(ours, images, 21)


def test_a_resnet_of_transformers_has_its_grid_and_its_pooled_features(
    transformers, tmp_path, images
):
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic"
    )
    reference = save_model(randomized(transformers.ResNetModel(config)), tmp_path)
    ours = build("hf-image", model=str(tmp_path))
    with torch.no_grad():
        expected = reference(Normalize(IMAGENET_MEAN, IMAGENET_STD)(images))
        features = ours(images)
    torch.testing.assert_close(features.grid, expected.last_hidden_state)
    torch.testing.assert_close(features.pooled, expected.pooler_output.flatten(1))
    assert ours.size is None
    check_parameters(ours)
    with pytest.raises(UserError, match="needs a backbone with 'attention'"):
        ours.require("attention", "'attend'")


def test_encoders_of_images_and_text_give_their_vision_features(transformers, tmp_path, images):
    vision = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2,
              "num_attention_heads": 3, "image_size": 32, "patch_size": 8}  # fmt: skip
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "vocab_size": 50}  # fmt: skip
    config = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=8)
    reference = save_model(randomized(transformers.CLIPModel(config)), tmp_path)
    ours = build("hf-image", model=str(tmp_path))
    with torch.no_grad():
        expected = reference.vision_model(Normalize(IMAGENET_MEAN, IMAGENET_STD)(images))
        torch.testing.assert_close(ours(images).pooled, expected.pooler_output)


def test_images_are_resized_to_the_size_of_a_network_with_positions(transformers, tmp_path, images):
    reference = save_model(randomized(transformers.ViTModel(vit_config(transformers))), tmp_path)
    ours = build("hf-image", model=str(tmp_path))
    larger = torch.rand(2, 3, 48, 48)
    assert ours(larger).grid.shape == (2, 24, 4, 4)
    at_64 = build("hf-image", model=str(tmp_path), size=64)
    resized = torch.nn.functional.interpolate(images, (64, 64), mode="bilinear", antialias=True)
    with torch.no_grad():
        expected = reference(
            Normalize(IMAGENET_MEAN, IMAGENET_STD)(resized), interpolate_pos_encoding=True
        )
        torch.testing.assert_close(at_64(images).tokens, expected.last_hidden_state[:, 1:])


def test_an_encoder_of_text_is_a_one_line_error(transformers, tmp_path):
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16,
    )  # fmt: skip
    save_model(transformers.BertModel(config), tmp_path)
    with pytest.raises(UserError, match="is not an encoder of images"):
        build("hf-image", model=str(tmp_path))
    with pytest.raises(UserError, match="nowhere: can't be loaded") as error:
        build("hf-image", model=str(tmp_path / "nowhere"))
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- torchvision


def test_a_resnet_of_torchvision_loads_from_a_file(tmp_path, images):
    reference = randomized(torchvision.models.resnet18(num_classes=7))
    save_file(reference.state_dict(), tmp_path / "theirs.safetensors")
    ours = build("torchvision", model="resnet18", file=tmp_path / "theirs.safetensors")
    reference.fc = torch.nn.Identity()
    with torch.no_grad():
        features = ours(images)
        expected = reference(Normalize(IMAGENET_MEAN, IMAGENET_STD)(images))
    torch.testing.assert_close(features.pooled, expected)
    assert features.grid.shape == (2, 512, 1, 1)
    check_parameters(ours)
    assert len(ours.layers()) == 9


def test_a_vit_of_torchvision_has_its_tokens(tmp_path, images, monkeypatch):
    theirs = torchvision.models.vision_transformer

    def tiny(*, weights, image_size):
        return theirs.VisionTransformer(image_size, 8, 3, 3, 24, 48, dropout=0.2)

    monkeypatch.setattr(torchvision.models, "get_model", lambda name, **options: tiny(**options))
    reference = randomized(tiny(weights=None, image_size=32))
    torch.save(reference.state_dict(), tmp_path / "theirs.pth")
    ours = build("torchvision", model="vit_b_16", size=32, file=tmp_path / "theirs.pth")
    with torch.no_grad():
        features = ours(images)
        x = reference._process_input(Normalize(IMAGENET_MEAN, IMAGENET_STD)(images))
        expected = reference.encoder(torch.cat([reference.class_token.expand(2, -1, -1), x], 1))
        assert torch.equal(ours.train()(images).pooled, features.pooled)
    torch.testing.assert_close(features.pooled, expected[:, 0])
    torch.testing.assert_close(features.tokens, expected[:, 1:])
    check_parameters(ours)
    assert [len(group) for group in ours.layers()] == [4, 12, 12, 14]
    weights = check_attention(ours, images, 17)
    assert weights.shape[1] == 3
    at_64 = build("torchvision", model="vit_b_16", size=64, file=tmp_path / "theirs.pth")
    assert at_64(images).grid.shape == (2, 24, 8, 8)


@pytest.mark.parametrize("name", ["efficientnet_b0", "mobilenet_v3_small"])
def test_other_classifiers_of_torchvision_give_the_input_of_their_last_layer(name, images):
    ours = build("torchvision", model=name, pretrained=False)
    reference = torchvision.models.get_model(name)
    seen = []
    last = [module for module in reference.modules() if isinstance(module, torch.nn.Linear)][-1]
    last.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    reference.load_state_dict(ours.network.state_dict(), strict=False)
    with torch.no_grad():
        reference.eval()(Normalize(IMAGENET_MEAN, IMAGENET_STD)(images))
        features = ours(images)
    torch.testing.assert_close(features.pooled, seen[0])
    assert features.tokens is None
    check_parameters(ours)
    with pytest.raises(UserError, match="needs a backbone with 'tokens', which 'torchvision'"):
        ours.require("tokens", "'mae'")


def test_unusable_names_and_files_of_torchvision_are_one_line_errors(tmp_path):
    with pytest.raises(UserError, match=r"no classifier 'resnet81'\. Did you mean 'resnet18'"):
        build("torchvision", model="resnet81")
    with pytest.raises(UserError, match="no weights 'MINE' of 'resnet18': choose IMAGENET1K_V1"):
        build("torchvision", model="resnet18", weights="MINE")
    with pytest.raises(UserError, match="auxiliary classifiers"):
        build("torchvision", model="googlenet")
    with pytest.raises(UserError, match="does not end with a linear layer"):
        build("torchvision", model="squeezenet1_0")
    state = torchvision.models.resnet18().state_dict()
    save_file(state, tmp_path / "18.safetensors")
    with pytest.raises(UserError, match=r"18.safetensors: parameter 'network.layer1.* is missing"):
        build("torchvision", model="resnet34", file=tmp_path / "18.safetensors")


def test_weights_that_cannot_be_downloaded_are_a_one_line_error(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("sslrun.backbones.library_torchvision.answers", lambda url: False)
    with pytest.raises(UserError, match=r"put them at .*checkpoints/resnet18-f37072fd.pth"):
        build("torchvision", model="resnet18")


def test_downloaded_weights_are_read_from_the_cache_of_torch(tmp_path, monkeypatch, images):
    reference = randomized(torchvision.models.resnet18())
    (tmp_path / "checkpoints").mkdir()
    torch.save(reference.state_dict(), tmp_path / "checkpoints/resnet18-f37072fd.pth")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    ours = build("torchvision", model="resnet18")
    reference.fc = torch.nn.Identity()
    with torch.no_grad():
        expected = reference(Normalize(IMAGENET_MEAN, IMAGENET_STD)(images))
        torch.testing.assert_close(ours(images).pooled, expected)


# ---------------------------------------------------------------- timm


@pytest.fixture(scope="module")
def timm():
    return pytest.importorskip("timm", reason="timm is not installed")


TIMM_VIT = {
    "img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3,
    "drop_path_rate": 0.2,
}  # fmt: skip


def save_timm(timm, model, folder, arguments):
    """Write a model as timm's hub does, with classifier and a normalization of its own."""
    model.pretrained_cfg.update(mean=MEAN, std=STD)
    model.pretrained_cfg["input_size"] = (3, 32, 32)
    timm.models.save_for_hf(model, str(folder), model_args=arguments, safe_serialization=True)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("vit_tiny_patch16_224", TIMM_VIT),
        ("vit_tiny_patch16_224", {**TIMM_VIT, "global_pool": "avg"}),
        ("vit_tiny_patch16_224", {**TIMM_VIT, "reg_tokens": 4}),
        ("resnet18", {}),
        ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}),
        ("swin_tiny_patch4_window7_224", {"img_size": 32, "window_size": 2, "embed_dim": 16,
                                          "depths": (1, 1), "num_heads": (2, 2)}),
        ("mobilenetv3_small_050", {}),
    ],
    ids=["vit", "vit-avg", "registers", "resnet", "convnext", "swin", "mobilenet"],
)  # fmt: skip
def test_networks_of_timm_give_timms_features(timm, tmp_path, images, name, arguments):
    reference = randomized(timm.create_model(name, num_classes=7, **arguments))
    save_timm(timm, reference, tmp_path, arguments)
    ours = build("timm", model=str(tmp_path))
    with torch.no_grad():
        output = reference.forward_features(Normalize(MEAN, STD)(images))
        expected = reference.forward_head(output, pre_logits=True)
        features = ours(images)
        torch.testing.assert_close(features.pooled, expected)
        torch.testing.assert_close(ours.eval()(images).pooled, expected)
    check_parameters(ours)
    assert len(ours.layers()) > 1
    if features.tokens is not None:
        assert features.grid.shape[1] == features.tokens.shape[2] == ours.width
    if name.startswith("vit"):
        torch.testing.assert_close(features.tokens, output[:, -16:])
        reference.blocks[-1].attn.fused_attn = False
        seen = []
        reference.blocks[-1].attn.attn_drop.register_forward_hook(
            lambda module, inputs, weights: seen.append(weights)
        )
        with torch.no_grad():
            reference.forward_features(Normalize(MEAN, STD)(images))
        torch.testing.assert_close(check_attention(ours, images, output.shape[1]), seen[0])


def test_a_file_of_timm_replaces_the_download(timm, tmp_path, images):
    reference = randomized(timm.create_model("resnet18", num_classes=7))
    save_file(reference.state_dict(), tmp_path / "theirs.safetensors")
    ours = build("timm", model="resnet18", file=tmp_path / "theirs.safetensors")
    with torch.no_grad():
        output = reference.forward_features(Normalize(IMAGENET_MEAN, IMAGENET_STD)(images))
        torch.testing.assert_close(ours(images).grid, output)
    with pytest.raises(UserError, match=r"in 'timm' as configured"):
        build("timm", model="resnet34", file=tmp_path / "theirs.safetensors")
    with pytest.raises(UserError, match=r"timm:resnet81: can't be loaded: .*resnet81") as error:
        build("timm", model="resnet81", pretrained=False)
    assert "\n" not in str(error.value)


def test_a_vit_of_timm_at_another_size(timm, images):
    ours = build("timm", model="vit_tiny_patch16_224", pretrained=False, size=64)
    assert ours(images).grid.shape == (2, 192, 4, 4)


def test_without_timm_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(UserError, match=r"needs timm: pip install 'sslrun\[timm\]'"):
        build("timm", model="resnet18")


# ---------------------------------------------------------------- all of them


def test_a_saved_backbone_is_rebuilt_without_its_pretrained_weights(tmp_path, monkeypatch, images):
    save_file(torchvision.models.resnet18().state_dict(), tmp_path / "theirs.safetensors")
    options = {"model": "resnet18", "file": tmp_path / "theirs.safetensors"}
    ours = build("torchvision", **options)
    for parameter in ours.parameters():
        parameter.data += 0.1
    (tmp_path / "run").mkdir()
    save_backbone(tmp_path / "run/backbone.safetensors", ours)
    (tmp_path / "theirs.safetensors").unlink()
    again = load_backbone(tmp_path / "run").eval()
    assert torch.equal(again(images).pooled, ours(images).pooled)
    assert again.options == ours.options
    empty = build_empty("torchvision", ours.options, ImageSpec(32)).eval()
    load_into(empty, tmp_path / "run/backbone.safetensors")
    assert torch.equal(empty(images).pooled, ours(images).pooled)


def test_normalization_is_fitted_to_the_data_only_without_pretrained_weights(tmp_path):
    save_file(torchvision.models.resnet18().state_dict(), tmp_path / "theirs.safetensors")
    pixels = torch.full((4, 3, 32, 32), 51, dtype=torch.uint8)
    examples = TensorExamples(pixels, None, (), ImageSpec(32))
    pretrained = build("torchvision", model="resnet18", file=tmp_path / "theirs.safetensors")
    pretrained.fit_inputs(examples)
    torch.testing.assert_close(pretrained.mean, torch.tensor(IMAGENET_MEAN))
    random = build("torchvision", model="resnet18", pretrained=False)
    random.fit_inputs(examples)
    torch.testing.assert_close(random.mean, torch.full((3,), 0.2))


def test_every_kind_of_dropout_is_switched_off():
    network = torch.nn.Sequential(
        torch.nn.Dropout(0.5), torchvision.ops.StochasticDepth(0.5, "row"), torch.nn.ReLU()
    )
    switch_off_dropout(network)
    x = torch.rand(64, 4)
    assert torch.equal(network.train()(x), x)


@pytest.mark.parametrize(
    ("data", "pretext", "name"),
    [
        ("digits", None, "hf-image"),
        ("digits", "simclr", "hf-image"),
        ("text", "mlm", "hf"),
    ],
)
def test_recipes_write_hf_for_encoders_of_images_and_of_text(data, pretext, name, tmp_path):
    (tmp_path / "a.txt").write_text("a text")
    recipe = {
        "name": "mine",
        "backbone": "hf:OWNER/NAME",
        "pretext": pretext,
        "pretrain": {"epochs": 1} if pretext else None,
        "data": {"name": "text", "path": str(tmp_path)} if data == "text" else data,
    }
    parsed = parse(Located(recipe, {(): "mine.yaml:1"}))
    assert parsed.backbone.name == name
    assert parsed.backbone.options.model == "OWNER/NAME"
