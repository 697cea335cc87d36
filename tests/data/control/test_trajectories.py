import torch

from sslrun.data.control.collect import collect, play
from sslrun.data.control.environments import make_environment
from sslrun.data.control.trajectories import Episodes, WindowExamples, join_episodes
from sslrun.data.source import sources
from sslrun.data.specs import ControlSpec, InputSpec

SPEC = ControlSpec("paths", states=2, actions=3, context=4, horizon=6)


def episodes(lengths=(3, 6, 1)):
    count = sum(lengths)
    generator = torch.Generator().manual_seed(0)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    return Episodes(
        torch.randn(count, 2, generator=generator),
        torch.randint(3, (count,), generator=generator),
        torch.randn(count, generator=generator, dtype=torch.float64),
        starts,
    )


def read(examples, indices):
    (batch,) = examples.batches([torch.tensor(indices)], torch.device("cpu"))
    return batch.inputs


def test_each_return_to_go_is_its_reward_and_the_next_one():
    data = episodes()
    returns = data.returns_to_go()
    for trajectory in range(3):
        first, end = data.starts[trajectory], data.starts[trajectory + 1]
        following = torch.cat([returns[first + 1 : end], torch.zeros(1, dtype=torch.float64)])
        assert torch.allclose(returns[first:end] - data.rewards[first:end], following, atol=1e-12)
        assert torch.isclose(returns[first], data.totals[trajectory], atol=1e-12)


def test_a_window_is_padded_at_its_end_and_holds_one_trajectory():
    data = episodes()
    windows = read(WindowExamples.of(data, SPEC), [1, 3, 9])
    assert windows.real.tolist() == [[True, True, False, False], [True] * 4, [True] + [False] * 3]
    assert windows.times.tolist() == [[1, 2, 0, 0], [0, 1, 2, 3], [0, 0, 0, 0]]
    assert torch.equal(windows.states[0, :2], data.states[1:3])
    assert torch.equal(windows.states[1], data.states[3:7])
    assert (windows.states[0, 2:] == 0).all()
    assert (windows.actions[2, 1:] == 0).all()
    assert (windows.returns[0, 2:] == 0).all()
    assert torch.equal(windows.goals, data.states[[2, 8, 9]])


def test_windows_are_drawn_uniformly_over_steps():
    examples = WindowExamples.of(episodes((1, 9)), SPEC)
    order = examples.order(seed=3, epoch=0)
    assert sorted(order.tolist()) == list(range(10))  # each step once an epoch
    firsts = torch.stack([examples.order(seed, 0)[0] for seed in range(4000)]).bincount(
        minlength=10
    )
    expected = 400
    chi_square = ((firsts - expected) ** 2 / expected).sum()
    assert chi_square < 28  # 9 degrees of freedom, p = 0.001


def test_the_best_share_holds_the_highest_returns_and_at_least_one():
    data = episodes((2, 2, 2, 4))
    data.rewards.copy_(torch.tensor([0, 1, 0, 5, 0, 3, 0, 0, 0, 9.0]))
    assert data.best(0.6).totals.tolist() == [5, 9]
    assert data.best(0.5).totals.tolist() == [9]
    assert data.best(0.01).totals.tolist() == [9]
    assert data.best(1.0).totals.tolist() == data.totals.tolist()


def test_selected_and_joined_trajectories_are_whole():
    data = episodes()
    again = join_episodes([data.select(torch.tensor([0])), data.select(torch.tensor([1, 2]))])
    assert torch.equal(again.states, data.states)
    assert torch.equal(again.starts, data.starts)
    turned = data.select(torch.tensor([2, 0]))
    assert turned.lengths.tolist() == [1, 3]
    assert torch.equal(turned.rewards, torch.cat([data.rewards[9:], data.rewards[:3]]))


def test_a_subset_of_a_subset_keeps_its_windows():
    examples = WindowExamples.of(episodes(), SPEC)
    part = examples.subset(torch.tensor([8, 4, 0])).subset(torch.tensor([1, 2]))
    for one, other in zip(read(part, [0, 1]), read(examples, [4, 0]), strict=True):
        assert torch.equal(one, other)


def test_joined_batches_are_in_order():
    examples = WindowExamples.of(episodes(), SPEC)
    joined = read(examples, [5, 2]).join(read(examples, [7]), torch.tensor([2, 0, 1]))
    assert torch.equal(joined.states, read(examples, [7, 5, 2]).states)


def test_collected_data_are_seeded_and_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("SSLRUN_CACHE", str(tmp_path / "a"))
    first = collect("paths", "medium", 30, seed=1)
    assert len(list((tmp_path / "a/control").glob("*.safetensors"))) == 1
    cached = collect("paths", "medium", 30, seed=1)
    monkeypatch.setenv("SSLRUN_CACHE", str(tmp_path / "b"))
    again = collect("paths", "medium", 30, seed=1)
    other = collect("paths", "medium", 30, seed=2)
    more = collect("paths", "medium", 40, seed=1)
    for field in ("states", "actions", "rewards", "starts"):
        assert torch.equal(getattr(first, field), getattr(again, field))
        assert torch.equal(getattr(first, field), getattr(cached, field))
    assert not torch.equal(first.actions, other.actions)
    assert torch.equal(more.actions[: len(first.actions)], first.actions)


def test_behaviors_are_ordered_by_their_returns(tmp_path, monkeypatch):
    monkeypatch.setenv("SSLRUN_CACHE", str(tmp_path))
    order = ("random", "replay", "medium-expert", "expert")
    means = [collect("point:wall", one, 200, 0).totals.mean().item() for one in order]
    assert means == sorted(means)
    assert means[0] < collect("point:wall", "medium", 200, 0).totals.mean() < means[2]
    thirds = collect("point:wall", "replay", 300, 0).totals.view(3, 100).mean(dim=1)
    assert thirds.tolist() == sorted(thirds.tolist())


def test_a_finished_episode_leaves_no_steps():
    played = play(make_environment("key-to-door"), list(range(40)), torch.zeros(40).numpy())
    assert (played.totals == 1).all()
    assert played.lengths.max() < 15
    last = played.starts[1:] - 1
    assert (played.rewards[last] == 1).all()


def test_sources_give_windows_of_their_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("SSLRUN_CACHE", str(tmp_path))
    for name in ("paths", "key-to-door", "point"):
        source = sources[name](sources[name].Options(trajectories=20))
        examples = source.load("train")
        spec, sketch = source.sketch(3)
        assert spec == examples.spec == source.spec
        assert spec.environment == name
        real = read(examples, [0, 1, 2])
        for one, other in zip(sketch.inputs, real, strict=True):
            assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert len(source.load("val").episodes) == 2
        assert not torch.equal(source.load("val").episodes.states[:5], examples.episodes.states[:5])


def test_a_spec_is_restored_from_its_folder(tmp_path):
    for spec in (SPEC, ControlSpec("point", 2, 2, (-1.0, -2.0), (1.0, 2.0))):
        spec.save(tmp_path)
        assert InputSpec.load(tmp_path) == spec
