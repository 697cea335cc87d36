"""Pretraining as a stage: periodic evaluation after a resume."""

import json
import signal
from dataclasses import replace

import pytest

from sslrun.recipe import parse
from sslrun.recipe.places import Located
from sslrun.stages.context import Context, Interrupted, Stop
from sslrun.stages.devices import describe_begun
from sslrun.stages.pretrain import Pretraining
from sslrun.stages.reporting import Reporter
from sslrun.training.device import compute

RECIPE = {
    "name": "tiny",
    "backbone": {"name": "mlp", "width": 8, "depth": 1},
    "pretext": "rotation",
    "data": {"name": "digits", "size": 8},
    "pretrain": {"epochs": 3, "batch": 64, "lr": 0.002},
    "watch": {"every": 1, "examples": 64},
}


class Soon(Stop):
    """A stop request after a number of steps."""

    steps = 20

    @property
    def due(self):
        self.steps -= 1
        return self.steps <= 0


def test_a_resumed_run_evaluates_at_the_same_steps_as_an_uninterrupted_one(tmp_path):
    job = Pretraining(parse(Located(RECIPE, {(): "tiny.yaml:1"})), 0, tmp_path)
    quiet = Reporter(quiet=True)
    with pytest.raises(Interrupted):
        job.execute(Context(tmp_path, compute("cpu"), quiet, stop=Soon(signal=signal.SIGTERM)))
    job.execute(Context(tmp_path, compute("cpu"), quiet))
    records = [
        json.loads(line) for line in (job.run.path / "metrics.jsonl").read_text().splitlines()
    ]
    assert [record["step"] for record in records if "knn" in record] == [18, 36, 54]


def test_a_run_begun_on_another_number_of_devices_is_named(tmp_path):
    """Rotation's random views make the result depend on the number of devices."""
    one = Pretraining(parse(Located(RECIPE, {(): "tiny.yaml:1"})), 0, tmp_path)
    eight = replace(one, devices=8)

    def begun():
        return describe_begun(lambda count: replace(one, devices=count), one.run.path.parent)

    assert begun() is None
    eight.run.start({}, {})
    assert begun() is None  # it has no checkpoint, so nothing is lost
    eight.run.checkpoints.mkdir()
    assert begun().startswith(f"{eight.run.path} was begun on 8 device(s)")
    assert "--gpus 8" in begun()
    one.run.path.mkdir()
    assert begun() is None
