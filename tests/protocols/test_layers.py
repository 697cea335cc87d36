"""Probes of several layers: what they read, what they choose, and what they refuse."""

import pytest
import torch

from sslrun.backbones import build_backbone
from sslrun.data.specs import ImageSpec
from sslrun.errors import UserError
from sslrun.protocols.layers import LayerReader, read_layers
from sslrun.protocols.logistic import LogisticOptions, LogisticRegression
from sslrun.recipe import Sweep, parse
from sslrun.recipe.places import Located
from sslrun.results.record import RunRecord
from sslrun.results.table import Table
from sslrun.stages.bench import CellBench
from sslrun.stages.context import Context
from sslrun.stages.reporting import Reporter
from sslrun.stages.sweep import Plan, work
from sslrun.training.device import compute

SHAPE = {"patch": 4, "width": 24, "heads": 3, "depth": 5}
VIT = {"name": "vit-tiny", **SHAPE}
SGD = {"solver": "sgd", "sgd": {"steps": 3, "batch": 16, "lr": 0.1, "precision": "fp32"}}


def recipe(protocols=("probe",), backbone=VIT, evaluation=None, **more):
    return {
        "name": "tiny",
        "backbone": backbone,
        "data": {"name": "digits", "size": 8},
        "evaluate": {"digits": {"protocols": list(protocols), **(evaluation or {})}},
        **more,
    }


def read(source):
    return parse(Located(source, {(): "tiny.yaml:1"}))


def run(folder, source):
    """Run a recipe and return its cells by protocol."""
    plan = Plan.of(Sweep(name="tiny", rows={"tiny": read(source)}), folder)
    context = Context(folder, compute("cpu"), Reporter(quiet=True))
    failures = work([plan], context)
    assert not failures, failures
    return {cell.protocol: cell for _, cell in plan.cells}, context


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_layers_of_a_vit_are_pooled_after_the_final_norm(pool):
    options = {**SHAPE, "pool": pool, "registers": 2}
    vit = build_backbone("vit-tiny", options, ImageSpec(8)).eval()
    images = torch.rand(3, 3, 8, 8)
    layers = vit.pooled_layers(images)
    assert torch.equal(layers[-1], vit(images).pooled)
    shallow = build_backbone("vit-tiny", options, ImageSpec(8)).eval()
    shallow.load_state_dict(vit.state_dict())
    del shallow.blocks[3:]
    assert torch.equal(layers[2], shallow(images).pooled)


def test_layers_of_a_resnet_are_the_averages_of_its_stages():
    resnet = build_backbone("resnet18", {"channels": 8}, ImageSpec(32)).eval()
    images = torch.rand(2, 3, 32, 32)
    layers = resnet.pooled_layers(images)
    assert tuple(layer.shape[1] for layer in layers) == resnet.layer_widths == (8, 16, 32, 64)
    assert torch.equal(layers[-1], resnet(images).pooled)
    stem = resnet.maxpool(resnet.relu(resnet.bn1(resnet.conv1(resnet.normalize(images)))))
    assert torch.equal(layers[0], resnet.layer1(stem).mean(dim=(2, 3)))


def test_a_reader_puts_layers_side_by_side_in_the_order_asked_for():
    resnet = build_backbone("resnet18", {"channels": 8}, ImageSpec(32)).eval()
    images = torch.rand(2, 3, 32, 32)
    reader = LayerReader(resnet, (3, 0))
    layers = resnet.pooled_layers(images)
    assert torch.equal(reader(images).pooled, torch.cat([layers[3], layers[0]], dim=1))
    assert reader.width == 72


def test_indices_of_layers():
    assert read_layers(None, 5, "") == ()
    assert read_layers("last4", 6, "") == (2, 3, 4, 5)
    assert read_layers("best", 3, "") == (0, 1, 2)
    assert read_layers((0, -1), 5, "") == (0, 4)
    with pytest.raises(UserError, match="layers 0 to 4, but not 5"):
        read_layers((5,), 5, "'x'")
    with pytest.raises(UserError, match="layers 0 to 2, but not -4"):
        read_layers("last4", 3, "'x'")


def test_the_best_layer_has_the_highest_validation_score_and_the_scores_of_its_own_probe(tmp_path):
    options = {"l2_count": 2, "iterations": 30}
    best = run(tmp_path, recipe(probe={"layers": "best", **options}))[0]["probe"].run.result
    curve = best["layers"]
    assert list(curve) == ["0", "1", "2", "3", "4"]
    chosen = str(best["layer"])
    assert curve[chosen]["val"] == max(scores["val"] for scores in curve.values())
    assert best["metrics"]["test"]["accuracy"] == curve[chosen]["test"]
    assert len({scores["test"] for scores in curve.values()}) > 1
    alone = run(tmp_path, recipe(probe={"layers": [best["layer"]], **options}))[0]["probe"]
    assert alone.run.result["metrics"] == best["metrics"]
    assert "layers" not in alone.run.result


