"""Pretraining that starts from weights, or extends a shorter run."""

import json
import signal

import pytest
import torch
from safetensors.torch import load_file

from sslrun.backbones.weights import WEIGHTS, load_backbone
from sslrun.errors import UserError
from sslrun.recipe import parse
from sslrun.recipe.places import Located
from sslrun.stages.context import Context, Interrupted, Stop
from sslrun.stages.evaluate import cells
from sslrun.stages.lineage import find_init
from sslrun.stages.pretrain import Pretraining
from sslrun.stages.reporting import Reporter
from sslrun.training.device import compute
from sslrun.training.loop import train

STEPS_AN_EPOCH = 18


def recipe(epochs=1, **changes):
    values = {
        "name": "tiny",
        "backbone": {"name": "mlp", "width": 8, "depth": 1},
        "pretext": "rotation",
        "data": {"name": "digits", "size": 8},
        "pretrain": {"epochs": epochs, "batch": 64, "lr": 0.002, **changes.pop("pretrain", {})},
        "evaluate": {"digits": {"protocols": ["knn"]}},
        "watch": {"every": 10, "examples": 64},
        **changes,
    }
    return parse(Located(values, {(): "tiny.yaml:1"}))


class Soon(Stop):
    """A stop request after a number of steps."""

    steps = 5

    @property
    def due(self):
        self.steps -= 1
        return self.steps <= 0


def context(root, **options):
    return Context(root, compute("cpu"), Reporter(quiet=True), **options)


def pretrain(root, loaded, extend=False, **options):
    job = Pretraining(loaded, 0, root)
    job = job.extending() if extend else job
    job.execute(context(root, **options))
    return job


def weights(job):
    return load_file(job.weights)


def log(job):
    return [json.loads(line) for line in (job.run.path / "metrics.jsonl").read_text().splitlines()]


def test_an_extension_goes_on_from_the_last_state_with_a_warm_restart(tmp_path):
    short = pretrain(tmp_path, recipe(1))
    longer = pretrain(tmp_path, recipe(3), extend=True)
    assert longer.parent.hash == short.run.hash
    records = [record for record in log(longer) if "lr" in record]
    assert records[-1]["step"] == 3 * STEPS_AN_EPOCH
    assert all(record["step"] > STEPS_AN_EPOCH for record in records)
    result = longer.run.result
    assert result["extends"] == short.run.hash
    assert result["steps"] == 3 * STEPS_AN_EPOCH
    assert result["seconds"] > short.run.result["seconds"]
    assert not all(torch.equal(weights(short)[name], w) for name, w in weights(longer).items())
    # The evaluation of the longer recipe finds the extension.
    (cell,) = cells(recipe(3), 0, tmp_path)
    assert cell.origin.identity == {"pretrain": longer.run.hash}
    assert cell.origin.exists


def test_the_first_step_of_an_extension_has_the_rate_of_a_first_step(tmp_path, monkeypatch):
    pretrain(tmp_path, recipe(1))
    job = Pretraining(recipe(2), 0, tmp_path).extending()
    rates = []

    def spy(training, examples, seed):
        for step in train(training, examples, seed):
            rates.append(step.lr)
            yield step

    monkeypatch.setattr("sslrun.stages.fit.train", spy)
    job.execute(context(tmp_path))
    assert len(rates) == STEPS_AN_EPOCH
    assert rates[0] == pytest.approx(0.002)
    assert rates == sorted(rates, reverse=True)


def test_an_interrupted_extension_ends_with_the_same_bits(tmp_path):
    results = []
    for name in ("whole", "stopped"):
        root = tmp_path / name
        pretrain(root, recipe(1))
        if name == "stopped":
            with pytest.raises(Interrupted):
                pretrain(root, recipe(2), True, stop=Soon(signal=signal.SIGTERM))
        results.append(weights(pretrain(root, recipe(2), extend=True)))
    for name, tensor in results[0].items():
        assert torch.equal(tensor, results[1][name])


def test_extensions_that_are_not_possible_are_errors(tmp_path):
    with pytest.raises(UserError, match="there is no finished run of recipe 'tiny'"):
        pretrain(tmp_path, recipe(2), extend=True)
    loaded = recipe(1, watch={"every": 10, "examples": 64, "keep_state": False})
    pretrain(tmp_path, loaded)
    with pytest.raises(UserError, match=r"kept no state .*keep_state: false.*give --from"):
        pretrain(tmp_path, recipe(2), extend=True)
    with pytest.raises(UserError, match="differs in a shorter pretraining only"):
        pretrain(tmp_path, recipe(2, pretrain={"lr": 0.1}), extend=True)


def test_a_shorter_finished_run_is_offered(tmp_path, capsys):
    short = pretrain(tmp_path, recipe(1))
    job = Pretraining(recipe(2), 0, tmp_path)
    job.execute(Context(tmp_path, compute("cpu")))
    said = capsys.readouterr()
    assert f"{short.run.path} is a finished, shorter run" in " ".join((said.out + said.err).split())


def test_pretraining_starts_from_the_weights_of_a_run(tmp_path):
    first = pretrain(tmp_path, recipe(1))
    # At a rate of almost zero the parameters stay where they start.
    started = recipe(1, pretrain={"init": str(first.run.path), "lr": 1e-12})
    second = pretrain(tmp_path, started)
    assert second.run.hash != first.run.hash
    assert second.run.result["init"] == str(first.run.path)
    for name, parameter in load_backbone(second.run.path).named_parameters():
        torch.testing.assert_close(parameter.data, weights(first)[name], atol=1e-6, rtol=0)


def test_the_hash_covers_the_weights_and_not_their_place(tmp_path):
    first = pretrain(tmp_path / "a", recipe(1))
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes((first.run.path / WEIGHTS).read_bytes())
    by_folder = Pretraining(recipe(1, pretrain={"init": str(first.run.path)}), 0, tmp_path)
    by_file = Pretraining(recipe(1, pretrain={"init": str(copy)}), 0, tmp_path)
    assert by_folder.run.hash == by_file.run.hash


def test_weights_that_do_not_exist_are_errors(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"tiny.yaml:1.*init.*no checkpoint at nowhere"):
        recipe(1, pretrain={"init": "nowhere"})
    monkeypatch.setattr("sslrun.stages.lineage.reach_hub", lambda: False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="nobody/nothing is not on this machine and the hub"):
        find_init("hub:nobody/nothing")
