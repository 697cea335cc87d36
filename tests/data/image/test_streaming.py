"""Parquet files that arrive while they are read give what they give once they are here."""

import io
from types import SimpleNamespace

import datasets
import fsspec
import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from sslrun.data.image import parquet
from sslrun.data.image.parquet import ArrivingImages
from sslrun.data.source import sources
from sslrun.data.splits import load_splits
from sslrun.errors import UserError

CPU = torch.device("cpu")
PATTERN = "memory://hub/train-*.parquet"
FILES, ROWS = 3, 4


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    """Give each test a cache and an object store of its own, with files of 4 images."""
    monkeypatch.setenv("SSLRUN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SSLRUN_WORKERS", "1")
    monkeypatch.chdir(tmp_path)
    parquet.open_copy.cache_clear()
    store = fsspec.filesystem("memory")
    store.store.clear()
    names = datasets.ClassLabel(names=["cat", "dog"])
    types = datasets.Features({"image": datasets.Image(), "label": names})
    pixels = np.random.default_rng(0).integers(0, 256, (FILES * ROWS, 8, 8, 3), dtype=np.uint8)
    for number, part in enumerate(np.split(pixels, FILES)):
        rows = {"image": [Image.fromarray(row) for row in part], "label": [0, 1, 1, 0]}
        file = io.BytesIO()
        datasets.Dataset.from_dict(rows, types).to_parquet(file)
        store.pipe(f"/hub/train-{number}.parquet", file.getvalue())
    yield tmp_path / "cache" / "remote"
    store.store.clear()


def source(name="shards", **options):
    cls = sources[name]
    return cls(cls.Options(**({"train": PATTERN, "streaming": True} | options)))


def copies(folder):
    return sorted(path.name for path in folder.glob("*/*.parquet"))


def test_an_arriving_set_equals_the_same_set_here(places, monkeypatch):
    whole = source(streaming=False, test=None).load("train")
    ours = source(size=8).load("train")
    assert isinstance(ours, ArrivingImages)
    assert (ours.classes, ours.labels.tolist()) == (whole.classes, whole.labels.tolist())
    order = [torch.tensor([11, 0, 5]), torch.tensor([7])]
    pairs = zip(ours.batches(order, CPU), whole.batches(order, CPU), strict=True)
    assert all(one.inputs.equal(two.inputs) and one.labels.equal(two.labels) for one, two in pairs)


def test_a_file_is_copied_when_it_is_first_read(places):
    examples = source(size=8).load("train")
    assert copies(places) == []
    first = next(examples.batches([torch.tensor([4, 6])], CPU))
    assert copies(places) == ["train-1.parquet"]
    fsspec.filesystem("memory").rm("/hub/train-1.parquet")
    again = next(examples.batches([torch.tensor([4, 6])], CPU))
    assert again.inputs.equal(first.inputs)
    fsspec.filesystem("memory").rm("/hub/train-2.parquet")
    with pytest.raises(UserError, match=r"train-2\.parquet: no such file"):
        list(examples.batches([torch.tensor([8])], CPU))


def test_the_first_epoch_reads_files_in_order_and_later_ones_do_not(monkeypatch):
    monkeypatch.setattr(parquet, "WINDOW", 3)
    train = load_splits("shards", source(size=8, validation=0.25).options).train
    rows = train.indices
    first, second = train.order(0, 0), train.order(0, 1)
    assert first.equal(train.order(0, 0))
    assert not first.equal(train.order(1, 0))
    assert first.sort().values.equal(second.sort().values)
    # A row comes after each row that is a window or more before it.
    assert all((rows[first[:place]] < rows[row] + 3).all() for place, row in enumerate(first))
    assert not all((rows[second[:place]] < rows[row] + 3).all() for place, row in enumerate(second))


def test_a_set_on_the_hub_arrives(places, monkeypatch):
    asked = []

    def builder(*place, **options):
        asked.append(place)
        files = [f"memory://hub/train-{number}.parquet" for number in range(FILES)]
        data_files = {"train": files, "csv": ["hf://datasets/a/b/x.csv"]}
        return SimpleNamespace(config=SimpleNamespace(data_files=data_files))

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    hub = {"hub": "owner/name", "test": None, "size": 8, "streaming": True}
    cls = sources["hub"]
    examples = cls(cls.Options(**hub)).load("train")
    assert (asked, len(examples), examples.classes) == ([("owner/name", None)], 12, ("cat", "dog"))
    assert next(examples.batches([torch.tensor([0])], CPU)).labels.tolist() == [0]
    assert copies(places) == ["train-0.parquet"]
    for split, message in (("missing", "has no files of a split 'missing'"), ("csv", "streaming")):
        with pytest.raises(UserError, match=message):
            cls(cls.Options(**hub, train=split)).load("train")


def test_damage_is_one_line():
    store = fsspec.filesystem("memory")
    store.pipe("/hub/train-1.parquet", store.cat("/hub/train-1.parquet")[:-100])
    with pytest.raises(
        UserError, match=r"^memory:///hub/train-1\.parquet: cannot be read: [^\n]*$"
    ):
        source(size=8).load("train")


@pytest.mark.parametrize("options", [{"train": "a.tar"}, {"skip_corrupt": True}])
def test_what_cannot_arrive_is_refused(options):
    with pytest.raises(ValidationError, match="streaming"):
        source(**options)
