"""Places that cannot be read or written, or that hold something else: one line with a remedy."""

import errno
import os
import signal
import sys
from pathlib import Path
from typing import get_type_hints

import pytest

from sslrun import cli, runs
from sslrun.errors import UserError
from sslrun.files import expand_home
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


@pytest.mark.parametrize(
    "command",
    [
        "report --runs {gone} -o {file}/r.html",
        "table --runs {gone} -o {file}/t.md",
        "claims frozen -o {file}/c.md",
        "export {gone} {file}/out",
        "attend {gone} -o {file}",
        "track {gone} a.mp4 --mask a.png -o {file}/t.mp4",
    ],
    ids=lambda command: command.partition(" ")[0],
)
def test_a_place_that_cannot_be_written_is_found_before_the_work(
    command, tmp_path, monkeypatch, capsys
):
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(Path(__file__).parents[2])
    words = command.format(gone=tmp_path / "gone", file=tmp_path / "file").split()
    monkeypatch.setattr(sys, "argv", ["sslrun", *words])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert f"can't be written ({tmp_path}/file is not a folder); name another place\n" in error


def test_a_place_without_permission_is_found_before_the_work(tmp_path, monkeypatch):
    runs.check_output(tmp_path / "new" / "t.md")
    with pytest.raises(UserError, match=r"can't be written \(is a folder\)"):
        runs.check_output(tmp_path)
    runs.check_output(tmp_path, is_folder=True)
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    with pytest.raises(UserError, match=rf"no permission to write to {tmp_path}\)"):
        runs.check_output(tmp_path / "new" / "t.md")


def _declared_paths():
    """Command and parameter -> the declaration of each parameter of the type Path."""
    cli.add_protocol_commands(cli.app)
    commands = [*cli.app.registered_commands, *cli.runs.runs_app.registered_commands]
    for callback in (command.callback for command in commands):
        for name, hint in get_type_hints(callback, include_extras=True).items():
            if "Path" in str(hint):
                yield f"{callback.__name__} {name}", hint.__metadata__[0]


def test_every_path_of_the_command_line_may_begin_with_a_home(tmp_path, monkeypatch):
    declared = dict(_declared_paths())
    assert {"pretrain runs", "report output", "probe source", "prune_runs runs"} <= {
        name.replace("command", "probe") for name in declared
    }
    assert [name for name, info in declared.items() if info.parser is not expand_home] == []
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand_home("~/x") == tmp_path / "x"
    with pytest.raises(UserError, match=r"~nosuch/x: no user has the home folder ~nosuch"):
        expand_home("~nosuch/x")


def test_a_home_in_a_recipe_is_expanded_or_named_with_its_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    values = {
        "name": "r",
        "backbone": {"name": "mlp", "width": 8},
        "data": {"name": "folder", "path": "~/pictures", "size": 8},
        "pretext": "simsiam",
        "pretrain": {"steps": 1, "batch": 8},
    }
    lines = {(): "r.yaml:1", ("data", "path"): "r.yaml:3"}
    assert parse(Located(values, lines)).data.options.path == tmp_path / "pictures"
    values["data"]["path"] = "~nosuch/pictures"
    with pytest.raises(UserError, match=r"r.yaml:3: data.path: ~nosuch/pictures: no user has"):
        parse(Located(values, lines))


def test_a_table_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "t.md", tmp_path):
        with pytest.raises(UserError, match=r"can't be written .*; name another place"):
            runs.write_atomically(place, "table", "name another place")
