"""Whole images: stored with their aspect ratio, cropped from all of their area."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp
from sklearn.datasets import load_sample_images
from torchvision.transforms import v2

from sslrun.backbones import build_backbone
from sslrun.data.image import augment
from sslrun.data.image import images as images_module
from sslrun.data.image.augment import Augmentation, crop_resize_whole, draw_boxes, to_float
from sslrun.data.image.images import StreamedImages
from sslrun.data.image.whole import WholeImageExamples, pack
from sslrun.data.source import sources
from sslrun.data.splits import load_splits, pool
from sslrun.errors import UserError
from sslrun.pretexts.base import pretexts
from sslrun.recipe import parse
from sslrun.recipe.places import Located
from sslrun.stages.evaluate import cells
from sslrun.stages.pretrain import Pretraining
from sslrun.training.checkpoint import latest, restore, save
from sslrun.training.device import compute
from sslrun.training.loop import Training, train
from sslrun.training.schedule import Schedule

CPU = torch.device("cpu")
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
SHAPES = [(30, 40), (40, 30), (24, 24), (24, 90)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def arrays(shapes=SHAPES, seed=0):
    random = np.random.default_rng(seed)
    return [random.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]


def boxes_in(height, width, count=4000):
    sides = torch.full((count,), height), torch.full((count,), width)
    return draw_boxes(*sides, SCALE, RATIO, generator())


def test_crops_reach_every_side_of_a_4_to_3_image():
    top, left, height, width = boxes_in(256, 341).T
    assert top.min() == 0
    assert left.min() == 0
    assert (top + height).max() == 256
    assert (left + width).max() == 341
    corner = (top < 13) & (left < 17)  # within a twentieth of the upper left corner
    assert corner.any()
    # Of an image of 500 x 375 pixels, the smallest crop has 0.08 of the area: about 122 squared.
    area = boxes_in(375, 500)[:, 2:].prod(dim=1).double()
    assert area.min().sqrt() == pytest.approx(122, abs=2)


@pytest.mark.parametrize(("height", "width"), [(256, 341), (341, 256), (256, 256), (100, 700)])
def test_boxes_are_distributed_as_those_of_torchvision(height, width):
    ours = boxes_in(height, width).double()
    torch.manual_seed(1)
    crop, image = v2.RandomResizedCrop(8, SCALE, RATIO), torch.empty(3, height, width)
    params = [crop.make_params([image]) for _ in range(4000)]
    theirs = torch.tensor(
        [[each["top"], each["left"], each["height"], each["width"]] for each in params]
    ).double()
    for measure in (
        lambda box: box[:, 2] * box[:, 3],
        lambda box: box[:, 3] / box[:, 2],
        lambda box: box[:, 0] + box[:, 2] / 2,
        lambda box: box[:, 1] + box[:, 3] / 2,
        lambda box: box[:, 0],
        lambda box: box[:, 1] + box[:, 3],
    ):
        assert ks_2samp(measure(ours), measure(theirs)).pvalue > 1e-3


def test_the_box_is_central_where_none_fits():
    wide = draw_boxes(torch.tensor([10]), torch.tensor([801]), (0.9, 1.0), RATIO, generator())
    assert wide.tolist() == [[0, (801 - 13) // 2, 10, 13]]  # 10 * 4/3 = 13


@pytest.mark.parametrize("on_cpu", [True, False], ids=["each", "windows"])
def test_crops_equal_torchvisions(on_cpu):
    pictures = arrays()
    whole = pack(pictures, 16)
    _, height, width = whole.places.T
    for seed in range(5):
        boxes = draw_boxes(height, width, SCALE, RATIO, generator(seed))
        views = (
            crop_resize_whole(whole, boxes, 16, RATIO)
            if on_cpu
            else augment._crop_resize_windows(whole, boxes, 16, RATIO)
        )
        for picture, box, view in zip(pictures, boxes.tolist(), views, strict=True):
            image = torch.from_numpy(picture).permute(2, 0, 1).float() / 255
            expected = v2.functional.resized_crop(image, *box, [16, 16], antialias=True)
            torch.testing.assert_close(view, expected, atol=1e-5, rtol=0)


def test_a_policy_draws_for_a_square_what_it_draws_for_a_tensor():
    squares = arrays([(24, 24)] * 100)
    tensor = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2)
    policy = Augmentation.simclr()
    views = policy(pack(squares, 24), 24, generator())
    torch.testing.assert_close(views, policy(tensor, 24, generator()), atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ["china.jpg", "flower.jpg"])
def test_evaluation_equals_resize_and_center_crop(tmp_path, name):
    files = load_sample_images()
    (picture,) = [
        image for image, file in zip(files.images, files.filenames, strict=True) if name in file
    ]
    for index in range(2):
        (tmp_path / f"train/{index}").mkdir(parents=True)
        for number in range(4):
            Image.fromarray(picture).save(tmp_path / f"train/{index}/{number}.png")
    options = sources["folder"].Options(path=tmp_path, size=224, whole=256)
    examples = sources["folder"](options).load("train")
    (batch,) = examples.batches([torch.tensor([0])], CPU)
    transform = v2.Compose([v2.Resize(256), v2.CenterCrop(224), v2.PILToTensor()])
    expected = transform(Image.fromarray(picture)).float() / 255
    torch.testing.assert_close(to_float(batch.inputs)[0], expected, atol=1e-6, rtol=0)
    assert examples.places[0].tolist() == [0, 256, 383]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Pictures of several shapes in two classes, and a cache of the test's own."""
    monkeypatch.setenv("SSLRUN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SSLRUN_WORKERS", "0")
    shapes = [(30, 40), (40, 30), (32, 32), (50, 20)] * 5
    for split in ("train", "test"):
        for label in "ab":
            place = tmp_path / "set" / split / label
            place.mkdir(parents=True)
            for number, picture in enumerate(arrays(shapes, seed=ord(label))):
                Image.fromarray(picture).save(place / f"{number:02}.png")
    return tmp_path / "set"


