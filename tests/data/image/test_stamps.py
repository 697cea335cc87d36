"""Stamps and PASCAL VOC: areas, disjoint splits, determinism, masks, and unusable files."""

import numpy as np
import pytest
import torch
from PIL import Image

from sslrun.data.image.masks import VOID, MaskedImages
from sslrun.data.source import sources
from sslrun.data.splits import load_splits
from sslrun.errors import UserError

COUNT = 8
"""Objects, each a disc of its own color, in two classes."""


def color_of(index):
    return (30 * index, 255 - 30 * index, 200)


@pytest.fixture
def folder(tmp_path):
    """Discs with alpha, and photographs of one gray each."""
    rows, columns = np.mgrid[:40, :40]
    disc = (rows - 19.5) ** 2 + (columns - 19.5) ** 2 < 19**2
    for index in range(COUNT):
        pixels = np.zeros((40, 60, 4), np.uint8)  # with a transparent margin
        pixels[:, :40, :3] = color_of(index)
        pixels[:, :40, 3] = 255 * disc
        place = tmp_path / "stamps" / ("round" if index % 2 else "flat")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place / f"{index}.png")
    (tmp_path / "photographs").mkdir()
    for gray in range(20, 120, 20):
        image = Image.new("RGB", (90, 70), (gray, gray, gray))
        image.save(tmp_path / "photographs" / f"{gray}.png")
    return tmp_path


def options(folder, **changes):
    settings = {"path": folder / "stamps", "backgrounds": folder / "photographs", "size": 32}
    return sources["stamps"].Options(**{**settings, "train": 60, "test": 30, **changes})


def load(folder, **changes):
    return load_splits("stamps", options(folder, **changes))


def colors(examples, inside):
    """The colors of pixels well inside of objects, or of the background."""
    pixels = examples.inputs.permute(0, 2, 3, 1)
    labels = examples.labels
    chosen = labels > 0 if inside else labels == 0
    if inside:  # without the soft edges
        eroded = -torch.nn.functional.max_pool2d(-chosen[:, None].float(), 5, 1, 2)
        chosen = eroded[:, 0] > 0
    found = pixels[chosen]
    if not inside:
        found = found[(found[:, 0] == found[:, 1]) & (found[:, 1] == found[:, 2])]
    return {tuple(color) for color in found.unique(dim=0).tolist()}


def test_masks_mark_the_objects_and_their_areas_are_within_bounds(folder):
    splits = load(folder, objects=1)
    examples = splits.test
    assert isinstance(examples, MaskedImages)
    assert examples.inputs.shape == (30, 3, 32, 32)
    assert (examples.labels.shape, examples.labels.dtype) == ((30, 32, 32), torch.uint8)
    shares = (examples.labels > 0).float().mean(dim=(1, 2))
    assert 0.15 - 0.02 < shares.min() < 0.2
    assert 0.35 < shares.max() < 0.4 + 0.02
    known = {color_of(index) for index in range(COUNT)}
    assert colors(examples, inside=True) <= known
    corners = examples.labels.flatten(1).float().mean(dim=0)
    assert (corners > 0).sum() > 800  # of 1024 pixels


def test_splits_share_neither_objects_nor_photographs(folder):
    splits = load(folder, objects=1)
    for inside, count in ((True, COUNT), (False, 5)):
        train, test = (colors(part, inside) for part in (splits.train, splits.test))
        assert len(train) >= 3
        assert test
        assert not train & test
        assert len(train | test) == count


def test_two_objects_have_their_own_numbers_and_hide_little_of_each_other(folder):
    labels = load(folder, objects=2, area=(0.15, 0.2)).test.labels
    most = labels.amax(dim=(1, 2))
    assert set(most.tolist()) == {1, 2}
    first = (labels[most == 2] == 1).float().mean(dim=(1, 2))
    assert first.min() > 0.9 * 0.14


def test_images_follow_from_the_seed(folder):
    one, same, other = load(folder), load(folder), load(folder, seed=1)
    assert torch.equal(one.test.inputs, same.test.inputs)
    assert torch.equal(one.train.labels, same.train.labels)
    assert not torch.equal(one.test.inputs, other.test.inputs)
    more = load(folder, test=40)
    assert torch.equal(more.test.inputs[:30], one.test.inputs)
    assert len(one.train) == 54  # a tenth is carved
    assert one.val.labels.shape == (6, 32, 32)


