"""Runs: identity, atomic files and locks."""

import hashlib
import json
import os
import sys
from pathlib import Path

import pytest

from sslrun import cli, files, runs
from sslrun.errors import UserError
from sslrun.recipe import parse
from sslrun.recipe.places import Located
from sslrun.runs import Run, digest, hash_contents, write_atomically
from sslrun.stages.evaluate import cells


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path, "mine", "pretrain", {"seed": 0, "data": {"name": "digits"}})


def test_the_hash_depends_on_the_identity_but_not_on_key_order(run, tmp_path):
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})
    other = Run(tmp_path, "mine", "pretrain", {"seed": 1, "data": {"name": "digits"}})
    assert run.path.parent == other.path.parent
    assert run.path != other.path


def test_the_hash_includes_the_content_of_files_that_a_recipe_names(tmp_path):
    (tmp_path / "model").mkdir()
    named = {"vocab": tmp_path / "vocab.txt", "weights": tmp_path / "model" / "model.safetensors"}
    recipe = {
        "name": "mine",
        "backbone": f"hf:{tmp_path / 'model'}",
        "data": {"name": "world", "tokenizer": {"file": str(named["vocab"])}},
        "evaluate": {"world-sentiment": {"protocols": ["probe"]}},
    }

    def build_run():
        hash_contents.cache_clear()  # one process reads them once
        (cell,) = cells(parse(Located(recipe, {(): "mine.yaml:1"})), 0, tmp_path)
        return cell.run.hash

    hashes = []
    for path, text in (("vocab", "a"), ("weights", "a"), ("weights", "b"), ("vocab", "b")):
        named[path].write_text(text)
        hashes += [build_run(), build_run()]
    assert hashes[::2] == hashes[1::2]
    assert len(set(hashes)) == 4
    named["weights"].rename(tmp_path / "model" / "other.safetensors")
    assert build_run() not in hashes


def test_large_folders_are_hashed_by_names_and_sizes(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "LARGE", 4)
    for folder, text in (("one", "abcd"), ("two", "abce"), ("three", "abc")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "file").write_text(text)
    one, two, three = (hash_contents(tmp_path / name) for name in ("one", "two", "three"))
    assert one == two != three
    assert hash_contents(tmp_path / "one" / "file") != hash_contents(tmp_path / "two" / "file")
    assert hash_contents(tmp_path / "four") is None


def test_files_are_hashed_in_the_order_of_their_folders(tmp_path):
    """The hash is that of earlier versions, which sorted Path."""
    for name in ("a/x", "a b/x", "a-b/c/y", "a-b/c d", "a.b", "B/z", "\udc80"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name.encode("utf-8", "surrogateescape").hex())
    found = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    names = [path.relative_to(tmp_path).as_posix() for path in found]
    expected = hashlib.sha256(repr((names, [path.stat().st_size for path in found])).encode())
    for path in found:
        expected.update(hashlib.sha256(path.read_bytes()).digest())
    assert hash_contents(tmp_path) == expected.hexdigest()[:12]


def test_a_run_is_finished_by_its_result(run):
    assert not run.finished
    run.start({"name": "mine"}, {})
    run.log({"step": 1})
    run.log({"step": 2})
    (run.path / "metrics.jsonl").open("a").write('{"step": 3, "lo')  # killed while writing
    run.forget_after(1)
    assert (run.path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    run.finish({"accuracy": 1})
    assert run.finished
    assert run.result["accuracy"] == 1
    run.clear()
    assert not run.finished


def test_the_log_of_one_training_of_several_is_continued_alone(run):
    run.start({"name": "mine"}, {})
    for attempt in ("lr-0.1", "lr-0.2"):
        for step in (1, 2, 3):
            run.log({"attempt": attempt, "step": step})
    run.forget_after(1, "lr-0.1")
    records = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert [(record["attempt"], record["step"]) for record in records] == [
        ("lr-0.1", 1), ("lr-0.2", 1), ("lr-0.2", 2), ("lr-0.2", 3),
    ]  # fmt: skip


def test_temporary_files_of_killed_writers_are_removed(run):
    lasting = [".hidden", ".result.json.notahash", "result.json.0a1b2c3d"]
    left = [".result.json.0a1b2c3d", "checkpoint/lr-0.1/.best.safetensors.0a1b2c3d"]
    for name in lasting + left:
        path = run.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (0, 0))
    (run.path / ".newer.json.0a1b2c3d").touch()
    os.utime(run.path / ".newer.json.0a1b2c3d", (2**33, 2**33))
    with run.claimed():
        names = {str(path.relative_to(run.path)) for path in run.path.rglob("*") if path.is_file()}
    assert names == {*lasting, ".newer.json.0a1b2c3d", ".lock"}


def test_a_run_is_locked_by_one_process_at_a_time(run):
    with (
        run.claimed() as lock,
        Run(run.root, "mine", "pretrain", run.identity).claimed() as other_lock,
    ):
        assert (lock, other_lock) == (True, False)
    with run.claimed() as lock:
        assert lock


def test_writes_are_atomic(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_atomically(path, "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(UserError, match="disk is full"):
        write_atomically(path, "new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_an_invalid_result_file_is_an_error(run):
    with pytest.raises(UserError, match="not a finished run"):
        runs.read_result(run.path)
    run.start({}, {})
    (run.path / "result.json").write_text("{")
    with pytest.raises(UserError, match="damaged; remove its folder"):
        runs.read_result(run.path)


def test_an_unwritable_runs_folder_is_a_one_line_error(tmp_path, run, monkeypatch):
    (tmp_path / "file").write_text("")
    for place in ("file", "file/runs/deeper"):
        with pytest.raises(
            UserError, match=rf"--runs {tmp_path / place}: {tmp_path / 'file'} is not a folder"
        ):
            runs.check_root(tmp_path / place)
    runs.check_root(tmp_path / "new" / "runs")
    runs.check_root(tmp_path)
    assert not (tmp_path / "new").exists()
    (tmp_path / "mine").write_text("")  # a file where the recipe's folder should be
    with pytest.raises(UserError, match="can't be written"), run.claimed():
        pass
    monkeypatch.setattr(runs.os, "access", lambda *_: False)
    with pytest.raises(
        UserError, match=f"no permission to write to {tmp_path}; name another place"
    ):
        runs.check_root(tmp_path / "new")
    with pytest.raises(UserError, match="no permission to read"):
        runs.check_root(tmp_path)


@pytest.mark.parametrize("command", [["pretrain"], ["probe"], ["sweep"]])
def test_commands_report_an_unwritable_runs_folder_before_computing(
    command, tmp_path, monkeypatch, capsys
):
    (tmp_path / "file").write_text("")
    recipe = Path(__file__).parents[1] / "recipes/image/rotation-cifar10.yaml"
    monkeypatch.setattr(
        sys, "argv", ["sslrun", *command, str(recipe), "--runs", str(tmp_path / "file" / "runs")]
    )
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"{tmp_path / 'file'} is not a folder; name another place")
