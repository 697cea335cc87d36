"""Workers on this machine: devices, deaths, and the end of all with the command."""

import threading
import time

import pytest
import torch

from sslrun.errors import UserError
from sslrun.launch import Workers, build, local
from sslrun.launch.engine import describe_exit
from sslrun.registry import Options
from sslrun.runs import Run
from sslrun.stages.sweep import MAX_DEATHS, launch, submit, work


@pytest.mark.parametrize(
    ("device", "gpus", "per_gpu", "expected"),
    [
        ("cuda", 8, None, [0, 1, 2, 3, 4, 5, 6, 7]),
        ("cuda", 3, None, [0, 1, 2, 0, 1, 2, 0, 1]),
        ("cuda", 8, 4, [0, 0, 0, 0, 1, 1, 1, 1]),
        ("cuda", 3, 3, [0, 0, 0, 1, 1, 1, 2, 2]),
        ("cuda:1", 8, None, [1] * 8),
        ("cuda:1", 8, 8, [1] * 8),
    ],
)
def test_each_worker_gets_its_gpu(device, gpus, per_gpu, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    devices = [f"cuda:{index}" for index in expected]
    assert local.spread(torch.device(device), 8, per_gpu) == devices
    assert local.spread(torch.device("cpu"), 8, per_gpu) == ["cpu"] * 8


def test_more_workers_than_fit_on_the_gpus_are_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="--jobs 8 --per-gpu 3: there is room for 6 workers"):
        local.spread(torch.device("cuda"), 8, 3)


def test_options_of_another_engine_are_one_line():
    with pytest.raises(UserError, match="-E gpus=2: the engine 'local' has no options; name ano"):
        build("local", ["gpus=2"])


def test_workers_die_with_their_last_line_as_the_reason(tmp_path):
    workers = Workers(("recipes", "--no-such-option"), 2, "cpu", tmp_path, "mine")
    crew = build("local", ()).start(workers)
    ends = []
    while crew.is_running:
        ends += crew.ends()
        time.sleep(0.05)
    assert sorted(end.title for end in ends) == ["worker 1 (cpu)", "worker 2 (cpu)"]
    assert {end.worker for end in ends} == set(workers.names())
    assert all(end.reason.startswith("exit code 2: ") for end in ends)
    assert "no-such-option" in workers.log(1).read_text()


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (0, None),
        (130, None),
        (-9, "killed by SIGKILL, which the system sends when memory runs out"),
        (-11, "killed by SIGSEGV"),
        (1, "exit code 1"),
    ],
)
def test_exit_codes_have_reasons(code, reason):
    assert describe_exit(code) == reason


@pytest.mark.usefixtures("cheap_workers")
def test_a_killed_worker_is_reported_and_the_other_one_takes_its_run(
    tiny, expected, waiting, capsys
):
    crews, killed = [], []

    class Watched(local.Local):
        def start(self, workers):
            crews.append(super().start(workers))
            return crews[0]

    def kill_one():
        holder, run = tiny.wait_for_held(1)[0]
        crews[0].running[tiny.workers.names().index(holder) + 1].kill()
        killed.append(run)
        waiting.unlink()

    killer = threading.Thread(target=kill_one)
    killer.start()
    failures = launch([tiny.plan], tiny.context, Watched(Options()), tiny.workers)
    killer.join()
    assert failures == []
    (run,) = killed
    lines = [line for line in capsys.readouterr().err.splitlines() if "died" in line]
    assert len(lines) == 1
    assert f"(cpu) died while it computed {run.path}: killed by SIGKILL" in lines[0]
    assert lines[0].endswith("; the others go on")
    assert tiny.outcome == expected


def test_a_run_that_kills_its_workers_comes_last_and_is_given_up(tiny):
    first = tiny.plan.jobs[0].run
    first.path.mkdir(parents=True)
    (first.path / ".lock").write_text("a\n" * (MAX_DEATHS - 1))
    tried = []
    start = Run.start

    def record(run, *arguments):
        tried.append(run.path)
        start(run, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "start", record)
        assert work([tiny.plan], tiny.context) == []
    assert tried.index(first.path) > 0
    assert first.holders == []


def test_a_run_that_killed_too_many_workers_fails_until_the_next_launch(tiny):
    first = tiny.plan.jobs[0].run
    first.path.mkdir(parents=True)
    (first.path / ".lock").write_text("a\n" * MAX_DEATHS)
    failures = work([tiny.plan], tiny.context)
    assert len(failures) == 2  # its evaluation fails with it
    assert "3 workers died while they computed" in failures[0]
    assert launch([tiny.plan], tiny.context, build("local", ()), single(tiny.workers)) == []


def single(workers):
    return Workers(workers.arguments, 1, workers.device, workers.logs, workers.name)


def test_a_worker_without_a_run_to_take_ends_after_its_idle_time(tiny):
    pretraining = tiny.plan.jobs[0].run
    with pretraining.claimed() as is_claimed:
        assert is_claimed
        assert work([tiny.plan], tiny.context, idle=0.001) == []
    assert not pretraining.finished
    assert any(job.run.finished for job in tiny.plan.jobs)


def test_no_worker_is_started_or_submitted_for_finished_runs(tiny, monkeypatch):
    assert work([tiny.plan], tiny.context) == []
    monkeypatch.delattr(local.Local, "start")
    assert launch([tiny.plan], tiny.context, build("local", ()), tiny.workers) == []
    said = submit([tiny.plan], tiny.context, build("slurm", ()), tiny.workers)
    assert said == "All runs are finished, so that nothing is submitted"
