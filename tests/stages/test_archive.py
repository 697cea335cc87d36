"""Runs on this machine: listed, shown, deleted only if nothing needs them, and pruned."""

import json
import os
import sys
import time

import pytest

from sslrun import cli
from sslrun.errors import UserError
from sslrun.runs import Run, lock_of
from sslrun.stages import archive

MONTH = 30 * 86400


@pytest.fixture
def root(tmp_path):
    """A folder with a pretraining, its probe, and a run that failed."""
    pretraining = Run(tmp_path, "mine", "pretrain", {"seed": 3})
    pretraining.start({"name": "mine"}, {"host": "here"})
    (pretraining.path / "backbone.safetensors").write_bytes(b"weights")
    (pretraining.path / "last").mkdir()
    (pretraining.path / "last" / "training.pt").write_bytes(bytes(1000))
    pretraining.log({"step": 7})
    pretraining.finish({"stage": "pretrain", "seed": 3, "watched": {"knn": 83.21, "rankme": 4}})
    probe = Run(tmp_path, "mine", "probe", {"origin": {"pretrain": pretraining.hash}})
    probe.start({}, {})
    metric = {"name": "accuracy", "unit": "%", "better": "higher", "digits": 1}
    probe.finish({"seed": 3, "metric": metric, "metrics": {"test": {"accuracy": 91.25}}})
    broken = Run(tmp_path, "other", "finetune", {"seed": 0})
    broken.start({}, {})
    broken.fail("one line\nthe loss is not finite")
    return tmp_path


