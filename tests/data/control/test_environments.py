import sys
from collections.abc import Sequence

import numpy as np
import pytest

from sslrun.data.control.environments import Environment, environments, make_environment
from sslrun.data.control.paths import shortest_paths
from sslrun.data.control.point import MOVE
from sslrun.errors import UserError

OWN = ("point", "point:wall", "paths", "key-to-door")


def play(environment: Environment, seeds: Sequence[int], expert: bool) -> tuple[np.ndarray, ...]:
    """States (B, T + 1, S), rewards (B, T) and done (B, T) of whole episodes."""
    draws = [
        np.random.default_rng([seed, 7]).random((environment.horizon, environment.actions))
        for seed in seeds
    ]
    states, rewards, done = [environment.reset(seeds)], [], []
    for time in range(environment.horizon):
        uniform = np.stack([draw[time] for draw in draws])
        step = environment.step(
            environment.expert_actions() if expert else environment.random_actions(uniform)
        )
        states.append(step.states)
        rewards.append(step.rewards)
        done.append(step.done)
    return np.stack(states, axis=1), np.stack(rewards, axis=1), np.stack(done, axis=1)


@pytest.mark.parametrize("title", OWN)
def test_the_size_of_a_batch_changes_nothing(title):
    together = play(make_environment(title), range(12), expert=False)
    for seed in range(12):
        alone = play(make_environment(title), [seed], expert=False)
        for many, one in zip(together, alone, strict=True):
            assert (many[seed] == one[0]).all()


@pytest.mark.parametrize("title", OWN)
def test_the_same_seeds_give_the_same_episodes_and_others_differ(title):
    environment = make_environment(title)
    first, again = (play(environment, range(8), expert=False)[0] for _ in range(2))
    other = play(environment, range(8, 16), expert=False)[0]
    assert (first == again).all()
    assert (first != other).any()


@pytest.mark.parametrize("title", OWN)
def test_random_and_expert_returns_are_the_reference(title):
    environment = make_environment(title)
    assert environment.reference is not None
    for expert, expected in zip((False, True), environment.reference, strict=True):
        returns = play(environment, range(3000), expert)[1].sum(axis=1)
        deviation = returns.std() / 3000**0.5
        assert abs(returns.mean() - expected) < 4 * deviation + 0.06


@pytest.mark.parametrize("title", OWN)
def test_episodes_end_within_the_horizon(title):
    _, _, done = play(make_environment(title), range(50), expert=True)
    assert done[:, -1].all()
    assert (np.diff(done.astype(int), axis=1) >= 0).all()


def test_a_title_makes_an_equal_environment():
    assert [make_environment(title).title for title in OWN] == list(OWN)


def test_an_unknown_name_or_variant_is_one_line():
    with pytest.raises(UserError, match=r"no such environment: 'pont'\. Did you mean 'point'\?"):
        make_environment("pont")
    with pytest.raises(UserError, match="'point:maze'; there is: point, point:wall"):
        make_environment("point:maze")


# ---------------------------------------------------------------- point


@pytest.mark.parametrize("title", ["point", "point:wall"])
def test_the_expert_ends_at_the_center(title):
    states, *_ = play(make_environment(title), range(500), expert=True)
    assert np.abs(states[:, -1]).max() < 1e-6


def test_moves_are_clipped_and_never_enter_the_wall():
    environment = make_environment("point:wall")
    states, *_ = play(environment, range(200), expert=False)
    assert environment.is_free(states).all()
    assert np.abs(np.diff(states, axis=1)).max() <= MOVE + 1e-6
    begin = environment.reset_to(np.zeros((1, 2)))
    assert np.abs(environment.step(np.array([[9.0, -9.0]])).states - begin).max() <= MOVE + 1e-6


def test_a_picture_shows_the_point_where_it_is():
    environment = make_environment("point")
    environment.reset_to(np.array([[-0.5, 0.75], [0.5, -0.75]]))
    pictures = environment.picture()
    assert pictures.shape == (2, 3, 48, 48)
    assert pictures.dtype == np.uint8
    for picture, (x, y) in zip(pictures, environment.positions, strict=True):
        rows, columns = np.nonzero(picture[0] > 128)
        assert abs((columns.mean() + 0.5) / 24 - 1 - x) < 0.02
        assert abs(1 - (rows.mean() + 0.5) / 24 - y) < 0.02


def test_pictures_show_the_wall_and_small_moves():
    environment = make_environment("point:wall")
    near, moved = environment.draw(np.array([[0.0, 0.0], [0.01, 0.0]]))
    assert (near != moved).any()
    gray = (near == 127) | (near == 128)
    assert gray.all(axis=0).mean() == pytest.approx(0.39 / 4 * 1.02, rel=0.4)
    plain = make_environment("point").draw(np.zeros((1, 2)))[0]
    assert (plain != near).any()