def test_labels_may_be_classes(folder):
    test = load(folder, label="class", objects=1).test
    assert test.classes == ("flat", "round")
    middle = test.inputs.flatten(2)
    known = torch.tensor([color_of(index) for index in range(COUNT)])
    for image, label in zip(middle, test.labels, strict=True):
        counts = (image.T[:, None] == known).all(dim=-1).sum(dim=0)
        assert counts.argmax() % 2 == label


def test_without_photographs_those_of_scikit_learn_are_used(folder):
    splits = load(folder, backgrounds=None, test=4, train=4)
    assert splits.test.inputs.float().std() > 20


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "stamps/flat/0.png").write_bytes(b"no"), r"0\.png: cannot be decoded"),
        (
            lambda f: Image.new("RGB", (9, 9)).save(f / "stamps/flat/0.png"),
            r"0\.png: has no transparent pixel",
        ),
        (
            lambda f: Image.new("RGBA", (9, 9)).save(f / "stamps/flat/0.png"),
            r"0\.png: has no opaque pixel",
        ),
        (
            lambda f: [path.unlink() for path in (f / "photographs").iterdir()],
            "photographs: holds 0 images, but at least 2",
        ),
        (lambda f: (f / "stamps").rename(f / "gone"), "stamps: no such folder"),
    ],
)
def test_unusable_files_are_reported_by_name(spoil, message, folder):
    spoil(folder)
    with pytest.raises(UserError, match=message):
        load(folder).train  # noqa: B018
    with pytest.raises(UserError, match=message):
        load(folder).test  # noqa: B018


def test_objects_that_are_too_thin_are_reported(folder):
    with pytest.raises(UserError, match=r"too thin to cover 90% of an image: lower data\.area"):
        load(folder, area=(0.9, 0.95)).train  # noqa: B018
    with pytest.raises(ValueError, match="two ascending shares"):
        options(folder, area=(0.4, 0.2))


# ---------------------------------------------------------------- VOC


@pytest.fixture
def voc(tmp_path):
    folder = tmp_path / "VOC2012"
    for name in ("JPEGImages", "SegmentationObject", "ImageSets/Segmentation"):
        (folder / name).mkdir(parents=True)
    for index, name in enumerate(("a", "b", "c")):
        Image.new("RGB", (64, 32), (80 * index, 0, 0)).save(folder / f"JPEGImages/{name}.jpg")
        mask = np.zeros((32, 64), np.uint8)
        mask[:16, :32], mask[16:, 32:] = 1, 2
        mask[:, 60:] = VOID
        image = Image.fromarray(mask, mode="P")
        image.putpalette([value for value in range(256) for _ in range(3)])
        image.save(folder / f"SegmentationObject/{name}.png")
    (folder / "ImageSets/Segmentation/train.txt").write_text("a\nb\n")
    (folder / "ImageSets/Segmentation/val.txt").write_text("c\n")
    return folder


def load_voc(folder, size=16):
    return load_splits("voc", sources["voc"].Options(path=folder, size=size, validation=0))


def test_voc_is_tested_on_its_validation_split_with_masks_of_the_nearest_pixel(voc):
    splits = load_voc(voc)
    assert (len(splits.train), len(splits.test)) == (2, 1)
    labels = splits.test.labels[0]
    expected = torch.zeros(16, 16, dtype=torch.uint8)
    expected[:8, :8], expected[8:, 8:] = 1, 2
    expected[:, 15] = VOID
    assert torch.equal(labels, expected)
    assert splits.test.inputs[0, 0].float().mean() == pytest.approx(160, abs=3)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "SegmentationObject/c.png").unlink(), r"c\.png: cannot be read: No such"),
        (lambda f: (f / "JPEGImages/c.jpg").unlink(), r"c\.jpg: no such file"),
        (lambda f: (f / "JPEGImages/c.jpg").write_bytes(b"x"), r"c\.jpg: cannot be decoded"),
        (
            lambda f: Image.new("RGB", (64, 32)).save(f / "SegmentationObject/c.png"),
            r"c\.png: holds colors \(RGB\)",
        ),
        (lambda f: (f / "ImageSets/Segmentation/val.txt").unlink(), r"val\.txt: cannot be read"),
        (lambda f: (f / "JPEGImages").rename(f / "x"), r"JPEGImages: no such folder: put"),
    ],
)
def test_a_damaged_copy_of_voc_is_reported_by_file(spoil, message, voc):
    spoil(voc)
    with pytest.raises(UserError, match=message):
        load_voc(voc).test  # noqa: B018
