"""An evaluation in several processes: only the first one writes."""

import pytest

from sslrun import distributed
from sslrun.recipe import parse
from sslrun.recipe.places import Located
from sslrun.stages.context import Context
from sslrun.stages.evaluate import cells
from sslrun.stages.reporting import Reporter
from sslrun.training.device import compute

RECIPE = {
    "name": "tiny",
    "backbone": {"name": "mlp", "width": 8, "depth": 1},
    "data": {"name": "digits", "size": 8},
    "finetune": {"steps": 2, "batch": 32, "lr": 0.01},
    "evaluate": {"digits": {"protocols": ["probe", "finetune", "scratch"], "labels": [0.1]}},
}


@pytest.mark.parametrize("protocol", ["probe", "fewshot", "finetune"])
def test_only_the_first_process_writes(protocol, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    (cell, *_) = cells(parse(Located(RECIPE, {(): "tiny.yaml:1"})), 0, tmp_path, [protocol])
    assert (
        cell.execute(Context(tmp_path, compute("cpu"), Reporter(quiet=True)))["metrics"]["test"][
            "accuracy"
        ]
        > 0
    )
    assert not list(tmp_path.rglob("*"))
