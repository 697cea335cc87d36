"""Refitting on train + validation, and going without validation."""

import pytest
import torch

from sslrun.backbones.image import ImageBackbone
from sslrun.data import splits as splits_module
from sslrun.errors import UserError
from sslrun.recipe import Sweep, parse
from sslrun.recipe.places import Located, read_yaml
from sslrun.stages.bench import CellBench
from sslrun.stages.context import Context
from sslrun.stages.reporting import Reporter
from sslrun.stages.sweep import Plan, work
from sslrun.training.device import compute

SGD = {"solver": "sgd", "sgd": {"steps": 3, "batch": 16, "lr": 0.1, "precision": "fp32"}}
FINETUNE = {"steps": 3, "batch": 16, "lr": [1e-3, 1e-2], "precision": "fp32"}
PROTOCOLS = ["knn", "probe", "fewshot", "finetune", "lpft", "scratch", "svm"]


def recipe(protocols=PROTOCOLS, data=None, evaluation=None, **more):
    return {
        "name": "tiny",
        "backbone": {"name": "mlp", "width": 16},
        "data": {"name": "digits", "size": 8, **(data or {})},
        "probe": {"l2_count": 3},
        "finetune": FINETUNE,
        "fewshot": {"shots": [5]},
        "evaluate": {"digits": {"protocols": protocols, **(evaluation or {})}},
        **more,
    }


def planned(folder, source):
    parsed = parse(Located(source, {(): "tiny.yaml:1"}))
    return Plan.of(Sweep(name="tiny", rows={"tiny": parsed}), folder)


def results(folder, source):
    plan = planned(folder, source)
    failures = work([plan], Context(folder, compute("cpu"), Reporter(quiet=True)))
    assert not failures, failures
    return {cell.protocol: cell.run.result for _, cell in plan.cells}


def test_a_refit_learns_from_validation_too_with_as_many_labels(tmp_path):
    few = results(tmp_path, recipe(evaluation={"labels": [0.1]}))
    refit = results(tmp_path, recipe(evaluation={"labels": [0.1], "refit": True}))
    for protocol in set(PROTOCOLS) - {"fewshot"}:
        assert few[protocol]["labelled"] == 120  # a tenth of each class of 1,210 images
        assert refit[protocol]["labelled"] == 136  # of 1,346
    for protocol in ("probe", "finetune", "lpft", "svm"):  # chosen before the refit
        assert refit[protocol]["metrics"]["val"] == few[protocol]["metrics"]["val"]
        assert refit[protocol]["metrics"]["test"] != few[protocol]["metrics"]["test"]
    for protocol in ("knn", "fewshot"):  # nothing is chosen, and validation was learned from
        assert set(refit[protocol]["metrics"]) == {"test"}
    assert refit["finetune"]["tried"] == few["finetune"]["tried"]


def test_a_refit_with_nothing_to_choose_equals_learning_without_validation(tmp_path, monkeypatch):
    # Otherwise inputs are normalized by the training split, which is not the same.
    monkeypatch.setattr(ImageBackbone, "fit_inputs", lambda self, examples: None)
    protocols = ["knn", "probe", "finetune", "scratch"]
    single = {"probe": SGD, "finetune": {**FINETUNE, "lr": 0.01}}
    refit = results(tmp_path, recipe(protocols, evaluation={"refit": True}, **single))
    none = results(tmp_path, recipe(protocols, {"validation": 0}, **single))
    for protocol in protocols:
        assert refit[protocol]["metrics"] == none[protocol]["metrics"]
        assert none[protocol]["labelled"] == 1346
        assert set(none[protocol]["metrics"]) == {"test"}


def test_the_features_of_a_refit_are_those_of_its_examples(tmp_path):
    plan = planned(tmp_path, recipe(["probe"], evaluation={"labels": [0.2], "refit": True}))
    ((_, cell),) = plan.cells
    bench = CellBench(cell, Context(tmp_path, compute("cpu"), Reporter(quiet=True)))
    x, y = bench.features("train+val")
    examples = bench.examples("train+val")
    assert torch.equal(y, examples.labels)
    (batch,) = examples.batches([torch.arange(len(examples))], torch.device("cpu"))
    with torch.inference_mode():
        own = bench.backbone().eval()(bench.task.inputs(batch)).pooled
    torch.testing.assert_close(x, own)


