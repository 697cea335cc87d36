import csv
import os
import re
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from pydantic import ValidationError

import sslrun.hub
from sslrun.data.image.sources import CARDS, sources
from sslrun.data.source import explain_missing
from sslrun.data.specs import ImageSpec
from sslrun.data.splits import load_splits
from sslrun.errors import UserError


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    """Hide all data except a test's own, in an empty working directory."""
    folder = os.environ.get("SSLRUN_DATA")
    monkeypatch.delenv("SSLRUN_DATA", raising=False)
    monkeypatch.setenv("SSLRUN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SSLRUN_WORKERS", "1")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return folder


def source(name, **options):
    cls = sources[name]
    return cls(cls.Options(**options))


def pixels(count, side=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def table(count, seed=0, label="label", image="image", names=("cat", "dog"), **columns):
    """Return images and labels as a table of `datasets`."""
    rows = {image: [Image.fromarray(pixel) for pixel in pixels(count, seed=seed)], **columns}
    types = {image: datasets.Image(), **{name: datasets.Value("int64") for name in columns}}
    if label:
        rows[label] = [index % len(names) for index in range(count)]
        types[label] = datasets.ClassLabel(names=list(names))
    return datasets.Dataset.from_dict(rows, datasets.Features(types))


def write(root, **splits):
    root.mkdir(parents=True, exist_ok=True)
    for split, table_ in splits.items():
        table_.to_parquet(str(root / f"{split}.parquet"))


def image_folder(root, **counts):
    """Write root/<split>/<class>/<n>.png; class 'dog' has one image more than 'cat'."""
    for split, count in counts.items():
        for name, extra in (("cat", 0), ("dog", 1)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index, image_array in enumerate(pixels(count + extra, seed=extra)):
                Image.fromarray(image_array).save(folder / f"{index}.png")


def equal(examples, expected):
    return (examples.inputs.permute(0, 2, 3, 1).numpy() == expected).all()


# ---------------------------------------------------------------- published sets


def test_a_published_set_is_read_from_sslrun_data(tmp_path, monkeypatch):
    write(tmp_path / "sets" / "cifar10", train=table(10), test=table(4, seed=1))
    write(Path("data/cifar10"), train=table(6, seed=2), test=table(2))
    assert len(source("cifar10").load("train")) == 6  # ./data, because SSLRUN_DATA is not set
    monkeypatch.setenv("SSLRUN_DATA", str(tmp_path / "sets"))
    cifar = source("cifar10")
    train, test = cifar.load("train"), cifar.load("test")
    assert equal(train, pixels(10))
    assert equal(test, pixels(4, seed=1))
    assert train.labels.tolist() == [0, 1] * 5
    assert train.classes == ("cat", "dog")
    assert train.spec.size == 8


def test_a_published_set_is_read_from_folders_in_its_own_size():
    image_folder(Path("data/imagenette"), train=3, val=1)
    imagenette = source("imagenette")
    assert imagenette.splits == ("train", "test")
    assert imagenette.load("train").inputs.shape == (7, 3, 160, 160)
    assert source("imagenette", size=8).load("test").labels.tolist() == [0, 1, 1]


def test_imagenet_is_tested_on_validation_even_beside_a_test_split():
    write(Path("data/imagenet-1k"), train=table(4), validation=table(6), test=table(2))
    imagenet = source("imagenet-1k", size=8)
    assert imagenet.splits == ("train", "test")
    assert len(imagenet.load("test")) == 6


def test_the_label_column_of_the_card_is_read():
    write(
        Path("data/cifar100"),
        train=table(6, label="fine_label", coarse=[0] * 6),
        test=table(2, label="fine_label"),
    )
    assert source("cifar100").load("train").labels.tolist() == [0, 1] * 3


@pytest.mark.parametrize("offline", [True, False])
def test_missing_set_without_network_fails_fast_and_says_what_to_do(monkeypatch, offline):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    began = time.monotonic()
    with pytest.raises(UserError) as error:
        load_splits("svhn", sources["svhn"].Options()).train  # noqa: B018
    assert time.monotonic() - began < 5
    assert str(error.value) == (
        "svhn: not on this machine and the hub cannot be reached. "
        "Put it at data/svhn, or set SSLRUN_DATA; see `sslrun show data svhn`"
    )


def test_cards_are_complete_and_described(monkeypatch, tmp_path):
    for name, card in CARDS.items():
        cls = sources[name]
        assert cls.gives is ImageSpec
        assert cls.__doc__ == card.summary
        assert card.counts.keys() == card.hub.splits.keys()
        assert {"train", "test"} <= card.hub.splits.keys()
        assert source(name).name == name
    monkeypatch.setenv("SSLRUN_DATA", str(tmp_path))
    (tmp_path / "stl10").mkdir()
    card = sources["stl10"].describe()
    assert card["hub"] == "https://huggingface.co/datasets/jxie/stl10"
    assert card["splits"] == "train 5,000, test 8,000, unlabeled 100,000"
    assert "stored at" not in card
    assert sources["imagenet-1k"].describe()["stored at"] == "256x256, unless size says otherwise"
    assert card["searched"].startswith(
        f"found at {tmp_path}/stl10, not found at data/stl10; then the hub"
    )


@pytest.mark.skipif("SSLRUN_DATA" not in os.environ, reason="needs SSLRUN_DATA with cifar10 in it")
def test_real_cifar10(places, monkeypatch):
    if not (Path(places) / "cifar10").is_dir():
        pytest.skip("no cifar10 in SSLRUN_DATA")
    monkeypatch.setenv("SSLRUN_DATA", places)
    test = source("cifar10").load("test")
    assert test.inputs.shape == (10_000, 3, 32, 32)
    assert test.labels.bincount().tolist() == [1000] * 10
    assert test.classes[:3] == ("airplane", "automobile", "bird")
    blue_over_red = [float(test.inputs[test.labels == c, 2].float().mean()) for c in (0, 6)]
    assert (
        blue_over_red[0] > blue_over_red[1] + 30
    )  # airplanes have the sky as background, frogs do not


# ---------------------------------------------------------------- the hub


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the hub: repositories that a test fills, and the recorded calls."""
    held, calls = {}, []

    def load_dataset(path, name=None, **options):
        calls.append((path, name, options))
        if path not in held:
            raise datasets.exceptions.DatasetNotFoundError(
                f"Dataset '{path}' doesn't exist on the Hub"
            )
        return datasets.DatasetDict(held[path])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    held["calls"] = calls
    return held


def test_hub_set_with_its_splits_and_columns_found_by_type(hub):
    hub["me/pets"] = {
        "train": table(10, image="photo"),
        "dev": table(4, image="photo"),
        "extra": table(3, label=None),
    }
    pets = source("hub", hub="me/pets", config="small", test="dev", unlabeled="extra")
    assert pets.splits == ("train", "test", "unlabeled")
    assert equal(pets.load("train"), pixels(10))
    assert pets.load("test").labels.tolist() == [0, 1, 0, 1]
    assert pets.load("unlabeled").labels is None
    assert [(path, config) for path, config, _ in hub["calls"]] == [
        ("me/pets", "small")
    ]  # one request


def test_cached_hub_set_needs_no_hub(hub):
    hub["uoft-cs/cifar10"] = {"train": table(6), "test": table(2)}
    source("cifar10").load("train")
    del hub["uoft-cs/cifar10"]
    assert equal(source("cifar10").load("train"), pixels(6))
    with pytest.raises(
        UserError, match=r"cifar10: there is no data set at .*uoft-cs/cifar10.*hf auth login"
    ):
        source("cifar10").load("test")


def test_stl10_pretrains_on_its_unlabeled_images(hub):
    hub["jxie/stl10"] = {
        "train": table(20),
        "test": table(4),
        "unlabeled": table(30, seed=5, label=None),
    }
    splits = load_splits("stl10", sources["stl10"].Options())
    assert len(splits.train) == 18
    assert equal(splits.pretrain.subset(torch.arange(18, 48)), pixels(30, seed=5))


def test_invalid_hub_sets_are_errors(hub):
    hub["me/two"] = {
        "train": table(4, other=[1] * 4).add_column("kind", [0, 1, 0, 1]),
        "dev": table(4),
    }
    two = datasets.ClassLabel(names=["x", "y"])
    hub["me/two"]["train"] = hub["me/two"]["train"].cast_column("kind", two)
    with pytest.raises(
        UserError, match=r"me/two: has labels in label, kind: choose one, as in label: label"
    ):
        source("hub", hub="me/two").load("train")
    with pytest.raises(UserError, match=r"me/two: no column 'kinds'. Did you mean 'kind'"):
        source("hub", hub="me/two", label="kinds").load("train")
    with pytest.raises(UserError, match=r"me/two: no image column 'imag'. Did you mean 'image'"):
        source("hub", hub="me/two", label="kind", image="imag").load("train")
    with pytest.raises(
        UserError, match=r"me/two: no split 'test' on the hub, only train, dev: .*'test'"
    ):
        source("hub", hub="me/two").load("test")
    with pytest.raises(UserError, match=r"me/none: there is no data set at"):
        source("hub", hub="me/none").load("train")
    hub["me/text"] = {"train": datasets.Dataset.from_dict({"text": ["a"], "label": [0]})}
    with pytest.raises(UserError, match=r"me/text: holds no images in its columns \(text, label\)"):
        source("hub", hub="me/text").load("train")
    with pytest.raises(ValidationError):
        source("hub", hub="not-a-repository")


def test_a_gated_set_explains_how_to_get_access(monkeypatch):
    def load_dataset(*_, **__):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'x' is a gated dataset on the Hub.")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        UserError, match=r"imagenet-1k: accept its terms at https://\S+ILSVRC.*hf auth login"
    ):
        source("imagenet-1k").load("train")


def test_a_plain_label_column_has_the_classes_of_train(hub):
    rows = [Image.fromarray(pixel) for pixel in pixels(4)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})

    def make(*labels):
        return datasets.Dataset.from_dict({"image": rows[: len(labels)], "label": labels}, features)

    hub["me/words"] = {
        "train": make("owl", "ant", "owl", "bee"),
        "test": make("owl", "owl"),
        "odd": make("ant", "elk"),
    }
    words = source("hub", hub="me/words")
    assert words.load("train").classes == ("ant", "bee", "owl")
    assert words.load("train").labels.tolist() == [2, 0, 2, 1]
    assert words.load("test").labels.tolist() == [2, 2]
    with pytest.raises(
        UserError, match=r"me/words: split 'test', row 1: its label is no class of train"
    ):
        source("hub", hub="me/words", test="odd").load("test")


# ---------------------------------------------------------------- parquet


def test_parquet_without_declared_types_in_one_or_several_files(tmp_path):
    from pyarrow import parquet

    plain = table(6).with_format("arrow")[:].replace_schema_metadata(None)
    parquet.write_table(plain.slice(0, 4), tmp_path / "train-00000-of-00002.parquet")
    parquet.write_table(plain.slice(4), tmp_path / "train-00001-of-00002.parquet")
    loaded = source("parquet", path=tmp_path)
    assert loaded.splits == ("train",)
    train = loaded.load("train")
    assert equal(train, pixels(6))
    assert train.labels.tolist() == [0, 1] * 3
    assert train.classes == ("0", "1")
    alone = source("parquet", path=tmp_path / "train-00000-of-00002.parquet")
    assert equal(alone.load("train"), pixels(4))


def test_invalid_parquet_sets_are_errors(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: should hold train.parquet"):
        source("parquet", path=tmp_path / "empty").load("train")
    (tmp_path / "only").mkdir()
    write(tmp_path / "only", test=table(4))
    only = source("parquet", path=tmp_path / "only")
    assert equal(only.load("test"), pixels(4))
    with pytest.raises(UserError, match=r"only: has no split 'train', only test"):
        only.load("train")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(UserError, match=r"broken.parquet: cannot be read as parquet") as error:
        source("parquet", path=tmp_path / "broken.parquet").load("train")
    assert "\n" not in str(error.value)
    write(tmp_path / "one", train=table(4, names=("cat",)))
    with pytest.raises(UserError, match=r"has only one class, 'cat'"):
        source("parquet", path=tmp_path / "one").load("train")


def test_damaged_row_is_named_or_skipped(tmp_path):
    rows = table(4).cast_column("image", datasets.Image(decode=False)).to_list()
    rows[2]["image"]["bytes"] = b"nothing"
    damaged = datasets.Dataset.from_list(rows, table(1).features)
    write(tmp_path / "set", train=damaged)
    with pytest.raises(UserError, match=r"set train, row 2: cannot be decoded.*skip_corrupt: true"):
        source("parquet", path=tmp_path / "set").load("train")
    kept = source("parquet", path=tmp_path / "set", skip_corrupt=True).load("train")
    assert equal(kept, pixels(4)[[0, 1, 3]])


def test_a_changed_file_is_read_again(tmp_path):
    write(tmp_path / "set", train=table(4))
    source("parquet", path=tmp_path / "set").load("train")
    write(tmp_path / "set", train=table(6, seed=1))
    assert equal(source("parquet", path=tmp_path / "set").load("train"), pixels(6, seed=1))


# ---------------------------------------------------------------- folders


def test_folder_with_splits(tmp_path):
    image_folder(tmp_path / "pets", train=4, val=2, test=1)
    pets = source("folder", path=tmp_path / "pets")
    assert pets.splits == ("train", "val", "test")
    train = pets.load("train")
    assert train.classes == ("cat", "dog")
    assert train.labels.tolist() == [0] * 4 + [1] * 5
    assert equal(train, np.concatenate([pixels(4), pixels(5, seed=1)]))
    assert len(pets.load("val")) == 5


def test_new_class_renumbers_the_cached_test_split(tmp_path):
    image_folder(tmp_path / "pets", train=2, test=1)
    assert source("folder", path=tmp_path / "pets").load("test").labels.tolist() == [0, 1, 1]
    (tmp_path / "pets" / "train" / "ant").mkdir()
    Image.fromarray(pixels(1)[0]).save(tmp_path / "pets" / "train" / "ant" / "0.png")
    test = source("folder", path=tmp_path / "pets").load("test")
    assert test.labels.tolist() == [1, 2, 2]
    assert test.classes == ("ant", "cat", "dog")


def test_folder_of_classes_alone_has_a_test_split_carved(tmp_path):
    image_folder(tmp_path, pets=8)
    splits = load_splits("folder", sources["folder"].Options(path=tmp_path / "pets"))
    assert [len(examples) for examples in (splits.train, splits.val, splits.test)] == [11, 2, 4]
    assert set(splits.test.labels.tolist()) == {0, 1}


def test_flat_folder_has_no_labels(tmp_path):
    for index, image in enumerate(pixels(6)):
        Image.fromarray(image).save(tmp_path / f"{index}.png")
    (tmp_path / "notes.txt").write_text("not an image")
    train = source("folder", path=tmp_path).load("train")
    assert train.labels is None
    assert equal(train, pixels(6))


def test_invalid_folders_are_errors(tmp_path):
    with pytest.raises(UserError, match=r"nowhere: no such folder"):
        source("folder", path=tmp_path / "nowhere").load("train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: holds no images"):
        source("folder", path=tmp_path / "empty").load("train")
    image_folder(tmp_path / "pets", train=2, test=1)
    (tmp_path / "pets" / "test" / "dog").rename(tmp_path / "pets" / "test" / "elk")
    with pytest.raises(
        UserError, match=r"test/elk/0.png: not in the folder of a class \(cat, dog\)"
    ):
        source("folder", path=tmp_path / "pets").load("test")
    for path in (tmp_path / "pets" / "train" / "dog").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"train: has only one class, 'cat'.*go without labels"):
        source("folder", path=tmp_path / "pets").load("train")


def test_damaged_file_is_named(tmp_path):
    image_folder(tmp_path / "pets", train=2)
    damaged = tmp_path / "pets" / "train" / "dog" / "1.png"
    damaged.write_bytes(damaged.read_bytes()[:50])
    with pytest.raises(UserError, match=f"{damaged}: cannot be decoded"):
        source("folder", path=tmp_path / "pets").load("train")


# ---------------------------------------------------------------- lists in CSV files


def list_images(file, rows, seed=0):
    """Write a CSV file of `rows` and the images that its path column names."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w", newline="") as text:
        csv.writer(text).writerows(rows)
    column = rows[0].index("path")
    for row, image in zip(rows[1:], pixels(len(rows) - 1, seed=seed), strict=True):
        path = file.parent / row[column]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


def csv_source(file, **options):
    return source("csv-images", path=file, **options)


PETS = [["path", "label"], ["cat/3.png", "cat"], ["dog, old/1.png", "dog"], ["cat/4.png", "cat"]]


def test_csv_lists_images_in_its_own_folder_and_order(tmp_path):
    list_images(tmp_path / "sets" / "photos.csv", PETS)
    photos = csv_source(tmp_path / "sets" / "photos.csv")
    assert photos.splits == ("train",)
    train = photos.load("train")
    assert equal(train, pixels(3))
    assert train.labels.tolist() == [0, 1, 0]
    assert train.classes == ("cat", "dog")


def test_csv_with_a_split_column(tmp_path):
    rows = [["split", "path", "label"]]
    for index, split in enumerate(["train", "test", "Train", "validation", "unlabeled", "train"]):
        label = "" if split == "unlabeled" else ["10", "9"][index % 2]
        rows.append([split, f"{index}.png", label])
    list_images(tmp_path / "photos.csv", rows)
    photos = csv_source(tmp_path / "photos.csv")
    assert photos.splits == ("train", "val", "test", "unlabeled")
    train = photos.load("train")
    assert equal(train, pixels(6)[[0, 2, 5]])
    assert train.classes == ("9", "10")  # in numeric order
    assert train.labels.tolist() == [1, 1, 0]
    assert photos.load("test").labels.tolist() == [0]
    assert equal(photos.load("val"), pixels(6)[[3]])
    assert photos.load("unlabeled").labels is None
    other = csv_source(tmp_path / "photos.csv", split="label", label="split")
    with pytest.raises(UserError, match=r"photos.csv:2: split '10' should be one of train, "):
        other.load("train")


def test_csv_files_for_each_split_with_named_columns(tmp_path):
    sets = tmp_path / "sets"
    list_images(
        sets / "train.csv",
        [["breed", "path", "label"], *([str(i % 2), f"{i}.png", "x"] for i in range(4))],
    )
    list_images(sets / "val.csv", [["breed", "path"], ["1", "v/0.png"], ["0", "v/1.png"]], seed=1)
    list_images(sets / "unlabeled.csv", [["path"], ["u/0.png"]], seed=2)
    photos = csv_source(sets, label="breed")
    assert photos.splits == ("train", "unlabeled", "test")  # validation serves as the test split
    assert photos.load("train").labels.tolist() == [0, 1, 0, 1]
    assert photos.load("test").labels.tolist() == [1, 0]
    assert equal(photos.load("unlabeled"), pixels(1, seed=2))


def test_csv_without_labels_pretrains(tmp_path):
    list_images(
        tmp_path / "photos.csv",
        [["path", "width"], *([f"{index}.png", "8"] for index in range(40))],
    )
    splits = load_splits("csv-images", sources["csv-images"].Options(path=tmp_path / "photos.csv"))
    assert splits.pretrain.labels is None
    assert splits.pretrain.classes == ()
    assert len(splits.pretrain) + len(splits.val) + len(splits.test) == 40


def test_csv_with_tabs_byte_order_mark_blank_lines_and_absolute_paths(tmp_path):
    list_images(tmp_path / "images" / "photos.csv", PETS)
    lines = [f"{tmp_path}/images/{path}\t{label}\r\n" for path, label in PETS[1:]]
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "photos.tsv").write_text(
        "\ufeffpath\tlabel\r\n\r\n" + "".join(lines), encoding="utf-8"
    )
    assert equal(csv_source(lists / "photos.tsv").load("train"), pixels(3))


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("path,label\n0.png,cat\nnone/1.png,dog\n", {}, ":3: no such file none/1.png"),
        ("path,label\n0.png,cat\n\n,dog\n", {}, ":4: the column 'path' is empty"),
        ("path,label\n0.png,cat\n1.png\n", {}, ":3: should have 2 cells, like the header, not 1"),
        (
            "path,label\n0.png,cat\n1.png,dog\n2.png,\n",
            {},
            ":4: has no label: it should be one of cat, dog",
        ),
        (
            "path,label\n0.png,cat\n1.png,cat\n",
            {},
            ": has only one class, 'cat': .*remove the column",
        ),
        (
            "file,label\n0.png,cat\n",
            {},
            r":1: no column 'path'\. There is: file, label\. Name it, as in image: ",
        ),
        (
            "path,lable\n0.png,cat\n",
            {"label": "label"},
            r":1: no column 'label'\. Did you mean 'lable'\?",
        ),
        ("path,label\n", {}, ": lists no images: add a row for each"),
        ("", {}, ": is empty: the first line should name the columns"),
        ('path,label\n0.png,cat\n"1.png,dog\n', {}, ":3: cannot be read as CSV: "),
        ("path,label,split\n0.png,cat,trian\n", {}, ":2: split 'trian' should be one of train, "),
        (b"path,label\n\xff.png,cat\n", {}, ": cannot be read as CSV: "),
    ],
)
def test_csv_errors_name_the_line(tmp_path, text, options, message):
    for index, image in enumerate(pixels(3)):
        Image.fromarray(image).save(tmp_path / f"{index}.png")
    file = tmp_path / "photos.csv"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=f"^{re.escape(str(file))}{message}") as error:
        csv_source(file, **options).load("train")
    assert "\n" not in str(error.value)


