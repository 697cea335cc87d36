"""Training in several processes that torchrun starts."""

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
pretext: {name: rotation, augmentation: {flip: 0}}  # each rank draws other random views
data: {name: digits, size: 8}
pretrain: {steps: 3, batch: 64, accumulate: 2, lr: 0.002, precision: fp32}
evaluate: {digits: {protocols: [finetune, lpft], labels: [0.01], task: {augmentation: {flip: 0}}}}
finetune: {epochs: 6, batch: 64, optimizer: sgd, lr: [0.01, 0.1], keep: best, precision: fp32}
"""
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def run_command(folder, command, runs, *launcher):
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
    completed = subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert completed.returncode == 0, completed.stderr
    return completed.stdout


def pretrain(folder, runs, *launcher):
    return folder / run_command(folder, "pretrain", runs, *launcher).strip()


def test_two_processes_learn_the_same_weights_as_one_and_write_one_run(tmp_path):
    (tmp_path / "vit.yaml").write_text(RECIPE)
    single, double = pretrain(tmp_path, "alone"), pretrain(tmp_path, "together", *TORCHRUN)
    expected, weights = (load_file(path / "backbone.safetensors") for path in (single, double))
    for name, weight in expected.items():
        assert weights[name].isfinite().all()
        torch.testing.assert_close(weights[name], weight, rtol=1e-4, atol=1e-5)
    records = [
        [json.loads(line)["step"] for line in (path / "metrics.jsonl").read_text().splitlines()]
        for path in (single, double)
    ]
    assert records[0] == records[1] == [3, 3]
    assert double.name == single.name


def test_two_processes_evaluate_as_one_process_does(tmp_path):
    (tmp_path / "vit.yaml").write_text(RECIPE)
    for runs in ("alone", "together"):
        pretrain(tmp_path, runs)
    tables = (
        run_command(tmp_path, "lpft", "alone"),
        run_command(tmp_path, "lpft", "together", *TORCHRUN),
    )
    assert tables[0] == tables[1]
    alone, together = (next(tmp_path.glob(f"{runs}/vit/lpft-*")) for runs in ("alone", "together"))
    for name in ("head.safetensors", "backbone.safetensors"):
        expected = load_file(alone / name)
        for key, weight in load_file(together / name).items():
            torch.testing.assert_close(weight, expected[key], rtol=1e-4, atol=1e-5)


def test_a_signal_saves_a_checkpoint_of_all_processes(tmp_path):
    (tmp_path / "vit.yaml").write_text(RECIPE)
    command = [
        sys.executable,
        *TORCHRUN,
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
    stderr = process.communicate(timeout=120)[1]
    assert stderr.count("sslrun: stopped by SIGTERM; everything finished is saved") == 1
    assert "[rank" not in stderr
    (folder,) = tmp_path.glob("runs/vit/*/checkpoint")
    assert latest(folder)
