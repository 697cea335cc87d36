"""Exported runs give the same features in transformers as in sslrun."""

import json
import sys

import pytest
import torch
import torchvision
from safetensors.torch import load_file
from torchvision.transforms import Normalize

from sslrun.backbones import build_backbone, save_backbone
from sslrun.backbones.base import Features
from sslrun.data.image.images import ImageSpec
from sslrun.data.specs import TextSpec
from sslrun.data.text.sequences import build_labeled
from sslrun.data.text.tokenizer import SPECIALS, Tokenizer, build_wordpiece
from sslrun.errors import UserError
from sslrun.stages.export import export

WORDS = ["aa", "bb", "cc", "dd", "##x", "."]
TEXTS = (["aa bbx cc.", "dd"], ["cc", "aa aa bb dd."])


@pytest.fixture
def run(tmp_path):
    """Return a function that writes a run's folder for a named backbone and returns both."""

    def write(name, **options):
        tokenizer = Tokenizer(
            build_wordpiece(
                True, {entry: number for number, entry in enumerate([*SPECIALS, *WORDS])}
            )
        )
        torch.manual_seed(0)
        backbone = build_backbone(name, options, TextSpec(tokenizer, 16)).eval()
        for parameter in backbone.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        save_backbone(tmp_path / "run/backbone.safetensors", backbone)
        return tmp_path / "run", backbone

    (tmp_path / "run").mkdir()
    return write


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("bert-tiny", {"positions": 20, "width": 24, "heads": 3}),
        ("bert-tiny", {"positions": 16, "depth": 1, "causal": True}),
        ("gpt-tiny", {"positions": 16}),
    ],
)
def test_transformers_loads_an_exported_run_and_computes_the_same_features(
    name, options, run, tmp_path
):
    transformers = pytest.importorskip("transformers")
    folder, ours = run(name, **options)
    export(folder, tmp_path / "out")
    reference = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    encode = ours.spec.tokenizer.encode
    examples = build_labeled(encode(TEXTS[0]), encode(TEXTS[1]), None, (), ours.spec)
    (batch,) = examples.batches([torch.arange(2)], torch.device("cpu"))
    inputs = tokenizer(*TEXTS, padding=True, return_tensors="pt")
    assert inputs["input_ids"].tolist() == batch.inputs.ids.tolist()
    if name == "bert-tiny":
        assert inputs["token_type_ids"].tolist() == batch.inputs.segments.tolist()
    real = batch.inputs.real
    assert real.tolist() == inputs["attention_mask"].bool().tolist()
    with torch.inference_mode():
        expected, actual = ours(batch.inputs), reference(**inputs)
    torch.testing.assert_close(
        actual.last_hidden_state[real], expected.tokens[real], atol=1e-5, rtol=1e-5
    )
    if name == "bert-tiny" and not options.get("causal"):
        torch.testing.assert_close(actual.pooler_output, expected.pooled, atol=1e-5, rtol=1e-5)


