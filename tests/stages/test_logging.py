"""Metric sinks: the run's own record, TensorBoard, wandb and Trackio."""

import json
import sys
from types import SimpleNamespace

import pytest

from sslrun.errors import UserError
from sslrun.runs import Run
from sslrun.stages.logging import logs

RECORDS = [{"step": 1, "loss": 2.5, "note": "not a number"}, {"step": 2, "loss": 1.5, "knn": 40.0}]


@pytest.fixture
def run(tmp_path):
    new_run = Run(tmp_path, "mine", "pretrain", {"seed": 0})
    new_run.path.mkdir(parents=True)
    return new_run


def log_all(run, *to):
    with logs(run, to) as log:
        for record in RECORDS:
            log(record)


class Board:
    """A stand-in for the parts of wandb and trackio that sslrun uses."""

    Error = type("Error", (Exception,), {})

    def __init__(self, refusal=None):
        self.refusal, self.logged, self.given, self.ended = refusal, [], {}, None

    def init(self, **arguments):
        if self.refusal:
            raise self.Error(self.refusal)
        self.given = arguments
        return self

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self.ended = "failed" if kind else "done"

    def finish(self):
        self.ended = "done"

    def log(self, record, step):
        self.logged.append((step, record))


def test_the_run_stores_every_record(run):
    log_all(run)
    assert [
        json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()
    ] == RECORDS


def test_tensorboard_receives_the_metrics(run):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log_all(run, "tensorboard")
    events = accumulator.EventAccumulator(str(run.path / "tensorboard")).Reload()
    assert [(scalar.step, scalar.value) for scalar in events.Scalars("loss")] == [
        (1, 2.5),
        (2, 1.5),
    ]
    assert events.Tags()["scalars"] == ["loss", "knn"]


def test_wandb_receives_the_metrics_and_writes_into_the_run(run, monkeypatch):
    board = Board()
    monkeypatch.setitem(sys.modules, "wandb", board)
    log_all(run, "wandb")
    assert board.logged == [(1, {"loss": 2.5}), (2, {"loss": 1.5, "knn": 40.0})]
    assert (board.given["id"], board.given["dir"], board.ended) == (run.hash, str(run.path), "done")


def test_wandb_is_notified_of_a_failure(run, monkeypatch):
    board = Board()
    monkeypatch.setitem(sys.modules, "wandb", board)
    with pytest.raises(ZeroDivisionError), logs(run, ["wandb"]):
        raise ZeroDivisionError
    assert board.ended == "failed"


def test_an_error_of_wandb_is_one_line(run, monkeypatch):
    monkeypatch.setitem(
        sys.modules, "wandb", Board("No API key configured. Use `wandb login` to log in.")
    )
    with pytest.raises(UserError, match=r"Use `wandb login` to log in\. Or set WANDB_MODE=offline"):
        log_all(run, "wandb")


def test_trackio_receives_the_metrics_and_is_finished(run, monkeypatch):
    board = Board()
    monkeypatch.setitem(sys.modules, "trackio", board)
    log_all(run, "trackio")
    assert board.logged == [(1, {"loss": 2.5}), (2, {"loss": 1.5, "knn": 40.0})]
    assert (board.given["name"], board.given["group"]) == (run.path.name, "mine")
    assert board.ended == "done"


@pytest.mark.parametrize(
    ("name", "module"),
    [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb"), ("trackio", "trackio")],
)
def test_a_missing_package_of_a_sink_is_an_error(name, module, run, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        UserError, match=rf"{name} is not installed: pip install 'sslrun\[{name}\]'"
    ):
        log_all(run, name)


def test_only_one_of_several_processes_logs(run, monkeypatch):
    monkeypatch.setattr("sslrun.stages.logging.distributed", SimpleNamespace(is_main=lambda: False))
    log_all(run, "tensorboard")
    assert list(run.path.iterdir()) == []
