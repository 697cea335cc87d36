"""Records: the folders of runs, read back."""

import pytest

from sslrun.errors import UserError
from sslrun.metric import Metric
from sslrun.results.address import Labels, Row
from sslrun.results.record import RunRecord, find_records
from sslrun.runs import Run

MAE = Metric("mae", "eV", "lower", 3)


def evaluation(tmp_path, **more):
    pretraining = Run(tmp_path, "mine", "pretrain", {"seed": 0})
    pretraining.start({"name": "mine"}, {"device": "cpu (2 threads)", "threads": 2})
    pretraining.finish(
        {
            "stage": "pretrain",
            "steps": 7,
            "parameters": 9,
            "tokens": 5,
            "seconds": 3.5,
            "flops": 8.0,
        }
    )
    run = Run(
        tmp_path, "mine", "fewshot", {"origin": {"pretrain": pretraining.hash}, "head": "abc"}
    )
    run.start({"name": "mine", "data": {"name": "digits"}}, {"device": "GPU", "devices": 4})
    result = {
        "stage": "fewshot",
        "protocol": "fewshot",
        "recipe": "mine",
        "backbone": "mlp",
        "pretext": None,
        "task": "qm9",
        "suite": ["VTAB", 19],
        "labels": 1,
        "labelled": 10,
        "seed": 3,
        "restart": 2,
        "metric": MAE.as_dict(),
        "metrics": {"val": {"mae": 2.0}, "test": {"mae": 3.0}},
        "shifts": {"fog": {"mae": 4.0}},
        "dropped": {"fog": {"cat": 2}},
        "seconds": 1.5,
    }
    run.finish({**result, **more})
    return run


def test_every_part_of_a_run_is_read_with_its_type(tmp_path):
    record = RunRecord(evaluation(tmp_path, distortion={"ID": 1.0}, feature_length=2.0).path)
    assert (record.stage, record.protocol, record.task, record.seed, record.restart) == (
        "fewshot",
    ) * 2 + ("qm9", 3, 2)
    assert record.labels == Labels(1, per_class=True)
    assert record.metric == MAE
    assert (record.validation, record.test, record.shifts) == (
        {"mae": 2.0},
        {"mae": 3.0},
        {"fog": {"mae": 4.0}},
    )
    assert (record.distortion, record.feature_length) == ({"ID": 1.0}, 2.0)
    assert (record.suite, record.labeled, record.dropped) == (("VTAB", 19), 10, {"fog": {"cat": 2}})
    assert (record.seed_key, record.seconds, record.flops) == ("3.2", 1.5, None)
    assert (record.device, record.devices, record.threads) == ("GPU", 4, None)
    assert record.recipe["data"]["name"] == "digits"
    assert record.row == Row("mine (mlp · no pretraining)", "fewshot")
    assert RunRecord(record.folder, "A").row == Row("A", "fewshot")
    assert record.is_evaluation
    pretraining = record.pretraining
    assert (pretraining.stage, pretraining.steps, pretraining.parameters, pretraining.tokens) == (
        "pretrain",
        7,
        9,
        5,
    )
    assert (pretraining.threads, pretraining.flops) == (2, 8.0)
    assert not pretraining.is_evaluation
    assert record.probe is None  # the identity names it, but it is missing


def test_the_log_is_read_line_by_line_and_a_half_written_line_is_skipped(tmp_path):
    run = evaluation(tmp_path)
    run.log({"step": 1, "loss": 2.0})
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    assert list(RunRecord(run.path).log()) == [{"step": 1, "loss": 2.0}]
    assert list(RunRecord(tmp_path).log()) == []


def test_pictures_are_found_in_the_folder_and_its_pictures_folder(tmp_path):
    run = evaluation(tmp_path)
    (run.path / "pictures" / "step-1").mkdir(parents=True)
    for name in ("b.png", "pictures/step-1/a.jpg", "pictures/notes.txt"):
        (run.path / name).write_bytes(b"")
    names = [str(path.relative_to(run.path)) for path in RunRecord(run.path).pictures]
    assert names == ["b.png", "pictures/step-1/a.jpg"]


def test_failed_and_missing_runs_have_no_result(tmp_path):
    run = Run(tmp_path, "mine", "probe", {})
    run.fail("digits: missing")
    record = RunRecord(run.path)
    assert (record.finished, record.failure, record.stage, record.pretraining) == (
        False,
        "digits: missing",
        "",
        None,
    )
    assert (record.recipe, record.identity, record.environment) == ({}, {}, {})
    with pytest.raises(UserError, match="not a finished run"):
        _ = record.seed
    (run.path / "result.json").write_text("{")
    with pytest.raises(UserError, match="damaged; remove its folder"):
        _ = RunRecord(run.path).seed


def test_records_are_found_in_the_order_in_which_they_finished(tmp_path):
    run = evaluation(tmp_path)
    assert [record.stage for record in find_records(tmp_path)] == ["pretrain", "fewshot"]
    run.finish({"stage": "measure"})
    assert [record.is_evaluation for record in find_records(tmp_path)] == [False, False]


def test_the_pretraining_that_a_result_rests_on(tmp_path):
    """Restarts share it, as do the seeds of a recipe that fixes `pretrain.seed`."""

    def record(recipe, origin, seed, restart=0):
        run = Run(tmp_path, "mine", "probe", {"origin": origin, "seed": (seed, restart)})
        run.start(recipe, {})
        run.finish({"stage": "probe", "seed": seed, "restart": restart})
        return RunRecord(run.path)

    recipe = {"name": "mine", "pretrain": {"steps": 1}, "backbone": {"name": "mlp"}}
    fixed = {**recipe, "pretrain": {"seed": 7}}
    assert record(recipe, {"pretrain": "a"}, 3, 2).pretraining_key == "3"
    assert {record(fixed, {"pretrain": "a"}, seed).pretraining_key for seed in (0, 1)} == {"7"}
    assert record(fixed, {"initial": {}, "seed": 4}, 4).pretraining_key == "4"  # own random weights
    pretrained = {**recipe, "backbone": {"name": "hf", "pretrained": True}}
    keys = {record(pretrained, {"initial": {}}, seed).pretraining_key for seed in (0, 1)}
    assert len(keys | {record(recipe, {"checkpoint": "b"}, 5).pretraining_key}) == 1
