import pytest
import torch
import torch.nn.functional as F

from sslrun.backbones import build_backbone
from sslrun.data.control.collect import play
from sslrun.data.control.environments import make_environment
from sslrun.data.control.trajectories import WindowExamples
from sslrun.data.source import sources
from sslrun.errors import UserError
from sslrun.pretexts.base import pretexts


def examples(name, noise=1.0, count=20):
    source = sources[name](sources[name].Options())
    levels = torch.full((count,), noise).numpy()
    episodes = play(make_environment(name), list(range(count)), levels)
    return WindowExamples.of(episodes, source.spec)


def build(name="paths", **options):
    torch.manual_seed(0)
    spec = examples(name, count=1).spec
    shape = {"depth": 1, "width": 32, "heads": 2, "positions": 30, "dropout": 0.0}
    cls = pretexts["actions"]
    return cls(cls.Options(**options), build_backbone("dt-tiny", shape, spec))


def batch(data, indices):
    (drawn,) = data.batches([torch.tensor(indices)], torch.device("cpu"))
    return drawn


@pytest.mark.parametrize("name", ["paths", "point"])
def test_the_loss_is_the_mean_over_real_steps(name):
    pretext, data = build(name), examples(name)
    horizon = make_environment(name).horizon
    drawn = batch(data, [0, horizon - 2, horizon - 1])  # the last two end with their trajectory
    views = pretext.views(drawn, torch.Generator())
    output = pretext(views)
    predicted = pretext.backbone.predict_actions(pretext.backbone(views))
    losses = []
    for row in range(3):
        for step in range(int(views.real[row].sum())):
            if name == "paths":
                losses.append(F.cross_entropy(predicted[row, step], views.actions[row, step]))
            else:
                losses.append(
                    (predicted[row, step] - 10 * views.actions[row, step]).square().mean()
                )
    assert views.real.sum() == len(losses) < views.real.numel()
    assert torch.allclose(output.loss, torch.stack(losses).mean(), atol=1e-6)


@pytest.mark.parametrize("condition", ["return", "goal", "none"])
def test_it_learns_the_expert(condition):
    pretext, data = build("point", condition=condition), examples("point", noise=0.0)
    pretext.backbone.fit_inputs(data)
    optimizer = torch.optim.AdamW(pretext.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        output = pretext(pretext.views(batch(data, list(range(0, 600, 40))), torch.Generator()))
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_held_out_metrics_have_the_loss_and_accuracy():
    pretext, data = build().eval(), examples("paths")
    held_out = pretext.held_out(batch(data, [0, 5]), torch.Generator())
    assert set(held_out) == {"held_out_loss", "held_out_accuracy"}
    assert 0 <= held_out["held_out_accuracy"] <= 1


def test_goals_need_an_environment_with_goals():
    with pytest.raises(UserError, match="condition: goal: key-to-door has no goal states"):
        build("key-to-door", condition="goal")
