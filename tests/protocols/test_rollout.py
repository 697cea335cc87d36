import json
import math
import sys

import numpy as np
import pytest
import torch

from sslrun import cli
from sslrun.backbones import build_backbone
from sslrun.data.control.collect import play
from sslrun.data.control.environments import Environment, Step, make_environment
from sslrun.data.control.trajectories import WindowExamples
from sslrun.data.source import sources
from sslrun.data.specs import ControlSpec
from sslrun.errors import UserError
from sslrun.pretexts.base import pretexts
from sslrun.protocols.base import protocols
from sslrun.protocols.rollout import (
    Result,
    Rollout,
    act,
    compare,
    episode_seeds,
    is_far,
    last_steps,
)
from sslrun.recipe import load

CPU = torch.device("cpu")


def build(environment: Environment, context=10, condition="return"):
    torch.manual_seed(0)
    spec = ControlSpec(
        environment=environment.title,
        states=environment.state_size,
        actions=environment.actions,
        low=environment.low,
        high=environment.high,
        horizon=environment.horizon,
        context=context,
        scale=environment.scale,
    )
    shape = {"depth": 2, "width": 32, "heads": 2, "positions": 30, "dropout": 0.0}
    backbone = build_backbone("dt-tiny", shape, spec).eval()
    backbone.set_condition(condition)
    return backbone


class Recorder(Environment):
    """Passes everything to another environment, and keeps the actions."""

    def __init__(self, inner: Environment) -> None:
        self.inner, self.actions_taken = inner, []
        self.horizon, self.has_goals = inner.horizon, inner.has_goals

    def reset(self, seeds):
        self.actions_taken = []
        return self.inner.reset(seeds)

    def step(self, actions) -> Step:
        self.actions_taken.append(actions)
        return self.inner.step(actions)

    def goals(self):
        return self.inner.goals()


@torch.no_grad()
@pytest.mark.parametrize("title", ["paths", "key-to-door", "point"])
def test_many_episodes_at_once_are_those_one_by_one(title):
    environment = Recorder(make_environment(title))
    backbone, seeds = build(environment.inner, context=7), episode_seeds(0, 6)
    asked = np.linspace(-9, 1, 6)
    returns = act(backbone, environment, seeds, asked)
    together = np.stack(environment.actions_taken, axis=1)
    for row, seed in enumerate(seeds):
        alone = act(backbone, environment, [seed], asked[[row]])
        actions = np.stack(environment.actions_taken, axis=1)[0]
        np.testing.assert_allclose(together[row, : len(actions)], actions, atol=1e-6)
        assert alone[0] == pytest.approx(returns[row], abs=1e-4)


def test_memorized_trajectories_are_replayed_exactly():
    environment = Recorder(make_environment("paths"))
    seeds = [1, 2, 3, 4]
    data = play(environment.inner, seeds, np.ones(4))
    first = data.first_states.argmax(dim=1)
    assert len(first.unique()) == 4  # else two trajectories may differ from the same past
    backbone = build(environment.inner)
    examples = WindowExamples.of(data, backbone.spec)
    backbone.fit_inputs(examples)
    cls = pretexts["actions"]
    pretext = cls(cls.Options(), backbone)
    optimizer = torch.optim.AdamW(pretext.parameters(), lr=1e-2)
    (batch,) = examples.batches([data.starts[:-1]], CPU)
    loss = math.inf
    while loss > 0.02:  # a test that never ends has a time limit
        output = pretext(batch.inputs)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss = output.loss.item()
    with torch.inference_mode():
        returns = act(backbone, environment, seeds, data.totals.numpy())
    assert np.array_equal(np.stack(environment.actions_taken, axis=1), data.actions.view(4, 10))
    assert np.array_equal(returns, data.totals.numpy())


def test_the_network_reads_the_last_steps_and_what_is_left_of_the_return():
    spec = ControlSpec("paths", states=2, actions=3, context=3, horizon=9)
    states = [np.full((2, 2), time, dtype=np.float32) for time in range(5)]
    actions = [np.array([time, time + 1]) for time in range(4)]
    to_go = [np.array([5.0, 6.0]) - time for time in range(5)]
    window = last_steps(states, actions, to_go, np.zeros((2, 2), np.float32), spec)
    assert window.states[:, :, 0].tolist() == [[2, 3, 4]] * 2
    assert window.actions.tolist() == [[2, 3, 0], [3, 4, 0]]
    assert window.returns.tolist() == [[3, 2, 1], [4, 3, 2]]
    assert window.times.tolist() == [[2, 3, 4]] * 2
    assert window.real.all()


def test_rewards_are_subtracted_from_the_return_that_was_asked_for():
    environment, seen = make_environment("paths"), []
    backbone = build(environment)
    backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.inference_mode():
        returns = act(backbone, environment, [3], np.array([-2.0]))
    rewards = -seen[-1].returns.diff(dim=1)[0]
    assert seen[-1].returns[0, 0] == -2
    last = float(seen[-1].states[0, -1, environment.goal] == 0)
    assert returns[0] == rewards.sum() - last


def data():
    """Two trajectories from one first state, one from another: returns -4, -2, -8."""
    played = play(make_environment("paths"), [0, 0, 1], np.ones(3))
    assert not torch.equal(played.first_states[0], played.first_states[2])
    rewards = torch.zeros(30, dtype=torch.float64)
    rewards[[0, 10, 20]] = torch.tensor([-4.0, -2.0, -8.0], dtype=torch.float64)
    return type(played)(played.states, played.actions, rewards, played.starts)


