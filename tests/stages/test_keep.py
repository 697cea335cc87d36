"""`pretrain.keep: best`: the weights of the best feature check, also after an interruption."""

import json
import signal

import pytest
import torch
from safetensors.torch import load_file

from sslrun.errors import UserError
from sslrun.recipe import parse
from sslrun.recipe.places import Located
from sslrun.stages.context import Context, Interrupted, Stop
from sslrun.stages.keep import BestWeights
from sslrun.stages.pretrain import Pretraining
from sslrun.stages.reporting import Reporter
from sslrun.tasks.diagnostics import COSTS
from sslrun.training.device import compute

RECIPE = {
    "name": "tiny",
    "backbone": {"name": "mlp", "width": 16, "depth": 1},
    "pretext": {"name": "simsiam", "hidden": 16, "bottleneck": 8},
    "data": {"name": "digits", "size": 8},
    "pretrain": {"steps": 16, "batch": 32, "lr": 0.05, "keep": "best", "keep_by": "rankme"},
    "watch": {"every": 0.1, "examples": 64, "views": 4},
}


def recipe(**changes):
    values = {**RECIPE, **{key: {**RECIPE[key], **value} for key, value in changes.items()}}
    values["pretext"] = changes.get("pretext", RECIPE["pretext"])
    return parse(Located(values, {(): "tiny.yaml:1"}))


def job(root, **changes):
    return Pretraining(recipe(**changes), 0, root)


def context(root, **options):
    return Context(root, compute("cpu"), Reporter(quiet=True), **options)


def checks(run):
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    return [record for line in lines if "rankme" in (record := json.loads(line))]


class After(Stop):
    """A stop request after a number of steps."""

    steps = 0

    @property
    def due(self):
        self.steps -= 1
        return self.steps <= 0


class Weights(torch.nn.Module):
    def __init__(self, value):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([float(value)]))


@pytest.mark.parametrize("diagnostic", ["rankme", "lidar", "alpha_req", "knn"])
def test_the_saved_weights_are_those_of_the_best_check(tmp_path, diagnostic):
    # A constant learning rate makes a shorter run the beginning of a longer one.
    constant = {"schedule": "constant", "keep_by": diagnostic}
    best = job(tmp_path / "best", pretrain=constant)
    result = best.execute(context(tmp_path / "best"))
    records = checks(best.run)
    costs = [COSTS[diagnostic](record[diagnostic]) for record in records]
    chosen = records[costs.index(min(costs))]
    assert len(records) > 3
    assert result["kept"]["step"] == chosen["step"]
    assert result["kept"]["by"] == diagnostic
    assert result["kept"][diagnostic] == chosen[diagnostic]
    assert not best.run.checkpoints.exists()
    last = {"steps": chosen["step"], "schedule": "constant", "keep": "last", "keep_by": "rankme"}
    short = job(tmp_path / "short", pretrain=last)
    short.execute(context(tmp_path / "short"))
    expected, saved = load_file(short.weights), load_file(best.weights)
    assert all(torch.equal(expected[name], saved[name]) for name in expected)


@pytest.mark.parametrize("steps", [5, 12])
def test_a_resumed_run_keeps_the_same_weights(tmp_path, steps):
    whole, parts = job(tmp_path / "whole"), job(tmp_path / "parts")
    expected = whole.execute(context(tmp_path / "whole"))
    stop = After(signal=signal.SIGTERM)
    stop.steps = steps
    with pytest.raises(Interrupted):
        parts.execute(context(tmp_path / "parts", stop=stop))
    result = parts.execute(context(tmp_path / "parts"))
    assert result["kept"] == expected["kept"]
    assert parts.weights.read_bytes() == whole.weights.read_bytes()
    assert checks(parts.run) == checks(whole.run)


def test_a_run_that_resumes_earlier_forgets_later_weights(tmp_path):
    best = BestWeights(tmp_path, "rankme")
    best.consider(10, {"rankme": 3.0}, Weights(10))
    (tmp_path / "step-000000015").mkdir()
    best.consider(20, {"rankme": 9.0}, Weights(20))
    best.consider(30, {"rankme": 5.0}, Weights(30))
    best.consider(40, {"rankme": float("nan")}, Weights(40))
    best.consider(50, {}, Weights(50))
    assert best.step == 20
    # Killed, and continued after step 15: the check at step 20 now has another result.
    best.consider(20, {"rankme": 2.0}, Weights(-20))
    assert (best.step, best.record) == (10, {"rankme": 3.0})
    network = Weights(0)
    best.load_into(network)
    assert network.weight.item() == 10


def test_few_weights_are_kept_on_disk(tmp_path):
    best = BestWeights(tmp_path, "held_out_loss")
    (tmp_path / "step-000000025").mkdir()
    (tmp_path / "step-000000045").mkdir()
    for step in range(10, 101, 10):
        best.consider(step, {"held_out_loss": 1 / step}, Weights(step))
    assert [path.name for path in sorted(tmp_path.glob("best-*"))] == [
        "best-000000020.safetensors",
        "best-000000040.safetensors",
        "best-000000100.safetensors",
    ]


def test_checks_that_choose_weights_are_part_of_the_runs_identity(tmp_path):
    last = {"keep": "last"}
    often, logged = {"every": 0.25}, {"to": ["tensorboard"], "checkpoint": 1.0}
    assert (
        job(tmp_path, pretrain=last).run.hash == job(tmp_path, pretrain=last, watch=often).run.hash
    )
    assert job(tmp_path).run.hash != job(tmp_path, watch=often).run.hash
    assert job(tmp_path).run.hash == job(tmp_path, watch=logged).run.hash


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pretrain": {"keep_by": "accuracy"}}, "rankme"),
        ({"pretrain": {"keep": "last", "keep_by": "lidar"}}, "keep_by: lidar needs keep: best"),
        ({"pretrain": {"keep_by": "held_out_loss"}}, "'simsiam' do not compute held_out_loss"),
        (
            {"pretrain": {"keep_by": "lidar"}, "pretext": {"name": "rotation"}},
            "'rotation' do not compute lidar; choose from: rankme, alpha_req, knn",
        ),
        ({"pretrain": {"keep_by": "lidar"}, "watch": {"views": None}}, "set watch.views"),
    ],
)
def test_a_diagnostic_that_checks_do_not_compute_is_refused_with_the_recipe(changes, message):
    with pytest.raises(UserError, match=message) as error:
        recipe(**changes)
    assert str(error.value).startswith("tiny.yaml:1: ")
    assert "\n" not in str(error.value)


def test_a_diagnostic_that_the_network_does_not_allow_is_refused_before_training(tmp_path):
    narrow = job(tmp_path, backbone={"width": 8}, pretrain={"keep_by": "alpha_req"})
    with pytest.raises(UserError, match=r"cannot compute alpha_req.*at least 11 numbers"):
        narrow.execute(context(tmp_path))
    assert not (narrow.run.path / "metrics.jsonl").exists()
