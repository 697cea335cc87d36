"""Colorizing video: its loss, clusters, baselines, lightness, and mistakes."""

import math

import pytest
import torch
import torch.nn.functional as F

from sslrun.backbones import build_backbone
from sslrun.data.examples import Batch, TensorExamples
from sslrun.data.image.lab import lightness, rgb_to_lab
from sslrun.data.specs import VideoSpec
from sslrun.data.video.films import Shot, StoredFilms
from sslrun.errors import UserError
from sslrun.pretexts.base import pretexts
from sslrun.pretexts.recolor import Cells, Recolor, color_loss, nearest
from sslrun.protocols.propagate import Propagate, PropagateOptions
from sslrun.tasks.masks import Masks, MasksOptions
from sslrun.training.checkpoint import restore, save
from sslrun.training.device import compute
from sslrun.training.loop import Schedule, Training, train

SIZE, FRAMES = 16, 4
CPU = torch.device("cpu")
SHAPE = {"patch": 4, "depth": 1, "width": 24, "heads": 3}  # a grid of 4x4 cells


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def clips(count=8, seed=0, frames=FRAMES):
    """Clips of quarters whose color follows from their lightness; they change places."""
    palette = torch.tensor([[250, 20, 20], [20, 120, 20], [20, 20, 90], [220, 220, 60]])
    order = torch.rand(count, frames, 4, generator=generator(seed)).argsort(dim=2)
    colors = palette[order].view(count, frames, 2, 2, 3).permute(0, 1, 4, 2, 3)
    return colors.repeat_interleave(8, dim=3).repeat_interleave(8, dim=4).byte()


def examples(inputs):
    return TensorExamples(inputs, None, (), VideoSpec(SIZE, inputs.shape[1]))


def build(inputs=None, frames=FRAMES, **options):
    torch.manual_seed(0)
    cls = pretexts["recolor"]
    chosen = cls.Options(**{"clusters": 4, "projection": 8, **options})
    spec = cls.backbone_spec(chosen, VideoSpec(SIZE, frames))
    pretext = cls(chosen, build_backbone("vit-tiny", SHAPE, spec))
    pretext.fit(examples(clips(32) if inputs is None else inputs))
    return pretext


def test_the_loss_is_minus_the_log_of_the_weight_on_the_true_color():
    pretext = build(smoothing=0.0)
    vectors = torch.randn(2, 4, 5, 8, generator=generator())
    labels = torch.randint(0, 4, (2, 4, 5), generator=generator(1))
    mixed = pretext.mix(vectors, F.one_hot(labels[:, :3], 4).float())
    torch.testing.assert_close(mixed.sum(dim=2), torch.ones(2, 5))
    total = 0.0
    for clip in range(2):
        for cell in range(5):
            products = {
                (frame, other): math.exp(
                    float(vectors[clip, 3, cell] @ vectors[clip, frame, other])
                )
                for frame in range(3)
                for other in range(5)
            }
            same = sum(
                weight
                for (frame, other), weight in products.items()
                if labels[clip, frame, other] == labels[clip, 3, cell]
            )
            total -= math.log(same / sum(products.values()) + 1e-20)
    assert color_loss(mixed, labels[:, 3]).item() == pytest.approx(total / 10, rel=1e-4)


def test_references_in_another_order_have_the_same_loss():
    pretext = build().eval()
    cells = pretext.views(Batch(clips(), None), generator())
    order = torch.tensor([2, 0, 1, 3])
    permuted = Cells(cells.frames[:, order], cells.colors[:, order])
    torch.testing.assert_close(pretext(permuted).loss, pretext(cells).loss)


def test_identical_frames_have_the_loss_of_ties_alone():
    pretext = build(smoothing=0.0)
    vectors = 20 * torch.eye(6)[None, None].expand(1, 4, -1, -1)  # six distinct cells
    labels = torch.tensor([0, 1, 2, 3, 0, 1]).expand(1, 4, -1)
    colors = F.one_hot(labels[:, :3], 4).float()
    assert color_loss(pretext.mix(vectors, colors), labels[:, 3]).item() == pytest.approx(0)
    # Two cells that look alike and have two colors share their weight.
    tied = vectors.clone()
    tied[:, :, 1] = tied[:, :, 0]
    expected = 2 * math.log(2) / 6
    assert color_loss(pretext.mix(tied, colors), labels[:, 3]).item() == pytest.approx(expected)


