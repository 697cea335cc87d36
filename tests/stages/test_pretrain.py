"""Pretraining as a stage: periodic evaluation after a resume."""

import json
import signal

import pytest

from sslrun.recipe import parse
from sslrun.recipe.places import Located
from sslrun.stages.context import Context, Interrupted, Stop
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
