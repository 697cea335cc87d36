"""Many processes, as torchrun starts them."""

import json
import os
import subprocess
import sys
import time

import torch
from safetensors.torch import load_file

from sslrun.training.checkpoint import latest

RECIPE = """\
name: vit
backbone: {name: vit-tiny, patch: 4, depth: 2, width: 32, heads: 2, pool: mean}
pretext: {name: rotation, augmentation: {flip: 0}}  # random views are drawn by rank
data: {name: digits, size: 8}
pretrain: {steps: 3, batch: 64, accumulate: 2, lr: 0.002, precision: fp32}
evaluate: {digits: {protocols: [finetune, lpft], labels: [0.01], task: {augmentation: {flip: 0}}}}
finetune: {epochs: 6, batch: 64, optimizer: sgd, lr: [0.01, 0.1], keep: best, precision: fp32}
"""
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def called(folder, command, runs, *launcher):
    command = [
        sys.executable,
        *launcher,
        "-m",
        "sslrun",
        command,
        "vit.yaml",
        "--device",
        "cpu",
        "--runs",
        runs,
    ]
    done = subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def pretrain(folder, runs, *launcher):
    return folder / called(folder, "pretrain", runs, *launcher).strip()


def test_two_processes_learn_what_one_learns_and_write_one_run(tmp_path):
    (tmp_path / "vit.yaml").write_text(RECIPE)
    alone, together = pretrain(tmp_path, "alone"), pretrain(tmp_path, "together", *TWO)
    expected, found = (load_file(path / "backbone.safetensors") for path in (alone, together))
    for name, weight in expected.items():
        assert found[name].isfinite().all()
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-5)
    records = [
        [json.loads(line)["step"] for line in (path / "metrics.jsonl").read_text().splitlines()]
        for path in (alone, together)
    ]
    # One process writes: the last step once with its loss, once with its feature check.
    assert [steps.count(3) for steps in records] == [2, 2]  # a slow machine logs others, too
    assert together.name == alone.name


def test_two_processes_evaluate_as_one_does(tmp_path):
    (tmp_path / "vit.yaml").write_text(RECIPE)
    for runs in ("alone", "together"):
        pretrain(tmp_path, runs)
    tables = called(tmp_path, "lpft", "alone"), called(tmp_path, "lpft", "together", *TWO)
    assert tables[0] == tables[1]
    alone, together = (next(tmp_path.glob(f"{runs}/vit/lpft-*")) for runs in ("alone", "together"))
    for name in ("head.safetensors", "backbone.safetensors"):
        expected = load_file(alone / name)
        for key, weight in load_file(together / name).items():
            torch.testing.assert_close(weight, expected[key], rtol=1e-4, atol=1e-5)


def test_a_signal_saves_what_all_have_done(tmp_path):
    (tmp_path / "vit.yaml").write_text(RECIPE)
    command = [
        sys.executable,
        *TWO,
        "-m",
        "sslrun",
        "pretrain",
        "vit.yaml",
        "pretrain.steps=100000",
        "--device",
        "cpu",
    ]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while process.poll() is None and not list(tmp_path.glob("runs/vit/*/metrics.jsonl")):
        time.sleep(0.05)
    process.terminate()
    told = process.communicate(timeout=120)[1]
    assert told.count("sslrun: stopped by SIGTERM; everything finished is saved") == 1
    assert "[rank" not in told
    (folder,) = tmp_path.glob("runs/vit/*/checkpoint")
    assert latest(folder)
