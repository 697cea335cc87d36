"""Damaged files that are read again: a cache is made again, a run is named with the remedy."""

import json
import logging

import numpy as np
import pytest
import torch

from sslrun import files
from sslrun.backbones.weights import WEIGHTS, read
from sslrun.data.cache import cache_entry, cache_tensors
from sslrun.data.text.corpora import token_file
from sslrun.data.text.tokenizer import blank_tokenizer
from sslrun.errors import UserError
from sslrun.launch import Workers, build
from sslrun.recipe import parse
from sslrun.recipe.places import Located
from sslrun.results.record import RunRecord, find_records
from sslrun.runs import Run, check_file
from sslrun.stages.context import Busy, Context, perform
from sslrun.stages.evaluate import cells
from sslrun.stages.keep import BestWeights
from sslrun.stages.pretrain import Pretraining
from sslrun.stages.reporting import Reporter
from sslrun.stages.sweep import launch
from sslrun.training.device import compute


def flip(path, position):
    """Flip one bit of a byte; a negative position counts from the end."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def spread(path, count=24):
    """Positions in all regions of a file."""
    return np.unique(np.linspace(0, path.stat().st_size - 1, count).astype(int)).tolist()


# ---------------------------------------------------------------- caches


def test_no_flipped_byte_of_a_tensor_file_gives_another_content(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = {"x": torch.arange(6).reshape(2, 3), "empty": torch.zeros(0), "y": torch.tensor(True)}
    files.write_tensors(path, tensors, {"classes": '["cat"]'})
    content = path.read_bytes()
    for position in range(len(content)):
        flip(path, position)
        result = files.read_tensors(path)
        if result is not None:  # such as another blank after the header
            assert result[1] == {"classes": '["cat"]'}
            assert all(torch.equal(result[0][name], tensors[name]) for name in tensors)
        path.write_bytes(content)
    assert files.read_tensors(path) is not None
    path.write_bytes(content[:-1])
    assert files.read_tensors(path) is None


def test_a_damaged_cache_is_made_again(tmp_path):
    path, calls = tmp_path / "a.safetensors", []

    def make():
        calls.append(1)
        return {"x": torch.arange(1000)}

    cache_tensors(path, make)
    flip(path, -1)
    assert torch.equal(cache_tensors(path, make)["x"], torch.arange(1000))
    assert len(calls) == 2
    assert cache_entry(path, lambda: pytest.fail("made again"))


@pytest.mark.parametrize("name", ["tokens", "sentences", "documents", files.SUMS])
def test_damaged_token_files_are_written_again(tmp_path, name):
    documents = [["w1 w2 w3", "w4"], ["w5 w6"]] * 20
    tokenizer = blank_tokenizer(50)
    first = [part.clone() for part in token_file(tmp_path / "t", lambda: documents, tokenizer)]
    path = tmp_path / "t" / name
    size = path.stat().st_size
    for damage in (lambda: flip(path, size // 2), lambda: path.write_bytes(path.read_bytes()[:8])):
        damage()
        again = token_file(tmp_path / "t", lambda: documents, tokenizer)
        assert all(map(torch.equal, first, again))


def test_damaged_progress_of_a_token_file_starts_again(tmp_path):
    documents = [["w1 w2 w3", "w4"], ["w5 w6"]] * 20
    tokenizer = blank_tokenizer(50)
    first = [part.clone() for part in token_file(tmp_path / "t", lambda: documents, tokenizer)]
    for name, text in (("progress.json", "{"), ("progress.json", "[]"), ("tokens", "xxxx")):
        (tmp_path / "t" / files.SUMS).unlink()
        (tmp_path / "t" / name).write_text(text)
        again = token_file(tmp_path / "t", lambda: documents, tokenizer)
        assert all(map(torch.equal, first, again)), name


# ---------------------------------------------------------------- runs


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path / "runs", "mine", "pretrain", {"seed": 0})
    run.start({"name": "mine"}, {"device": "cpu"})
    files.write_tensors(run.path / WEIGHTS, {"x": torch.arange(100.0)}, {})
    run.finish({"stage": "pretrain", "seconds": 1.0})
    return run


@pytest.mark.parametrize(
    "name", ["result.json", "identity.json", "environment.json", "recipe.yaml", files.SUMS]
)
def test_a_damaged_run_is_one_line_and_does_not_break_the_table_of_the_others(
    run, tmp_path, caplog, name
):
    other = Run(tmp_path / "runs", "mine", "pretrain", {"seed": 1})
    other.start({"name": "mine"}, {"device": "cpu"})
    other.finish({"stage": "pretrain", "seconds": 1.0})
    path = run.path / name
    content = path.read_bytes()
    for position in spread(path):
        flip(path, position)
        records = find_records(tmp_path / "runs")
        path.write_bytes(content)
        # A flipped name in the list of checksums only leaves an intact file unverified.
        assert records[-1].folder == other.path
        assert name == files.SUMS or len(records) == 1, position
    for text in ("", "[]", "{", "null", "\0", "- a\n- b", "\xff"):
        path.write_text(text, encoding="latin-1")
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert [record.folder for record in find_records(tmp_path / "runs")] == [other.path]
        (line,) = caplog.messages
        assert str(run.path) in line
        assert "damaged; remove its folder" in line


def test_a_finished_run_with_a_damaged_recipe_is_not_passed_over_in_silence(run, tmp_path):
    run.check()
    recipe = run.path / "recipe.yaml"
    recipe.write_bytes(recipe.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"recipe\.yaml: damaged; remove its folder"):
        perform(run, {}, open_context(tmp_path), dict)


def test_results_of_older_versions_are_read_without_checksums(run):
    (run.path / files.SUMS).unlink()
    assert RunRecord(run.path).seconds == 1.0
    assert read(run.path / WEIGHTS)[0]["x"].sum() == 4950


def test_a_result_without_its_entries_is_skipped(run, tmp_path):
    run.finish({"protocol": "probe", "stage": "probe"})
    assert find_records(tmp_path) == []


def test_damaged_weights_are_named(run):
    path = run.path / WEIGHTS
    content = path.read_bytes()
    for position in spread(path):
        flip(path, position)
        with pytest.raises(UserError, match=rf"{WEIGHTS}: damaged; remove its folder"):
            read(path)
        path.write_bytes(content)
    (run.path / files.SUMS).write_text("{")
    with pytest.raises(UserError, match=r"sums\.json: damaged"):
        check_file(path)


def test_metadata_that_are_no_json_are_one_line(tmp_path):
    from safetensors.torch import save_file

    for text in ("{", "[]", '{"backbone": "mlp"}', '{"backbone": "mlp", "options": "{]"}'):
        save_file({"x": torch.zeros(1)}, tmp_path / WEIGHTS, {"sslrun": text})
        with pytest.raises(UserError, match=rf"{WEIGHTS}: .*metadata"):
            load_from(tmp_path)


def load_from(folder):
    from sslrun.backbones.weights import load_backbone

    return load_backbone(folder)


def test_a_damaged_log_is_cut_and_a_damaged_list_of_devices_named(run):
    log = run.path / "metrics.jsonl"
    log.write_bytes(b'{"step": 1}\n[3]\n{"step": "x"}\n\xff\xfe\nnull\n{"step": 2}\n')
    run.forget_after(1)
    assert log.read_text() == '{"step": 1}\n'
    from sslrun.runs import DEVICES, device_counts

    for text in ("{", "3", '["a"]'):
        (run.path.parent / DEVICES).write_text(text)
        with pytest.raises(UserError, match=rf"{DEVICES}: damaged"):
            device_counts(run.path.parent)


# ---------------------------------------------------------------- pretraining


RECIPE = {
    "name": "tiny",
    "backbone": {"name": "mlp", "width": 16, "depth": 1},
    "pretext": {"name": "simsiam", "hidden": 16, "bottleneck": 8},
    "data": {"name": "digits", "size": 8},
    "pretrain": {"steps": 2, "batch": 32},
    "watch": {"every": 1000, "examples": 64, "views": 4},
    "evaluate": {"digits": {"task": "classification", "protocols": ["probe"]}},
}


def open_context(root, **options):
    return Context(root, compute("cpu"), Reporter(quiet=True), **options)


def test_a_pretraining_whose_weights_are_gone_or_damaged_is_made_again(tmp_path):
    job = Pretraining(parse(Located(RECIPE, {(): "tiny.yaml:1"})), 0, tmp_path)
    context = open_context(tmp_path)
    job.execute(context)
    content = job.weights.read_bytes()
    for damage in (job.weights.unlink, lambda: flip(job.weights, len(content) // 2)):
        damage()
        (cell,) = cells(job.recipe, 0, tmp_path, ["probe"])
        with pytest.raises(UserError, match=r"backbone\.safetensors.*remove its folder"):
            cell.execute(context)
        job.reopen(context)
        assert not job.run.finished
        job.execute(context)
        assert job.weights.read_bytes() == content
        job.reopen(context)
        assert job.run.finished


def test_fresh_refuses_a_run_that_another_process_holds(tmp_path):
    job = Pretraining(parse(Located(RECIPE, {(): "tiny.yaml:1"})), 0, tmp_path)
    job.run.start({}, {})

    class Plan:
        name, jobs = "plan", (job,)

    context, workers = open_context(tmp_path, fresh=True), Workers((), 1, "cpu", tmp_path, "w")
    with job.run.claimed(), pytest.raises(Busy, match="another process is working on this run"):
        launch([Plan()], context, build("local", ()), workers)
    assert (job.run.path / "recipe.yaml").exists()


def test_damaged_best_weights_take_the_checkpoints_after_them_along(tmp_path):
    best = BestWeights(tmp_path, "rankme")
    (tmp_path / "step-000000002").mkdir()
    network = torch.nn.Linear(2, 2)
    best.consider(1, {"rankme": 1.0}, network)
    best.consider(4, {"rankme": 2.0}, network)
    (tmp_path / "step-000000005").mkdir()
    assert best.step == 4
    flip(tmp_path / "best-000000004.safetensors", -1)
    best.forget_damaged()
    assert best.step == 1
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-000000002"]
    assert json.loads(files.read_metadata(tmp_path / "best-000000001.safetensors")["record"])
