"""Links, pipes, devices and senseless numbers in data: one line that names the file, and an end."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from sslrun.data.image.images import EncodedFiles
from sslrun.data.source import sources
from sslrun.data.stores import FolderStore
from sslrun.data.text.corpora import LONGEST_LINE
from sslrun.data.text.tokenizer import TokenizerOptions, blank_tokenizer, load_tokenizer
from sslrun.errors import UserError
from sslrun.files import require_file, walk
from sslrun.hub import NAME
from sslrun.runs import hash_contents
from sslrun.training.device import compute


@pytest.fixture
def pics(tmp_path):
    """Two classes with one image each, in train and test; the images are never decoded."""
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            folder = tmp_path / "pics" / split / name
            folder.mkdir(parents=True)
            (folder / "0.png").write_bytes(b"pixels")
    return tmp_path / "pics"


def test_a_link_to_a_folder_that_holds_it_is_not_followed(pics, tmp_path, caplog):
    for number, target in enumerate(("..", "../..", "../../..", ".", pics, "/")):
        os.symlink(target, pics / f"train/cat/loop{number}")
    (tmp_path / "more").mkdir()
    (tmp_path / "more/1.png").write_bytes(b"pixels")
    os.symlink(tmp_path / "more", pics / "train/cat/more")
    os.symlink(pics / "train/dog", tmp_path / "more/through")
    os.symlink(tmp_path / "more", pics / "train/dog/back")
    files = FolderStore(pics).list_files("train")
    assert len(files) == len(set(files))
    assert all("loop" not in file for file in files)
    assert str(pics / "train/cat/more/1.png") in files  # another folder is followed
    assert len(files) == 5  # two of the split, two through cat/more, and one through dog/back
    assert "loop0: not followed, as it is a link to a folder that holds it" in caplog.text
    assert hash_contents(pics) is not None


def test_folders_of_the_system_are_refused(tmp_path):
    os.symlink("/proc", tmp_path / "link")
    for folder in (Path("/proc/self"), Path("/proc"), tmp_path):
        with pytest.raises(UserError, match="leads into the system's own files"):
            list(walk(folder))


def test_pipes_devices_and_dangling_links_are_named(pics):
    pipe, dangling = pics / "train/cat/pipe.png", pics / "train/dog/dangling.png"
    os.mkfifo(pipe)
    with pytest.raises(UserError, match=r"pipe\.png: not a file but"):
        FolderStore(pics).identity("train")
    with pytest.raises(UserError, match=r"pipe\.png: not a file but"):
        EncodedFiles([str(pipe)]).read(0)
    pipe.unlink()
    os.symlink("nothing", dangling)
    with pytest.raises(UserError, match=r"dangling\.png: a link to nothing"):
        FolderStore(pics).identity("train")
    for path in ("/dev/zero", pics):
        with pytest.raises(UserError, match="not a file but a folder, a pipe or a device"):
            require_file(path)
    with pytest.raises(ValidationError, match="not a file but"):
        TokenizerOptions(file="/dev/zero")
    npz = sources["npz"]
    with pytest.raises(UserError, match="not a file but"):
        npz(npz.Options(path="/dev/zero")).load("train")


def test_arrays_without_images_are_named(tmp_path):
    path, npz = tmp_path / "none.npz", sources["npz"]
    for shape in ((0, 8, 8, 3), (0, 8, 8), (4, 0, 8)):
        labels = np.arange(shape[0]) % 2
        np.savez(path, x_train=np.zeros(shape, np.uint8), y_train=labels)
        with pytest.raises(UserError, match=r"none\.npz: x_train: images are .*: there is none"):
            npz(npz.Options(path=path)).load("train")


def test_classes_that_training_lacks_are_named(tmp_path):
    path, npz = tmp_path / "foreign.npz", sources["npz"]
    images = np.zeros((8, 8, 8, 3), np.uint8)
    labels = np.arange(8)
    np.savez(path, x_train=images, y_train=labels % 2, x_test=images, y_test=labels)
    with pytest.raises(UserError, match=r"foreign\.npz: y_test: has class 7, which does not occur"):
        npz(npz.Options(path=path)).load("test")


def test_a_line_without_end_is_named(tmp_path, monkeypatch):
    path, text = tmp_path / "long.txt", sources["text"]
    path.write_text("a b\n\n" + "a" * (LONGEST_LINE + 1) + "\n")
    with pytest.raises(UserError, match=r"long\.txt:3: has 100,002 characters"):
        list(text(text.Options(path=path)).documents())


def test_an_id_of_a_tokenizer_is_range_checked(tmp_path):
    content = json.loads(blank_tokenizer(50).core.to_str())
    content["model"]["vocab"]["w1"] = 4_000_000_000
    (tmp_path / "big.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"big\.json: this tokenizer has the id 4000000000"):
        load_tokenizer(TokenizerOptions(file=tmp_path / "big.json"))


def test_names_on_the_hub_are_no_paths(tmp_path, monkeypatch):
    hub = sources["hub"]
    for name in ("../..", "a/..", "./a", "/etc", "a/b/c", "a\n/b"):
        with pytest.raises(ValidationError):
            hub.Options(hub=name)
        with pytest.raises(ValidationError):
            TokenizerOptions(hub=name)
    assert hub.Options(hub="owner/name.v1-2").hub == "owner/name.v1-2"
    assert NAME
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner/name").mkdir(parents=True)
    with pytest.raises(UserError, match="is also a folder here"):
        hub(hub.Options(hub="owner/name")).load("train")


def test_the_meta_device_computes_nothing():
    with pytest.raises(UserError, match="--device meta: not on this machine"):
        compute("meta")
