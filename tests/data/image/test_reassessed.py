"""ImageNet ReaL: several labels or none per image, by image number."""

import io
import json
import os
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from sslrun.data.source import sources
from sslrun.errors import UserError
from sslrun.recipe import Sweep, parse
from sslrun.recipe.places import Located
from sslrun.results.address import Column, Labels, Row
from sslrun.results.compare import compare
from sslrun.results.published import published
from sslrun.stages import bench
from sslrun.stages.context import Context
from sslrun.stages.reporting import Reporter
from sslrun.stages.sweep import Plan, work
from sslrun.training.device import compute

REAL = [[0], [0, 1], [], [1], [2, 1]]
"""Labels of images 1 to 5."""


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("SSLRUN_DATA", str(tmp_path / "sets"))
    monkeypatch.setenv("SSLRUN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SSLRUN_WORKERS", "1")
    bench._load_splits.cache_clear()
    (tmp_path / "real.json").write_text(json.dumps(REAL))
    return tmp_path


def picture(label, dark=0):
    """Return an image whose color is its class."""
    pixels = np.full((8, 8, 3), dark, dtype=np.uint8)
    pixels[..., label] = 250
    return Image.fromarray(pixels)


def folders(root, names="ILSVRC2012_val_{:08d}.JPEG"):
    """Write three classes; test images are in class folders, so not ordered by number."""
    for label in range(3):
        for number in range(4):
            path = root / "train" / f"n{label}" / f"n{label}_{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(label, 10 * number).save(path)
    for number, label in ((1, 2), (2, 0), (3, 1), (4, 1), (5, 0)):
        path = root / "val" / f"n{label}" / names.format(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(label).save(path, "PNG")


def load(split, real):
    cls = sources["imagenet-1k"]
    return cls(cls.Options(size=8, real=real)).load(split)


def test_labels_follow_image_numbers_in_any_layout(place):
    folders(place / "sets/imagenet-1k")
    test = load("test", place / "real.json")
    # Images in the order of the folders: 2 and 5, 3 and 4, 1.
    assert test.labels.tolist() == [[0, 0, 1], [0, 2, 1], [1, -1, -1], [1, 1, -1], [2, 0, -1]]
    assert load("train", place / "real.json").labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert load("test", None).labels.tolist() == [0, 0, 1, 1, 2]
    assert (
        load("test", place / "real.json").labels.tolist() == test.labels.tolist()
    )  # read from the cache


def test_tables_keep_file_names(place):
    def encoded(number, label, name):
        written = io.BytesIO()
        picture(label).save(written, "PNG")
        return {"bytes": written.getvalue(), "path": name.format(number)}

    for name, root in (("ILSVRC2012_val_{:08d}.JPEG", "sets"), ("{}.png", "others")):
        rows = {"image": [encoded(4, 1, name), encoded(1, 2, name)], "label": [1, 2]}
        classes = datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])}
        )
        folder = place / root / "imagenet-1k"
        folder.mkdir(parents=True)
        for split in ("train", "validation"):
            datasets.Dataset.from_dict(rows, classes).to_parquet(str(folder / f"{split}.parquet"))
    assert load("test", place / "real.json").labels.tolist() == [[1, 1], [2, 0]]
    os.environ["SSLRUN_DATA"] = str(place / "others")
    with pytest.raises(
        UserError,
        match=r"not named ILSVRC2012_val_00000001.JPEG and so on: get them with their names",
    ):
        load("test", place / "real.json")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "no such file; it is real.json of github.com/google-research/reassessed-imagenet"),
        ("[1, 2]", "should be a list of lists of labels"),
        ("{", "cannot be read"),
        ("[[0], [7]]", r"image 2 has \[7\]: should be classes, from 0 to 2"),
    ],
)
def test_invalid_label_files_are_errors(place, text, words):
    folders(place / "sets/imagenet-1k")
    if text is not None:
        (place / "other.json").write_text(text)
    with pytest.raises(UserError, match=words):
        load("test", place / "other.json")


def test_real_and_imagenet_labels_are_scored_in_one_run(place):
    folders(place / "sets/imagenet-1k")
    data = {"name": "imagenet-1k", "size": 8, "real": str(place / "real.json")}
    options = {
        "name": "tiny",
        "backbone": "pixels",
        "data": data,
        "probe": {"l2_count": 1, "l2_min": 0.001},
        "evaluate": {"imagenet-1k": {"protocols": ["probe", "knn"]}},
    }
    recipe = parse(Located(options, {(): "tiny.yaml:1"}))
    plan = Plan.of(Sweep(name="tiny", rows={"Ours-I21k (ViT-L/16)": recipe}), place / "runs")
    assert not work([plan], Context(Path(place / "runs"), compute("cpu"), Reporter(quiet=True)))
    table = plan.table()
    # All original labels are predicted; ReaL agrees for two of the four images with labels.
    for protocol in ("probe", "knn"):
        row = Row("Ours-I21k (ViT-L/16)", protocol)
        assert table.cells[row, Column("imagenet-1k", Labels(1.0))].mean == 100
        assert table.cells[row, Column("imagenet-1k ReaL", Labels(1.0))].mean == 50
    comparison = compare(table, published("vit_table2"))
    assert {pair.value for pair in comparison.pairs} == {85.3, 88.62}
