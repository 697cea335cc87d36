"""Signals, and the data that runs were computed from."""

import signal

import pytest

from sslrun.data.source import sources
from sslrun.errors import UserError
from sslrun.recipe import Named
from sslrun.runs import Run, hash_contents
from sslrun.stages import context
from sslrun.stages.context import Context, Interrupted, Stop, perform
from sslrun.stages.reporting import Reporter
from sslrun.training.device import compute


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
