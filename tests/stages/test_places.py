"""Places that cannot be read or written, or that hold something else: one line with a remedy."""

import errno
import os
import signal
import sys

import pytest

from sslrun import cli, runs
from sslrun.errors import UserError
from sslrun.recipe import parse
from sslrun.recipe.places import Located
from sslrun.runs import Run
from sslrun.stages.check import _explain_missing_data
from sslrun.stages.context import Context, perform
from sslrun.stages.export import export
from sslrun.stages.reporting import Reporter
from sslrun.training.device import compute


def test_an_export_replaces_no_files_without_force(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"backbone\.safetensors|no such file"):
        export(tmp_path / "run", tmp_path / "out")
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="holds files; name a new folder, or add --force"):
        export(tmp_path / "run", tmp_path / "out")
    with pytest.raises(UserError, match="no such file"):
        export(tmp_path / "run", tmp_path / "out", force=True)
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_check_reports_weights_that_do_not_exist(tmp_path):
    values = {
        "name": "r",
        "backbone": {"name": "mlp", "width": 8},
        "data": {"name": "digits", "size": 8},
        "weights": str(tmp_path / "nowhere.safetensors"),
        "evaluate": {"digits": {"protocols": ["probe"]}},
    }
    (reason,) = _explain_missing_data(parse(Located(values, {(): "r.yaml:1"})))
    assert reason == f"weights: no checkpoint at {tmp_path}/nowhere.safetensors: put it there"
    (tmp_path / "nowhere.safetensors").write_bytes(b"")
    assert _explain_missing_data(parse(Located(values, {(): "r.yaml:1"}))) == []


ERRORS = (errno.EROFS, errno.EACCES, errno.EIO, errno.ENOENT, errno.ESTALE)


@pytest.mark.parametrize("number", ERRORS, ids=errno.errorcode.__getitem__)
def test_an_error_of_the_disk_while_a_run_is_computed_is_one_line(tmp_path, number):
    def fail():
        raise OSError(number, os.strerror(number), str(tmp_path / "somewhere"))

    context = Context(tmp_path, compute("cpu"), Reporter(quiet=True))
    with pytest.raises(UserError, match=rf"somewhere: {os.strerror(number)}"):
        perform(Run(tmp_path, "mine", "probe", {}), {}, context, fail)


@pytest.mark.parametrize("number", ERRORS, ids=errno.errorcode.__getitem__)
def test_a_run_on_a_read_only_or_foreign_disk_is_one_line(tmp_path, monkeypatch, capsys, number):
    def fail(path):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(runs, "replacing", fail)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(
        "name: r\nbackbone: {name: mlp, width: 8}\npretext: simsiam\n"
        "data: {name: digits, size: 8}\npretrain: {steps: 1, batch: 8}\n"
    )
    monkeypatch.setattr(sys, "argv", ["sslrun", "pretrain", "r.yaml", "--device", "cpu"])
    handlers = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    for name, handler in handlers.items():
        signal.signal(name, handler)
    error = capsys.readouterr().err
    assert exit_info.value.code == 2, error
    assert error.count("\n") == 1, error
    assert os.strerror(number) in error


def test_a_table_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "t.md", tmp_path):
        with pytest.raises(UserError, match=r"can't be written .*; name another place"):
            runs.write_atomically(place, "table", "name another place")
