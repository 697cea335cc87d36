"""LP-FT starts where its probe ends."""

import pytest

from sslrun.protocols.base import protocols
from sslrun.recipe import Sweep, parse
from sslrun.recipe.places import Located
from sslrun.stages.context import Context
from sslrun.stages.reporting import Reporter
from sslrun.stages.sweep import Plan, work
from sslrun.training.device import compute

IMAGES = {
    "data": {"name": "digits", "size": 8},
    "evaluate": {"digits": {"protocols": ["probe", "lpft"], "labels": [0.1]}},
}
TEXTS = {
    "data": {"name": "world", "documents": 30, "length": 48, "tokenizer": {"vocab": 200}},
    "evaluate": {
        "sentiment": {
            "data": {"name": "world-sentiment", "train": 60, "held_out": 60},
            "protocols": ["probe", "lpft"],
            "task": {"pool": "mean"},
        }
    },
}
SMALL = {"depth": 1, "width": 16, "positions": 64}
BACKBONES = [
    ({"name": "resnet18", "stem": "small", "channels": 4}, IMAGES),
    ({"name": "vit-tiny", "patch": 4, "depth": 1, "width": 32, "heads": 2}, IMAGES),
    ({"name": "mlp", "width": 32}, IMAGES),
    ({"name": "bert-tiny", **SMALL}, TEXTS),
    ({"name": "gpt-tiny", **SMALL}, TEXTS),
    ({"name": "lstm", "depth": 1, "width": 16}, TEXTS),
    ({"name": "elmo", "width": 16}, TEXTS),
]
NO_RATE = 1e-30
"""Learning rate whose steps are lost in the rounding of any weight."""


def scores(folder, backbone, recipe, precision, lpft):
    """The metrics of the probe and of LP-FT without a learning rate, per split."""
    source = {
        "name": "tiny",
        "backbone": backbone,
        **recipe,
        "probe": {"precision": precision},
        "finetune": {"steps": 3, "batch": 16, "lr": NO_RATE, "precision": precision},
        "lpft": lpft,
    }
    parsed = parse(Located(source, {(): "tiny.yaml:1"}))
    plan = Plan.of(Sweep(name="tiny", rows={"tiny": parsed}), folder)
    failures = work([plan], Context(folder, compute("cpu"), Reporter(quiet=True)))
    assert not failures, failures
    return [cell.run.result["metrics"] for _, cell in plan.cells]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("backbone", "recipe"), BACKBONES, ids=lambda case: case.get("name"))
def test_lpft_without_a_learning_rate_is_its_probe(tmp_path, backbone, recipe, precision):
    probe, lpft = scores(tmp_path, backbone, recipe, precision, {})
    assert lpft == probe


def test_moving_batch_statistics_would_leave_the_probe(tmp_path):
    backbone, recipe = BACKBONES[0]
    probe, lpft = scores(tmp_path, backbone, recipe, "fp32", {"frozen_norm": False})
    assert lpft != probe


@pytest.mark.parametrize("name", ["finetune", "lpft", "scratch"])
def test_gradients_are_clipped_only_where_a_recipe_says_so(name):
    assert protocols[name].Options().clip is None