def test_smoothing_makes_the_loss_of_a_missing_color_finite():
    pretext = build(smoothing=0.01)
    vectors, labels = torch.randn(1, 2, 3, 8), torch.zeros(1, 1, 3).long()
    mixed = pretext.mix(vectors, F.one_hot(labels, 4).float())
    torch.testing.assert_close(mixed.sum(dim=2), torch.ones(1, 3))
    missing = torch.ones(1, 3).long()
    expected = -math.log(0.01 * pretext.frequencies[1])
    assert color_loss(mixed, missing).item() == pytest.approx(expected, rel=1e-4)


def test_a_radius_copies_from_near_cells_only():
    pretext = build(radius=1.0, smoothing=0.0)
    assert pretext.side == 4
    pretext.frequencies = torch.ones(16)
    vectors = torch.zeros(1, 2, 16, 8)
    places = F.one_hot(torch.arange(16), 16).float()[None, None]
    weights = pretext.mix(vectors, places)[0]
    assert torch.equal(weights[0].nonzero()[:, 0], torch.tensor([0, 1, 4]))
    assert torch.equal(weights[5].nonzero()[:, 0], torch.tensor([1, 4, 5, 6, 9]))


def test_the_backbone_sees_lightness_in_equal_channels():
    pretext = build()
    inputs = clips()
    cells = pretext.views(Batch(inputs, None), generator())
    assert torch.equal(cells.frames[:, :, 0], cells.frames[:, :, 1])
    assert torch.equal(cells.frames[:, :, 0], cells.frames[:, :, 2])
    torch.testing.assert_close(cells.frames[3, 2], lightness(inputs[3, 2][None] / 255)[0])
    first = inputs[:, 0] / 255
    assert torch.equal(pretext.watched_inputs(first), lightness(first))
    assert pretext.backbone.mean.unique().numel() == 1
    values = lightness(clips(32).flatten(0, 1) / 255)
    assert pretext.backbone.mean[0].item() == pytest.approx(values.mean().item(), abs=0.002)


def test_clusters_are_the_colors_and_their_entropy_is_the_floor():
    pretext = build()
    inputs = clips(32)
    true = rgb_to_lab(inputs[0, :1] / 255)[0, 1:].flatten(1).T.unique(dim=0)
    assert torch.cdist(pretext.centers, true).amin(dim=1).max() < 1
    torch.testing.assert_close(pretext.frequencies, torch.full((4,), 0.25))
    assert pretext.floor(examples(inputs)) == pytest.approx(math.log(4), rel=1e-5)
    again = build()
    assert torch.equal(again.centers, pretext.centers)
    labels = pretext.views(Batch(inputs, None), generator()).colors
    corners = labels.view(32, 4, 4, 4)[..., ::2, ::2].flatten(2)
    assert torch.equal(corners.sort(dim=2).values, torch.arange(4).expand(32, 4, -1))


def test_the_baseline_copies_the_color_at_the_same_place():
    pretext = build().eval()
    still = clips()[:, :1].expand(-1, 4, -1, -1, -1)
    metrics = pretext(pretext.views(Batch(still, None), generator())).metrics
    assert metrics["copy_accuracy"] == 1
    assert metrics["copy_loss"].item() == pytest.approx(0, abs=1e-5)
    cells = pretext.views(Batch(clips(), None), generator())
    metrics = pretext(cells).metrics
    right = (cells.colors[:, 2] == cells.colors[:, 3]).float().mean().item()
    # A copy that is right with a probability r, and doubts itself by 1 - r.
    expected = -right * math.log(right + (1 - right) / 4) - (1 - right) * math.log((1 - right) / 4)
    assert metrics["copy_accuracy"].item() == pytest.approx(right)
    assert metrics["copy_loss"].item() == pytest.approx(expected, rel=1e-3)


