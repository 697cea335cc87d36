"""The command line on graphs: every protocol on numbers, lower is better, and mistakes."""

import json

import pytest

RECIPE = """
name: small
backbone: {name: gin, width: 16, depth: 2, pool: sum}
pretext: {name: mask-graph}
data: {name: shapes, degrees: true}
pretrain: {epochs: 2, batch: 64, optimizer: adamw, lr: 0.003}
finetune: {steps: 30, batch: 64, optimizer: adamw, lr: [0.003, 1.0e-6], clip: 1.0}
evaluate:
  shapes:
    protocols: [knn, probe, finetune, lpft, scratch, random-forest]
    labels: [0.5]
"""


def results(folder):
    return [json.loads(path.read_text()) for path in (folder / "runs").rglob("result.json")]


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE)
    return path


def test_every_protocol_learns_numbers_and_the_lowest_error_is_chosen(sslrun, recipe, tmp_path):
    table = sslrun("sweep", recipe, cwd=tmp_path).stdout
    found = {result["protocol"]: result for result in results(tmp_path) if "protocol" in result}
    assert set(found) == {"knn", "probe", "finetune", "lpft", "scratch", "random-forest"}
    for protocol, result in found.items():
        metrics = result["metrics"]["test"]
        assert 0 < metrics["mae"] < 3.5, protocol  # the mean has an error of about 3.5
        assert metrics["mae"] <= metrics["rmse"]
    for protocol in ("finetune", "scratch"):
        tried = found[protocol]["tried"]
        assert found[protocol]["lr"] == float(min(tried, key=tried.get)) == 0.003
    assert "↓" in table
    assert "lower is better" in table


def test_mistakes_are_one_line(sslrun, recipe, tmp_path):
    def fail(old, new, command="pretrain"):
        text = RECIPE.replace(old, new)
        if command != "pretrain":
            text = text.replace("{name: mask-graph}", "null")
        recipe.write_text(text)
        done = sslrun(command, recipe, cwd=tmp_path, code=2)
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
        return done.stderr

    assert "'simclr' reads image data, but 'shapes' is graph data" in fail("mask-graph", "simclr")
    assert "'resnet18' takes image data" in fail(
        "{name: gin, width: 16, depth: 2, pool: sum}", "resnet18"
    )
    assert "needs one vector and one class per example" in fail(
        "random-forest]", "svm]", command="svm"
    )
    assert "metric roc_auc does not suit these labels" in fail(
        "    labels: [0.5]", "    task: {metric: roc_auc}", command="knn"
    )
