import json
import math
import os
import signal
import sys
import time

import numpy as np
import pytest
import torch

from sslrun import cli
from sslrun.data.specs import ImageSpec
from sslrun.errors import UserError
from sslrun.protocols.practice.episodes import Arena, Episodes
from sslrun.protocols.practice.learners import Contrastive, Td3, infonce, similarities
from sslrun.protocols.practice.options import PracticeOptions, Relabel
from sslrun.protocols.practice.protocol import OWN_METRICS
from sslrun.protocols.practice.replay import (
    Goals,
    Replay,
    Transitions,
    future_offsets,
    relabel,
    skew_weights,
)
from sslrun.protocols.practice.session import Session
from sslrun.protocols.practice.spaces import StateSpace
from sslrun.recipe import load
from sslrun.tasks.base import tasks
from sslrun.tasks.reach import Cells, Reach

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    """Several threads are slow on networks this small; practice itself learns on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def replay_of(episodes=40, horizon=9, width=3, alpha=0.0, bins=4):
    """Random episodes: an endless supply of distinct codes."""
    generator = draws()
    codes = torch.rand(episodes, horizon + 1, width, generator=generator)
    actions = torch.rand(episodes, horizon, 2, generator=generator)
    goals = 10 + torch.rand(episodes, width, generator=generator)
    cells = Cells(torch.tensor([[0.0] * width, [1.0] * width]), bins)
    replay = Replay(ImageSpec(48), horizon, cells, alpha)
    empty = torch.zeros(0)
    replay.add(Episodes(codes, actions, codes, empty, empty), goals)
    return replay


# ---------------------------------------------------------------- goals and rewards


def test_a_relabeled_reward_is_the_recomputed_distance():
    replay, generator = replay_of(), draws(1)
    goals = Goals("fitted", torch.randn(50, 3, generator=generator), generator)
    steps = torch.arange(len(replay))
    batch = relabel(replay, steps, Relabel(goals=0.4, future=0.4), goals, generator)
    codes = replay.state_dict()["codes"]
    for step in range(0, len(replay), 7):
        reached = codes[step // 9, step % 9 + 1]
        distance = math.dist(reached.tolist(), batch.goals[step].tolist())
        assert batch.rewards()[step].item() == pytest.approx(-distance, rel=1e-6)


def test_shares_of_goals_are_realized():
    replay, generator = replay_of(), draws(2)
    goals = Goals("data", torch.full((1, 3), -5.0), generator)
    count, shares = 40_000, Relabel(goals=0.5, future=0.3)
    steps = torch.randint(len(replay), (count,), generator=generator)
    found = relabel(replay, steps, shares, goals, generator).goals[:, 0]
    for share, number in ((0.5, found == -5), (0.2, found > 9), (0.3, (found >= 0) & (found <= 1))):
        deviation = math.sqrt(share * (1 - share) / count)
        assert abs(number.double().mean().item() - share) < 3 * deviation


def test_a_future_goal_is_a_code_that_the_same_episode_reached_later():
    replay, generator = replay_of(), draws(3)
    goals = Goals("data", torch.zeros(1, 3), generator)
    steps = torch.randint(len(replay), (4000,), generator=generator)
    found = relabel(replay, steps, Relabel(goals=0, future=1), goals, generator).goals
    codes, offsets = replay.state_dict()["codes"], []
    for step, goal in zip(steps.tolist(), found, strict=True):
        (places,) = (codes[step // 9] == goal).all(dim=1).nonzero(as_tuple=True)
        offsets.append(places.item() - step % 9)
    left = replay.left(steps)
    assert min(offsets) == 1
    assert (torch.tensor(offsets) <= left).all()
    last = torch.tensor(offsets)[left == 9].bincount(minlength=10)[1:]
    assert last.min() > 0  # all nine


def test_goals_have_their_distributions():
    known = torch.tensor([[1.0, 5.0], [3.0, 9.0]])
    count = 20_000
    prior = Goals("prior", known, draws()).draw(count)
    assert torch.allclose(prior.mean(dim=0), torch.zeros(2), atol=0.03)
    assert torch.allclose(prior.std(dim=0), torch.ones(2), atol=0.03)
    fitted = Goals("fitted", known, draws()).draw(count)
    assert torch.allclose(fitted.mean(dim=0), known.mean(dim=0), atol=0.1)
    assert torch.allclose(fitted.std(dim=0), known.std(dim=0, correction=0), atol=0.1)
    data = Goals("data", known, draws()).draw(count)
    assert torch.equal(data.unique(dim=0), known)


# ---------------------------------------------------------------- skew


def test_alpha_0_gives_uniform_weights():
    cells = torch.tensor([0, 0, 0, 1, 2, 2])
    assert torch.equal(skew_weights(cells, 0.0), torch.full((6,), 1 / 6, dtype=torch.float64))


def test_alpha_minus_1_is_exactly_uniform_over_cells():
    cells = torch.tensor([0, 0, 0, 1, 2, 2])
    of_cells = torch.zeros(3, dtype=torch.float64).index_add(0, cells, skew_weights(cells, -1.0))
    assert torch.allclose(of_cells, torch.full((3,), 1 / 3, dtype=torch.float64), atol=1e-15)
    half = torch.zeros(3, dtype=torch.float64).index_add(0, cells, skew_weights(cells, -0.5))
    assert half[0] > half[2] > half[1]  # between both


def test_the_order_of_a_skewed_replay_follows_what_was_collected():
    replay = replay_of(episodes=200, alpha=-1.0, bins=2)
    with_corner = replay.state_dict()
    with_corner["codes"] = with_corner["codes"].clone()
    with_corner["codes"][:150] = 0.1  # three quarters of all steps are in one of eight cells
    replay.load_state_dict(with_corner)
    reached = replay.reached[replay.order(0, 0)]
    share = replay.cells(reached).bincount().double() / len(reached)
    assert len(share) == 8
    assert torch.allclose(share, torch.full((8,), 1 / 8, dtype=torch.float64), atol=0.03)
    assert torch.equal(replay.order(0, 1), replay.order(0, 1))
    assert not torch.equal(replay.order(0, 0), replay.order(0, 1))


def test_a_replay_continues_from_its_state():
    replay = replay_of(alpha=-1.0)
    other = Replay(replay.spec, replay.horizon, replay.cells, -1.0)
    assert len(other) == 0
    other.load_state_dict(replay.state_dict())
    assert torch.equal(replay.order(3, 4), other.order(3, 4))
    indices = torch.tensor([5, 100, 7])
    (one,), (two,) = [list(one.batches([indices], CPU)) for one in (replay, other)]
    assert all(torch.equal(a, b) for a, b in zip(one.inputs, two.inputs, strict=True))
    (part,) = replay.subset(indices).batches([torch.arange(3)], CPU)
    assert torch.equal(part.inputs.codes, one.inputs.codes)


# ---------------------------------------------------------------- contrastive


def test_equal_logits_have_the_loss_ln_b():
    assert infonce(torch.full((7, 7), -3.0)).item() == pytest.approx(math.log(7), abs=1e-6)


def test_the_similarity_of_the_same_embedding_is_0_and_the_maximum():
    points = torch.randn(40, 16, generator=draws())
    scores = similarities(points, points)
    assert (scores.diagonal() == 0).all()
    assert (scores <= 0).all()
    assert (scores + torch.eye(40) * -1 < 0).all()
    points.requires_grad_()
    similarities(points, points.detach()).sum().backward()
    assert points.grad.isfinite().all()


@pytest.mark.parametrize("left", [1, 4, 30])
def test_future_offsets_follow_the_truncated_geometric_law(left):
    from scipy.stats import chisquare

    count, discount = 50_000, 0.9
    offsets = future_offsets(torch.full((count,), left), discount, draws(left))
    law = discount ** np.arange(left)
    expected = count * law / law.sum()
    found = offsets.bincount(minlength=left + 1)
    assert found[0] == 0
    assert len(found) == left + 1
    assert left == 1 or chisquare(found[1:].numpy(), expected).pvalue > 0.001


def test_a_contrastive_critic_learns_who_goes_where():
    torch.manual_seed(0)
    options = PracticeOptions(learner="contrastive", lr=0.01)
    learner, generator = Contrastive(2, 2, options, draws()), draws()
    for _ in range(150):
        codes, actions = torch.rand(2, 64, 2, generator=generator) * 2 - 1
        batch = learner_batch(codes, actions, codes + actions)
        learner.learn(batch, torch.zeros(64, 2))
    codes, goals = torch.tensor([[0.0, 0.0]] * 2), torch.tensor([[0.7, 0.0], [0.0, -0.7]])
    acted = learner.act(codes, goals)
    assert acted[0, 0] > 0.3
    assert acted[1, 1] < -0.3


def learner_batch(codes, actions, goals):
    return Transitions(codes, actions, codes + actions, goals)


def test_td3_learns_to_move_toward_the_goal():
    torch.manual_seed(0)
    learner, generator = Td3(1, 1, PracticeOptions(discount=0.5, lr=0.005), draws()), draws()
    for _ in range(300):
        codes, actions, goals, noise = torch.rand(4, 64, 1, generator=generator) * 2 - 1
        learner.learn(learner_batch(codes, actions, goals), noise)
    acted = learner.act(torch.tensor([[0.0], [0.0]]), torch.tensor([[0.8], [-0.8]]))
    assert acted[0] > 0.3
    assert acted[1] < -0.3


def test_an_actors_step_leaves_its_critics_alone():
    torch.manual_seed(0)
    learner = Td3(2, 2, PracticeOptions(), draws())
    before = [one.clone() for one in learner.critics.parameters()]
    learner._descend(learner.critics[0](torch.randn(4, 6)).mean() * 0
                     + learner.act(torch.randn(4, 2), torch.randn(4, 2)).mean(),
                     learner.actor_optimizer)  # fmt: skip
    assert all(map(torch.equal, before, learner.critics.parameters()))


# ---------------------------------------------------------------- sessions


def session(seed=0, **options):
    torch.manual_seed(0)
    settings = {"space": "state", "goals": "data", "steps": 60, "warmup": 30, "parallel": 3}
    options = PracticeOptions(**{**settings, "horizon": 10, "batch": 8, **options})
    task = Reach(tasks["reach"].Options(), ImageSpec(48), ())
    known = torch.rand(50, 2, generator=draws()) * 2 - 1
    return Session(options, Arena.of(task, options), StateSpace(task), known, seed, CPU)


@pytest.mark.parametrize(
    "options",
    [{}, {"goals": "skew"}, {"learner": "contrastive"}, {"learner": "random"}],
    ids=["data", "skew", "contrastive", "random"],
)
def test_the_same_seed_gives_the_same_trajectories(options):
    first, second, other = session(**options), session(**options), session(seed=1, **options)
    for one in (first, second, other):
        one.practice()
    assert torch.equal(first.visited, second.visited)
    assert not torch.equal(first.visited, other.visited)
    assert first.visited.shape == (6 * 11, 2)
    described = first.describe()
    assert described["environment_steps"] == 60
    assert described["gradient_steps"] == (0 if options.get("learner") == "random" else 60)
    assert described["environment_steps_a_second"] > 0


def test_skewed_goals_are_those_that_practice_reached():
    one = session(goals="skew", start=(0.5, -0.5))
    one.practice()
    drawn = one.goals.draw(64)
    reached = one.replay.reached
    assert all((goal == reached).all(dim=1).any() for goal in drawn)
    assert torch.equal(one.visited.unflatten(0, (6, 11))[:, 0], torch.tensor([[0.5, -0.5]] * 6))


def test_actions_stay_within_bounds():
    one = session()
    one.practice()
    steps = one.visited.unflatten(0, (6, 11)).diff(dim=1)
    assert steps.abs().max() <= 0.1 + 1e-6
    assert one.replay.state_dict()["actions"].abs().max() <= 1


@pytest.mark.parametrize(
    ("options", "environment", "message"),
    [
        ({"start": (0.5, 0.0)}, "point:wall", "is no free state of point:wall"),
        ({"start": (0.5,)}, "point", "which has 2 numbers"),
        ({}, "key-to-door", "actions that are vectors, but those of key-to-door are discrete"),
    ],
)
def test_an_environment_that_does_not_suit_is_one_line(options, environment, message):
    task = Reach(tasks["reach"].Options(environment=environment), ImageSpec(48), ())
    with pytest.raises(UserError, match=message):
        Arena.of(task, PracticeOptions(**options))


# ---------------------------------------------------------------- recipes and runs

RECIPE = """\
name: goals
backbone: {name: mlp, width: 16, depth: 1}
pretext: {name: autoencoder, latent: 3, beta: 0.1, channels: 8}
data: {name: pictures, pictures: 60, size: 16}
pretrain: {steps: 4, batch: 16, lr: 0.001}
watch: {every: 1000}
evaluate:
  pictures: {protocols: [practice]}
