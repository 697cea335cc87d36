"""What a failing machine and broken data come to: one line, exit code 2, and nothing lost."""

import errno
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sslrun import cli
from sslrun.training import checkpoint

RECIPE = """\
name: pics
backbone: {name: resnet18, stem: small, channels: 4}
pretext: rotation
data: {name: folder, path: pics, size: 8}
pretrain: {steps: 4, batch: 16, lr: 0.002}
watch: {checkpoint: 1.0e-9}
"""


@pytest.fixture
def pretrain(tmp_path, monkeypatch, capsys):
    """Pretrains on a folder of images, in this process; returns what it said on stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SSLRUN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "pics.yaml").write_text(RECIPE)
    noise = np.random.default_rng(0)
    for split, name in ((split, name) for split in ("train", "test") for name in ("cat", "dog")):
        (tmp_path / "pics" / split / name).mkdir(parents=True)
        for at in range(20):
            picture = Image.fromarray(noise.integers(0, 256, (9, 8, 3), dtype=np.uint8))
            picture.save(tmp_path / "pics" / split / name / f"{at}.png")
    handlers = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}

    def called(*changes, code):
        monkeypatch.setattr(
            sys, "argv", ["sslrun", "pretrain", "pics.yaml", "--device", "cpu", *changes]
        )
        with pytest.raises(SystemExit) as exit:
            cli.main()
        told = capsys.readouterr().err
        assert exit.value.code == code, told
        assert len(told.splitlines()) <= 1, told
        return told

    yield called
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_a_corrupt_image_is_named_and_skipped_only_where_the_recipe_says_so(
    pretrain, tmp_path, caplog
):
    picture = tmp_path / "pics/train/cat/7.png"
    picture.write_bytes(picture.read_bytes()[:100])
    told = pretrain(code=2)
    assert told.startswith("sslrun: pics/train/cat/7.png: cannot be decoded (")
    assert "skip_corrupt: true" in told
    pretrain("data.skip_corrupt=true", code=0)
    assert "pics-train: skipped 1 image" in caplog.text


def test_a_disk_that_fills_up_keeps_the_last_checkpoint(pretrain, tmp_path, monkeypatch):
    replace, calls = checkpoint.os.replace, []

    def full_at_the_third(source, target):
        if Path(target).name.startswith("step-"):
            calls.append(target)
            if len(calls) == 3:
                raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(checkpoint.os, "replace", full_at_the_third)
    told = pretrain(code=2)
    assert (
        "the disk is full; the last checkpoint is kept. Free some space and give the same command again"
        in told
    )
    (folder,) = tmp_path.glob("runs/pics/pretrain-*/checkpoint")
    assert sorted(each.name for each in folder.iterdir()) == ["step-000000001", "step-000000002"]
    assert checkpoint.latest(folder)
    assert "continues after step 2" in pretrain(code=0)


def test_a_disk_that_is_full_when_the_weights_are_written(pretrain, tmp_path, monkeypatch):
    from safetensors import SafetensorError

    from sslrun.backbones import weights

    def full(*_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(weights, "save_file", full)
        assert "the disk is full; free some space" in pretrain(code=2)
    assert not list(tmp_path.rglob("result.json"))
    pretrain(code=0)


def test_out_of_memory_names_batch_and_accumulate(pretrain, monkeypatch):
    from sslrun.pretexts.rotation import Rotation

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(Rotation, "forward", full)
    assert "lower batch from 16 to 8, or set accumulate to 2 and keep the batch" in pretrain(code=2)
