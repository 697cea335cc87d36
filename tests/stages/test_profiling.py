"""The profiler trace of `--profile`."""

import io
import json

import pytest
from rich.console import Console

from sslrun.recipe import parse
from sslrun.recipe.places import Located
from sslrun.stages.context import Context
from sslrun.stages.pretrain import Pretraining
from sslrun.stages.profiling import TRACED
from sslrun.stages.reporting import Reporter
from sslrun.training.device import compute

RECIPE = {
    "name": "tiny",
    "backbone": {"name": "mlp", "width": 8, "depth": 1},
    "pretext": "rotation",
    "data": {"name": "digits", "size": 8},
    "watch": {"every": 1000, "examples": 64},
}


@pytest.fixture
def pretrained(tmp_path):
    """Pretrain for a few steps with --profile; returns the job and the output."""

    def call(steps, profile=True):
        recipe = {**RECIPE, "pretrain": {"steps": steps, "batch": 16, "lr": 0.002}}
        job = Pretraining(parse(Located(recipe, {(): "tiny.yaml:1"})), 0, tmp_path)
        console = Console(file=io.StringIO(), width=400, soft_wrap=True)
        job.execute(Context(tmp_path, compute("cpu"), Reporter(console), profile=profile))
        return job, console.file.getvalue()

    return call


def test_ten_steps_are_traced_into_the_folder_of_the_run(pretrained):
    job, printed = pretrained(20)
    path = job.run.path / "trace.json"
    assert f"profile of {TRACED} steps" in printed
    assert str(path) in printed
    events = json.loads(path.read_text())["traceEvents"]
    steps = {event["name"] for event in events if event.get("name", "").startswith("ProfilerStep#")}
    assert len(steps) == TRACED
    assert any("addmm" in event.get("name", "") for event in events)
    _, again = pretrained(20)
    assert "is finished, so nothing is profiled; add --fresh" in again


def test_profiling_does_not_change_the_result_and_is_off_by_default(pretrained, tmp_path):
    job, _ = pretrained(18)
    weights = job.weights.read_bytes()
    job.run.clear()
    job, _ = pretrained(18, profile=False)
    assert job.weights.read_bytes() == weights
    assert not (job.run.path / "trace.json").exists()


def test_too_few_steps_are_reported(pretrained):
    job, printed = pretrained(4)
    assert "only 4 steps" in printed
    assert not (job.run.path / "trace.json").exists()
    job, printed = pretrained(9)
    assert "profile of 4 steps" in printed
    assert (job.run.path / "trace.json").exists()
