"""Training in several processes that `--gpus` or torchrun starts."""

import json
import os
import signal

import pytest
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


@pytest.fixture
def run(tmp_path, sslrun, start_ranks, forking_python):
    """Return `run(command, runs)` for one process, or for two with `together=True`."""
    (tmp_path / "vit.yaml").write_text(RECIPE)

    def execute(command, runs, *, together=False):
        arguments = [command, "vit.yaml", "--device", "cpu", "--runs", runs]
        if not together:
            return sslrun(*arguments, cwd=tmp_path).stdout
        if command == "pretrain":
            python = str(forking_python)
            return sslrun(*arguments, "--gpus", "2", cwd=tmp_path, PYTHON_EXEC=python).stdout
        first, second = (rank.finish() for rank in start_ranks(*arguments, cwd=tmp_path))
        assert first.returncode == second.returncode == 0, first.stderr + second.stderr
        assert not second.stdout
        return first.stdout

    return execute


def assert_equal_weights(folder, expected_folder, name):
    expected = load_file(expected_folder / name)
    for key, weight in load_file(folder / name).items():
        assert weight.isfinite().all()
        torch.testing.assert_close(weight, expected[key], rtol=1e-4, atol=1e-5)


def test_two_processes_learn_and_evaluate_as_one_process_does(tmp_path, run):
    """They give the same weights and the same table, and write one run."""
    alone, together = (
        tmp_path / run("pretrain", runs, together=runs == "together").strip()
        for runs in ("alone", "together")
    )
    assert together.name == alone.name
    assert_equal_weights(together, alone, "backbone.safetensors")
    for path in (alone, together):
        log = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        steps = [record["step"] for record in log if "loss" in record]
        assert steps == sorted(set(steps)), "each step is logged by one process"
        assert steps[-1] == 3
    assert run("lpft", "alone") == run("lpft", "together", together=True)
    folders = (next(tmp_path.glob(f"{runs}/vit/lpft-*")) for runs in ("together", "alone"))
    together, alone = folders
    for name in ("head.safetensors", "backbone.safetensors"):
        assert_equal_weights(together, alone, name)


def test_the_notice_of_a_time_limit_saves_a_checkpoint_of_all_processes(tmp_path, start_sslrun):
    """The job is requeued once, by the process that waits for the others."""
    (tmp_path / "vit.yaml").write_text(RECIPE)
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/called\n')
    (tmp_path / "scontrol").chmod(0o755)
    command = ("pretrain", "vit.yaml", "pretrain.steps=100000", "--gpus=2", "--device=cpu")
    path = f"{tmp_path}:{os.environ['PATH']}"
    process = start_sslrun(*command, cwd=tmp_path, SLURM_JOB_ID="12", PATH=path)
    process.wait_for(tmp_path, "runs/vit/*/metrics.jsonl")
    os.kill(process.pid, signal.SIGUSR1)
    code, _, stderr = process.finish()
    assert code == 130
    *_, stopped, requeued = stderr.splitlines()
    assert stopped.startswith("sslrun: stopped by SIGTERM; everything finished is")
    assert requeued == "sslrun: job 12 is requeued, and continues there"
    assert (tmp_path / "called").read_text() == "requeue 12\n"
    assert "Traceback" not in stderr
    assert "[rank" not in stderr
    (folder,) = tmp_path.glob("runs/vit/*/checkpoint")
    assert latest(folder)
