"""Comparing runs: what differs, and intervals paired over examples or seeds."""

import json

import numpy as np
import pytest
from scipy import stats

from sslrun.errors import UserError
from sslrun.report.comparison import compare_runs
from sslrun.results.record import RunRecord


def probes(root, recipe):
    """The probes of a recipe by labels and seed."""
    records = [RunRecord(path.parent) for path in (root / recipe).glob("probe-*/result.json")]
    return {(record.labels.amount, record.seed): record for record in records}


def test_two_evaluations_are_paired_over_test_examples(planted):
    first, second = (probes(planted, name)[1.0, 0] for name in ("first", "second"))
    result = compare_runs(first.folder, second.folder)
    (pair,) = result.metrics
    assert (pair.first, pair.second, pair.over) == (87.5, 75.0, "8 test examples")
    differences = 100 * (second.predictions.correct - first.predictions.correct.astype(float))
    expected = stats.t.interval(0.95, 7, differences.mean(), stats.sem(differences))
    assert pair.interval == pytest.approx(expected)
    assert [(line.key, line.first, line.second) for line in result.differences] == [
        ("name", "first", "second")
    ]


def test_folders_are_paired_over_seeds(planted):
    result = compare_runs(planted / "first", planted / "second")
    assert [pair.over for pair in result.metrics] == [
        "the seeds all give the same difference (-12.50)"
    ] * 2
    path = probes(planted, "second")[1.0, 1].folder / "result.json"
    changed = json.loads(path.read_text())
    changed["metrics"]["test"]["accuracy"] += 2.0
    path.write_text(json.dumps(changed))
    (pair,) = [
        p for p in compare_runs(planted / "first", planted / "second").metrics if "100 %" in p.name
    ]
    expected = stats.t.interval(0.95, 1, -11.5, stats.sem(np.array([-12.5, -10.5])))
    assert pair.interval == pytest.approx(expected)
    assert pair.over == "2 seeds (t interval)"


def test_pretrainings_are_compared_by_their_last_check(planted):
    folders = [next(iter((planted / name).glob("pretrain-*"))) for name in ("first", "second")]
    names = [pair.name for pair in compare_runs(*folders).metrics]
    assert names == ["rankme", "steps", "seconds"]


def test_other_test_examples_give_no_interval(planted):
    first, second = (probes(planted, name)[1.0, 0] for name in ("first", "second"))
    (second.folder / "predictions.safetensors").unlink()
    (pair,) = compare_runs(first.folder, second.folder).metrics
    assert (pair.interval, pair.over) == (None, "no predictions were kept")


def test_runs_without_a_common_metric_are_refused(planted):
    pretraining = next(iter((planted / "first").glob("pretrain-*")))
    with pytest.raises(UserError, match="no metric in common"):
        compare_runs(pretraining, probes(planted, "first")[1.0, 0].folder)
    with pytest.raises(UserError, match="no such folder"):
        compare_runs(pretraining, planted / "absent")
