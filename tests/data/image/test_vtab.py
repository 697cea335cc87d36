"""VTAB-1k: a thousand examples per set, and sweeps that skip unavailable sets."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

import sslrun.hub
from sslrun.data.source import sources
from sslrun.data.splits import load_splits
from sslrun.errors import UserError
from sslrun.recipe import Sweep, parse
from sslrun.recipe.places import Located
from sslrun.results.address import Column, Labels
from sslrun.results.compare import compare
from sslrun.results.formats import to_markdown
from sslrun.results.published import published
from sslrun.stages import bench
from sslrun.stages.context import Context
from sslrun.stages.reporting import Reporter
from sslrun.stages.sweep import Plan, work
from sslrun.training.device import compute

VTAB = sources["vtab"]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("SSLRUN_DATA", str(tmp_path / "sets"))
    monkeypatch.setenv("SSLRUN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SSLRUN_WORKERS", "1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    bench._load_splits.cache_clear()
    return tmp_path


def make(place, name, train, test=6, classes=2, width=8):
    """Write Parquet files whose images have a color per class and their number in the red."""
    folder = place / "sets/vtab" / name
    folder.mkdir(parents=True)
    for split, count in (("train", train), ("test", test)):
        pixels = np.zeros((count, 8, width, 3), dtype=np.uint8)
        for index in range(count):
            pixels[index, ..., 0] = index % 250
            pixels[index, ..., 1 + index % classes] = 255
        rows = {
            "webp": [Image.fromarray(label) for label in pixels],
            "cls": [index % classes for index in range(count)],
        }
        types = {
            "webp": datasets.Image(),
            "cls": datasets.ClassLabel(names=[str(label) for label in range(classes)]),
        }
        datasets.Dataset.from_dict(rows, datasets.Features(types)).to_parquet(
            str(folder / f"{split}.parquet")
        )


def splits(name, size=8):
    return load_splits("vtab", VTAB.Options(set=name, size=size))


def test_a_set_has_800_training_and_200_validation_examples(place):
    make(place, "dtd", 1100, classes=2)
    dtd = splits("dtd")
    assert [len(examples) for examples in (dtd.train, dtd.val, dtd.test)] == [800, 200, 6]
    assert dtd.train.labels.bincount().min() > 340
    again = splits("dtd")
    assert torch.equal(dtd.train.inputs, again.train.inputs)
    assert dtd.classes == ("0", "1")


def test_smaller_sets_have_the_same_proportions_and_disjoint_splits(place):
    make(place, "pets", 50)
    pets = splits("pets")
    numbers = [set(examples.inputs[:, 0, 0, 0].tolist()) for examples in (pets.train, pets.val)]
    assert [len(indices) for indices in numbers] == [40, 10]
    assert numbers[0] | numbers[1] == set(range(50))


def test_images_are_resized_to_squares_without_cropping(place):
    folder = place / "sets/vtab/dmlab"
    edges = np.zeros((2, 8, 32, 3), dtype=np.uint8)
    edges[:, :, :8] = 255  # a center crop would remove the edges
    rows = {"image": [Image.fromarray(edge) for edge in edges], "label": [0, 1]}
    types = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        datasets.Dataset.from_dict(rows, datasets.Features(types)).to_parquet(
            str(folder / f"{split}.parquet")
        )
    image = splits("dmlab").test.inputs[0, 0]
    assert image.shape == (8, 8)
    assert (image[:, 0] > 200).all()
    assert (image[:, 4:] < 50).all()


def test_sets_are_read_from_hub_repositories_with_vtabs_labels(monkeypatch):
    asked = []

    def load_dataset(path, name=None, **options):
        asked.append(path)
        raise ConnectionError

    monkeypatch.setattr(sslrun.hub, "answers", lambda url: True)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in ("caltech101", "sun397"):
        with pytest.raises(
            UserError, match=rf"vtab-{name}: not on this machine .* Put it at data/vtab/{name}"
        ):
            splits(name).test  # noqa: B018
    assert asked == ["clip-benchmark/wds_vtab-caltech101", "dpdl-benchmark/sun397"]


def test_hub_files_are_read_as_web_datasets(monkeypatch):
    """Write images under their format's name, labels under cls, and their origin."""

    def load_dataset(path, name=None, **options):
        pixels = np.arange(30, dtype=np.uint8).repeat(8 * 8 * 3).reshape(30, 8, 8, 3)
        rows = {
            "__key__": list("k" * 30),
            "__url__": list("u" * 30),
            "webp": [Image.fromarray(pixel) for pixel in pixels],
        }
        types = {
            "__key__": datasets.Value("string"),
            "__url__": datasets.Value("string"),
            "webp": datasets.Image(),
            "cls": datasets.Value("int64"),
        }
        dataset = datasets.Dataset.from_dict(
            {**rows, "cls": [number % 3 for number in range(30)]}, datasets.Features(types)
        )
        return datasets.DatasetDict(train=dataset, test=dataset)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    eurosat = splits("eurosat")
    assert (len(eurosat.train), len(eurosat.val), len(eurosat.test)) == (24, 6, 30)
    assert eurosat.classes == ("0", "1", "2")
    assert (eurosat.train.inputs[:, 0, 0, 0] % 3).tolist() == eurosat.train.labels.tolist()


