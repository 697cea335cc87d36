"""Transfer from a weight file to a higher resolution."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from sslrun.backbones import build_backbone
from sslrun.backbones.vit import interpolate_positions
from sslrun.data.examples import Batch
from sslrun.data.specs import ImageSpec
from sslrun.errors import UserError
from sslrun.recipe import Sweep, parse
from sslrun.recipe.places import Located
from sslrun.stages.bench import CellBench
from sslrun.stages.context import Context
from sslrun.stages.reporting import Reporter
from sslrun.stages.sweep import Plan, work
from sslrun.training.device import compute

VIT = {"patch": 4, "depth": 1, "width": 16, "heads": 2}
HALF = [0.5, 0.5, 0.5]


@pytest.fixture
def weights(tmp_path):
    """Write a ViT's weights as timm does: with a classifier, without pixel statistics."""
    torch.manual_seed(0)
    backbone = build_backbone("vit-tiny", VIT, ImageSpec(8))
    torch.nn.init.normal_(backbone.pos_embed)
    state = {
        name: tensor.clone()
        for name, tensor in backbone.state_dict().items()
        if name not in ("mean", "std")
    }
    path = tmp_path / "vit.safetensors"
    save_file({**state, "head.weight": torch.zeros(10, 16), "head.bias": torch.zeros(10)}, path)
    return path


def plan(tmp_path, weights, size, protocol="finetune", normalized=True, **more):
    options = {
        "name": "tiny",
        "backbone": {"name": "vit-tiny", **VIT},
        "data": {"name": "digits", "size": 8},
        "weights": {"file": str(weights), **({"mean": HALF, "std": HALF} if normalized else {})},
        "finetune": {"steps": 1, "batch": 8, "lr": 1e-12, "precision": "fp32"},
        "evaluate": {"digits": {"protocols": [protocol], "labels": [0.1], "task": {"size": size}}},
        **more,
    }
    return Plan.of(
        Sweep(name="tiny", rows={"tiny": parse(Located(options, {(): "tiny.yaml:1"}))}),
        tmp_path / "runs",
    )


def done(planned, tmp_path):
    failures = work([planned], Context(tmp_path / "runs", compute("cpu"), Reporter(quiet=True)))
    assert not failures, failures
    ((_, cell),) = planned.cells
    return cell


def test_positions_are_interpolated_once_and_then_learn_at_the_new_size(tmp_path, weights):
    cell = done(plan(tmp_path, weights, 24), tmp_path)
    tuned, original = load_file(cell.run.path / "backbone.safetensors"), load_file(weights)
    assert tuned["pos_embed"].shape == (1, 1 + 6 * 6, 16)
    torch.testing.assert_close(tuned["pos_embed"][:, :1], original["pos_embed"][:, :1])
    torch.testing.assert_close(
        tuned["pos_embed"][:, 1:], interpolate_positions(original["pos_embed"][:, 1:], 2, 6, 6)
    )
    torch.testing.assert_close(
        tuned["patch_embed.proj.weight"], original["patch_embed.proj.weight"]
    )
    assert tuned["mean"].tolist() == tuned["std"].tolist() == HALF
    assert cell.run.result["pretext"] == "vit.safetensors"
    assert json.loads((cell.run.path / "identity.json").read_text())["origin"]["mean"] == HALF


def test_features_use_the_weights_and_normalization_of_the_file(tmp_path, weights):
    ((_, cell),) = plan(tmp_path, weights, 8, "knn").cells
    bench = CellBench(cell, Context(tmp_path, compute("cpu")))
    backbone_ = bench.backbone().eval()
    bare = build_backbone("vit-tiny", VIT, ImageSpec(8)).eval()
    state = {
        name: tensor for name, tensor in load_file(weights).items() if not name.startswith("head")
    }
    bare.load_state_dict(state, strict=False)
    bare.mean.zero_()
    bare.std.fill_(1.0)
    images = bench.task.inputs(Batch(bench.examples("test").inputs[:5], None))
    torch.testing.assert_close(backbone_(images).pooled, bare(2 * images - 1).pooled)
    assert plan(tmp_path, weights, 8, "knn", normalized=False).cells[0][1].run.hash != cell.run.hash


def test_invalid_weight_files_are_errors(tmp_path, weights):
    with pytest.raises(UserError, match=r"nothing\.safetensors: no checkpoint there"):
        plan(tmp_path, tmp_path / "nothing.safetensors", 8)
    with pytest.raises(
        UserError,
        match=r"weights: can't be combined with pretraining: give either them or 'pretext'",
    ):
        plan(tmp_path, weights, 8, pretext="rotation", pretrain={"steps": 1, "lr": 0.1})
    recipe = parse(
        Located(
            {"name": "x", "backbone": "vit-tiny", "data": "digits", "weights": "w"},
            {(): "x.yaml:1"},
        )
    )
    assert parse(Located(recipe.resolved(), {(): "x.yaml:1"})) == recipe
