"""Shards hold what a folder of the same images holds, wherever they are, and damage is one line."""

import io
import json
import os
import tarfile

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from sslrun.data.image import images, shards
from sslrun.data.packed import PackedStrings
from sslrun.data.remote import expand_braces, list_stored
from sslrun.data.source import sources
from sslrun.data.splits import load_splits
from sslrun.errors import UserError

CPU = torch.device("cpu")
NAMES = ("cat", "dog")


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    """Give each test a cache, a working directory, and an object store of its own."""
    monkeypatch.setenv("SSLRUN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SSLRUN_WORKERS", "1")
    monkeypatch.chdir(tmp_path)
    store = fsspec.filesystem("memory").store
    store.clear()
    yield
    store.clear()


def encode(seed, ending="jpg", side=40):
    """Return an image of that format; a JPEG is large enough to be decoded at reduced scale."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side + 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, {"jpg": "jpeg"}.get(ending, ending))
    return file.getvalue()


def tar(*members):
    """Return a tar file of members (name, content)."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def samples(numbers, label=lambda number: [("cls", NAMES[number % 2].encode())]):
    """Return the members of images 0, 1, ... with their labels."""
    return [
        (f"a.b/{number:03}.{ending}", content)
        for number in numbers
        for ending, content in [("jpg", encode(number)), *label(number)]
    ]


def write(place, *shards):
    """Write shards 0, 1, ... to a folder or an object store and return their pattern."""
    for number, content in enumerate(shards):
        with fsspec.open(f"{place}/train-{number:02}.tar", "wb", auto_mkdir=True) as file:
            file.write(content)
    return f"{place}/train-{{00..{len(shards) - 1:02}}}.tar"


def load(split="train", **options):
    source = sources["shards"]
    return source(source.Options(size=10, **options)).load(split)


def refusal(**options):
    """Return the message, one line, with which loading shards ends."""
    with pytest.raises(UserError) as error:
        load(**options)
    message = str(error.value)
    assert "\n" not in message
    assert message.isprintable()
    return message


def write_folder(root, count):
    """Write the images of `samples` as a folder, in which classes follow each other."""
    for number in range(count):
        folder = root / NAMES[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:03}.jpg").write_bytes(encode(number))


@pytest.mark.parametrize("place", ["here", "memory://bucket"])
@pytest.mark.parametrize("limit", [2**33, 0], ids=["cached", "streamed"])
def test_shards_equal_a_folder_of_the_same_images(tmp_path, monkeypatch, place, limit):
    monkeypatch.setattr(images, "MAX_TENSOR_BYTES", limit)
    write_folder(tmp_path / "folder", 7)
    cls = sources["folder"]
    folder = cls(cls.Options(path="folder", size=10)).load("train")
    ours = load(train=write(place, tar(*samples([0, 2, 4, 6, 1])), tar(*samples([3, 5]))))
    assert ours.classes == folder.classes == NAMES
    assert ours.labels.tolist() == folder.labels.tolist() == [0] * 4 + [1] * 3
    order = [torch.tensor([6, 0, 4]), torch.tensor([2, 5])]
    pairs = list(zip(ours.batches(order, CPU), folder.batches(order, CPU), strict=True))
    assert all(one.inputs.equal(two.inputs) and one.labels.equal(two.labels) for one, two in pairs)


def test_splits_and_the_order_of_epochs_are_those_of_any_set():
    train = write("here", tar(*samples(range(8))), tar(*samples(range(8, 16))))
    cls = sources["shards"]
    one = load_splits("shards", cls.Options(size=10, train=train, test="here/*1.tar"))
    assert [len(one.train), len(one.val), len(one.test)] == [14, 2, 8]
    assert sorted(one.train.order(0, 1).tolist()) == list(range(14))
    assert not one.train.order(0, 1).equal(one.train.order(0, 2))


def json_label(**fields):
    return lambda number: [("json", json.dumps({**fields, "label": 10 - number}).encode())]