practice: {steps: 60, warmup: 30, parallel: 3, horizon: 10, batch: 8, episodes: 5}
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "goals.yaml"
    path.write_text(RECIPE)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("practice.horizon=1", "practice.horizon: should be greater than or equal to 2"),
        ("practice.space=state", "goals: prior is for space: latent: take goals: data"),
        ("practice.relabel.future=0.6", "shares of 0.5 and 0.6 are more than all steps"),
        ("practice.goals=dreams", "practice.goals"),
        ("evaluate.pictures.protocols=[knn]", "has nothing to learn: take practice"),
        ("evaluate.pictures.refit=true", "learns from no labels"),
    ],
)
def test_a_bad_recipe_is_one_line(recipe, change, message):
    with pytest.raises(UserError) as error:
        load(recipe, [change])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def results(tmp_path, folder="runs"):
    paths = sorted((tmp_path / folder).rglob("result.json"))
    return {one["stage"]: one for one in map(json.loads, (path.read_text() for path in paths))}


@pytest.fixture
def sweep(recipe, monkeypatch, capsys):
    """Run the recipe with changes; returns the exit code and the output."""

    def run(*changes, runs="runs"):
        sets = [word for change in changes for word in ("--set", change)]
        root = recipe.parent / runs
        words = ["sslrun", "sweep", str(recipe), "--runs", str(root), "--device", "cpu", *sets]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        printed = capsys.readouterr()
        return stopped.value.code or 0, printed.out + printed.err

    return run


