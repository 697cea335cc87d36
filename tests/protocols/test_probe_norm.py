"""The probe with batch norm below its head, as MAE's."""

import pytest
import torch
from torch import nn

from sslrun.errors import UserError
from sslrun.protocols.frozen import NormalizedHead, ProbeOptions
from sslrun.recipe import Sweep, parse
from sslrun.recipe.places import Located
from sslrun.stages.context import Context
from sslrun.stages.reporting import Reporter
from sslrun.stages.sweep import Plan, work
from sslrun.training.device import compute

SGD = {"steps": 150, "batch": 64, "optimizer": "sgd", "lr": 0.5, "precision": "fp32"}


def source(**probe):
    return {
        "name": "tiny",
        "backbone": {"name": "mlp", "width": 16},
        "data": {"name": "digits", "size": 8},
        "probe": {"solver": "sgd", "sgd": SGD, **probe},
        "finetune": {"steps": 1, "batch": 16, "lr": 1e-12, "precision": "fp32"},
        "evaluate": {"digits": {"protocols": ["probe", "lpft"], "task": {"augmentation": {}}}},
    }


def results(folder, recipe):
    plan = Plan.of(
        Sweep(name="tiny", rows={"tiny": parse(Located(recipe, {(): "tiny.yaml:1"}))}), folder
    )
    failures = work([plan], Context(folder, compute("cpu"), Reporter(quiet=True)))
    assert not failures, failures
    return {cell.protocol: cell.run.result["metrics"] for _, cell in plan.cells}


def test_the_norm_folds_into_the_linear_map():
    torch.manual_seed(0)
    head = NormalizedHead(nn.Linear(6, 3))
    scales = torch.logspace(-3, 1, 6)
    for _ in range(5):
        head(5 + scales * torch.randn(32, 6))
    head.eval()
    x = 5 + scales * torch.randn(8, 6)
    torch.testing.assert_close(head.folded()(x), head(x), rtol=1e-4, atol=1e-4)
    assert not [name for name, _ in head.norm.named_parameters()]


def test_a_probe_with_norm_scores_and_its_head_starts_lpft(tmp_path):
    plain, normed = (results(tmp_path, source(norm=norm)) for norm in (False, True))
    assert normed["probe"]["test"]["accuracy"] > 50
    assert normed["probe"]["test"] != plain["probe"]["test"]
    # A step of fine-tuning that changes nothing has the probe's scores, so its head was kept.
    assert normed["lpft"]["test"] == normed["probe"]["test"]


def test_norm_changes_no_identity_unless_it_is_set():
    assert ProbeOptions(solver="sgd").non_defaults() == {"solver": "sgd"}
    assert ProbeOptions(solver="sgd", norm=True).non_defaults() == {"solver": "sgd", "norm": True}


def test_norm_without_sgd_is_an_error_with_its_place():
    recipe = source(norm=True)
    del recipe["probe"]["solver"]
    with pytest.raises(UserError, match=r"tiny.yaml:1.*norm: true needs solver: sgd"):
        parse(Located(recipe, {(): "tiny.yaml:1"}))
