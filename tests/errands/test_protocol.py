"""A protocol without a head and without vectors, from a file outside the package.

Its task has no linear head, and a metric that is better when lower, in a unit of its own.
"""

import importlib.util
import json

import pytest

from sslrun import cli
from sslrun.protocols.base import protocols

PLUGIN = '''
"""Propagate labels from example to example, as a video protocol does from frame to frame."""

import torch
import torch.nn.functional as F
from pydantic import Field

from sslrun.data.specs import ImageSpec
from sslrun.metric import Metric
from sslrun.protocols import Protocol, Scores, protocols
from sslrun.registry import Options
from sslrun.tasks.base import Task, TaskOptions, tasks


class HeadlessOptions(TaskOptions):
    @property
    def linear(self):
        return False


@tasks.register("digit-distance")
class DigitDistance(Task):
    """The distance between the predicted and the true digit."""

    Options = HeadlessOptions
    reads = ImageSpec
    metrics = (
        Metric("distance", unit="steps", better="lower", digits=2),
        Metric("wrong", better="lower"),
    )

    def inputs(self, batch):
        return batch.inputs.float() / 255

    def measure(self, outputs, targets):
        distance = (outputs - targets).abs().float()
        wrong = (distance > 0).float()
        return {"distance": distance.mean().item(), "wrong": 100 * wrong.mean().item()}


class PropagateOptions(Options):
    radius: int = Field(default=1, ge=1)
    """Number of neighbors that pass their label on."""


@protocols.register("spread")
class Propagate(Protocol):
    """Propagate labels along nearest neighbors, without a head.

    The docstring's further lines are for `sslrun show`.
    """

    Options = PropagateOptions
    synonyms = ("label propagation",)

    @classmethod
    def supports(cls, task, options):
        if task.reads is ImageSpec:
            return None
        return f"needs images, which the task '{task.name}' does not have"

    def run(self, bench):
        backbone = bench.backbone().eval()

        def encode(batch):
            with torch.inference_mode():
                features = backbone(bench.task.inputs(batch)).pooled.float()
                return F.normalize(features, dim=1), batch.labels

        def encoded(split):
            examples, device = bench.examples(split), bench.device
            batches = examples.batches(torch.arange(len(examples)).split(128), device)
            features, labels = zip(*map(encode, batches))
            return torch.cat(features), torch.cat(labels)

        bank, labels = encoded("train")
        metrics = {}
        for split in ("val", *bench.tests):
            queries, _ = encoded(split)
            nearest = (queries @ bank.T).topk(self.options.radius, dim=1).indices
            metrics[split] = bench.score(split, labels[nearest].mode(dim=1).values)
        return Scores(metrics, {"bank": len(bank)})


@protocols.register("guess")
class Guess(Protocol):
    """Always guess zero: learns nothing, so that one run serves all amounts of labels."""

    learns = False

    def run(self, bench):
        return Scores({
            split: bench.score(split, torch.zeros(len(bench.examples(split)), dtype=torch.int64))
            for split in bench.tests
        })


@protocols.register("forgetful")
class Forgetful(Protocol):
    """Forget to score the shifts."""

    def run(self, bench):
        return Scores({"test": {"distance": 1.0}})
'''

RECIPE = """\
name: mine
backbone: {name: mlp, width: 16, depth: 1}
data: {name: digits, size: 8}
spread: {radius: 5}
evaluate:
  near:
    data: {name: digits, size: 8}
    task: digit-distance
    protocols: [spread, guess]
    labels: [0.1, 0.5]
    spread: {radius: 3}
    shifts: {noise: {corruption: gaussian-noise, severity: [1, 5]}}
"""


@pytest.fixture
def plugin(registered, tmp_path):
    """Import a file from outside the package."""
    path = tmp_path / "my_protocol.py"
    path.write_text(PLUGIN)
    spec = importlib.util.spec_from_file_location("my_protocol", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "mine.yaml").write_text(RECIPE)
    return module


def results(tmp_path, stage):
    paths = tmp_path.glob(f"runs/mine/{stage}-*/result.json")
    return {result["labels"]: result for result in (json.loads(path.read_text()) for path in paths)}


