import pytest
import torch

from sslrun.data.control.environments import make_environment
from sslrun.data.control.trajectories import Episodes, WindowExamples
from sslrun.data.specs import ControlSpec
from sslrun.errors import UserError
from sslrun.tasks.returns import Returns

SPEC = ControlSpec("paths", states=20, actions=20)
EMPTY = WindowExamples.of(
    Episodes(
        torch.zeros(1, 20), torch.zeros(1).long(), torch.zeros(1).double(), torch.tensor([0, 1])
    ),
    SPEC,
)


def task(spec=SPEC, **options):
    return Returns(Returns.Options(**options), spec, ())


def pairs(asked, achieved):
    """Asked and achieved returns of episodes, from lists of (B, T)."""
    return torch.stack([torch.tensor(asked), torch.tensor(achieved)], dim=-1)


def test_random_actions_are_0_and_the_expert_is_100():
    random, expert = make_environment("paths").reference
    values = task().normalize(torch.tensor([random, expert, (random + expert) / 2]))
    assert values.tolist() == pytest.approx([0, 100, 50], abs=1e-3)
    own = task(reference=(0.0, 4.0)).normalize(torch.tensor([1.0]))
    assert own.tolist() == [25]


def test_an_unknown_reference_is_one_line():
    pytest.importorskip("gymnasium")
    spec = ControlSpec("gymnasium:CartPole-v1", states=4, actions=2)
    with pytest.raises(UserError, match="returns of random actions and of an expert are not known"):
        task(spec).normalize(torch.zeros(1))
    assert task(spec, reference=(20.0, 500.0)).normalize(torch.tensor([500.0])) == 100


def test_the_first_target_counts_and_the_correlation_is_within_episodes():
    asked = [[-1.0, -5.0, -9.0], [-1.0, -5.0, -9.0]]
    rising = task(reference=(-10.0, 0.0)).score(pairs(asked, [[-2.0, -5.0, -8.0]] * 2), EMPTY)
    assert rising == pytest.approx({"normalized_return": 80, "rank_correlation": 100})
    # One episode follows what is asked, the other does the reverse.
    mixed = task().score(pairs(asked, [[-2.0, -5.0, -8.0], [-8.0, -5.0, -2.0]]), EMPTY)
    assert mixed["rank_correlation"] == pytest.approx(0)
    half = task().score(pairs(asked, [[-2.0, -5.0, -8.0], [-5.0, -5.0, -5.0]]), EMPTY)
    assert half["rank_correlation"] == pytest.approx(50)


def test_episodes_of_another_level_are_no_correlation():
    """Easy starts are asked for more and achieve more, whatever is asked within an episode."""
    asked = [[-1.0, -1.5], [-8.0, -8.5]]
    values = task().score(pairs(asked, [[-2.0, -2.0], [-9.0, -9.0]]), EMPTY)
    assert values["rank_correlation"] == 0


def test_one_target_has_no_correlation():
    assert set(task().score(pairs([[-1.0]], [[-2.0]]), EMPTY)) == {"normalized_return"}
