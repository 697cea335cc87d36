"""Failing machines and broken data: one error line, exit code 2, and nothing lost."""

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
    """Pretrain on a folder of images in this process; returns stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SSLRUN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "pics.yaml").write_text(RECIPE)
    noise = np.random.default_rng(0)
    for split, name in ((split, name) for split in ("train", "test") for name in ("cat", "dog")):
        (tmp_path / "pics" / split / name).mkdir(parents=True)
        for number in range(20):
            picture = Image.fromarray(noise.integers(0, 256, (9, 8, 3), dtype=np.uint8))
            picture.save(tmp_path / "pics" / split / name / f"{number}.png")
    handlers = {
        signal_number: signal.getsignal(signal_number)
        for signal_number in (signal.SIGINT, signal.SIGTERM)
    }

    def run(*changes, code):
        monkeypatch.setattr(
            sys, "argv", ["sslrun", "pretrain", "pics.yaml", "--device", "cpu", *changes]
        )
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        error = capsys.readouterr().err
        assert exit_info.value.code == code, error
        assert len(error.splitlines()) <= 1, error
        return error

    yield run
    for signal_number, handler in handlers.items():
        signal.signal(signal_number, handler)


def test_a_corrupt_image_is_named_and_skipped_only_with_skip_corrupt(pretrain, tmp_path, caplog):
    picture = tmp_path / "pics/train/cat/7.png"
    picture.write_bytes(picture.read_bytes()[:100])
    error = pretrain(code=2)
    assert error.startswith("sslrun: pics/train/cat/7.png: cannot be decoded (")
    assert "skip_corrupt: true" in error
    pretrain("data.skip_corrupt=true", code=0)
    assert "pics-train: skipped 1 image" in caplog.text


def test_a_disk_that_fills_up_keeps_the_last_checkpoint(pretrain, tmp_path, monkeypatch):
    replace, calls = checkpoint.os.replace, []

    def fail_at_third_checkpoint(source, target):
        if Path(target).name.startswith("step-"):
            calls.append(target)
            if len(calls) == 3:
                raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(checkpoint.os, "replace", fail_at_third_checkpoint)
    error = pretrain(code=2)
    assert (
        "the disk is full; the last checkpoint is kept. "
        "Free some space and give the same command again" in error
    )
    (folder,) = tmp_path.glob("runs/pics/pretrain-*/checkpoint")
    assert sorted(path.name for path in folder.iterdir()) == ["step-000000001", "step-000000002"]
    assert checkpoint.latest(folder)
    assert "continues after step 2" in pretrain(code=0)


def test_a_full_disk_while_weights_are_written_leaves_no_result(pretrain, tmp_path, monkeypatch):
    from safetensors import SafetensorError

    from sslrun.backbones import weights

    def report_full_disk(*_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(weights, "save_file", report_full_disk)
        assert "the disk is full; free some space" in pretrain(code=2)
    assert not list(tmp_path.rglob("result.json"))
    pretrain(code=0)


def test_out_of_memory_names_batch_and_accumulate(pretrain, monkeypatch):
    from sslrun.pretexts.rotation import Rotation

    def run_out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(Rotation, "forward", run_out_of_memory)
    assert "lower batch from 16 to 8, or set accumulate to 2 and keep the batch" in pretrain(code=2)