def test_practice_from_pretraining_to_a_picture(sweep, tmp_path):
    code, printed = sweep()
    assert code == 0, printed
    result = results(tmp_path)["practice"]
    assert set(result["metrics"]["test"]) == {"success", *OWN_METRICS}
    assert result["practice"]["environment_steps"] == 60
    assert result["practice"]["gradient_steps"] == 60
    (drawn,) = (tmp_path / "runs").rglob("practice.png")
    from PIL import Image

    width, height = Image.open(drawn).size
    assert width == pytest.approx(4 * 100, abs=8)  # start, goal, reached, goals of practice
    assert height > 5 * 96
    assert len(list((tmp_path / "runs").rglob("pretext.safetensors"))) == 1


def test_the_same_run_twice_gives_the_same_numbers(sweep, tmp_path):
    for runs in ("one", "two"):
        assert (
            sweep("pretext=null", "practice.space=state", "practice.goals=skew", runs=runs)[0] == 0
        )
    one, two = [results(tmp_path, runs)["practice"]["metrics"] for runs in ("one", "two")]
    assert one == two


def test_a_practice_that_was_killed_gives_the_same_result(recipe, start_sslrun, tmp_path):
    # Long enough to be killed while it collects.
    changes = ["pretext=null", "practice.space=state", "practice.goals=data", "practice.steps=120"]
    sets = [word for change in changes for word in ("--set", change)]

    def start(runs):
        words = ["sweep", recipe, "--runs", tmp_path / runs, "--device", "cpu", *sets]
        return start_sslrun(*words, cwd=tmp_path)

    killed = start("killed")
    while not list((tmp_path / "killed").rglob("identity.json")):
        assert killed.poll() is None
        time.sleep(0.02)
    time.sleep(0.1)
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.finish().returncode == -signal.SIGKILL
    assert not results(tmp_path, "killed")
    assert start("killed").finish().returncode == 0
    assert start("whole").finish().returncode == 0
    one, two = [results(tmp_path, runs)["practice"] for runs in ("killed", "whole")]
    assert one["metrics"] == two["metrics"]
    assert one["practice"]["gradient_steps"] == 120


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["pretext=null"], "none was kept beside the backbone: take pretext: {name: autoencoder"),
        (["pretext=rotation"], "needs the latent layer of an autoencoder, which 'rotation'"),
        (["pretext.latent=null", "pretext.beta=null"], "take pretext: {name: autoencoder, latent"),
        (["data.environment=paths"], "paths: this environment has no pictures"),
        (["evaluate.pictures.task={name: reach, environment: point:wall}"], "are inside walls of"),
        (["practice.space=state", "practice.goals=data", "practice.start=[2]"], "is no free state"),
    ],
)
def test_bad_input_is_one_line(sweep, changes, message):
    code, printed = sweep(*changes)
    assert code == 2
    assert message in printed
    assert "Traceback" not in printed


def test_check_prints_the_budget(recipe, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sslrun", "check", str(recipe)])
    with pytest.raises(SystemExit):
        cli.main()
    words = " ".join(capsys.readouterr().out.split())
    assert "practice: 60 steps in the environment, 60 gradient steps" in words
