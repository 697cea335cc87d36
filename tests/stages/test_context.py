"""Signals, and the data that runs were computed from."""

import os
import signal
import sys
import threading
from contextlib import suppress
from functools import partial

import pytest

from sslrun.cli import run as run_module
from sslrun.data.source import sources
from sslrun.errors import UserError
from sslrun.launch.timelimit import NOTICE, time_limit
from sslrun.launch.torchrun import ERROR_FILE
from sslrun.protocols.classical import answering_signals
from sslrun.recipe import Named
from sslrun.runs import WORKER, Run, hash_contents
from sslrun.stages import context
from sslrun.stages.context import Context, Interrupted, Stop, perform
from sslrun.stages.reporting import Reporter
from sslrun.training.device import compute

SIGNALS = signal.SIGINT, signal.SIGTERM


def test_a_second_interrupt_ends_at_once_and_a_second_termination_does_not(monkeypatch):
    stop, clock = Stop(), iter([10.0, 13.0])
    monkeypatch.setattr(context.time, "monotonic", lambda: next(clock))
    stop.check()
    stop._received(signal.SIGINT, None)
    stop._received(
        signal.SIGTERM, None
    )  # the first worker of a sweep ends the others after it has saved
    with pytest.raises(Interrupted, match="stopped by SIGINT"):
        stop.check()
    with pytest.raises(KeyboardInterrupt):
        stop._received(signal.SIGINT, None)


def test_a_forwarded_interrupt_does_not_count_as_a_second_one(monkeypatch):
    stop, clock = Stop(), iter([10.0, 11.0])
    monkeypatch.setattr(context.time, "monotonic", lambda: next(clock))
    stop._received(signal.SIGINT, None)
    stop._received(signal.SIGINT, None)
    assert stop.due


def test_a_signal_ends_a_fit_in_c_code(monkeypatch):
    """The main thread answers while another one is in C code, here the wait for an event."""
    stop, blocked = Stop(), threading.Event()
    handlers = {number: signal.getsignal(number) for number in (*SIGNALS, NOTICE)}
    stop.listen()
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
    try:
        with pytest.raises(KeyboardInterrupt), stop.unsaved():
            answering_signals(partial(blocked.wait, 60))
    finally:
        blocked.set()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert answering_signals(lambda: 1) == 1
    with pytest.raises(ValueError, match="of the fit"):
        answering_signals(partial(fail, ValueError("of the fit")))


def fail(error):
    raise error


@pytest.mark.parametrize("error", [None, ValueError("of a library")])
def test_a_signal_is_not_lost_in_a_library_that_swallows_it(error):
    stop = Stop()

    def work():
        with stop.unsaved():
            with suppress(KeyboardInterrupt):
                stop._received(signal.SIGTERM, None)
            if error is not None:
                raise error

    with pytest.raises(KeyboardInterrupt):
        work()


SCONTROL = """#!/bin/sh
echo "$@" >> {folder}/called
test "$2" != 13 || {{ echo "Job 13 is pending" >&2; exit 1; }}
"""


def test_the_time_limit_of_a_slurm_job_requeues_it(tmp_path, monkeypatch, capsys):
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(SCONTROL.format(folder=tmp_path))
    scontrol.chmod(0o755)
    monkeypatch.setattr(time_limit, "reached", False)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)

    def stopped_by(number):
        stop = Stop()
        stop._received(number, None)
        monkeypatch.setattr(run_module, "_run", stop.check)
        with pytest.raises(SystemExit) as ended:
            run_module.main()
        assert ended.value.code == 130
        first, *more = capsys.readouterr().err.splitlines()
        assert f"stopped by {signal.Signals(number).name}" in first
        return more

    assert stopped_by(NOTICE) == []  # outside of Slurm
    monkeypatch.setattr(time_limit, "reached", False)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    assert stopped_by(signal.SIGTERM) == []
    with monkeypatch.context() as patch:
        patch.setenv(WORKER, "one")
        assert stopped_by(NOTICE) == []  # the process that has started this one does it
    assert stopped_by(NOTICE) == ["sslrun: job 12 is requeued, and continues there"]
    assert (tmp_path / "called").read_text() == "requeue 12\n"
    monkeypatch.setenv("SLURM_JOB_ID", "13")
    assert stopped_by(NOTICE) == ["sslrun: job 13 cannot be requeued: Job 13 is pending"]
    scontrol.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    (message,) = stopped_by(NOTICE)
    assert "cannot be requeued: scontrol: No such file" in message


def test_a_process_that_another_one_started_ends_with_it(tmp_path, monkeypatch, capsys):
    ends = []
    monkeypatch.setattr(run_module, "end_with_parent", lambda: ends.append(1))
    monkeypatch.setattr(sys, "argv", ["sslrun", "--version"])
    for variable, count in ((None, 0), (WORKER, 1), (ERROR_FILE, 2)):
        with monkeypatch.context() as patch:
            if variable is not None:
                patch.setenv(variable, str(tmp_path / "error"))
            with pytest.raises(SystemExit):
                run_module.main()
        assert len(ends) == count


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """A local copy of CIFAR-10, as far as its files are concerned."""
    folder = tmp_path / "data" / "cifar10"
    folder.mkdir(parents=True)
    (folder / "train.parquet").write_bytes(b"images")
    monkeypatch.setenv("SSLRUN_DATA", str(folder.parent))
    hash_contents.cache_clear()
    yield folder
    hash_contents.cache_clear()


def test_a_run_of_other_data_is_not_taken_for_a_run_of_these(cifar10, tmp_path):
    source = sources["cifar10"]
    reads = [Named(name="cifar10", options=source.Options(), component=source)]
    run = Run(tmp_path / "runs", "mine", "pretrain", {"seed": 0})

    def execute(fresh=False):
        body = cifar10.joinpath("train.parquet").read_text
        opened = Context(tmp_path / "runs", compute("cpu"), Reporter(quiet=True), fresh)
        return perform(run, {}, opened, lambda: {"content": body()}, reads)["content"]

    assert execute() == "images"
    (cifar10 / "train.parquet").write_bytes(b"others")
    hash_contents.cache_clear()
    with pytest.raises(UserError, match=r"cifar10: its files are not those that .*pretrain"):
        execute()
    assert execute(fresh=True) == "others"
    (cifar10 / "train.parquet").unlink()
    hash_contents.cache_clear()
    assert execute() == "others"  # a result can be read where the data are not