def sweep(place, *sets):
    asked = {
        name: {"data": {"name": "vtab", "set": name, "size": 8}, "protocols": ["probe"]}
        for name in sets
    }
    options = {
        "name": "tiny",
        "backbone": "pixels",
        "data": {"name": "vtab", "set": sets[0], "size": 8},
        "probe": {"l2_count": 1},
        "evaluate": asked,
    }
    row = "Ours-I21k (ViT-L/16)"
    plan = Plan.of(
        Sweep(name="tiny", rows={row: parse(Located(options, {(): "t.yaml:1"}))}), place / "runs"
    )
    return work([plan], Context(place / "runs", compute("cpu"), Reporter(quiet=True))), plan


def test_an_unavailable_set_is_an_empty_cell_with_its_reason(place, monkeypatch):
    make(place, "dtd", 40)
    make(place, "svhn", 40)
    failures, plan = sweep(place, "dtd", "kitti_closest_vehicle_distance", "svhn")
    assert len(failures) == 1
    table = plan.table()
    columns = [column.task for column in table.columns]
    assert columns == ["dtd", "svhn", "kitti_closest_vehicle_distance"]
    assert "VTAB is the mean over 19 sets, but only 2 of them are here" in table.notes
    note = (
        "empty, kitti_closest_vehicle_distance 100 %: "
        "vtab-kitti_closest_vehicle_distance: not on this machine"
    )
    assert any(note_.startswith(note) for note_ in table.notes)
    assert to_markdown(table).splitlines()[4].endswith("|  |")
    assert '"reason": "vtab-kitti' in table.to_json()
    # After its data is added, the cell is computed, and the complete benchmark has its mean.
    make(place, "kitti_closest_vehicle_distance", 40)
    monkeypatch.setattr(VTAB, "suite", ("VTAB", 3))
    for run in place.glob("runs/tiny/probe-*"):
        (run / "result.json").unlink(missing_ok=True)
    bench._load_splits.cache_clear()
    failures, plan = sweep(place, "dtd", "kitti_closest_vehicle_distance", "svhn")
    assert not failures
    table = plan.table()
    assert not table.empty
    row = table.rows[0]
    mean = sum(table.cells[row, Column(task, Labels(1.0))].mean for task in columns) / 3
    assert table.cells[row, Column("VTAB", Labels(1.0))].mean == pytest.approx(mean)
    (pair,) = compare(table, published("vit_table2")).pairs[-1:]
    assert (pair.published_row, pair.published_column) in {
        ("VTAB (19 tasks)", row.name),
        (row.name, "VTAB (19 tasks)"),
    }
