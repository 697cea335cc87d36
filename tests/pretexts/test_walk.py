"""The contrastive random walk: its walks and loss, patches, dropped edges, collapses, mistakes."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from sslrun.backbones import build_backbone
from sslrun.data.examples import Batch, TensorExamples
from sslrun.data.specs import VideoSpec
from sslrun.errors import UserError
from sslrun.pretexts.base import pretexts
from sslrun.pretexts.walk import DROPPED, Steps, cut_patches, palindromes, returns, transitions
from sslrun.training.checkpoint import restore, save
from sslrun.training.device import compute
from sslrun.training.loop import Schedule, Training, train

SIZE, FRAMES = 16, 4
PLAIN = {"augmentation": {}, "patch_augmentation": {}}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def unit(*shape, seed=0, dtype=torch.float32):
    return F.normalize(torch.randn(*shape, generator=generator(seed), dtype=dtype), dim=-1)


def clips(count=4, frames=FRAMES, seed=0):
    """Noise that moves by a pixel from frame to frame."""
    wide = torch.randint(0, 256, (count, 3, SIZE, SIZE + frames), generator=generator(seed)).byte()
    return torch.stack([wide[..., time : time + SIZE] for time in range(frames)], dim=1)


def batch(*args, **options):
    return Batch(clips(*args, **options), None)


VIT = {"patch": 2, "depth": 1, "width": 24, "heads": 3}
RESNET = {"channels": 4, "stem": "small", "strides": [1, 2, 1, 1]}


def build(backbone="vit-tiny", frames=FRAMES, shape=None, **options):
    torch.manual_seed(0)
    cls = pretexts["walk"]
    chosen = cls.Options(**{"projection": 16, **options})
    spec = cls.backbone_spec(chosen, VideoSpec(SIZE, frames))
    return cls(chosen, build_backbone(backbone, VIT if shape is None else shape, spec))


def test_rows_of_every_step_and_of_every_walk_sum_to_one():
    steps = transitions(unit(2, 5, 7, 3), 0.05, dropout=0.3)
    walks = palindromes(steps)
    assert walks.shape == (2, 3, 7, 7)
    for matrices in (steps.forth, steps.back, walks):
        torch.testing.assert_close(
            matrices.sum(dim=-1), torch.ones(matrices.shape[:-1]), atol=1e-6, rtol=0
        )


def test_the_loss_is_an_explicit_sum_over_all_paths():
    nodes, tau = 3, 0.3
    states = unit(1, 3, nodes, 4, dtype=torch.float64)
    similar = [
        [[math.exp(float(a @ b) / tau) for b in states[0, time + 1]] for a in states[0, time]]
        for time in range(2)
    ]

    def forth(time, a, b):
        return similar[time][a][b] / sum(similar[time][a])

    def back(time, b, a):
        return similar[time][a][b] / sum(similar[time][other][b] for other in range(nodes))

    total = 0.0
    for start in range(nodes):
        paths = itertools.product(range(nodes), repeat=3)
        total -= math.log(
            sum(
                forth(0, start, a) * forth(1, a, b) * back(1, b, c) * back(0, c, start)
                for a, b, c in paths
            )
        )
    loss, _ = returns(palindromes(transitions(states, tau)))
    assert loss.item() == pytest.approx(total / nodes, rel=1e-12)


def test_longer_walks_are_products_of_their_steps():
    steps = transitions(unit(2, 5, 6, 3), 0.2, dropout=0.2)
    forth, back = steps.forth.unbind(1), steps.back.unbind(1)
    walks = palindromes(steps)
    two = forth[0] @ forth[1] @ back[1] @ back[0]
    four = forth[0] @ forth[1] @ forth[2] @ forth[3] @ back[3] @ back[2] @ back[1] @ back[0]
    torch.testing.assert_close(walks[:, 0], two)
    torch.testing.assert_close(walks[:, 2], four)


def test_still_clips_of_distinct_nodes_return_for_sure_as_the_temperature_falls():
    still = unit(2, 1, 9, 8).expand(-1, 4, -1, -1)
    walks = palindromes(transitions(still, 0.001))
    torch.testing.assert_close(walks, torch.eye(9).expand_as(walks), atol=1e-5, rtol=0)
    loss, returned = returns(walks)
    assert loss.item() == pytest.approx(0, abs=1e-5)
    assert torch.equal(returned, torch.ones(2))


def test_nodes_without_a_difference_return_by_chance():
    loss, returned = returns(palindromes(transitions(torch.ones(2, 4, 9, 3), 0.05)))
    assert loss.item() == pytest.approx(math.log(9))
    torch.testing.assert_close(returned, torch.full((2,), 1 / 9))


def test_the_gradient_of_a_walk():
    def loss(states):
        return returns(palindromes(transitions(F.normalize(states, dim=-1), 0.2)))[0]

    states = torch.randn(1, 4, 3, 2, dtype=torch.float64, generator=generator())
    assert torch.autograd.gradcheck(loss, states.requires_grad_())


def test_edges_are_dropped_at_the_rate_and_separately_forth_and_back():
    torch.manual_seed(0)
    steps = transitions(unit(8, 3, 20, 4), 0.5, dropout=0.1)
    assert math.exp(DROPPED) == 0
    dropped = Steps(*((matrix == 0) for matrix in steps))
    count = dropped.forth.numel()
    for each in dropped:
        deviation = (0.1 * 0.9 / count) ** 0.5
        assert each.float().mean().item() == pytest.approx(0.1, abs=3 * deviation)
    both = (dropped.forth & dropped.back.transpose(2, 3)).float().mean().item()
    assert both == pytest.approx(0.01, abs=3 * (0.01 * 0.99 / count) ** 0.5)


def test_patches_overlap_and_are_listed_row_by_row():
    frames = torch.rand(2, 3, 64, 64, generator=generator())
    patches = cut_patches(frames, 16, 8)
    assert patches.shape == (2, 49, 3, 16, 16)
    assert torch.equal(patches[1, 7 * 2 + 5], frames[1, :, 16:32, 40:56])
    pretext = build(**PLAIN)  # by default a quarter of the frame, half a patch apart
    nodes, still = pretext.views(batch(), generator())
    assert nodes.shape == (4, FRAMES, 49, 3, 4, 4)
    torch.testing.assert_close(nodes[2, 1], cut_patches(clips()[2, 1:2] / 255, 4, 2)[0])
    assert still == 0


@pytest.mark.parametrize(("nodes", "padding"), [("grid", "zeros"), ("map", "reflect")])
def test_views_depend_on_the_generator_alone_and_crop_each_frame_by_itself(nodes, padding):
    pretext = build("resnet18", nodes=nodes, shape={**RESNET, "padding": padding})
    still = Batch(clips()[:, :1].expand(-1, 3, -1, -1, -1), None)
    (first, share), (again, _), (other, _) = (
        pretext.views(still, generator(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[:, 0], first[:, 1])
    assert share == 1
    output = pretext((first, share))
    output.loss.backward()
    assert pretext.backbone.conv1.weight.grad.abs().sum() > 0
    assert set(output.metrics) == {"accuracy", "accuracy_2", "still"}


def test_patches_are_embedded_as_images_and_cells_as_a_grid():
    grid = build(**PLAIN).eval()
    nodes, _ = grid.views(batch(2), generator())
    alone = grid.head(grid.backbone(nodes[1, 2, 5][None]).pooled)
    torch.testing.assert_close(
        grid.embed(nodes)[1, 2, 5], F.normalize(alone, dim=1)[0], atol=1e-5, rtol=1e-4
    )
    cells = build("resnet18", nodes="map", shape={**RESNET, "padding": "reflect"}, **PLAIN).eval()
    frames, _ = cells.views(batch(2), generator())
    place = cells.head(cells.backbone.dense(frames[1])[2, :, 1, 0])
    torch.testing.assert_close(
        cells.embed(frames)[1, 2, 8], F.normalize(place, dim=0), atol=1e-5, rtol=1e-4
    )


def test_edges_are_dropped_in_training_only():
    pretext = build(dropout=0.5, **PLAIN)
    views = pretext.views(batch(), generator())
    states = pretext.embed(views[0])
    torch.manual_seed(3)
    dropped = returns(palindromes(transitions(states, 0.05, 0.5)))[0]
    torch.manual_seed(3)
    assert pretext(views).loss.item() == pytest.approx(dropped.item(), rel=1e-4)
    assert pretext.eval()(views).loss == pretext(views).loss


def learned(pretext, inputs, steps, lr=0.01):
    optimizer = torch.optim.Adam(pretext.parameters(), lr=lr)
    for step in range(steps):
        output = pretext(pretext.views(Batch(inputs(step), None), generator(step)))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    pretext.eval()
    return {name: value.item() for name, value in output.metrics.items()}


def checked(pretext, metrics, inputs):
    with torch.inference_mode():
        held_out = pretext.held_out(Batch(inputs, None), generator())
    record = metrics | {name: value.item() for name, value in held_out.items()}
    return record, pretext.diagnose(record)


def textures(step, count=8):
    """Smooth color textures that move by a pixel from frame to frame."""
    wide = torch.rand(count, 3, 5, 6, generator=generator(step))
    wide = F.interpolate(wide, (20, 24), mode="bilinear").mul(255).byte()
    return torch.stack([wide[..., 2 : 2 + SIZE, t : t + SIZE] for t in range(FRAMES)], dim=1)


def unrelated(step):
    """Frames with nothing in common but their places."""
    return torch.randint(0, 256, (8, 3, 3, SIZE, SIZE), generator=generator(step)).byte()


def test_it_learns_to_return_and_is_healthy():
    pretext = build(stride=4, temperature=0.1, **PLAIN)
    before, _ = checked(pretext.eval(), {}, textures(99))
    metrics = learned(pretext.train(), textures, 40)
    record, problem = checked(pretext, metrics, textures(99))
    assert problem is None
    assert record["held_out_loss"] < before["held_out_loss"] - 0.2
    assert record["held_out_accuracy"] > 1.6 * record["chance"]


def test_cells_that_know_their_place_collapse_and_the_collapse_is_named():
    pretext = build(shape={**VIT, "patch": 4}, nodes="map", temperature=0.1, **PLAIN)
    with torch.no_grad():
        pretext.backbone.pos_embed.mul_(100)
    metrics = learned(pretext, unrelated, 40, lr=0.003)
    record, problem = checked(pretext, metrics, unrelated(99))
    assert record["accuracy_unrelated"] > 0.7
    assert "collapse to places" in problem
    assert "nodes: grid" in problem


def test_frames_without_texture_collapse_and_the_collapse_is_named():
    pretext = build(stride=4, **PLAIN)

    def plain(step):
        return unrelated(step)[..., :1, :1].expand(-1, -1, -1, SIZE, SIZE)

    metrics = learned(pretext, plain, 10)
    record, problem = checked(pretext, metrics, plain(99))
    assert record["held_out_loss"] == pytest.approx(math.log(1 / record["chance"]), rel=0.01)
    assert "walks return by chance" in problem


def test_still_films_are_named():
    pretext = build(**PLAIN).eval()
    metrics = {"still": 1.0}
    assert "clips of the last batch are still" in pretext.diagnose(metrics)
    assert pretext.diagnose({}) is None


def test_pictures_color_nodes_by_place_and_a_still_clip_keeps_them():
    pretext = build(temperature=1e-5, **PLAIN).eval()
    still = clips(2)[:, :1].expand(-1, 3, -1, -1, -1)
    pictures = pretext.pictures(Batch(still, None), generator())
    assert all(picture.shape == (2, 3, SIZE, SIZE) for picture in pictures.values())
    torch.testing.assert_close(
        pictures["nodes it came from"], pictures["its nodes"], atol=1e-3, rtol=0
    )


def training(steps, pretext):
    examples = TensorExamples(clips(16), None, (), VideoSpec(SIZE, FRAMES))
    schedule = Schedule(steps=steps, batch=4, lr=0.01, optimizer="adamw", precision="fp32")
    return Training(pretext, schedule, compute("cpu")), examples


def test_a_resumed_run_equals_one_never_stopped_bit_for_bit(tmp_path):
    whole, examples = training(5, build(stride=4))
    losses = [step.loss for step in train(whole, examples, 0)]
    stopped, _ = training(5, build(stride=4))
    for step in train(stopped, examples, 0):
        if step.step == 2:
            save(stopped, tmp_path)
            break
    torch.manual_seed(9)
    resumed, _ = training(5, build(stride=4))
    restore(resumed, next(tmp_path.glob("*")))
    rest = [step.loss for step in train(resumed, examples, 0)]
    assert torch.equal(torch.stack(rest), torch.stack(losses[2:]))
    for name, value in whole.learner.state_dict().items():
        assert torch.equal(resumed.learner.state_dict()[name], value), name


def test_mistakes_are_one_line():
    with pytest.raises(UserError, match=r"clips of 2 frames hold no walk .* data\.frames: 3"):
        build(frames=2)
    with pytest.raises(UserError, match="fewer than two patches of 20 pixels, 10 apart"):
        build(patch=20)
    with pytest.raises(UserError, match="do not divide into the backbone's patches of 4: set pat"):
        build(shape={**VIT, "patch": 4}, patch=6)
    with pytest.raises(UserError, match="nodes: map needs a backbone with 'dense'"):
        build("mlp", shape={"width": 8, "depth": 1}, nodes="map")
