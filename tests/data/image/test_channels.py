"""Images that are not 8-bit RGB squares: channels, 16 bits, floats, TIFF files, other shapes."""

import json

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from sslrun.backbones import build_backbone, load_backbone, load_into, save_backbone
from sslrun.data.examples import Batch, TensorExamples
from sslrun.data.image.augment import Augmentation, to_float
from sslrun.data.image.images import StreamedImages, convert_arrays, resize_and_crop
from sslrun.data.source import sources
from sslrun.data.specs import ImageSpec, InputSpec
from sslrun.errors import UserError
from sslrun.pretexts.base import pretexts
from sslrun.training.device import compute

NETWORKS = {
    "resnet18": {"channels": 4, "stem": "small"},
    "vit-tiny": {"patch": 4, "width": 24, "depth": 1, "heads": 3},
    "mlp": {"width": 16, "depth": 1},
    "mixer": {"patch": 4, "width": 16, "depth": 1},
    "pixels": {},
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SSLRUN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SSLRUN_WORKERS", "1")


def noise(*shape, dtype=np.uint16, seed=0):
    high = np.iinfo(dtype).max + 1
    return np.random.default_rng(seed).integers(0, high, shape, dtype=dtype)


def load(name, **options):
    cls = sources[name]
    return cls(cls.Options(**options)).load("train")


def folder(path, write, count=4):
    for index in range(count):
        target = path / "train" / "ab"[index % 2]
        target.mkdir(parents=True, exist_ok=True)
        write(target / f"{index}", index)
    return path


# ---------------------------------------------------------------- arrays


@pytest.mark.parametrize("channels", [2, 4, 16])
def test_arrays_keep_their_type_and_channels(channels):
    pixels = noise(3, 8, 8, channels)
    images = convert_arrays(pixels)
    assert images.dtype == torch.uint16
    assert (images.permute(0, 2, 3, 1).numpy() == pixels).all()
    np.testing.assert_allclose(
        to_float(images).permute(0, 2, 3, 1).numpy(), pixels / 65535, atol=1e-6
    )


def test_gray_arrays_get_three_channels_unless_one_is_asked_for():
    pixels = noise(3, 8, 8)
    assert convert_arrays(pixels).shape == (3, 3, 8, 8)
    one = convert_arrays(pixels, channels=1)
    assert (one[:, 0].numpy() == pixels).all()
    assert (convert_arrays(pixels[..., None], channels=1) == one).all()
    with pytest.raises(UserError, match="have 5 channels: set channels: 5"):
        convert_arrays(noise(2, 8, 8, 5), channels=4)


def test_a_range_scales_and_clips_values():
    floats = np.array([[-3.0, 0.0], [1.0, 9.0]], np.float32)[None]
    images = convert_arrays(floats, channels=1, value_range=(-1.0, 3.0))
    assert images.dtype == torch.float32
    assert images[0, 0].tolist() == [[0.0, 0.25], [0.5, 1.0]]
    integers = np.array([[0, 1000], [4095, 5000]], np.uint16)[None]
    scaled = convert_arrays(integers, channels=1, value_range=(0, 4095))
    assert scaled[0, 0].tolist() == [[0, round(1000 / 4095 * 65535)], [65535, 65535]]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "not finite"),
        (float("inf"), "not finite"),
        (2.5, r"from 0 to 2.5: .*range: \[0, 2.5\]"),
        (-1.0, r"range: \[-1, 0\]"),
    ],
)
def test_floats_must_be_finite_and_in_their_range(value, message):
    pixels = np.zeros((1, 4, 4), np.float32)
    pixels[0, 1, 1] = value
    with pytest.raises(UserError, match=message):
        convert_arrays(pixels)


def test_arrays_need_not_be_square():
    images = convert_arrays(noise(2, 6, 9, 3, dtype=np.uint8), (6, 9))
    assert images.shape == (2, 3, 6, 9)
    with pytest.raises(UserError, match=r"9x6, not square.*size: \[6, 9\]"):
        convert_arrays(noise(2, 6, 9, 3))
    # A horizontal ramp: it is covered and cropped at the left and the right, not squeezed.
    ramp = torch.linspace(0, 1, 24).expand(1, 1, 8, 24).contiguous()
    cut = resize_and_crop(ramp, (4, 8))
    assert cut.shape == (1, 1, 4, 8)
    assert cut[0, 0, 0, 0] == pytest.approx(4.5 / 23, abs=0.01)
    assert resize_and_crop(ramp, (4, 8), squash=True)[0, 0, 0, 0] == pytest.approx(1 / 23, abs=0.02)


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("planar", [False, True])
def test_tiff_files_keep_16_bits_and_channels(tmp_path, planar):
    pixels = noise(4, 8, 12, 5)

    def write(path, index):
        image = pixels[index].transpose(2, 0, 1) if planar else pixels[index]
        config = "separate" if planar else "contig"
        tifffile.imwrite(
            path.with_suffix(".tif"), image, photometric="minisblack", planarconfig=config
        )

    path = folder(tmp_path / "set", write)
    examples = load("folder", path=path, size=(8, 12), channels=5, dtype="uint16")
    assert examples.spec == ImageSpec(8, 5, 12)
    expected = pixels[[0, 2, 1, 3]].transpose(0, 3, 1, 2)
    assert (examples.inputs.numpy() == expected).all()
    again = load("folder", path=path, size=(8, 12), channels=5, dtype="uint16")
    assert again.spec == examples.spec
    assert again.inputs.equal(examples.inputs)
    with pytest.raises(UserError, match=r"0.tif: is an array .*set data.channels"):
        load("folder", path=path, size=8, channels=4, dtype="uint16")
    with pytest.raises(UserError, match=r"0.tif: holds uint16 values.*set dtype: uint16"):
        load("folder", path=path, size=8, channels=5, dtype="float32")
    with pytest.raises(UserError, match=r"0.tif: is 12x8, not square.*size: \[8, 12\]"):
        load("folder", path=path, channels=5, dtype="uint16")


