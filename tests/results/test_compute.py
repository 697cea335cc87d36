"""Costs of rows: FLOPs, hours and TPUv3-core-days."""

import io
import json

import pytest
from rich.console import Console

from sslrun.recipe import Sweep, parse
from sslrun.recipe.places import Located
from sslrun.results.compare import compare
from sslrun.results.compute import (
    ALL,
    CORE_DAYS,
    PRETRAINING,
    add_compute,
    core_days,
    expenses,
    utilizations,
)
from sslrun.results.formats import to_markdown
from sslrun.results.published import published
from sslrun.results.record import RunRecord
from sslrun.results.table import Table, format_amount
from sslrun.runs import Run
from sslrun.stages.context import Context
from sslrun.stages.evaluate import cells
from sslrun.stages.reporting import Reporter
from sslrun.stages.sweep import Plan, work
from sslrun.training.device import compute
from sslrun.training.flops import COUNTED_STEPS

METRIC = {"name": "accuracy", "unit": "%", "better": "higher", "digits": 1}


@pytest.fixture
def stage(tmp_path):
    """Plant a finished run and return it."""

    def plant(name, stage, flops, seconds=3600, device="GPU", devices=1, identity=(), **result):
        run = Run(tmp_path, "r", stage, {"name": name, **dict(identity)})
        run.start({}, {"device": device, "devices": devices})
        run.finish({"stage": stage, "flops": flops, "seconds": seconds, **result})
        return run

    return plant


@pytest.fixture
def result(stage):
    """Plant an evaluation, optionally of a pretraining run, and return its record."""

    def plant(row, protocol, seed, flops, pretraining=None, task="ImageNet", **more):
        identity = {"origin": {"pretrain": pretraining.hash}} if pretraining else {}
        about = {
            "recipe": "r",
            "backbone": "b",
            "pretext": "p",
            "task": task,
            "protocol": protocol,
            "labels": 1.0,
            "seed": seed,
            "metric": METRIC,
            "metrics": {"test": {"accuracy": 50.0}},
        }
        run = stage(f"{row} {task} {seed}", protocol, flops, identity=identity, **more, **about)
        return RunRecord(run.path, row)

    return plant


def test_core_days_agree_with_those_of_the_paper():
    # 43 % of 61.5 TFLOP/s for a day is 2.3 exaFLOPs; ViT-L/16's 1567 are then its 680 core-days.
    for (name, share), (flops, days) in zip(
        utilizations().items(), ((1567, 680), (4262, 2500)), strict=True
    ):
        assert flops * 1e18 / (share * 61.5e12 * 86400) == pytest.approx(days), name
        assert core_days(flops * 1e18) == pytest.approx(days, rel=0.18)
    assert [round(share, 3) for share in utilizations().values()] == [0.434, 0.321]


def test_a_run_counts_once_per_row_and_seed(stage, result):
    pretraining = {
        seed: stage(f"pretrain-{seed}", "pretrain", 2e15 + seed * 1e15, 7200, devices=8)
        for seed in (0, 1)
    }
    records = [
        result("A", "probe", seed, 1e15, pretraining[seed], task)
        for task in ("ImageNet", "CIFAR-10")
        for seed in (0, 1)
    ]
    records.append(result("B", "scratch", 0, 5e15, device="CPU"))
    records.append(result("C", "knn", 0, 1e12, stage("old", "pretrain", None)))
    table = Table.from_records(records)
    add_compute(table)
    cells = {
        (row.name, column.metric.name): cell
        for (row, column), cell in table.cells.items()
        if column in table.costs
    }
    assert cells["A", PRETRAINING].values == {"0": 2.0, "1": 3.0}
    assert cells["A", ALL].values == {"0": 4.0, "1": 5.0}
    assert cells["A", CORE_DAYS].values["0"] == pytest.approx(core_days(2e15))
    assert cells["A", "hours on GPU"].mean == 2 * 8 + 2
    assert cells["A", ALL].text() == "4.5 ± 0.707"
    assert [format_amount(amount) for amount in (1.234e-7, 12.34, 2500.4)] == [
        "1.23e-07",
        "12.3",
        "2,500",
    ]
    assert ("B", PRETRAINING) not in cells
    assert ("B", CORE_DAYS) not in cells
    assert cells["B", "hours on CPU"].mean == 1
    assert ("C", ALL) not in cells
    assert (
        "FLOPs unknown, since they were not counted or weights are from elsewhere: C · knn"
        in table.notes
    )
    assert any(f"for texts, in {COUNTED_STEPS} steps" in note for note in table.notes)
    assert (
        "**"
        not in next(
            line for line in to_markdown(table).splitlines() if line.startswith("| B")
        ).split("|")[-4]
    )


