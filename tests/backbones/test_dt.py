import pytest
import torch

from sslrun.backbones import build_backbone, load_backbone, save_backbone
from sslrun.backbones.weights import WEIGHTS
from sslrun.data.control.trajectories import Episodes, Trajectories, WindowExamples
from sslrun.data.specs import ControlSpec
from sslrun.errors import UserError

DISCRETE = ControlSpec("paths", states=5, actions=4, horizon=9, context=6, scale=10.0)
VECTORS = ControlSpec("point", 5, 2, (-1.0, 0.0), (1.0, 4.0), horizon=9, context=6)


def build(spec=DISCRETE, condition="return", **options):
    torch.manual_seed(0)
    small = {"depth": 2, "width": 32, "heads": 2, "positions": 9, **options}
    backbone = build_backbone("dt-tiny", small, spec).eval()
    backbone.set_condition(condition)
    return backbone


def windows(spec=DISCRETE, seed=0, batch=3):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, spec.context)
    actions = (
        torch.randint(spec.actions, shape, generator=generator)
        if spec.is_discrete
        else torch.rand(*shape, spec.actions, generator=generator)
    )
    return Trajectories(
        torch.randn(*shape, spec.states, generator=generator),
        actions,
        torch.randn(shape, generator=generator),
        torch.arange(spec.context).expand(shape),
        torch.ones(shape, dtype=torch.bool),
        torch.randn(batch, spec.states, generator=generator),
    )


@torch.no_grad()
def predict(backbone, inputs):
    return backbone.predict_actions(backbone(inputs))


def replace_from(tensor, other, first):
    """The steps of `tensor` before `first`, then those of `other`."""
    return torch.cat([tensor[:, :first], other[:, first:]], dim=1)


@pytest.mark.parametrize("spec", [DISCRETE, VECTORS])
def test_an_action_depends_on_nothing_that_comes_after_its_state(spec):
    backbone, inputs, other = build(spec), windows(spec), windows(spec, seed=1)
    before = predict(backbone, inputs)
    for time in range(spec.context):
        later = inputs._replace(
            states=replace_from(inputs.states, other.states, time + 1),
            actions=replace_from(inputs.actions, other.actions, time),
            returns=replace_from(inputs.returns, other.returns, time + 1),
        )
        after = predict(backbone, later)
        assert torch.equal(after[:, : time + 1], before[:, : time + 1])
        if time + 1 < spec.context:
            assert not torch.equal(after[:, time + 1], before[:, time + 1])


def test_an_action_depends_on_its_state_and_return_and_earlier_steps():
    backbone, inputs, other = build(), windows(), windows(seed=1)
    before = predict(backbone, inputs)[:, -1]
    for name in ("states", "actions", "returns"):
        for step in (0, 4):
            changed = getattr(inputs, name).clone()
            changed[:, step] = getattr(other, name)[:, step]
            if name == "actions":
                changed[:, step] = (inputs.actions[:, step] + 1) % 4
            assert not torch.equal(
                predict(backbone, inputs._replace(**{name: changed}))[:, -1], before
            )


def test_padding_changes_nothing_in_real_steps():
    backbone, inputs, other = build(), windows(), windows(seed=1)
    real = torch.arange(6).expand(3, -1) < 4
    padded = inputs._replace(real=real, times=inputs.times * real)
    filled = padded._replace(
        states=replace_from(inputs.states, other.states, 4),
        actions=replace_from(inputs.actions, other.actions, 4),
        returns=replace_from(inputs.returns, other.returns, 4),
    )
    with torch.no_grad():
        first, second = backbone(padded), backbone(filled)
        short = backbone(Trajectories(*(part[:, :4] for part in inputs[:5]), inputs.goals))
    assert torch.equal(first.tokens[:, :4], second.tokens[:, :4])
    assert torch.equal(first.pooled, second.pooled)
    # Kernels round differently for another number of tokens.
    assert torch.allclose(first.tokens[:, :4], short.tokens, atol=1e-6)
    assert torch.allclose(first.pooled, short.pooled, atol=1e-6)


