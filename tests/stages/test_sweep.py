"""Sweeps handed to Slurm."""

import os
import shlex
import sys
from pathlib import Path

import pytest

from sslrun import cli

QUICKSTART = str(Path(__file__).parents[2] / "recipes/quickstart.yaml")


@pytest.fixture
def sweep(monkeypatch):
    """The exit code of `sslrun sweep` of the quickstart, with further arguments."""

    def called(*arguments):
        monkeypatch.setattr(sys, "argv", ["sslrun", "sweep", QUICKSTART, *arguments])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        return exit.value.code

    return called


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
    """Puts an sbatch on the PATH that runs a script; returns the file in which the script finds its arguments."""
    given = tmp_path / "given"

    def put(script):
        path = tmp_path / "bin" / "sbatch"
        path.parent.mkdir()
        path.write_text(f"#!/bin/sh\nprintf '%s\\n' \"$@\" > {given}\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")
        return given

    return put


def test_slurm_gets_an_array_of_workers_that_run_the_same_sweep(sweep, sbatch, capsys):
    given = sbatch("echo Submitted batch job 17")
    options = "--partition gpu --comment 'two words'"
    assert sweep("--jobs", "40", "--slurm", options, "--runs", "my runs", "--set", "pretrain.epochs=5") == 0
    assert capsys.readouterr().out == "Submitted batch job 17\n"
    arguments = given.read_text().splitlines()
    assert {"--array=1-40", "--requeue", "--signal=B:TERM@120"} <= set(arguments)
    assert arguments[-6:-2] == ["--partition", "gpu", "--comment", "two words"]
    assert arguments[-2] == "--wrap"
    worker = [sys.executable, "-m", "sslrun", "sweep", QUICKSTART, "--jobs=1", "--runs=my runs", "--device=auto"]
    assert shlex.split(arguments[-1]) == ["exec", *worker, "--set=pretrain.epochs=5"]  # each of the array is one worker


def test_a_refusal_of_slurm_is_one_line(sweep, sbatch, capsys):
    sbatch("echo 'sbatch: error: no such partition: gpo' >&2\necho 'sbatch: error: submission failed' >&2\nexit 1")
    assert sweep("--slurm", "--partition gpo") == 2
    assert capsys.readouterr().err == "sslrun: sbatch refused: no such partition: gpo; submission failed\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--slurm", "--comment 'open"], "not options of sbatch: No closing quotation"),
        (["--slurm", "", "--fresh"], "not with --slurm"),
    ],
)
def test_nothing_is_submitted_by_mistake(arguments, words, sweep, sbatch, capsys):
    given = sbatch("")
    assert sweep(*arguments) == 2
    assert words in capsys.readouterr().err
    assert not given.exists()


def test_no_slurm_here(sweep, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    assert sweep("--slurm", "") == 2
    assert "no sbatch on this machine" in capsys.readouterr().err