def test_csv_errors_about_labels_and_images_name_the_line(tmp_path):
    list_images(tmp_path / "train.csv", PETS)
    list_images(tmp_path / "test.csv", [["path", "label"], ["t.png", "cat"], ["u.png", "elk"]])
    message = r"test.csv:3: label 'elk' does not occur in train: it should be one of cat, dog"
    with pytest.raises(UserError, match=message):
        csv_source(tmp_path).load("test")
    (tmp_path / "cat" / "4.png").write_bytes(b"nothing")
    with pytest.raises(
        UserError, match=r"train.csv:4: cat/4.png: cannot be decoded \(not an image\)"
    ):
        csv_source(tmp_path).load("train")
    kept = csv_source(tmp_path, skip_corrupt=True).load("train")
    assert kept.labels.tolist() == [0, 1]


def test_csv_is_checked_without_decoding_an_image(tmp_path, monkeypatch):
    file = tmp_path / "photos.csv"
    list_images(file, PETS)
    options = sources["csv-images"].Options(path=file)
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("decoded"))
    assert explain_missing("csv-images", options) is None
    (tmp_path / "cat" / "3.png").unlink()
    assert explain_missing("csv-images", options) == f"{file}:2: no such file cat/3.png"


def test_missing_csv_files_are_errors(tmp_path):
    with pytest.raises(UserError, match=r"none.csv: no such file; it should be a CSV file"):
        csv_source(tmp_path / "none.csv").load("train")
    with pytest.raises(UserError, match=r"should be a CSV file, or a folder with train.csv"):
        csv_source(tmp_path).load("train")