def test_an_environment_without_pictures_says_so():
    environment = make_environment("key-to-door")
    environment.reset([0])
    with pytest.raises(UserError, match="key-to-door: this environment has no pictures"):
        environment.picture()
    assert not environment.has_goals


# ---------------------------------------------------------------- paths


def test_shortest_paths_of_a_small_graph():
    edges = np.zeros((4, 4), dtype=bool)
    edges[0, 1] = edges[1, 2] = edges[2, 0] = True
    assert shortest_paths(edges)[0].tolist() == [0, 1, 2, np.inf]
    assert shortest_paths(edges)[2].tolist() == [1, 2, 0, np.inf]


def test_the_expert_takes_a_shortest_path():
    environment = make_environment("paths")
    states, rewards, _ = play(environment, range(100), expert=True)
    first = states[:, 0].argmax(axis=1)
    assert (-rewards.sum(axis=1) == environment.distances[first]).all()


def test_a_step_without_an_edge_stays():
    environment = make_environment("paths")
    before = environment.reset(range(30))
    nodes = before.argmax(axis=1)
    no_edge = (~environment.edges[nodes]).argmax(axis=1)
    assert (environment.step(no_edge).states == before).all()


# ---------------------------------------------------------------- key to door


def test_the_door_opens_only_with_the_key():
    environment = make_environment("key-to-door")
    environment.reset(range(200))
    while environment.room < 2:  # walk to the right, away from the key
        environment.step(np.zeros(200, dtype=np.int64))
    without = ~environment.has_key
    assert without.any()
    rewards = np.zeros(200)
    for _ in range(5):
        rewards += environment.step(environment.expert_actions()).rewards
    assert (rewards[without] == 0).all()
    assert (rewards[~without] == 1).all()


def test_the_state_hides_whether_the_key_was_taken_in_later_rooms():
    environment = make_environment("key-to-door")
    environment.reset(range(300))
    for _ in range(5):
        states = environment.step(environment.expert_actions()).states
    assert environment.has_key.all()
    assert (states[:, -1] == 0).all()


# ---------------------------------------------------------------- gymnasium


def test_pendulum_is_batched_and_its_expert_beats_random():
    pytest.importorskip("gymnasium")
    environment = make_environment("gymnasium:Pendulum-v1")
    assert (environment.state_size, environment.actions, environment.horizon) == (3, 1, 200)
    assert (environment.low, environment.high) == ((-2.0,), (2.0,))
    together = play(environment, range(3), expert=True)
    alone = play(environment, [2], expert=True)
    assert (together[0][2] == alone[0][0]).all()
    assert together[1].sum(axis=1).min() > -500
    assert play(environment, range(3), expert=False)[1].sum(axis=1).max() < -500


def test_discrete_actions_and_early_ends_of_gymnasium():
    pytest.importorskip("gymnasium")
    environment = make_environment("gymnasium:CartPole-v1")
    assert environment.is_discrete
    states, rewards, done = play(environment, range(4), expert=False)
    for episode in range(4):
        end = int(done[episode].argmax())
        assert rewards[episode].sum() == end + 1
        assert (states[episode, end + 1 :] == states[episode, end + 1]).all()


def test_a_gymnasium_environment_that_cannot_be_made_is_one_line():
    pytest.importorskip("gymnasium")
    with pytest.raises(UserError, match="gymnasium:Pendulun-v1: gymnasium cannot make it") as error:
        make_environment("gymnasium:Pendulun-v1")
    assert "\n" not in str(error.value)


def test_a_missing_gymnasium_names_the_package_and_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(UserError, match=r"package gymnasium: pip install 'sslrun\[control\]'"):
        make_environment("gymnasium:Pendulum-v1")


def test_pictures_of_gymnasium_need_no_display(monkeypatch):
    gymnasium = pytest.importorskip("gymnasium")
    monkeypatch.delenv("DISPLAY", raising=False)

    class Dot(gymnasium.Env):
        metadata = {"render_modes": ["rgb_array"], "render_fps": 30}  # noqa: RUF012
        observation_space = gymnasium.spaces.Box(-1, 1, (2,))
        action_space = gymnasium.spaces.Discrete(2)

        def __init__(self, render_mode: str | None = None) -> None:
            self.render_mode = render_mode

        def reset(self, seed=None, options=None):
            super().reset(seed=seed)
            return np.zeros(2, dtype=np.float32), {}

        def render(self):
            return np.full((5, 7, 3), (10, 20, 30), dtype=np.uint8)

    gymnasium.register("Dot-v0", Dot)
    environment = make_environment("gymnasium:Dot-v0")
    environment.reset([1, 2])
    pictures = environment.picture()
    assert pictures.shape == (2, 3, 5, 7)
    assert pictures[0, :, 0, 0].tolist() == [10, 20, 30]
    gymnasium.registry.pop("Dot-v0")


def test_environments_have_a_registry_of_their_own():
    assert set(environments) >= {"point", "paths", "key-to-door", "gymnasium"}