def test_gray_files_of_16_bits_are_reduced_only_by_default(tmp_path):
    pixels = noise(4, 8, 8)
    write = lambda path, index: Image.fromarray(pixels[index]).save(path.with_suffix(".png"))  # noqa: E731
    path = folder(tmp_path / "set", write)
    full = load("folder", path=path, channels=1, dtype="uint16")
    assert (full.inputs[:, 0].numpy() == pixels[[0, 2, 1, 3]]).all()
    default = load("folder", path=path)
    assert default.inputs.dtype == torch.uint8
    assert default.spec == ImageSpec(8)


def test_large_sets_of_other_images_are_streamed(tmp_path, monkeypatch):
    pixels = noise(4, 8, 8, 4)
    path = folder(
        tmp_path / "set",
        lambda path, index: tifffile.imwrite(path.with_suffix(".tif"), pixels[index]),
    )
    monkeypatch.setattr("sslrun.data.image.images.MAX_TENSOR_BYTES", 100)
    monkeypatch.setenv("SSLRUN_WORKERS", "0")
    examples = load("folder", path=path, channels=4, dtype="uint16")
    assert isinstance(examples, StreamedImages)
    assert examples.spec == ImageSpec(8, 4)
    (batch,) = examples.batches([torch.tensor([1])], torch.device("cpu"))
    assert (batch.inputs[0].permute(1, 2, 0).numpy() == pixels[2]).all()


def test_whole_images_are_8_bit_rgb(tmp_path):
    with pytest.raises(ValueError, match="whole is for 8-bit RGB"):
        sources["folder"].Options(path=tmp_path, size=16, whole=20, channels=4)


# ---------------------------------------------------------------- networks


def test_specs_are_saved_with_what_differs_from_squares(tmp_path):
    ImageSpec(8).save(tmp_path)
    assert json.loads((tmp_path / "spec.json").read_text()) == {
        "kind": "image", "size": 8, "channels": 3,
    }  # fmt: skip
    spec = ImageSpec.of((4, 8, 12))
    spec.save(tmp_path)
    assert InputSpec.load(tmp_path) == spec
    assert (spec.shape, spec.channels, spec.is_square) == ((8, 12), 4, False)
    assert ImageSpec.of((3, 8, 8)) == ImageSpec(8)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_built_for_channels_and_shapes(tmp_path, name):
    spec = ImageSpec(8, 5, 12)
    backbone = build_backbone(name, NETWORKS[name], spec).eval()
    images = torch.rand(2, 5, 8, 12)
    features = backbone(images)
    assert features.pooled.shape == (2, backbone.width)
    if features.grid is not None:
        height, width = features.grid.shape[2:]
        assert height < width
    assert backbone(torch.rand(2, 5, 8, 8)).pooled.shape == (2, backbone.width)
    save_backbone(tmp_path / "backbone.safetensors", backbone)
    assert load_backbone(tmp_path).eval()(images).pooled.equal(features.pooled)
    color = build_backbone(name, NETWORKS[name], ImageSpec(8, 3, 12))
    with pytest.raises(UserError, match=r"images of 5 channels, and the data's have 3"):
        load_into(color, tmp_path / "backbone.safetensors")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32])
def test_each_channel_is_normalized_by_its_own_statistics(dtype):
    values = torch.rand(600, 4, 8, 8) * torch.tensor([0.1, 0.5, 1.0, 0.3]).view(4, 1, 1)
    scale = {torch.uint8: 255, torch.uint16: 65535, torch.float32: 1}[dtype]
    pixels = values if scale == 1 else (values * scale).round().to(dtype)
    backbone = build_backbone("pixels", {}, ImageSpec(8, 4))
    backbone.fit_inputs(TensorExamples(pixels, None, (), ImageSpec(8, 4)))
    exact = pixels.double() / scale
    torch.testing.assert_close(backbone.mean.double(), exact.mean((0, 2, 3)), atol=1e-6, rtol=0)
    torch.testing.assert_close(backbone.std.double(), exact.std((0, 2, 3)), atol=1e-4, rtol=0)