def test_backbones_without_a_counterpart_are_a_one_line_error(run, tmp_path):
    folder, _ = run("bert-tiny", fast=True)
    with pytest.raises(UserError, match="no counterpart of fast: true"):
        export(folder, tmp_path / "out")
    save_backbone(
        folder / "backbone.safetensors", build_backbone("resnet18", {"stem": "small"}, ImageSpec(8))
    )
    with pytest.raises(UserError, match="transformers has no counterpart of stem: small"):
        export(folder, tmp_path / "out")
    with pytest.raises(UserError, match="nothing: no such file"):
        export(tmp_path / "nothing", tmp_path / "out")
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="was not written by sslrun"):
        export(tmp_path / "a.pt", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    folder, _ = run("bert-tiny")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: can't be written"):
        export(folder, tmp_path / "file")
    (folder / "tokenizer.json").unlink()  # only the weights stay
    export(folder, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    assert json.loads((tmp_path / "out/config.json").read_text())["hidden_size"] == 128


# ---------------------------------------------------------------- images

SMALL_VIT = {"patch": 4, "depth": 2, "width": 24, "heads": 3}
MEAN_VIT = {**SMALL_VIT, "pool": "mean", "positions": "sincos", "size": 16}
VITS = [("vit-tiny", SMALL_VIT), ("vit-tiny", MEAN_VIT)]
RESNETS = [("resnet18", {}), ("resnet50", {})]


@pytest.fixture(scope="module")
def image_run(tmp_path_factory):
    """Return a function that writes an image backbone's run once; it returns folder and backbone.

    Tests must change neither.
    """
    written = {}

    def get(name, **options):
        key = name, *sorted(options.items())
        if key not in written:
            written[key] = write(tmp_path_factory.mktemp("run"), name, options)
        return written[key]

    def write(folder, name, options):
        torch.manual_seed(0)
        backbone = build_backbone(name, options, ImageSpec(16)).eval()
        for parameter in backbone.parameters():
            parameter.data += 0.01 * torch.randn_like(parameter)
        for buffer, tensor in backbone.named_buffers():
            if buffer.endswith("running_mean"):
                tensor.normal_(std=0.1)
        backbone.mean.copy_(torch.tensor([0.2, 0.3, 0.4]))
        backbone.std.copy_(torch.tensor([0.5, 0.6, 0.7]))
        save_backbone(folder / "backbone.safetensors", backbone)
        return folder, backbone

    return get


@pytest.fixture
def images():
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("name", "options"), [*VITS, *RESNETS, ("resnet18", {"channels": 8})])
def test_transformers_computes_the_features_of_an_exported_image_run(
    name, options, image_run, tmp_path, images
):
    transformers = pytest.importorskip("transformers")
    folder, ours = image_run(name, **options)
    export(folder, tmp_path / "out", "transformers")
    cls = transformers.ViTModel if name.startswith("vit") else transformers.ResNetModel
    arguments = {"add_pooling_layer": False} if name.startswith("vit") else {}
    reference, info = cls.from_pretrained(tmp_path / "out", output_loading_info=True, **arguments)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    pixels = (255 * images).round().byte()
    inputs = processor(list(pixels), return_tensors="pt")
    with torch.inference_mode():
        expected, actual = ours(pixels / 255), reference.eval()(**inputs)
    if name.startswith("vit"):
        tokens = actual.last_hidden_state
        torch.testing.assert_close(tokens[:, 1:], expected.tokens, atol=1e-4, rtol=1e-4)
    else:
        close = {"atol": 1e-4, "rtol": 1e-4}
        torch.testing.assert_close(actual.last_hidden_state, expected.grid, **close)
        torch.testing.assert_close(actual.pooler_output.flatten(1), expected.pooled, **close)


@pytest.mark.parametrize(
    ("name", "options"), [*VITS, ("vit-tiny", {**SMALL_VIT, "registers": 3}), *RESNETS]
)
def test_timm_computes_the_features_of_an_exported_image_run(
    name, options, image_run, tmp_path, images
):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    folder, ours = image_run(name, **options)
    export(folder, tmp_path / "out", "timm")
    reference = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    settings = timm.data.resolve_model_data_config(reference)
    assert tuple(settings["input_size"]) == (3, 16, 16)
    normalize = Normalize(settings["mean"], settings["std"])
    with torch.inference_mode():
        torch.testing.assert_close(
            reference(normalize(images)), ours(images).pooled, atol=1e-4, rtol=1e-4
        )
    theirs = reference.state_dict()
    written = load_file(tmp_path / "out/model.safetensors")
    assert theirs.keys() == written.keys()
    again = build_backbone("timm", {"model": str(tmp_path / "out")}, ImageSpec(16)).eval()
    with torch.inference_mode():
        torch.testing.assert_close(again(images).pooled, ours(images).pooled, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("name", "options"), [VITS[0], *RESNETS])
def test_torchvision_computes_the_features_of_an_exported_image_run(
    name, options, image_run, tmp_path, images
):
    folder, ours = image_run(name, **options)
    export(folder, tmp_path / "out", "torchvision")
    config = json.loads((tmp_path / "out/config.json").read_text())
    reference = getattr(torchvision.models, config["model"])(**config["arguments"]).eval()
    missing, unexpected = reference.load_state_dict(
        load_file(tmp_path / "out/model.safetensors"), strict=False
    )
    head = "heads" if name.startswith("vit") else "fc"
    assert unexpected == []
    assert all(key.startswith(head) for key in missing)
    setattr(reference, head, torch.nn.Identity())
    with torch.inference_mode():
        torch.testing.assert_close(
            reference(Normalize(config["mean"], config["std"])(images)),
            ours(images).pooled,
            atol=1e-4,
            rtol=1e-4,
        )


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit-tiny", {**SMALL_VIT, "depth": 1}),
        ("vit-tiny", {**MEAN_VIT, "depth": 1, "registers": 3}),
        ("resnet18", {"stem": "small"}),
        ("mixer", {"patch": 4, "width": 16, "depth": 1}),
    ],
)
def test_onnxruntime_computes_the_features_of_images_in_0_to_1(
    name, options, image_run, tmp_path, images
):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    folder, ours = image_run(name, **options)
    export(folder, tmp_path / "out", "onnx")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "out/model.onnx")
    assert [given.name for given in session.get_inputs()] == ["images"]
    for batch in (images, images[:1]):
        features, tokens = session.run(["features", "tokens"], {"images": batch.numpy()})
        with torch.inference_mode():
            expected = ours(batch)
        close = {"atol": 1e-4, "rtol": 1e-4}
        torch.testing.assert_close(torch.from_numpy(features), expected.pooled, **close)
        torch.testing.assert_close(torch.from_numpy(tokens), expected.tokens, **close)