@pytest.mark.parametrize(
    ("label", "options", "classes", "labels"),
    [
        (lambda number: [("cls", b"%d\n" % (10 - number))], {}, ("8", "9", "10"), [2, 1, 0]),
        (json_label(), {}, ("8", "9", "10"), [2, 1, 0]),
        (json_label(kind="x"), {"label": "label"}, ("8", "9", "10"), [2, 1, 0]),
        (lambda number: [("cls", b"%d" % number)], {"classes": "names"}, ("e", "d", "c"),
         [0, 1, 2]),
        (lambda number: [("cls", b"cde"[number:][:1])], {"classes": "names"}, ("e", "d", "c"),
         [2, 1, 0]),
        (lambda number: [], {}, (), None),
        (lambda number: [("seg.png", encode(0, "png")), ("cls", b"%d" % number)], {},
         ("0", "1", "2"), [0, 1, 2]),
    ],
    ids=["numbers", "json", "field", "names by number", "names", "none", "other members"],
)  # fmt: skip
def test_labels(tmp_path, label, options, classes, labels):
    (tmp_path / "names").write_text("e\nd\nc\n")
    examples = load(train=write("here", tar(*samples(range(3), label))), **options)
    assert examples.classes == classes
    assert (None if examples.labels is None else examples.labels.tolist()) == labels


def test_the_ending_of_images_may_be_chosen():
    both = [("0.jpg", encode(0)), ("0.png", encode(1, "png")), ("0.cls", b"1")]
    both += [("1.jpg", encode(2)), ("1.png", encode(3, "png")), ("1.cls", b"0")]
    pattern = write("here", tar(*both))
    assert "several images among its members (jpg, png, cls)" in refusal(train=pattern)
    jpg, png = (load(train=pattern, image=ending).inputs for ending in ("jpg", "png"))
    assert not jpg.equal(png)


TWO = samples(range(2))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (tar(*TWO, ("2.jpg", b"")), "here/train-00.tar: 2.jpg: has no label: it should be one of"),
        (tar(TWO[1], *TWO[2:]), "train-00.tar: a.b/000: has no image among its members (cls)"),
        (tar(TWO[0], *TWO), "a.b/000: has two members of one ending"),
        (tar(*TWO)[:-11_000], "train-00.tar: damaged, or no tar file"),
        (tar(*TWO)[:512], "train-00.tar: damaged, or no tar file"),
        (tar(*TWO).replace(b"a.b/001", b"a.b/\x00zz"), "train-00.tar: damaged, or no tar file"),
        (tar(*TWO).rstrip(b"\0"), "train-00.tar: damaged, or no tar file"),
        (b"", "train-00.tar: damaged, or no tar file"),
        (b"\x1f\x8b" + bytes(600), "train-00.tar: damaged, or no tar file"),
        (tar(("notes", b"x")), "train-00.tar: holds no images"),
        (tar(*samples(range(2), lambda number: [("json", b"[" * 100_000)])), "json: cannot be"),
        (tar(*samples(range(2), lambda number: [("json", b'{"label": [1]}')])), "neither text nor"),
        (tar(*samples(range(2), lambda number: [("cls", b"1")])), "have only one class, '1'"),
        (tar(("\x1b[2J.cls", b"1")), "'\\x1b[2J': has no image"),
    ],
)
def test_damage_is_one_line(content, message):
    assert message in refusal(train=write("here", content))


def test_a_label_that_does_not_occur_in_train_is_named():
    write("test", tar(*samples(range(1), lambda number: [("cls", b"cow")])))
    train = write("here", tar(*samples(range(2))))
    assert "label 'cow' is no class" in refusal(split="test", train=train, test="test/*.tar")


def test_names_that_climb_out_of_a_folder_write_nothing(tmp_path):
    members = [("../up.jpg", encode(0)), ("../up.cls", b"0"), ("/up.jpg", encode(1))]
    before = sorted(tmp_path.parent.iterdir())
    assert len(load(train=write("here", tar(*members, ("/up.cls", b"1"))))) == 2
    assert sorted(tmp_path.parent.iterdir()) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "here"]