def test_the_last_row_of_the_vit_table_is_filled_in(stage, result):
    pretraining = stage("p", "pretrain", 1567e18)
    table = Table.from_records([result("Ours-JFT (ViT-L/16)", "finetune", 0, 1e18, pretraining)])
    add_compute(table)
    comparison = compare(table, published("vit_table2"))
    (cost,) = [
        pair
        for pair in comparison.pairs
        if pair.published_row == CORE_DAYS or pair.published_column == CORE_DAYS
    ]
    assert (cost.value, cost.ours.mean) == (680, pytest.approx(core_days(1567e18)))
    text = io.StringIO()
    Console(file=text, width=250).print(comparison.render())
    assert "680" in text.getvalue()
    assert "TPUv3-core-days: of pretraining alone" in text.getvalue()
    assert "PFLOPs" not in str(comparison.unmatched)


def test_runs_record_their_costs(tmp_path):
    options = {
        "name": "tiny",
        "backbone": {"name": "mlp", "width": 8, "depth": 1},
        "pretext": "rotation",
        "data": {"name": "digits", "size": 8},
        "pretrain": {"steps": 2, "batch": 16, "lr": 0.001, "precision": "fp32"},
        "finetune": {"steps": 2, "batch": 16, "lr": [0.001, 0.01], "precision": "fp32"},
        "evaluate": {"digits": {"protocols": ["probe", "lpft"], "labels": [0.1]}},
    }
    recipe = parse(Located(options, {(): "tiny.yaml:1"}))
    plan = Plan.of(Sweep(name="tiny", rows={"tiny": recipe}), tmp_path)
    assert not work([plan], Context(tmp_path, compute("cpu"), Reporter(quiet=True)))
    stages = {record.protocol: expenses(record) for record in plan.records()}
    assert [stage.stage for stage in stages["probe"]] == ["pretrain", "probe"]
    assert [stage.stage for stage in stages["lpft"]] == ["pretrain", "probe", "lpft"]
    pretraining, probe, lpft = stages["lpft"]
    result = json.loads(next(tmp_path.glob("tiny/lpft-*/result.json")).read_text())
    forward = 2 * 192 * 8  # one image through one layer, whose input needs no gradient
    head = 2 * 8 * 10
    assert probe.flops == forward * result["labelled"]
    assert lpft.flops == 2 * 2 * 16 * (2 * forward + 3 * head)  # two rates, two steps
    assert pretraining.flops % (2 * 2 * 16) == 0
    assert pretraining.devices == 1
    assert "threads" in pretraining.device
    assert expenses(RunRecord(tmp_path)) == []


HF = {
    "backbone": {"name": "hf", "model": "some/encoder"},
    "data": "world",
    "task": "world-sentiment",
}
MLP = {"backbone": "mlp", "data": "digits", "task": "digits"}


@pytest.mark.parametrize(
    ("protocol", "about", "known"),
    [
        ("finetune", {**MLP, "weights": "weights.safetensors"}, False),
        ("finetune", HF, False),  # this backbone is pretrained by default
        ("finetune", {**HF, "backbone": {**HF["backbone"], "pretrained": False}}, True),
        ("scratch", HF, True),
        ("finetune", MLP, True),
    ],
)
def test_weights_from_elsewhere_have_no_total_cost(tmp_path, monkeypatch, protocol, about, known):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.safetensors").touch()
    keys = {key: value for key, value in about.items() if key != "task"}
    evaluate = {about["task"]: {"protocols": [protocol]}}
    recipe = parse(Located({"name": "r", **keys, "evaluate": evaluate}, {(): "r.yaml:1"}))
    (cell,) = cells(recipe, 0, tmp_path)
    run = cell.run
    run.start(recipe.resolved(), {"device": "GPU"})
    result = {
        "recipe": "r",
        "backbone": "b",
        "pretext": "p",
        "task": "t",
        "protocol": protocol,
        "labels": 1.0,
        "seed": 0,
        "metric": METRIC,
        "metrics": {"test": {"accuracy": 50.0}},
    }
    run.finish({"stage": protocol, "flops": 2e15, "seconds": 3600, **result})
    table = Table.from_records([RunRecord(run.path, "A")])
    add_compute(table)
    columns = {
        column.metric.name: cell.mean
        for (_, column), cell in table.cells.items()
        if column in table.costs
    }
    assert columns == {"hours on GPU": 1.0, **({ALL: 2.0} if known else {})}
    assert any(note.startswith("FLOPs unknown") for note in table.notes) != known