@pytest.mark.parametrize(
    ("name", "options"),
    [("bert-tiny", {"positions": 20, "depth": 1}), ("gpt-tiny", {"depth": 1})],
)
def test_onnxruntime_computes_the_features_of_text(name, options, run, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    folder, ours = run(name, **options)
    export(folder, tmp_path / "out", "onnx")
    session = onnxruntime.InferenceSession(tmp_path / "out/model.onnx")
    encode = ours.spec.tokenizer.encode
    examples = build_labeled(encode(TEXTS[0]), encode(TEXTS[1]), None, (), ours.spec)
    (batch,) = examples.batches([torch.arange(2)], torch.device("cpu"))
    inputs = {
        "input_ids": batch.inputs.ids.numpy(),
        "attention_mask": batch.inputs.real.long().numpy(),
        "token_type_ids": batch.inputs.segments.numpy(),
    }
    taken = [given.name for given in session.get_inputs()]
    features, tokens = session.run(None, {name: inputs[name] for name in taken})
    with torch.inference_mode():
        expected = ours(batch.inputs)
    real, close = batch.inputs.real, {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(torch.from_numpy(features), expected.pooled, **close)
    torch.testing.assert_close(torch.from_numpy(tokens)[real], expected.tokens[real], **close)


@pytest.mark.parametrize(
    ("name", "options", "to", "message"),
    [
        ("resnet18", {"stem": "small"}, "timm", "timm has no counterpart of stem: small: export "
         "with --to onnx, or pretrain with backbone.stem: imagenet"),
        ("resnet18", {"channels": 8}, "torchvision", "no counterpart of channels: 8"),
        ("vit-tiny", {**SMALL_VIT, "registers": 2}, "transformers", "no counterpart of registers"),
        ("vit-tiny", {**SMALL_VIT, "registers": 2}, "torchvision", "no counterpart of registers"),
        ("vit-tiny", {**SMALL_VIT, "pool": "mean"}, "torchvision", "no counterpart of pool: mean"),
        ("mixer", {"patch": 4, "width": 16, "depth": 2}, "timm", "timm has no class for 'mixer', "
         "only for resnet18"),
        ("resnet18", {}, "keras", "--to keras: no such library"),
        ("resnet18", {}, "tim", r"no such library\. Did you mean 'timm'"),
    ],
)  # fmt: skip
def test_what_a_library_cannot_say_is_a_one_line_error(
    name, options, to, message, image_run, tmp_path
):
    folder, _ = image_run(name, **options)
    with pytest.raises(UserError, match=message) as error:
        export(folder, tmp_path / "out", to)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_what_onnx_cannot_express_is_a_one_line_error(tmp_path, image_run, monkeypatch):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    folder, ours = image_run("vit-tiny", **SMALL_VIT)

    def forward(self, images):
        if images.sum() > 0:  # depends on the data, which a graph cannot
            return Features(images.mean(dim=(2, 3)))
        return Features(images.amax(dim=(2, 3)))

    monkeypatch.setattr(type(ours), "forward", forward)
    with pytest.raises(UserError, match="vit-tiny: ONNX cannot express the network: ") as error:
        export(folder, tmp_path / "out", "onnx")
    assert "\n" not in str(error.value)
    assert list((tmp_path / "out").iterdir()) == []


def test_without_onnx_its_extra_is_named(tmp_path, image_run, monkeypatch):
    folder, _ = image_run("vit-tiny", **SMALL_VIT)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UserError, match=r"--to onnx needs onnx: pip install 'sslrun\[onnx\]'"):
        export(folder, tmp_path / "out", "onnx")


def test_exported_files_can_be_read_by_a_group(tmp_path, image_run):
    folder, _ = image_run("vit-tiny", **SMALL_VIT)
    export(folder, tmp_path / "out", "timm")
    (tmp_path / "plain").touch()
    modes = {path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert modes == {(tmp_path / "plain").stat().st_mode}
