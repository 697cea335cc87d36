"""`sslrun attend`: drawings of known maps, what RUN may be, and mistakes in one line."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sslrun import cli
from sslrun.backbones import build_backbone, save_backbone
from sslrun.backbones.image import patch_attention
from sslrun.backbones.weights import WEIGHTS
from sslrun.data.specs import ImageSpec, TextSpec
from sslrun.data.text.tokenizer import SPECIALS, Tokenizer, build_wordpiece
from sslrun.errors import UserError
from sslrun.protocols.attend import heaviest
from sslrun.stages.attend import (
    CONTACT,
    DIM,
    ImagePicture,
    Request,
    attend,
    head_colors,
)
from sslrun.stages.pictures import GAP, SQUARE, TITLE, write_matrices
from sslrun.stages.subject import open_backbone
from sslrun.training.device import compute

SMALL = {"patch": 4, "depth": 2, "width": 24, "heads": 3}
CPU = compute("cpu")


@pytest.fixture
def run(tmp_path):
    """A folder with the weights of a small ViT for images of 16 pixels."""
    torch.manual_seed(0)
    vit = build_backbone("vit-tiny", SMALL, ImageSpec(16))
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path / "run"
    folder.mkdir()
    save_backbone(folder / WEIGHTS, vit)
    return folder


@pytest.fixture
def photographs(tmp_path):
    random = np.random.default_rng(0)
    folder = tmp_path / "photographs"
    (folder / "more").mkdir(parents=True)
    for name in ("a", "b", "more/a"):
        pixels = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder


def request(reference, *inputs, output=Path("attention"), **options):
    return Request(str(reference), tuple(map(str, inputs)), output, **options)


# ---------------------------------------------------------------- drawings


def test_known_maps_are_drawn_in_gray_in_color_and_as_masks():
    image = torch.full((3, 4, 4), 0.5)
    maps = torch.zeros(2, 2, 2)
    maps[0, 0, 0], maps[0, 0, 1] = 0.4, 0.1  # the first head: left, and a quarter of it right
    maps[1, 1, 1] = 0.2  # the second: below
    picture = ImagePicture(image, maps, heaviest(maps, 0.6))
    first, second = head_colors(2)
    columns = picture.columns
    assert list(columns) == ["image", "head 1", "head 2", "all heads"]
    gray, mask = columns["head 1"]
    assert gray[:, 0, 0].tolist() == [1, 1, 1]
    assert gray[:, 0, 3].tolist() == pytest.approx([0.25] * 3)
    assert gray[:, 3, 0].tolist() == [0, 0, 0]
    assert torch.allclose(mask[:, 1, 1], 0.6 * 0.5 + 0.4 * first)
    assert torch.allclose(mask[:, 0, 3], torch.tensor(DIM * 0.5))  # 0.4 of 0.5 is above 60 %
    painted, masks = columns["all heads"]
    assert torch.allclose(painted[:, 0, 0], first)
    assert torch.allclose(painted[:, 0, 3], first / 4)
    assert torch.allclose(painted[:, 3, 3], second)
    assert painted[:, 3, 0].tolist() == [0, 0, 0]
    assert torch.allclose(masks[:, 3, 3], 0.6 * 0.5 + 0.4 * second)
    assert torch.allclose(masks[:, 3, 0], torch.tensor(DIM * 0.5))
    assert len({tuple(color) for color in head_colors(12).tolist()}) == 12


def test_a_matrix_has_its_entries_at_its_labels(tmp_path):
    matrix = torch.zeros(3, 3)
    matrix[0, 2], matrix[2, 1] = 1, 0.5
    path = tmp_path / "matrix.png"
    write_matrices(path, {"head 1": matrix, "head 2": matrix.T}, ["[CLS]", "word", "[SEP]"])
    drawn = np.asarray(Image.open(path))[..., 0]
    width = drawn.shape[1] // 2
    left, top = width - GAP - 3 * SQUARE, drawn.shape[0] - GAP - 3 * SQUARE
    assert top - TITLE == left
    for start, expected in ((left, matrix), (width + left, matrix.T)):
        entries = drawn[top : top + 3 * SQUARE, start : start + 3 * SQUARE]
        centers = entries[SQUARE // 2 :: SQUARE, SQUARE // 2 :: SQUARE]
        assert np.abs(centers - 255 * (1 - expected.numpy())).max() <= 1
    assert (drawn[top : top + 3 * SQUARE, :left] < 128).any()  # the labels of rows
    assert (drawn[TITLE:top, left : left + 3 * SQUARE] < 128).any()  # those of columns


# ---------------------------------------------------------------- images


def test_every_image_has_a_picture_and_all_are_on_the_contact_sheet(run, photographs, tmp_path):
    output = tmp_path / "out"
    lines = attend(request(run, photographs, photographs / "b.png", output=output), CPU)
    names = ["a", "a-2", "b", "b-2"]
    assert sorted(path.name for path in output.iterdir()) == sorted(
        f"{name}.png" for name in (*names, CONTACT)
    )
    assert "3 heads of the last layer, 4x4 patches; masks hold 60%" in lines[0]
    assert sum("largest token norm" in line for line in lines) == 4
    # The map of the first head, as the backbone gives it for the same file.
    pixels = np.asarray(Image.open(photographs / "b.png"))
    image = torch.tensor(pixels).permute(2, 0, 1)[None] / 255
    backbone = open_backbone(str(run)).backbone.eval()
    with torch.inference_mode():
        maps = patch_attention(backbone, image)[0, 0]
    drawn = np.asarray(Image.open(output / "b.png"))[..., 0]
    cell = 96  # 16 pixels, enlarged six times
    left, top = GAP + cell + GAP, TITLE + GAP
    found = drawn[top + 12 : top + cell : 24, left + 12 : left + cell : 24]
    assert np.abs(found - 255 * (maps / maps.max()).numpy()).max() <= 1
    assert (drawn[top : top + cell : 6, GAP : GAP + cell : 6] == pixels[..., 0]).all()


def test_other_sizes_than_the_training_s_are_drawn(run, photographs, tmp_path):
    options = {"output": tmp_path / "out", "size": 24}
    assert "6x6 patches" in attend(request(run, photographs / "a.png", **options), CPU)[0]
    with pytest.raises(UserError, match=r"--size 30: is no multiple .* 4: take 28 or 32"):
        attend(request(run, photographs, output=tmp_path, size=30), CPU)


def test_an_outlier_among_token_norms_is_reported(run, photographs, tmp_path):
    backbone = open_backbone(str(run)).backbone
    with torch.no_grad():
        backbone.pos_embed[0, 5] += 100
    save_backbone(run / WEIGHTS, backbone)
    lines = attend(request(run, photographs / "a.png", output=tmp_path / "out"), CPU)
    assert "an outlier" in lines[1]


def test_a_file_of_weights_may_have_any_name(run):
    renamed = (run / WEIGHTS).rename(run / "mine.safetensors")
    subject = open_backbone(str(renamed))
    assert subject.backbone.spec == ImageSpec(16)
    assert subject.recipe is None


RECIPE = """\
name: mine
backbone: {{name: vit-tiny, patch: 4, depth: 1, width: 24, heads: 2}}
data: {{name: digits, size: 16}}
{rest}
"""


def test_a_recipe_gives_its_weights_and_its_test_split(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(RECIPE.format(rest="pretext: rotation\npretrain: {epochs: 1, lr: 0.1}"))
    runs = {"runs": tmp_path / "runs", "output": tmp_path / "out"}
    with pytest.raises(UserError, match=r"run `sslrun pretrain .*mine.yaml` first"):
        attend(request(recipe, examples=2, **runs), CPU)
    lines = attend(request(recipe, examples=2, overrides=("pretext=null",), **runs), CPU)
    assert lines[1].startswith("test-0: ")
    assert (tmp_path / "out" / "test-1.png").is_file()
    initial = open_backbone(str(recipe), ["pretext=null"], runs=tmp_path / "runs").backbone
    save_backbone(tmp_path / WEIGHTS, initial)
    recipe.write_text(RECIPE.format(rest=f"weights: {tmp_path / WEIGHTS}"))
    loaded = open_backbone(str(recipe), runs=tmp_path / "runs").backbone
    assert all(map(torch.equal, loaded.state_dict().values(), initial.state_dict().values()))


# ---------------------------------------------------------------- text


@pytest.fixture
def text_run(tmp_path):
    entries = [*SPECIALS, "the", "cat", "sat", "##ting"]
    tokenizer = Tokenizer(build_wordpiece(True, {word: i for i, word in enumerate(entries)}))
    torch.manual_seed(0)
    bert = build_backbone("bert-tiny", {"width": 32, "heads": 4}, TextSpec(tokenizer, 16))
    folder = tmp_path / "text"
    folder.mkdir()
    save_backbone(folder / WEIGHTS, bert)
    return folder


def test_a_sentence_is_drawn_as_a_matrix_of_its_tokens(text_run, tmp_path):
    output = tmp_path / "out"
    asked = request(text_run, "the cat", output=output, sentences=("the cat satting",))
    lines = attend(asked, CPU)
    assert [line.rpartition(": ")[2] for line in lines] == [
        "4 tokens, 4 heads of the last layer",
        "6 tokens, 4 heads of the last layer",
    ]
    width, height = Image.open(output / "sentence-2.png").size
    assert width % 4 == 0
    assert width // 4 > 6 * SQUARE < height


# ---------------------------------------------------------------- mistakes


def test_mistakes_are_one_line(run, text_run, photographs, tmp_path):
    (tmp_path / "empty").mkdir()
    (photographs / "broken.png").write_bytes(b"no image")
    resnet = tmp_path / "resnet"
    resnet.mkdir()
    save_backbone(resnet / WEIGHTS, build_backbone("resnet18", {"channels": 4}, ImageSpec(16)))
    foreign = tmp_path / "foreign.pt"
    torch.save({"weight": torch.zeros(1)}, foreign)
    cases = [
        (request(resnet, photographs), r"sslrun attend needs a backbone with 'attention', which "
         r"'resnet18' does not offer: choose one that has it: .*vit-tiny"),
        (request(run, photographs), r"broken\.png: is no image that can be decoded"),
        (request(run, tmp_path / "empty"), r"empty: holds no images \(\.bmp"),
        (request(run, tmp_path / "gone.png"), r"gone\.png: no such image or folder"),
        (request(run), "nothing to draw: name images"),
        (request(run, examples=3), "--examples draws a recipe's test split, but no recipe"),
        (request(run, photographs / "a.png", sentences=("hi",)), "--text is for backbones of text"),
        (request(tmp_path / "empty", photographs), r"empty: no checkpoint there"),
        (request(foreign, photographs), r"foreign\.pt: was not written by sslrun"),
        (request("no-such-recipe", photographs), "no such file, and no recipe of this name"),
        (request(text_run), "nothing to draw: give a sentence"),
        (request(text_run, "the cat", examples=1), "--examples is for images"),
    ]  # fmt: skip
    for asked, message in cases:
        with pytest.raises(UserError, match=message) as raised:
            attend(asked, CPU)
        assert "\n" not in str(raised.value)
    assert not (tmp_path / "attention").exists()


def test_the_command_draws_and_reports(run, photographs, tmp_path, monkeypatch, capsys):
    arguments = ["attend", str(run), str(photographs), "-o", str(tmp_path / "out"), "--mass", "0.8"]
    monkeypatch.setattr(sys, "argv", ["sslrun", *arguments, "--device", "cpu"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert not stopped.value.code
    assert "masks hold 80%" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["sslrun", *arguments[:-1], "1.5"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert "--mass 1.5: should be a share" in capsys.readouterr().err
    assert json.loads((run / "spec.json").read_text())["size"] == 16