def called(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["sslrun", "runs", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    return exit_info.value.code


def names(entries):
    return [entry.folder.name.rpartition("-")[0] for entry in entries]


def test_a_list_names_state_and_main_number_and_can_be_filtered(root, monkeypatch, capsys):
    assert called(monkeypatch, "ls", "--runs", root, "--json") == 0
    listed = {row["stage"]: row for row in json.loads(capsys.readouterr().out)}
    assert [row["state"] for row in listed.values()] == ["done", "done", "failed"]
    assert listed["pretrain"]["text"] == "knn 83.2"
    assert listed["pretrain"]["seed"] == 3
    assert listed["pretrain"]["bytes"] > 1000
    assert listed["probe"]["value"] == 91.25
    assert listed["finetune"]["failure"] == "the loss is not finite"
    entries = archive.find_entries(root)
    assert names(archive.select(entries, "mine/", False, None)) == ["pretrain", "probe"]
    assert names(archive.select(entries, None, True, None)) == ["finetune"]
    assert archive.select(entries, None, False, archive.parse_age("2d")) == []
    for path in archive.find_entries(root)[0].folder.rglob("*"):
        os.utime(path, (time.time() - MONTH,) * 2)
    assert names(archive.select(archive.find_entries(root), None, False, 7 * 86400)) == ["pretrain"]
    assert called(monkeypatch, "ls", "--runs", root) == 0
    assert "accuracy 91.2" in capsys.readouterr().out


def test_a_run_is_shown_with_its_lineage_and_files(root, monkeypatch, capsys):
    assert called(monkeypatch, "show", "mine/pre", "--runs", root, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert [name.partition("-")[0] for name in shown["used_by"]] == ["mine/probe"]
    assert shown["files"]["last/training.pt"] == 1000
    assert shown["last_record"] == {"step": 7}
    assert called(monkeypatch, "show", "mine/probe", "--runs", root) == 0
    assert "computed from: mine/pretrain-" in capsys.readouterr().out


def test_a_run_is_named_by_folder_or_by_a_unique_beginning(root):
    entries = archive.find_entries(root)
    probe = entries[1]
    for text in (str(probe.folder), probe.name, probe.hash[:8], "probe", "mine/pro"):
        assert archive.find_entry(entries, text) == probe
    with pytest.raises(UserError, match="the name of the run is empty"):
        archive.find_entry(entries[:1], "")
    with pytest.raises(UserError, match="xyz: no such run; `sslrun runs ls` lists them"):
        archive.find_entry(entries, "xyz")
    with pytest.raises(UserError, match=r"mine: 2 runs begin so: mine/pretrain-.*, mine/probe-"):
        archive.find_entry(entries, "mine")
    with pytest.raises(UserError, match="no such folder"):
        archive.find_entries(root / "nothing")
    with pytest.raises(UserError, match="--older soon: give a number and a unit"):
        archive.parse_age("soon")


def test_what_is_needed_or_running_is_not_removed(root, monkeypatch, capsys):
    pretraining, probe, _ = archive.find_entries(root)
    assert called(monkeypatch, "rm", "mine/pretrain", "--yes", "--runs", root) == 2
    assert f"1 runs were computed from it, such as {probe.name}" in capsys.readouterr().err
    assert called(monkeypatch, "rm", "mine/probe", "--runs", root) == 2  # no terminal to ask on
    assert "add --yes" in capsys.readouterr().err
    with lock_of(root / "other" / next((root / "other").iterdir()).name) as is_claimed:
        assert is_claimed
        assert called(monkeypatch, "rm", "finetune", "--yes", "--force", "--runs", root) == 2
        assert "a process is working on it" in capsys.readouterr().err
        assert names(archive.find_entries(root)) == ["pretrain", "probe", "finetune"]
    assert called(monkeypatch, "rm", "mine/pre", "mine/probe", "--yes", "--runs", root) == 0
    assert names(archive.find_entries(root)) == ["finetune"]
    assert not pretraining.folder.exists()


def test_an_evaluation_of_a_file_of_weights_needs_the_run_that_wrote_it(root):
    entries = archive.find_entries(root)
    weights = entries[0].folder / "backbone.safetensors"
    other = Run(root, "third", "knn", {"origin": {"checkpoint": archive.hash_file(weights)}})
    other.start({}, {})
    users = archive.users_of(entries[0], archive.find_entries(root))
    assert names(users) == ["probe", "knn"]


def test_pruning_deletes_what_no_result_needs(root, monkeypatch, capsys):
    pretraining, probe, broken = (entry.folder for entry in archive.find_entries(root))
    old, new = probe / ".head.safetensors.0a1b2c3d", probe / ".head.safetensors.0a1b2c3e"
    for path in (old, new):
        path.write_bytes(bytes(50))
    os.utime(old, (time.time() - 7200,) * 2)
    leftovers = archive.find_leftovers(root, None)
    found = {leftover.kind: (leftover.path, leftover.size) for leftover in leftovers}
    assert found["training states"] == (pretraining / "last", 1000)
    assert found["temporary files"] == (old, 50)
    assert found["failed runs"][0] == broken
    assert archive.find_leftovers(root, 3600.0) == [archive.Leftover("temporary files", old, 50)]
    assert called(monkeypatch, "prune", "--dry-run", "--runs", root) == 0
    total = sum(leftover.size for leftover in leftovers)
    assert f"({total:,} bytes)" in capsys.readouterr().out
    assert old.exists()
    assert called(monkeypatch, "prune", "--yes", "--runs", root) == 0
    assert not any(path.exists() for path in (old, broken, pretraining / "last"))
    assert new.exists()  # its writer may be at work
    assert (pretraining / "backbone.safetensors").exists()
    assert called(monkeypatch, "prune", "--yes", "--runs", root) == 0
    assert capsys.readouterr().out.endswith("nothing to delete\n")


def test_cached_data_that_was_not_read_for_a_month_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("SSLRUN_CACHE", str(tmp_path))
    fresh, stale = (tmp_path / "images" / f"mine-{digit * 16}.safetensors" for digit in "ab")
    own = tmp_path / "images" / "notes.txt"
    own.parent.mkdir()
    for path in (fresh, stale, own):
        path.write_bytes(bytes(10))
    for path in (stale, own):
        os.utime(path, (time.time() - 2 * MONTH,) * 2)
    assert archive.find_unread_caches() == [archive.Leftover("cached data", stale, 10)]
