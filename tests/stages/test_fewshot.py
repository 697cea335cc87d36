"""Few-shot evaluation from a recipe."""

import pytest

from sslrun.errors import UserError
from sslrun.recipe import Sweep, parse
from sslrun.recipe.places import Located
from sslrun.results.address import Column, Labels, Row
from sslrun.results.table import Table
from sslrun.stages.check import estimate
from sslrun.stages.context import Context
from sslrun.stages.reporting import Reporter
from sslrun.stages.sweep import Plan, work
from sslrun.training.device import compute

DIGITS = {
    "name": "tiny",
    "backbone": "pixels",
    "data": {"name": "digits", "size": 8},
    "fewshot": {"shots": [1, 5, 25], "l2": 16},
    "evaluate": {"digits": {"protocols": ["fewshot", "knn"], "labels": [0.1]}},
}
TEXT = {
    "name": "tiny",
    "backbone": {"name": "bert-tiny", "depth": 1, "width": 16, "positions": 64},
    "data": {"name": "world", "documents": 30, "length": 48, "tokenizer": {"vocab": 200}},
    "fewshot": {"shots": [2]},
    "evaluate": {
        "task": {
            "data": {"name": "world-sentiment", "train": 40, "held_out": 20},
            "protocols": ["fewshot"],
        }
    },
}


def table(options, tmp_path, seeds=(0,)):
    recipe = parse(Located(options, {(): "tiny.yaml:1"}))
    plan = Plan.of(Sweep(name="tiny", rows={"tiny": recipe}, seeds=seeds), tmp_path)
    failures = work([plan], Context(tmp_path, compute("cpu"), Reporter(quiet=True)))
    assert not failures, failures
    return plan.table(), plan, recipe


def test_few_shot_on_images_starts_at_one_per_class(tmp_path, monkeypatch):
    monkeypatch.setenv("SSLRUN_CACHE", str(tmp_path))
    scores_table, plan, recipe = table(DIGITS, tmp_path, seeds=(0, 1))
    assert scores_table.columns == [
        Column("digits", Labels(0.1)),
        Column("digits", Labels(1, per_class=True)),
        Column("digits", Labels(5, per_class=True)),
        Column("digits", Labels(25, per_class=True)),
    ]
    scores = [
        scores_table.cells[Row("tiny", "fewshot"), column] for column in scores_table.columns[1:]
    ]
    means = [cell.mean for cell in scores]
    assert 25 < means[0] < means[1] < means[2]
    assert means[2] > 85
    assert all(cell.deviation > 0 for cell in scores)  # other seeds draw other examples
    shots = [cell for _, cell in plan.cells if cell.protocol == "fewshot"]
    assert [cell.run.result["labelled"] for cell in shots] == [10, 50, 250] * 2
    assert estimate("", recipe, compute("cpu"))["cells"] == 4


def test_adding_shots_does_not_change_existing_results(tmp_path):
    def runs(shots):
        recipe = parse(Located({**DIGITS, "fewshot": {"shots": shots}}, {(): "tiny.yaml:1"}))
        plan = Plan.of(Sweep(name="tiny", rows={"tiny": recipe}), tmp_path)
        return {cell.run.path for _, cell in plan.cells if cell.protocol == "fewshot"}

    assert runs([1]) < runs([1, 5])


def test_few_shot_on_text_and_its_errors_for_unsuitable_tasks(tmp_path, monkeypatch):
    monkeypatch.setenv("SSLRUN_CACHE", str(tmp_path))
    scores_table, plan, _ = table(TEXT, tmp_path)
    assert isinstance(scores_table, Table)
    assert scores_table.columns == [Column("task", Labels(2, per_class=True))]
    assert plan.cells[0][1].run.result["labelled"] == 4
    tagging = {
        **TEXT,
        "evaluate": {"task": {"data": {"name": "world-tagging"}, "protocols": ["fewshot"]}},
    }
    with pytest.raises(
        UserError,
        match=r"tiny.yaml:1: evaluate.task.protocols: fewshot needs one vector and one class",
    ):
        table(tagging, tmp_path)