def load(folder, **options):
    return load_splits("folder", sources["folder"].Options(path=folder, **options))


def test_a_stream_gives_what_the_store_gives(folder, monkeypatch):
    stored = load(folder, size=16, whole=20).train
    assert isinstance(stored, WholeImageExamples)
    monkeypatch.setenv("SSLRUN_CACHE", str(folder.parent / "other"))
    monkeypatch.setattr(images_module, "MAX_TENSOR_BYTES", 0)
    streamed = load(folder, size=16, whole=20).train
    assert isinstance(streamed, StreamedImages)
    order = [torch.tensor([3, 30, 7]), torch.tensor([0])]
    for ours, theirs in zip(stored.batches(order, CPU), streamed.batches(order, CPU), strict=True):
        assert torch.equal(ours.inputs.pixels, theirs.inputs.pixels)
        assert torch.equal(ours.inputs.places, theirs.inputs.places)
        assert torch.equal(ours.labels, theirs.labels)
        assert ours.inputs.sizes.amin(dim=1).eq(20).all()
    joined = pool(stored, streamed, labeled=True)
    mixed = torch.tensor([40, 2, 37])
    (batch,) = joined.batches([mixed], CPU)
    assert torch.equal(batch.labels, joined.labels[mixed])
    singles = [next(joined.batches([index[None]], CPU)).inputs.centers() for index in mixed]
    assert torch.equal(batch.inputs.centers(), torch.cat(singles))


def test_a_set_on_the_device_gives_the_same_views(folder):
    stored = load(folder, size=16, whole=20).train
    (batch,) = stored.batches([torch.tensor([5, 1, 33])], CPU)
    on_device = augment.WholeImages(
        stored.pixels, stored.places[[5, 1, 33]], stored.places[[5, 1, 33], 1:], 16
    )
    assert torch.equal(batch.inputs.centers(), on_device.centers())
    assert batch.inputs.numel() == on_device.numel() == 3 * int(batch.inputs.sizes.prod(1).sum())