def test_lpft_chooses_from_a_probe_that_has_not_seen_validation(tmp_path):
    plan = planned(tmp_path, recipe(["probe", "lpft"], evaluation={"refit": True}))
    lpft = next(cell for _, cell in plan.cells if cell.protocol == "lpft")
    assert lpft.refits
    assert lpft.follows.refits
    assert not lpft.chooses_from.refits
    assert lpft.chooses_from.run.hash != lpft.follows.run.hash
    assert lpft.chooses_from in lpft.needs
    one_rate = recipe(["lpft"], evaluation={"refit": True}, finetune={**FINETUNE, "lr": 0.01})
    ((_, lpft),) = planned(tmp_path, one_rate).cells
    assert lpft.chooses_from is None


def test_refit_and_validation_are_part_of_the_identity(tmp_path):
    def hashes(**changes):
        return [cell.run.hash for _, cell in planned(tmp_path, recipe(**changes)).cells]

    usual = hashes()
    assert hashes(evaluation={"refit": False}) == usual
    assert not set(hashes(evaluation={"refit": True})) & set(usual)
    assert not set(hashes(data={"validation": 0.2})) & set(usual)


REFUSED = [
    ("probe", {}, "probe chooses its L2 strength (probe.l2_count: 3) on validation"),
    ("finetune", {}, "finetune chooses its learning rate (finetune.lr: [0.001, 0.01])"),
    ("scratch", {}, "scratch chooses its learning rate (finetune.lr: [0.001, 0.01])"),
    ("lpft", {"finetune": {"steps": 3, "lr": 0.1}}, "probe chooses its L2 strength"),
    ("scratch", {"finetune": {"steps": 3, "keep": "best"}}, "its best epoch (finetune.keep: best)"),
    ("svm", {}, "svm chooses its hyperparameter"),
]


@pytest.mark.parametrize(("protocol", "more", "message"), REFUSED)
def test_nothing_can_be_chosen_without_validation(tmp_path, protocol, more, message):
    file = tmp_path / "tiny.yaml"
    options = "\n".join(f"{key}: {value}" for key, value in more.items())
    file.write_text(
        "name: tiny\nbackbone: {name: mlp, width: 16}\n"
        "data: {name: digits, size: 8, validation: 0}\n"
        "evaluate:\n  digits:\n"
        f"    protocols: [{protocol}]\n"
        "finetune: {steps: 3, batch: 16, lr: [0.001, 0.01]}\nprobe: {l2_count: 3}\n"
        if not more
        else "name: tiny\nbackbone: {name: mlp, width: 16}\n"
        "data: {name: digits, size: 8, validation: 0}\n"
        "evaluate:\n  digits:\n"
        f"    protocols: [{protocol}]\n{options}\n"
    )
    with pytest.raises(UserError) as error:
        parse(read_yaml(file))
    text = str(error.value)
    assert text.startswith(f"{file}:6: evaluate.digits.protocols: ")
    assert message in text
    assert "data.validation is 0: give one value, or a share" in text
    assert "\n" not in text


def test_refit_needs_validation_and_no_early_stopping():
    with pytest.raises(UserError, match=r"refit adds the validation split, but data.validation is"):
        parse(Located(recipe(["knn"], {"validation": 0}, {"refit": True}), {(): "tiny.yaml:1"}))
    best = recipe(["finetune"], evaluation={"refit": True}, finetune={**FINETUNE, "keep": "best"})
    with pytest.raises(UserError, match=r"finetune has no validation left .*: take keep: last"):
        parse(Located(best, {(): "tiny.yaml:1"}))


def pretrained(folder, **data):
    schedule = {"steps": 3, "batch": 64, "lr": 1e-3, "compile": "off"}
    source = {
        **recipe(["knn"], data),
        "pretext": {"name": "simclr", "size": 8},
        "pretrain": {**schedule, "precision": "fp32"},
        "watch": {"examples": 64},
    }
    plan = planned(folder, source)
    failures = work([plan], Context(folder, compute("cpu"), Reporter(quiet=True)))
    assert not failures, failures
    return next(job.run.result for job in plan.jobs if job.run.stage == "pretrain")


@pytest.mark.parametrize("data", [{}, {"validation": 0}, {"pretrain_on": "all"}])
def test_pretraining_sees_the_images_that_the_recipe_says(tmp_path, monkeypatch, data):
    seen = []
    pretrain = splits_module.Splits.pretrain.func

    def recorded(self):
        seen.append(len(pretrain(self)))
        return pretrain(self)

    monkeypatch.setattr(splits_module.Splits, "pretrain", property(recorded))
    result = pretrained(tmp_path, **data)
    assert set(seen) == {1346 if data else 1210}
    assert 0 <= result["watched"]["knn"] <= 100
