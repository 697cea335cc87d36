"""A signal while a trained model is scored ends the process, and nothing is trained again."""

import signal

import pytest

from sslrun.recipe import parse
from sslrun.recipe.places import Located
from sslrun.stages.bench import CellBench
from sslrun.stages.context import Context
from sslrun.stages.evaluate import cells
from sslrun.stages.reporting import Reporter
from sslrun.training.device import compute

RECIPE = {
    "name": "tiny",
    "backbone": {"name": "mlp", "width": 16, "depth": 1},
    "data": {"name": "digits", "size": 8},
    "pretext": None,
    "finetune": {"steps": 6, "batch": 32, "lr": [0.01, 0.1]},
    "watch": {"checkpoint": 1e-9},
    "evaluate": {"digits": {"protocols": ["scratch"], "labels": [0.3]}},
}


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_signal_while_a_trained_model_is_scored(tmp_path, monkeypatch, split):
    recipe = parse(Located(RECIPE, {(): "tiny.yaml:1"}))

    def execute(root):
        (cell,) = cells(recipe, 0, root)
        context = Context(root, compute("cpu"), Reporter(quiet=True))
        result = cell.execute(context)
        return {key: result[key] for key in ("metrics", "lr", "tried", "flops")}, cell.run

    expected, _ = execute(tmp_path / "whole")
    honest = CellBench.outputs

    def interrupted(self, name, run):
        if name == split:
            self.context.stop._received(signal.SIGTERM, None)
        return honest(self, name, run)

    with monkeypatch.context() as patch:
        patch.setattr(CellBench, "outputs", interrupted)
        with pytest.raises(KeyboardInterrupt):
            execute(tmp_path / "parts")
    found, run = execute(tmp_path / "parts")
    assert found == expected
    text = (run.path / "metrics.jsonl").read_text()
    assert text.count('"step": 6,') == 2  # each learning rate ended once