def test_last4_is_a_probe_of_the_last_four_blocks_side_by_side(tmp_path):
    options = {"l2_count": 1, "l2_min": 0.01}
    cells, context = run(tmp_path, recipe(probe={"layers": "last4", **options}))
    bench = CellBench(cells["probe"], context)
    (batch,) = bench.examples("train").batches(
        [torch.arange(len(bench.examples("train")))], torch.device("cpu")
    )
    with torch.inference_mode():
        layers = bench.backbone().eval().pooled_layers(batch.inputs / 255)
    expected = torch.cat(layers[1:], dim=1)
    x, y = bench.features("train", (1, 2, 3, 4))
    torch.testing.assert_close(x, expected, atol=1e-5, rtol=1e-5)
    head = LogisticRegression(LogisticOptions(**options)).fit_one((x, y), 10, 0.01)
    with torch.inference_mode():
        outputs = head(bench.vectors("test", (1, 2, 3, 4)))
    assert bench.score("test", outputs) == cells["probe"].run.result["metrics"]["test"]


def test_layers_share_one_pass_and_leave_other_protocols_their_features(tmp_path, monkeypatch):
    passes = []
    from sslrun.stages import bench as module

    def counted(*arguments):
        passes.append(arguments)
        return extract(*arguments)

    extract = module.extract
    monkeypatch.setattr(module, "extract", counted)
    probe = {"layers": "best", "l2_count": 1, "iterations": 20}
    both, _ = run(tmp_path / "a", recipe(["probe", "fewshot"], probe=probe, fewshot={"shots": [5]}))
    read = [arguments[0] for arguments in passes]
    assert sum(isinstance(backbone, LayerReader) for backbone in read) == 3  # train, val, test
    alone, _ = run(tmp_path / "b", recipe(["fewshot"], fewshot={"shots": [5]}))
    assert both["fewshot"].run.result["metrics"] == alone["fewshot"].run.result["metrics"]


def test_knn_and_sgd_choose_a_layer_and_refit(tmp_path):
    source = recipe(
        ["knn", "probe"],
        backbone={**VIT, "depth": 2},
        evaluation={"labels": [0.1], "refit": True},
        knn={"layers": "best"},
        probe={"layers": "best", **SGD},
    )
    cells, _ = run(tmp_path, source)
    for cell in cells.values():
        result = cell.run.result
        assert list(result["layers"]) == ["0", "1"]
        chosen = result["layers"][str(result["layer"])]
        assert result["metrics"]["val"]["accuracy"] == chosen["val"]
        assert result["labelled"] == 136  # of training and validation, a tenth of each class


def test_the_table_of_layers_has_a_row_for_each(tmp_path):
    cells, _ = run(tmp_path, recipe(probe={"layers": "best", "l2_count": 1, "iterations": 20}))
    result = cells["probe"].run.result
    table = Table.of_layers([RunRecord(cells["probe"].run.path)])
    assert [row.protocol for row in table.rows] == [f"probe, layer {layer}" for layer in range(5)]
    values = [cell.mean for cell in table.cells.values()]
    assert values == [scores["test"] for scores in result["layers"].values()]
    with pytest.raises(UserError, match=r"probe\.layers"):
        Table.of_layers([])


def test_impossible_layers_are_refused_when_the_recipe_is_read():
    with pytest.raises(UserError, match=r"'probe' as configured needs .*'layers'"):
        read(recipe(backbone={"name": "mlp"}, probe={"layers": "best"}))
    with pytest.raises(UserError, match="lpft starts from the head of probe"):
        read(recipe(["lpft"], probe={"layers": "last4"}))
    source = recipe(probe={"layers": "best"})
    source["data"]["validation"] = 0
    with pytest.raises(UserError, match=r"its layer \(probe\.layers: best\) and its L2 strength"):
        read(source)


def test_a_missing_layer_is_refused_before_pretraining(tmp_path):
    source = recipe(
        probe={"layers": [7]},
        pretext={"name": "rotation"},
        pretrain={"steps": 1, "batch": 8},
    )
    plan = Plan.of(Sweep(name="tiny", rows={"tiny": read(source)}), tmp_path)
    (cell,) = (cell for _, cell in plan.cells)
    (pretraining,) = cell.needs
    with pytest.raises(UserError, match=r"probe\.layers: 'vit-tiny' has layers 0 to 4, but not 7"):
        pretraining.execute(Context(tmp_path, compute("cpu"), Reporter(quiet=True)))