@pytest.mark.parametrize(
    ("condition", "reads"), [("return", "returns"), ("goal", "goals"), ("none", None)]
)
def test_the_condition_alone_is_read(condition, reads):
    backbone, inputs, other = build(condition=condition), windows(), windows(seed=1)
    before = predict(backbone, inputs)
    for name in ("returns", "goals"):
        after = predict(backbone, inputs._replace(**{name: getattr(other, name)}))
        assert torch.equal(after, before) == (name != reads)


def test_cloning_is_the_same_network_with_a_zero_embedding_of_returns():
    with_returns, cloning = build(), build(condition="none")
    cloning.load_state_dict({**with_returns.state_dict(), "conditions": cloning.conditions})
    torch.nn.init.zeros_(with_returns.return_embed.weight)
    torch.nn.init.zeros_(with_returns.return_embed.bias)
    assert torch.equal(predict(with_returns, windows()), predict(cloning, windows()))


def test_states_are_standardized_and_constant_ones_centered():
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(50, 5, generator=generator) * 3 + 7
    states[:, 2] = 4.0
    episodes = Episodes(
        states, torch.zeros(50).long(), torch.zeros(50).double(), torch.tensor([0, 50])
    )
    backbone = build()
    backbone.fit_inputs(WindowExamples.of(episodes, DISCRETE))
    scaled = backbone._standardize(states)
    assert torch.allclose(scaled.mean(dim=0), torch.zeros(5), atol=1e-5)
    wanted = torch.tensor([1.0, 1, 0, 1, 1])
    assert torch.allclose(scaled.std(dim=0, correction=0), wanted, atol=1e-4)
    backbone.state_mean.zero_()
    backbone.state_std.fill_(2.0)
    inputs = windows()
    halved = predict(backbone, inputs._replace(states=2 * inputs.states))
    assert torch.allclose(halved, predict(build(), inputs), atol=1e-6)


def test_returns_are_divided_by_the_scale():
    inputs = windows()
    unscaled = build(ControlSpec("paths", 5, 4, context=6, horizon=9))
    divided = predict(unscaled, inputs._replace(returns=inputs.returns / 10))
    assert torch.allclose(divided, predict(build(), inputs), atol=1e-6)


def test_vectors_stay_within_the_bounds():
    backbone = build(VECTORS)
    actions = torch.tensor([[-1.0, 0.0], [1.0, 4.0], [0.5, 1.0]])
    scaled = backbone.scale_actions(actions)
    assert scaled.tolist() == [[-1, -1], [1, 1], [0.5, -0.5]]
    assert torch.equal(backbone.unscale_actions(scaled), actions)
    torch.nn.init.normal_(backbone.action_head.weight, std=9)
    predicted = backbone.unscale_actions(predict(backbone, windows(VECTORS)))
    low, high = torch.tensor(VECTORS.low), torch.tensor(VECTORS.high)
    assert ((predicted >= low) & (predicted <= high)).all()


def test_late_times_share_the_last_embedding():
    backbone, inputs = build(), windows()
    late = inputs._replace(times=inputs.times + 100)
    last = inputs._replace(times=torch.full_like(inputs.times, 8))
    assert torch.equal(predict(backbone, late), predict(backbone, last))


def test_windows_longer_than_the_positions_are_refused():
    with pytest.raises(UserError, match="windows of 6 steps are longer than its 5 positions"):
        build(positions=5)


@pytest.mark.parametrize("condition", ["return", "goal", "none"])
def test_a_loaded_network_knows_its_condition(tmp_path, condition):
    backbone = build(VECTORS, condition)
    save_backbone(tmp_path / WEIGHTS, backbone)
    loaded = load_backbone(tmp_path).eval()
    assert loaded.condition == condition
    assert torch.equal(predict(loaded, windows(VECTORS)), predict(backbone, windows(VECTORS)))