def test_a_users_protocol_becomes_a_command_and_a_table_row(plugin, sslrun, tmp_path):
    code, out, err = sslrun("spread", "mine.yaml", "--device", "cpu")
    assert code == 0, err
    assert "spread" in out
    by_labels = results(tmp_path, "spread")
    assert set(by_labels) == {0.1, 0.5}
    assert by_labels[0.1]["metric"] == {
        "name": "distance",
        "unit": "steps",
        "better": "lower",
        "digits": 2,
    }
    assert by_labels[0.1]["flops"] is None  # passes that the protocol makes itself are not counted
    assert by_labels[0.1]["bank"] == by_labels[0.1]["labelled"] < by_labels[0.5]["labelled"]
    assert (
        by_labels[0.5]["metrics"]["test"]["distance"]
        < by_labels[0.1]["metrics"]["test"]["distance"]
        < 2
    )
    assert set(by_labels[0.1]["shifts"]["noise"]) == {"distance", "wrong"}

    code, out, err = sslrun("table", "runs", "--json")
    assert code == 0, err
    cells = {(cell["labels"], cell["shift"]): cell["mean"] for cell in json.loads(out)["cells"]}
    assert cells[0.5, None] == by_labels[0.5]["metrics"]["test"]["distance"]


def test_a_protocol_that_learns_nothing_runs_once(plugin, sslrun, tmp_path):
    code, _, err = sslrun("sweep", "mine.yaml", "--device", "cpu")
    assert code == 0, err
    guesses = results(tmp_path, "guess")
    assert list(guesses) == [1.0]
    assert (guesses[1.0]["labelled"], list(guesses[1.0]["metrics"])) == (0, ["test"])
    assert set(results(tmp_path, "spread")) == {0.1, 0.5}
    assert guesses[1.0]["metrics"]["test"]["distance"] > 3


def test_a_protocols_options_are_read_from_the_recipe_and_checked(plugin, sslrun, tmp_path):
    from sslrun.recipe import load

    options = load(tmp_path / "mine.yaml").evaluate["near"].options
    assert options["spread"].radius == 3
    for text, line, message in (
        (
            RECIPE.replace("{radius: 5}", "{raduis: 5}"),
            4,
            "spread.raduis: no such option of 'spread'. Did you mean 'radius'?",
        ),
        (
            RECIPE.replace("    spread:", "    spreed:"),
            11,
            "no such option of 'evaluate.near'. Did you mean 'spread'?",
        ),
        (
            RECIPE.replace("[spread,", "[spred,"),
            9,
            "no such protocol: 'spred'. Did you mean 'spread'?",
        ),
        (
            RECIPE.replace("[spread,", "[knn,"),
            9,
            "evaluate.near.protocols: knn needs one vector and one class per example",
        ),
    ):
        (tmp_path / "mine.yaml").write_text(text)
        code, _, err = sslrun("check", "mine.yaml")
        assert code == 2
        assert err.startswith(f"sslrun: mine.yaml:{line}: ")
        assert message in err
        assert err.count("\n") == 1


def test_an_unsupported_task_is_a_one_line_error_of_check(plugin, sslrun, tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "name: mine\nbackbone: lstm\ndata: {name: world, length: 32}\n"
        "evaluate:\n  world-sentiment:\n    protocols: [spread]\n"
    )
    code, _, err = sslrun("check", "mine.yaml")
    assert code == 2
    assert err == (
        "sslrun: mine.yaml:6: evaluate.world-sentiment.protocols: "
        "spread needs images, which the task 'sentences' does not have\n"
    )


def test_missing_scores_are_a_one_line_error(plugin, sslrun):
    code, _, err = sslrun("forgetful", "mine.yaml", "--device", "cpu")
    assert code == 2
    assert (
        "protocol 'forgetful' returned no 'distance' "
        "for noise: gaussian-noise 1, noise: gaussian-noise 5" in err
    )


def test_show_and_help_include_the_protocol(plugin, sslrun):
    code, out, _ = sslrun("show", "protocol", "spread")
    assert code == 0
    assert "Propagate labels along nearest neighbors" in out
    assert "Number of neighbors that pass their label on." in out
    code, out, _ = sslrun("--help")
    assert code == 0
    assert "spread" in out
    assert "svm" in out


def test_commands_are_added_once(plugin):
    cli.add_protocol_commands(cli.app)
    cli.add_protocol_commands(cli.app)
    names = [command.name for command in cli.app.registered_commands if command.name]
    assert len(names) == len(set(names))
    assert {"knn", "svm", "spread"} <= set(names)


def test_plugin_order_follows_the_built_in_protocols(plugin):
    assert protocols.in_order[:3] == ["knn", "probe", "fewshot"]
    assert protocols.in_order[-3:] == ["spread", "guess", "forgetful"]