def test_csv_is_cached_until_a_label_or_an_image_changes(tmp_path, monkeypatch):
    file = tmp_path / "photos.csv"
    list_images(file, PETS)
    options = sources["csv-images"].Options(path=file)
    assert options.files() == [file, *(tmp_path / path for path, _ in PETS[1:])]
    csv_source(file).load("train")
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", lambda *_: pytest.fail("decoded again"))
        assert equal(csv_source(file).load("train"), pixels(3))
    file.write_text(file.read_text().replace("cat/4.png,cat", "cat/4.png,dog"))
    assert csv_source(file).load("train").labels.tolist() == [0, 1, 1]
    Image.fromarray(pixels(1, seed=3)[0]).save(tmp_path / "cat" / "4.png")
    assert equal(csv_source(file).load("train"), np.concatenate([pixels(3)[:2], pixels(1, seed=3)]))
    monkeypatch.setattr("sslrun.data.image.sources.HASHED_BYTES", 1)
    assert options.files() == [file]


# ---------------------------------------------------------------- arrays


def test_npz_with_and_without_splits(tmp_path):
    path = tmp_path / "set.npz"
    np.savez(
        path,
        x_train=pixels(6),
        y_train=np.array([[0], [1], [2]] * 2),
        x_test=pixels(2),
        y_test=np.array([1, 0]),
    )
    arrays = source("npz", path=path)
    assert arrays.splits == ("train", "test")
    assert equal(arrays.load("train"), pixels(6))
    assert arrays.load("train").labels.tolist() == [0, 1, 2] * 2
    assert arrays.load("test").classes == ("0", "1", "2")
    np.savez(path, images=pixels(6)[..., 0])
    loaded = source("npz", path=path, size=16)
    assert loaded.splits == ("train",)
    assert loaded.load("train").inputs.shape == (6, 3, 16, 16)
    assert loaded.load("train").labels is None


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": pixels(2)}, "holds pictures: should hold x_train"),
        ({"images": pixels(2).astype(float)}, "images: images are float64"),
        (
            {"images": pixels(2), "labels": np.array([0.0, 1.0])},
            "labels: should be whole numbers from 0, not float64",
        ),
        ({"images": pixels(2), "labels": np.array([0, 1, 0])}, "labels: has 3 labels for 2 images"),
        ({"images": pixels(2), "labels": np.array([0, 0])}, "labels: has only one class"),
        ({"images": np.array([object()], dtype=object)}, "cannot be read as .npz"),
    ],
)
def test_invalid_npz_files_are_errors(tmp_path, arrays, message):
    np.savez(tmp_path / "set.npz", **arrays)
    with pytest.raises(UserError, match=f"set.npz: {message}"):
        source("npz", path=tmp_path / "set.npz").load("train")


