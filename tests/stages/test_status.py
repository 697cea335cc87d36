"""The plan and the state of a sweep: nothing is run, and nothing is written."""

import io
import json
import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from sslrun import cli
from sslrun.cli import plans
from sslrun.recipe import load_sweep
from sslrun.runs import environment, lock_of
from sslrun.stages import status
from sslrun.stages.sweep import Plan
from sslrun.training.device import compute

SWEEP = """\
name: two
base:
  backbone: {name: resnet18, stem: small, channels: 4}
  data: {name: digits, size: 8}
  pretext: rotation
  pretrain: {epochs: 4, batch: 64, lr: 0.01}
  evaluate: {digits: {protocols: [knn, probe]}}
rows: {one: {}, again: {knn.k: 5}}
"""
CURSOR_UP = "\x1b[1A"
METRIC = {"name": "accuracy", "unit": "%", "better": "higher", "digits": 1}


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "two.yaml"
    path.write_text(SWEEP)
    return Plan.of(load_sweep(path), tmp_path / "runs")


def begin(job):
    job.run.path.mkdir(parents=True)
    job.run.start({}, environment("cpu"))


def finish(job, seconds):
    begin(job)
    metrics = {"test": {"accuracy": 87.65}}
    job.run.finish({"metric": METRIC, "metrics": metrics, "seconds": seconds})


def called(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["sslrun", "sweep", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    return exit_info.value.code


def test_a_dry_run_prints_what_is_left_and_writes_nothing(plan, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        status, "estimate", lambda *_: {"seconds": 60.0, "measured_on": status.PROBE_BATCH}
    )
    options = ("--dry-run", "--json", "--device", "cpu", "--jobs", 2, "--runs", tmp_path / "runs")
    assert called(monkeypatch, tmp_path / "two.yaml", *options) == 0
    (described,) = json.loads(capsys.readouterr().out)
    rows = {run["stage"]: run["rows"] for run in described["runs"]}
    assert rows["pretrain"] == rows["probe"] == ["one", "again"]
    assert rows["knn"] == ["again"]  # the last of the two with their own options
    assert described["seconds_left"] == 60.0 / 2
    assert not described["covers_all_runs"]
    assert not (tmp_path / "runs").exists()


def test_the_time_left_is_that_of_finished_runs_of_the_stage(plan):
    knn, other = (job for job in plan.jobs if job.run.stage == "knn")
    (pretraining,) = (job for job in plan.jobs if job.run.stage == "pretrain")
    finish(pretraining, 10.0)
    finish(knn, 3.0)
    forecast = status.Forecast.of(plan, compute("cpu"))
    assert forecast.seconds == {other.run.path: 3.0}
    assert forecast.left([other]) == (3.0, True)
    assert forecast.left(forecast.unfinished) == (3.0, False)  # no probe is finished
    text = "\n".join(status.render_plan(forecast, 2).renderables[-1].plain.splitlines())
    assert text == "two: 2 of 4 runs left: over 2 s with 2 workers"


def test_every_run_has_a_state_with_progress_number_or_failure(plan, tmp_path, monkeypatch, capsys):
    pretraining, *cells = plan.jobs
    knn, probe, other = cells
    begin(pretraining)
    pretraining.run.log({"step": 12, "epoch": 1.25, "loss": 0.5})
    finish(knn, 3.0)
    probe.run.path.mkdir(parents=True)
    probe.run.fail("first\nthe loss is not finite")
    with lock_of(pretraining.run.path):
        described = status.describe_status(plan)
        options = ("--status", "--runs", tmp_path / "runs")
        assert called(monkeypatch, tmp_path / "two.yaml", *options) == 0  # piped: prints once
    runs = {run["run"]: run for run in described["runs"]}
    running = runs[str(pretraining.run.path)]
    assert (running["state"], running["step"], running["epochs"]) == ("running", 12, 4)
    assert running["pid"] == environment("cpu")["pid"]
    assert runs[str(knn.run.path)]["text"] == "accuracy 87.7"
    assert runs[str(probe.run.path)]["failure"] == "the loss is not finite"
    assert runs[str(other.run.path)]["state"] == "waiting"
    printed = capsys.readouterr().out
    assert "step 12 · epoch 1.2 of 4 · loss 0.500 · by process" in printed
    assert "two: 1 done, 1 running, 1 waiting, 1 failed" in printed
    assert status.describe_status(plan)["runs"][0]["state"] == "stopped"  # the lock is free


def test_a_terminal_shows_the_runs_until_no_worker_is_left(plan, tmp_path, monkeypatch, capsys):
    pretraining, knn, *_ = plan.jobs
    begin(pretraining)
    pretraining.run.log({"step": 12, "epoch": 1.25, "loss": 0.5})
    terminal = Console(file=io.StringIO(), force_terminal=True, width=160, height=30)
    monkeypatch.setattr(plans, "console", lambda: terminal)
    frames = []

    def sleep(seconds):
        """Take what was drawn, and let the worker go on."""
        assert seconds == plans.REFRESH_SECONDS
        frames.append(terminal.file.getvalue())
        terminal.file.seek(0)
        terminal.file.truncate()
        if len(frames) == 1:
            pretraining.run.log({"step": 34, "epoch": 2.5, "loss": 0.25})
        elif len(frames) == 2:
            pretraining.run.finish({"seconds": 1.0})
            worker.close()

    monkeypatch.setattr(plans, "time", SimpleNamespace(sleep=sleep))
    worker = ExitStack()
    worker.enter_context(lock_of(pretraining.run.path))
    options = ("--status", "--runs", tmp_path / "runs")
    assert called(monkeypatch, tmp_path / "two.yaml", *options) == 0
    first, second, *idle = frames
    assert "step 12 · epoch 1.2 of 4 · loss 0.500" in first
    assert "step 34 · epoch 2.5 of 4 · loss 0.250" in second
    assert "step 12" not in second
    assert CURSOR_UP in second  # drawn over the first
    assert len(idle) == 2
    assert "running" not in idle[-1]
    last = capsys.readouterr().out
    assert "two: 1 done, 3 waiting" in last
    assert knn.title in last  # the whole table, as without a terminal


def test_json_needs_a_plan_or_a_status(plan, tmp_path, monkeypatch, capsys):
    assert called(monkeypatch, tmp_path / "two.yaml", "--json") == 2
    assert "--json goes with --dry-run or --status" in capsys.readouterr().err
    assert called(monkeypatch, tmp_path / "two.yaml", "--dry-run", "--status") == 2
    assert "give one of them" in capsys.readouterr().err
    assert not Path(tmp_path / "runs").exists()