def test_sines_and_cosines_of_a_grid_that_is_not_square():
    spec = ImageSpec(8, 3, 12)
    options = {**NETWORKS["vit-tiny"], "positions": "sincos"}
    grid = build_backbone("vit-tiny", options, spec).pos_embed[0, 1:].view(2, 3, 24)
    square = build_backbone("vit-tiny", options, ImageSpec(12)).pos_embed[0, 1:].view(3, 3, 24)
    assert grid.equal(square[:2])


def test_four_channels_are_safe_in_the_memory_format_of_the_device():
    torch.manual_seed(0)
    network = build_backbone("resnet18", {"channels": 16}, ImageSpec(32, 4))
    images, gradients = torch.rand(4, 4, 32, 32), []
    for module in (network, compute("cpu").put(network)):
        module.zero_grad()
        module(images).pooled.square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in module.parameters()])
    for expected, actual in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-3)


# ---------------------------------------------------------------- pretext tasks


def test_brightness_and_contrast_work_for_any_channels():
    images = 0.3 + 0.3 * torch.rand(16, 5, 8, 8)  # so that nothing is clipped
    policy = Augmentation(jitter=(0.4, 0.4, 0.0, 0.0), jitter_p=1.0)
    views = policy(images, 8, torch.Generator().manual_seed(0))
    assert views.shape == images.shape
    assert (views - images).abs().amax(dim=(1, 2, 3)).min() > 1e-3
    # Either operation maps all channels of an image by one line.
    for x, y in zip(images.flatten(1), views.flatten(1), strict=True):
        slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
        torch.testing.assert_close(y, y.mean() + slope * (x - x.mean()), atol=2e-3, rtol=0)


def build(name, spec, **options):
    backbone = build_backbone("mlp", NETWORKS["mlp"], spec)
    return pretexts[name](pretexts[name].Options(**options), backbone)


@pytest.mark.parametrize("name", ["simclr", "byol", "vicreg"])
def test_augmentation_that_needs_color_says_what_to_write(name):
    with pytest.raises(UserError, match=r"pretext.augmentation: .*these have 4") as error:
        build(name, ImageSpec(8, 4))
    assert "\n" not in str(error.value)
    message = str(error.value)
    assert "jitter: [" in message
    assert "gray" not in message.split("write pretext.augmentation:")[1]


def test_views_of_images_that_are_not_square_are_square_crops():
    policy = Augmentation.simclr().without_color()
    task = build("simclr", ImageSpec(8, 4, 12), augmentation=policy)
    inputs = torch.randint(0, 65536, (4, 4, 8, 12), dtype=torch.int32).to(torch.uint16)
    views = task.views(Batch(inputs, None), torch.Generator().manual_seed(0))
    assert [tuple(view.shape) for view in views] == [(4, 4, 8, 8)] * 2
    assert task(views).loss.isfinite()


def test_tasks_that_do_not_fit_are_refused_in_one_line():
    with pytest.raises(UserError, match=r"rotation.*12x8.*size: 8"):
        build("rotation", ImageSpec(8, 3, 12))
    with pytest.raises(UserError, match=r"pretext.color: drop needs color.*color: none"):
        build("position", ImageSpec(24, 4))


RECIPE = """
name: tiny
backbone: {name: resnet18, stem: small, channels: 4}
pretext:
  name: simclr
  augmentation: {crop: [0.2, 1.0], flip: 0.5, jitter: [0.4, 0.4, 0, 0]}
data: {name: npz, path: set.npz, size: [8, 12]}
pretrain: {steps: 3, batch: 16, lr: 0.1}
watch: {examples: 64, views: 2}
evaluate:
  npz: {protocols: [probe]}
"""


def test_four_channels_of_16_bits_from_pretraining_to_a_probe(tmp_path, sslrun):
    labels = np.arange(80) % 2
    pixels = noise(80, 8, 12, 4) // 4 + (labels * 40000).astype(np.uint16)[:, None, None, None]
    np.savez(
        tmp_path / "set.npz", x_train=pixels, y_train=labels, x_test=pixels[:20], y_test=labels[:20]
    )
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    for command in ("pretrain", "probe"):
        sslrun(command, "tiny.yaml", "--runs", "runs", "--device", "cpu", cwd=tmp_path)
    results = [json.loads(path.read_text()) for path in tmp_path.glob("runs/tiny/*/result.json")]
    assert {result["stage"] for result in results} >= {"pretrain"}
    (pretrained,) = tmp_path.glob("runs/tiny/pretrain-*")
    spec = json.loads((pretrained / "spec.json").read_text())
    assert spec == {"kind": "image", "size": 8, "channels": 4, "width": 12}
    assert len(results) == 2