@pytest.mark.parametrize(
    ("target", "overall", "from_first"),
    [("best", -2, -2), ("mean", -14 / 3, -3), ("beyond", -2 / 3, -1.5), (-7.5, -7.5, -7.5)],
)
def test_targets_follow_from_the_returns_of_the_data(target, overall, from_first):
    first = data().first_states[[0, 2]].numpy()
    options = protocols["rollout"].Options
    protocol, by_start = Rollout(options()), Rollout(options(per_start=True))
    assert protocol._resolve(target, data(), first) == pytest.approx([overall, overall])
    asked = by_start._resolve(target, data(), first)
    assert asked[0] == pytest.approx(from_first)
    assert asked[1] == (-8 if isinstance(target, str) else target)
    new = np.zeros((1, 20), np.float32)
    assert by_start._resolve(target, data(), new) == pytest.approx([overall])


def test_the_correlation_leaves_out_what_is_beyond_the_data():
    def result(target, asked):
        return Result(target, np.array([asked, asked + 1.0]), np.zeros(2))

    results = [result("best", -3), result("mean", -6), result("beyond", -2.5), result(2.0, 2)]
    assert compare(results, best=-2)[:, :, 0].tolist() == [[-3, -6], [-2, -5]]
    assert compare(results[2:], best=-2)[:, :, 0].tolist() == [[-2.5], [-1.5]]


def test_only_returns_three_times_beyond_the_data_are_far():
    # The mean is -4.67; the farthest return is 3.33 from it.
    assert not is_far(np.array([5.0]), data())
    assert is_far(np.array([5.0, 5.5]), data())
    assert is_far(np.array([-15.0]), data())


def test_seeds_of_tests_are_not_those_of_data(tmp_path):
    assert len({*episode_seeds(0, 50), *episode_seeds(1, 50)}) == 100


# ---------------------------------------------------------------- recipes

RECIPE = """
name: mine
backbone: {name: dt-tiny, depth: 1, width: 16, heads: 1, positions: 10}
pretext: actions
data: {name: paths, trajectories: 40}
pretrain: {steps: 6, batch: 16, lr: 0.001}
evaluate:
  paths: {protocols: [rollout, random-actions], rollout: {episodes: 4}}
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.setenv("SSLRUN_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "mine.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def sweep(recipe, monkeypatch, capsys):
    """Run the recipe with changes; returns the exit code, the output, and results by stage."""

    def run(*changes, runs="runs"):
        root = recipe.parent / runs
        sets = [part for change in changes for part in ("--set", change)]
        words = ["sslrun", "sweep", str(recipe), "--runs", str(root), "--device", "cpu", *sets]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        printed = capsys.readouterr()
        values = [json.loads(path.read_text()) for path in root.rglob("result.json")]
        results = {one["stage"]: one for one in values}
        return stopped.value.code, " ".join((printed.out + printed.err).split()), results

    return run


def test_the_same_recipe_gives_the_same_trajectories(sweep):
    _, _, first = sweep()
    _, _, again = sweep(runs="others")
    assert first["rollout"]["rollouts"] == again["rollout"]["rollouts"]
    assert first["random-actions"]["returns"] == again["random-actions"]["returns"]
    metrics = first["rollout"]["metrics"]["test"]
    assert set(metrics) == {"normalized_return", "asked_mean", "asked_beyond", "rank_correlation"}
    achieved = first["rollout"]["rollouts"][0]["achieved"]
    expected = 100 * (achieved + 7.5878) / (7.5878 - 7 / 3)
    assert metrics["normalized_return"] == pytest.approx(expected, abs=0.01)


def test_columns_show_the_other_targets(sweep):
    code, words, _ = sweep("rollout.targets=[best, -9]")
    assert code == 0, words
    assert "asked -9" in words
    assert "rank correlation" in words


def test_a_network_without_returns_acts_once(sweep):
    _, _, results = sweep("pretext.condition=none")
    assert len(results["rollout"]["rollouts"]) == 1
    assert set(results["rollout"]["metrics"]["test"]) == {"normalized_return"}


def test_a_far_target_is_a_warning(sweep):
    code, words, results = sweep("rollout.targets=[best, 40]")
    assert code == 0
    assert "asked for a return of 40, but those of the data are from -10 to" in words
    assert "asked_40" in results["rollout"]["metrics"]["test"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.context=11", "11 tokens are longer than the 10 positions of 'dt-tiny'"),
        ("data.validation=0.2", "validation takes whole trajectories"),
        ("data.pretrain_on=all", "set validation: 0 instead"),
        ("backbone=resnet18", "'resnet18' takes image data"),
        ("data=digits", "'actions' reads control data, but 'digits' is image data"),
        ("evaluate.paths.protocols=[probe]", "has nothing to learn: take rollout"),
        ("rollout.targets=[worst]", "rollout.targets"),
        ("data.behavior=good", "data.behavior"),
    ],
)
def test_a_bad_recipe_is_one_line(recipe, change, message):
    with pytest.raises(UserError) as error:
        load(recipe, [change])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_reference_asks_for_one(sweep):
    pytest.importorskip("gymnasium")
    changes = ["data=gymnasium:CartPole-v1", "data.context=5", "data.trajectories=10"]
    code, words, _ = sweep(*changes, "evaluate={gymnasium: {protocols: [random-actions]}}")
    assert code == 2
    assert "gymnasium:CartPole-v1: its returns" in words
    assert "reference: [-20.3, 3234.3]" in words


def test_sources_share_the_window_of_pretraining_with_evaluations(recipe):
    recipe.write_text(
        RECIPE.replace(
            "data: {name: paths, trajectories: 40}", "data: {name: paths, context: 7}"
        ).replace("paths: {protocols", "paths: {data: {name: paths, seed: 3}, protocols")
    )
    evaluation = load(recipe).evaluate["paths"]
    assert evaluation.data.options.context == 7
    assert evaluation.data.options.seed == 3
    assert sources["paths"].task == "returns"