@pytest.mark.parametrize("place", ["here", "memory://bucket"])
def test_an_index_is_used_again_until_its_shard_changes(monkeypatch, place):
    read = []
    list_members = shards._list_members
    monkeypatch.setattr(
        shards, "_list_members", lambda shard: read.append(shard.path[-6:]) or list_members(shard)
    )
    pattern = write(place, tar(*samples(range(2))), tar(*samples(range(2, 4))))
    first = load(train=pattern)
    assert read == ["00.tar", "01.tar"]
    assert load(train=pattern).inputs.equal(first.inputs)
    assert len(read) == 2
    with fsspec.open(f"{place}/train-01.tar", "wb") as file:
        file.write(tar(*samples([3, 2])))
    changed = load(train=pattern)
    assert read[2:] == ["01.tar"]
    assert changed.inputs.equal(first.inputs[[0, 1, 3, 2]])
    assert changed.labels.tolist() == [0, 1, 1, 0]


def test_links_are_the_shards_that_they_lead_to(tmp_path):
    write("there", tar(*samples(range(2))))
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "0.tar").symlink_to(tmp_path / "there" / "train-00.tar")
    first = list_stored("here/*.tar")
    assert [file.size for file in first] == [file.size for file in list_stored("there/*.tar")]
    write("there", tar(*samples([1, 0])))
    os.utime("there/train-00.tar", (1, 1))
    assert list_stored("here/0.tar") == list_stored("here/*.tar") != first
    assert load(train="here/*.tar").labels.tolist() == [1, 0]


def test_a_shard_that_shrinks_during_a_run_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_TENSOR_BYTES", 0)
    examples = load(train=write("here", tar(*samples(range(4)))))
    (tmp_path / "here" / "train-00.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"a\.b/003\.jpg: the shard ends before it"):
        list(examples.batches([torch.tensor([3])], CPU))


def test_parquet_of_an_object_store_equals_the_same_file_here(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = {"image": [encode(number) for number in range(3)], "label": ["b", "a", "b"]}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "train.parquet")
    fsspec.filesystem("memory").pipe("/b/x.parquet", (tmp_path / "train.parquet").read_bytes())
    cls = sources["parquet"]
    here = cls(cls.Options(path="train.parquet", size=10)).load("train")
    remote = load(train="memory://b/*.parquet")
    assert remote.inputs.equal(here.inputs)
    assert (remote.labels.tolist(), remote.classes) == ([1, 0, 1], ("a", "b"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": "here/{0..2}.tar"}, "here/0.tar: no such file"),
        ({"train": "memory://b/*.tar"}, r"memory://b/*.tar: no such file"),
        ({"train": "nothing://b/0.tar"}, "nothing://b/0.tar: cannot be read: Protocol not known"),
        ({"train": "{0..999999999}.tar"}, "stands for more than 100,000 files"),
        ({"train": "folder.tar"}, "not a file but a folder"),
    ],
)
def test_missing_shards_are_one_line(tmp_path, options, message):
    (tmp_path / "folder.tar").mkdir()
    assert message in refusal(**options)


@pytest.mark.parametrize(
    "options", [{"train": "a.zip"}, {"train": "a.tar", "test": "b.parquet"},
                {"train": "a.parquet", "classes": "names"}],
)  # fmt: skip
def test_formats_are_not_mixed(options):
    with pytest.raises(ValidationError, match="tar"):
        sources["shards"].Options(**options)


def test_shards_are_part_of_a_runs_identity(tmp_path):
    pattern = write("here", tar(*TWO), tar(*TWO))
    write("memory://bucket", tar(*TWO))
    options = sources["shards"].Options(train=pattern, test="memory://bucket/*.tar")
    assert [path.name for path in options.files()] == ["train-00.tar", "train-01.tar"]


def test_patterns_expand_in_order():
    assert expand_braces("{a,b}-{08..10}.tar")[1:4] == ["a-09.tar", "a-10.tar", "b-08.tar"]
    assert expand_braces("x{9..10}") == ["x9", "x10"]
    pattern = write("memory://b", b"1", b"2")
    assert [file.size for file in list_stored(pattern)] == [1, 1]
    found = [file.path for file in list_stored("memory://b/*.tar")]
    assert found == [file.path for file in list_stored(pattern)]


def test_packed_strings_are_the_strings():
    strings = ["", "a", "bé\udcff", "c" * 300, ""]
    packed = PackedStrings.pack(strings)
    assert list(packed) == strings
    assert (packed[-2], packed[1:3]) == (strings[-2], strings[1:3])
    assert len(PackedStrings.pack([])) == 0
    with pytest.raises(IndexError):
        packed[5]