def test_it_learns_to_find_colors_below_its_floor_and_below_a_copy():
    pretext = build()
    optimizer = torch.optim.Adam(pretext.parameters(), lr=0.01)
    for step in range(30):
        output = pretext(pretext.views(Batch(clips(8, seed=step), None), generator()))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    pretext.eval()
    with torch.inference_mode():
        batch = Batch(clips(16, seed=999), None)
        held_out = pretext.held_out(batch, generator())
        pictures = pretext.pictures(batch, generator())
    assert held_out["held_out_loss"] < 0.5 * pretext.floor(examples(clips()))
    assert held_out["held_out_loss"] < 0.5 * held_out["held_out_copy_loss"]
    assert {tuple(picture.shape) for picture in pictures.values()} == {(16, 3, SIZE, SIZE)}
    true = pictures["true colors"]
    error = {name: (picture - true).abs().mean() for name, picture in pictures.items()}
    assert error["predicted colors"] < 0.5 * error["colors of the frame before"]
    assert error["predicted colors"] < 0.5 * error["gray"]


def test_a_color_belongs_to_its_nearest_cluster():
    centers = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, -20.0]])
    colors = torch.tensor([[[4.0, 1.0], [6.0, 0.0]], [[0.0, -11.0], [100.0, 50.0]]])
    assert nearest(colors, centers).tolist() == [[0, 1], [2, 1]]


def test_a_resumed_run_equals_one_never_stopped_bit_for_bit(tmp_path):
    def training():
        schedule = Schedule(steps=5, batch=4, lr=0.01, optimizer="adamw", precision="fp32")
        return Training(build(), schedule, compute("cpu"))

    whole, data = training(), examples(clips(16))
    losses = [step.loss for step in train(whole, data, 0)]
    for step in train(stopped := training(), data, 0):
        if step.step == 2:
            save(stopped, tmp_path)
            break
    restore(resumed := training(), next(tmp_path.glob("*")))
    rest = [step.loss for step in train(resumed, data, 0)]
    assert torch.equal(torch.stack(rest), torch.stack(losses[2:]))
    for name, value in whole.learner.state_dict().items():
        assert torch.equal(resumed.learner.state_dict()[name], value), name


def test_mistakes_are_one_line():
    gray = torch.randint(0, 256, (8, FRAMES, 1, SIZE, SIZE), generator=generator()).byte()
    with pytest.raises(UserError, match="all of the frames that were looked at are gray"):
        build(gray.expand(-1, -1, 3, -1, -1))
    red = torch.tensor([200, 30, 30]).byte()[:, None, None].expand(8, FRAMES, 3, SIZE, SIZE)
    with pytest.raises(UserError, match="one and the same color"):
        build(red)
    with pytest.raises(UserError, match=r"3 references .* have 3: set data\.frames: 4"):
        build(frames=3)
    gray_only = build_backbone("vit-tiny", SHAPE, VideoSpec(SIZE, FRAMES, channels=1).frame)
    with pytest.raises(UserError, match="color images of 3 channels"):
        Recolor(Recolor.Options(), gray_only)


class Seen(torch.nn.Module):
    """A backbone that keeps what it sees."""

    def dense(self, inputs, layer=None):
        self.inputs = inputs
        return inputs

    def fit_inputs(self, data):
        (self.fitted,) = (batch.inputs for batch in data.batches([torch.arange(2)], CPU))


@pytest.mark.parametrize("color", ["rgb", "lightness"])
def test_label_propagation_shows_what_pretraining_showed(color):
    inputs = clips(2)
    masks = torch.zeros(2 * FRAMES, SIZE, SIZE, dtype=torch.uint8)
    masks[:, :8, :8] = 1
    films = StoredFilms(("a", "b"), inputs.flatten(0, 1), torch.tensor([0, FRAMES, 8]), masks)
    task = Masks(MasksOptions(color=color), VideoSpec(SIZE, FRAMES), ())
    backbone, shot = Seen(), Shot(films, 0, torch.arange(FRAMES))
    Propagate(PropagateOptions()).follow(backbone, shot, CPU, task.prepare)
    frames = inputs / 255
    expected = lightness(frames.flatten(0, 1)).view_as(frames) if color == "lightness" else frames
    torch.testing.assert_close(backbone.inputs, expected[0])
    torch.testing.assert_close(task.inputs(Batch(inputs, None)), expected.flatten(0, 1))
    task.fit_inputs(backbone, examples(inputs))
    torch.testing.assert_close(backbone.fitted / 255, expected, atol=0.003, rtol=0)
    assert MasksOptions(color="rgb").non_defaults() == {}