def test_the_cache_keeps_whole_images_apart_and_serves_any_size(folder):
    cache = folder.parent / "cache/images"
    load(folder, size=16).train.spec  # noqa: B018
    assert len(list(cache.glob("*.safetensors"))) == 1
    assert load(folder, size=16, whole=20).train.spec.size == 16
    assert len(list(cache.glob("*.safetensors"))) == 2
    assert load(folder, size=12, whole=20).train.spec.size == 12
    assert len(list(cache.glob("*.safetensors"))) == 2
    assert load(folder, size=12, whole=24).train.spec.size == 12
    assert len(list(cache.glob("*.safetensors"))) == 3


def test_an_unreadable_image_can_be_skipped(folder):
    (folder / "train/a/00.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="cannot be decoded"):
        load(folder, size=16, whole=20).train.spec  # noqa: B018
    skipped = load(folder, size=16, whole=20, skip_corrupt=True)
    assert len(skipped.train) + len(skipped.val) == 39


def test_whole_needs_a_size_within_it(folder):
    for options in ({"whole": 20}, {"whole": 20, "size": 24}):
        with pytest.raises(ValueError, match="whole needs a size of at most its own side"):
            load(folder, **options)


def recipe(folder, **data):
    source = {
        "name": "whole",
        "backbone": {"name": "mlp", "width": 16},
        "pretext": "simclr",
        "data": {"name": "folder", "path": str(folder), "size": 16, **data},
        "pretrain": {"steps": 2, "batch": 8},
        "evaluate": {"folder": {"protocols": ["knn"]}},
    }
    return parse(Located(source, {(): "whole.yaml:1"}))


def test_the_option_is_part_of_the_identity(folder, tmp_path):
    def hashes(**data):
        parsed = recipe(folder, **data)
        return Pretraining(parsed, 0, tmp_path).run.hash, cells(parsed, 0, tmp_path)[0].run.hash

    runs = [hashes(), hashes(whole=20), hashes(whole=24)]
    assert len({run for pair in runs for run in pair}) == 6


def training(examples):
    torch.manual_seed(0)
    backbone = build_backbone("mlp", {"width": 16}, examples.spec)
    backbone.fit_inputs(examples)
    pretext = pretexts["simclr"](pretexts["simclr"].Options(), backbone)
    schedule = Schedule(steps=6, batch=8, lr=0.01, precision="fp32", compile="off")
    return Training(pretext, schedule, compute("cpu"))


def test_training_resumes_exactly(folder, tmp_path):
    examples = load(folder, size=16, whole=20).train
    through = [step.loss.item() for step in train(training(examples), examples, 0)]
    assert len(through) == 6
    assert all(map(math.isfinite, through))
    first = training(examples)
    for step in train(first, examples, 0):
        if step.step == 3:
            save(first, tmp_path / "kept")
            break
    second = training(examples)
    restore(second, latest(tmp_path / "kept"))
    assert [step.loss.item() for step in train(second, examples, 0)] == through[3:]


def test_inputs_are_normalized_by_all_pixels(folder):
    examples = load(folder, size=16, whole=20).train
    backbone = build_backbone("resnet18", {"stem": "small", "channels": 4}, examples.spec)
    backbone.fit_inputs(examples)
    batches = examples.batches([torch.arange(len(examples))], CPU)
    values = next(batches).inputs.pixels.double() / 255
    torch.testing.assert_close(backbone.mean.double(), values.mean(dim=0), atol=1e-6, rtol=0)
    torch.testing.assert_close(
        backbone.std.double(), values.std(dim=0, correction=0), atol=1e-6, rtol=0
    )


def test_no_crop_waits_for_the_device():
    """Tensors on the meta device have no values: whatever asks for one fails there."""
    whole = pack(arrays(), 16).to(torch.device("meta"))
    boxes = torch.empty(4, 4, dtype=torch.int64, device="meta")
    assert crop_resize_whole(whole, boxes, 16, RATIO).shape == (4, 3, 16, 16)
    assert Augmentation(flip=0.5)(whole, 16, torch.Generator()).shape == (4, 3, 16, 16)
    assert to_float(whole).shape == (4, 3, 16, 16)
