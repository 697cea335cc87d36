"""`sslrun.load`: features of images and of sentences in Python."""

import subprocess
import sys

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import sslrun
from sslrun.backbones import build_backbone, save_backbone
from sslrun.data.specs import ImageSpec, TextSpec
from sslrun.data.text.sequences import build_labeled
from sslrun.data.text.tokenizer import SPECIALS, Tokenizer, build_wordpiece
from sslrun.errors import UserError

TEXTS = ["aa bb", "cc"]


@pytest.fixture
def image_run(tmp_path):
    torch.manual_seed(0)
    backbone = build_backbone("resnet18", {"channels": 4, "stem": "small"}, ImageSpec(16)).eval()
    (tmp_path / "run").mkdir()
    save_backbone(tmp_path / "run/backbone.safetensors", backbone)
    return tmp_path / "run", backbone


@pytest.fixture
def pixels():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, 3, 16, 16), generator=generator).byte()


def test_features_of_images_are_the_backbones_whatever_their_form(image_run, pixels, tmp_path):
    folder, backbone = image_run
    loaded = sslrun.load(folder)
    with torch.no_grad():
        expected = backbone(pixels.float() / 255).pooled
    arrays = pixels.permute(0, 2, 3, 1).numpy()
    pictures = [Image.fromarray(array) for array in arrays]
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / f"{number}.png")
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for images in (pixels, arrays, list(arrays), pictures, paths, [str(path) for path in paths]):
        features = loaded(images, batch=2)
        torch.testing.assert_close(features, expected)
    assert loaded.width == features.shape[1]
    assert not features.requires_grad
    torch.testing.assert_close(loaded(paths[0]), expected[:1])
    weights = sslrun.load(f"{folder}/backbone.safetensors")
    torch.testing.assert_close(weights(pixels), expected)
    assert loaded([]).shape == (0, loaded.width)


def test_larger_images_are_resized_and_cropped_as_when_data_are_read(image_run):
    loaded = sslrun.load(image_run[0])
    array = np.zeros((32, 64, 3), dtype=np.uint8)
    array[:, 16:48] = 200  # the central square
    central = torch.full((1, 3, 16, 16), 200, dtype=torch.uint8)
    whole = torch.from_numpy(array).permute(2, 0, 1)[None]
    cropped = loaded([Image.fromarray(array)])
    assert cropped.shape == loaded(whole).shape == loaded(central).shape
    torch.testing.assert_close(cropped, loaded(whole), atol=0.02, rtol=0.02)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 3, 16, 16), "should be uint8 of shape"),
        ([torch.zeros(3, 16, 16)], "not Tensor"),
        (["nowhere.png"], r"nowhere\.png: no such file"),
    ],
)
def test_unusable_images_are_a_one_line_error(images, message, image_run):
    with pytest.raises(UserError, match=message):
        sslrun.load(image_run[0])(images)


def test_features_of_sentences_are_the_backbones(tmp_path):
    entries = [*SPECIALS, "aa", "bb", "cc"]
    tokenizer = Tokenizer(build_wordpiece(True, {entry: i for i, entry in enumerate(entries)}))
    spec = TextSpec(tokenizer, 8)
    torch.manual_seed(0)
    backbone = build_backbone("bert-tiny", {"width": 24, "heads": 3, "depth": 1}, spec).eval()
    save_backbone(tmp_path / "backbone.safetensors", backbone)
    examples = build_labeled(tokenizer.encode(TEXTS), None, None, (), spec)
    (batch,) = examples.batches([torch.arange(2)], torch.device("cpu"))
    loaded = sslrun.load(tmp_path)
    with torch.no_grad():
        expected = backbone(batch.inputs).pooled
    torch.testing.assert_close(loaded(TEXTS), expected)
    torch.testing.assert_close(loaded(TEXTS[1]), expected[1:], atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="reads sentences, not int"):
        loaded([1])


def test_models_of_libraries_are_loaded_by_name(tmp_path, monkeypatch):
    reference = torchvision.models.resnet18().eval()
    (tmp_path / "checkpoints").mkdir()
    torch.save(reference.state_dict(), tmp_path / "checkpoints/resnet18-f37072fd.pth")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    loaded = sslrun.load("torchvision:resnet18")
    image = Image.fromarray(np.full((224, 224, 3), 99, dtype=np.uint8))
    reference.fc = torch.nn.Identity()
    preset = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.transforms(resize_size=224)
    with torch.no_grad():
        expected = reference(preset(image)[None])
    torch.testing.assert_close(loaded([image]), expected, atol=1e-4, rtol=1e-4)


def test_hf_loads_encoders_of_images_and_of_text(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3,
             "intermediate_size": 24}  # fmt: skip
    transformers.ViTModel(transformers.ViTConfig(image_size=32, patch_size=8, **sizes)
                          ).save_pretrained(tmp_path / "vit")  # fmt: skip
    vit = sslrun.load(f"hf:{tmp_path / 'vit'}")
    assert vit(np.zeros((2, 40, 50, 3), dtype=np.uint8)).shape == (2, 24)
    assert vit.backbone.spec.size == 32
    config = transformers.BertConfig(vocab_size=20, max_position_embeddings=12, **sizes)
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    with pytest.raises(UserError, match="needs its tokenizer"):
        sslrun.load(f"hf:{tmp_path / 'bert'}")
    entries = [*SPECIALS, "aa", "bb", "cc"]
    Tokenizer(build_wordpiece(True, {entry: i for i, entry in enumerate(entries)})).save(
        tmp_path / "bert"
    )
    bert = sslrun.load(f"hf:{tmp_path / 'bert'}")
    assert bert.backbone.spec.length == 12
    assert bert([*TEXTS, "aa " * 40]).shape == (3, 24)


def test_what_is_no_run_is_a_one_line_error(tmp_path):
    with pytest.raises(UserError, match=r"no backbone\.safetensors there; name a finished run's"):
        sslrun.load(tmp_path)
    with pytest.raises(UserError, match="resnet81"):
        sslrun.load("torchvision:resnet81")
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        sslrun.lode  # noqa: B018


def test_importing_sslrun_imports_no_slow_package():
    code = "import sys, sslrun; print([name for name in ('torch', 'numpy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