def test_missing_or_damaged_npz_files_are_errors(tmp_path):
    with pytest.raises(UserError, match=r"none.npz: no such file"):
        source("npz", path=tmp_path / "none.npz").load("train")
    (tmp_path / "set.npz").write_bytes(b"PK but no archive")
    with pytest.raises(UserError, match=r"set.npz: cannot be read as .npz"):
        source("npz", path=tmp_path / "set.npz").load("train")


def test_digits_keep_their_gray_levels():
    digits = source("digits", size=8).load("train")
    assert digits.inputs.shape == (1797, 3, 8, 8)
    assert digits.inputs.unique().tolist() == [round(level * 255 / 16) for level in range(17)]
    assert source("digits").load("train").spec.size == 24


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    digits, expected = source("digits", size=8).load("train"), load_digits()
    gray = torch.from_numpy((expected.images * (255 / 16)).round()).to(torch.uint8)
    assert digits.inputs[:, 0].equal(gray)
    assert digits.labels.tolist() == expected.target.tolist()


def test_a_hub_that_does_not_answer_times_out(monkeypatch):
    monkeypatch.setattr(sslrun.hub, "PATIENCE", 0.2)

    def hang(*_, **__):
        time.sleep(1)
        raise TimeoutError

    monkeypatch.setattr(sslrun.hub.urllib.request, "urlopen", hang)
    began = time.monotonic()
    assert not sslrun.hub.answers("https://example.org")
    assert time.monotonic() - began < 0.9


def test_cifar101_is_read_in_its_authors_format(tmp_path, monkeypatch):
    monkeypatch.setenv("SSLRUN_DATA", str(tmp_path))
    with pytest.raises(
        UserError, match=r"cifar10.1: not on this machine: put cifar10.1_v6_data.npy and"
    ):
        source("cifar10.1").load("test")
    folder = tmp_path / "cifar10.1"
    folder.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    np.save(folder / "cifar10.1_v6_data.npy", images)
    np.save(folder / "cifar10.1_v6_labels.npy", np.arange(6, dtype=np.int32))
    examples = source("cifar10.1").load("test")
    assert np.array_equal(examples.inputs.permute(0, 2, 3, 1).numpy(), images)
    assert [examples.classes[label] for label in examples.labels[:2].tolist()] == [
        "airplane",
        "automobile",
    ]
    assert source("cifar10.1", size=16).load("test").inputs.shape == (6, 3, 16, 16)
    with pytest.raises(UserError, match="has no split 'train', only test"):
        source("cifar10.1").load("train")
    (folder / "cifar10.1_v6_data.npy").write_bytes(b"")
    with pytest.raises(UserError, match="cannot be read as NumPy arrays"):
        source("cifar10.1").load("test")
