"""Runs: their identity, their atomic files, and who may work on them."""

import pytest

from sslrun import runs
from sslrun.errors import UserError
from sslrun.runs import Run, digest, write_atomically


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path, "mine", "pretrain", {"seed": 0, "data": {"name": "digits"}})


def test_the_hash_is_of_the_identity_and_not_of_its_order(run, tmp_path):
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})
    other = Run(tmp_path, "mine", "pretrain", {"seed": 1, "data": {"name": "digits"}})
    assert run.path.parent == other.path.parent
    assert run.path != other.path


def test_a_run_is_finished_by_its_result(run):
    assert not run.finished
    run.start({"name": "mine"}, {})
    run.log({"step": 1})
    run.log({"step": 2})
    (run.path / "metrics.jsonl").open("a").write('{"step": 3, "lo')  # killed while it wrote
    run.forget_after(1)
    assert (run.path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    run.finish({"accuracy": 1})
    assert run.finished
    assert run.result["accuracy"] == 1
    run.clear()
    assert not run.finished


def test_one_process_at_a_time(run):
    with run.claimed() as mine, Run(run.root, "mine", "pretrain", run.identity).claimed() as theirs:
        assert (mine, theirs) == (True, False)
    with run.claimed() as mine:
        assert mine


def test_writes_are_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_atomically(path, "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs.os, "fsync", full)
    with pytest.raises(UserError, match="disk is full"):
        write_atomically(path, "new")
    assert [each.read_text() for each in tmp_path.iterdir()] == ["old"]


def test_a_result_that_is_none(run):
    with pytest.raises(UserError, match="not a finished run"):
        runs.read_result(run.path)
    run.start({}, {})
    (run.path / "result.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        runs.read_result(run.path)
