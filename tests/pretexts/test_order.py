"""Frame order: which orders there are, what frames show, and that still films give nothing away."""

import itertools
import math

import pytest
import torch

from sslrun.backbones import build_backbone
from sslrun.data.examples import Batch
from sslrun.data.specs import ImageSpec, VideoSpec
from sslrun.data.video.films import ClipExamples, StoredFilms
from sslrun.errors import UserError
from sslrun.pretexts.order import (
    TRIPLES,
    FrameHead,
    Order,
    PairHead,
    even_light,
    list_orders,
    motion_of,
    split_channels,
)

SIZE = 16
AUTHORS_ORDERS = (1234, 1324, 1342, 1243, 1423, 1432, 2134, 2143, 2314, 3124, 3142, 3214)
"""The order of classes in the authors' code."""
PLAIN = {"split_channels": False, "jitter": 0, "mirror": 0.0, "by_motion": False}


def build(size=SIZE, **options):
    torch.manual_seed(0)
    backbone = build_backbone("mlp", {"width": 16, "depth": 1}, ImageSpec(size))
    options = {"features": 16, "hidden": 8, "dropout": 0.0, **options}
    return Order(Order.Options(**options), backbone)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def numbered(count=64, frames=8, size=SIZE):
    """Clips whose frames are gray and as bright as their number."""
    clips = torch.arange(frames, dtype=torch.uint8)[None, :, None, None, None]
    return Batch(clips.expand(count, frames, 3, size, size).contiguous(), None)


def noisy(count=16, frames=6, size=SIZE):
    shape = (count, frames, 3, size, size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator(3))


def shown_numbers(pretext, batch, seed=0):
    """The numbers of the frames that are shown (B, n), and the classes (B,)."""
    frames, targets = pretext.views(batch, generator(seed))
    return (frames[:, :, 0, 0, 0] * 255).round().long(), targets


def test_orders_and_their_reverses_are_all_permutations_once():
    orders = list_orders(4)
    assert len(orders) == 12
    both = orders + [order[::-1] for order in orders]
    assert sorted(both) == sorted(itertools.permutations(range(4)))
    authors = [tuple(int(digit) - 1 for digit in str(order)) for order in AUTHORS_ORDERS]
    assert {min(order, order[::-1]) for order in authors} == {
        min(order, order[::-1]) for order in orders
    }


def test_the_class_is_that_of_the_order_shown_forward_or_backward():
    pretext = build(**PLAIN)
    shown, targets = shown_numbers(pretext, numbered(512))
    ranks = shown.argsort(dim=1).argsort(dim=1).tolist()
    orders = list_orders(4)
    names = {order: label for label, order in enumerate(orders)}
    names |= {order[::-1]: label for label, order in enumerate(orders)}
    assert [names[tuple(row)] for row in ranks] == targets.tolist()
    assert set(targets.tolist()) == set(range(12))
    backward = sum(tuple(row) not in orders for row in ranks) / 512
    assert 0.4 < backward < 0.6


def test_triples_in_order_are_monotone_in_time_and_others_are_not():
    pretext = build(kind="verify", **PLAIN)
    shown, targets = shown_numbers(pretext, numbered(1000))
    steps = shown.diff(dim=1)
    monotone = (steps > 0).all(dim=1) | (steps < 0).all(dim=1)
    assert torch.equal(monotone, targets == 1)
    assert targets.float().mean().item() == pytest.approx(0.25, abs=0.05)
    # The middle frame of the wrong triples is before or after both others, equally often.
    wrong = shown[targets == 0]
    before = (wrong[:, 1] < wrong[:, [0, 2]].amin(dim=1)).float().mean().item()
    assert before == pytest.approx(0.5, abs=0.06)
    assert {tuple(sorted(triple)) for triple in TRIPLES} == {(1, 2, 3), (0, 1, 3), (1, 3, 4)}


def test_frames_are_preferred_by_motion():
    clips = numbered(400, frames=8).inputs
    clips[:, 4:] += 100  # a jump between frames 3 and 4 alone, with steps of 1 elsewhere
    pretext = build(**{**PLAIN, "by_motion": True})
    chosen = pretext._draw_frames(motion_of(clips), generator())
    assert (chosen.diff(dim=1) > 0).all()
    share = [(chosen == number).any(dim=1).float().mean().item() for number in (3, 4, 0, 7)]
    assert min(share[:2]) > 0.95 > 0.6 > max(share[2:])


def test_the_crop_is_placed_by_motion():
    clips = torch.zeros(32, 4, 3, 32, 32, dtype=torch.uint8)
    clips[:, ::2, :, 24:, 24:] = 255  # only the lower right corner changes
    pretext = build(32, by_motion=True, crop=8, jitter=0, split_channels=False, mirror=0.0)
    frames, _ = pretext.views(Batch(clips, None), generator())
    assert frames.amax(dim=(1, 2, 3, 4)).min() == 1
    pretext = build(32, by_motion=False, crop=8, jitter=0, split_channels=False, mirror=0.0)
    frames, _ = pretext.views(Batch(clips, None), generator())
    assert frames.amax(dim=(1, 2, 3, 4)).min() == 0


def test_frames_are_mirrored_together_and_moved_by_themselves():
    ramp = torch.arange(SIZE, dtype=torch.uint8).expand(64, 4, 3, SIZE, SIZE).contiguous()
    mirrored = build(**{**PLAIN, "mirror": 0.5}).views(Batch(ramp, None), generator())[0]
    rises = mirrored[..., 0, -1] > mirrored[..., 0, 0]
    assert (rises == rises[:, :1, :1]).all()
    assert 0.3 < rises[:, 0, 0].float().mean() < 0.7
    moved = build(**{**PLAIN, "jitter": 2}).views(Batch(ramp, None), generator())[0]
    assert moved.shape[-1] == SIZE - 4
    first = (moved[:, :, 0, 0, 0] * 255).round()
    assert (first != first[:, :1]).any(dim=1).float().mean() > 0.8
    assert (first.unique() == torch.arange(5)).all()


def test_each_frame_shows_one_channel_of_its_own():
    colors = torch.tensor([0.1, 0.2, 0.3])[:, None, None].expand(200, 4, 3, 2, 2)
    split = split_channels(colors, generator())
    assert split.shape == colors.shape
    assert (split == split[:, :, :1, :1, :1]).all()
    drawn = split[:, :, 0, 0, 0]
    assert (drawn != drawn[:, :1]).any(dim=1).float().mean() > 0.8
    for value in (0.1, 0.2, 0.3):
        assert (drawn == value).float().mean().item() == pytest.approx(1 / 3, abs=0.06)


def test_the_defense_removes_gain_and_offset_of_each_frame():
    frames = torch.rand(8, 4, 3, 6, 6, generator=generator(5))
    gain = torch.tensor([1.0, 1.1, 1.2, 1.3])[:, None, None, None]
    offset = torch.tensor([0.0, 0.1, 0.2, 0.3])[:, None, None, None]
    even = even_light(frames[:, :1] * gain + offset, 0.0, generator())
    torch.testing.assert_close(even, even[:, :1].expand_as(even))
    changed = even_light(frames, 0.2, generator())
    means = changed.mean(dim=(2, 3, 4)) - frames.mean(dim=(1, 2, 3, 4))[:, None]
    assert 0.1 < means.abs().max() <= 0.2
    assert changed.mean(dim=(2, 3, 4)).std(dim=1).min() > 0


def test_brightness_that_drifts_orders_frames_unless_the_defense_is_on():
    # A still film of 1 % more light in each frame.
    still = noisy(256, frames=1).float().expand(-1, 4, -1, -1, -1) * 0.8
    rise = 1 + 0.01 * torch.arange(4)[:, None, None, None]
    drifting = Batch((still * rise).round().byte(), None)

    def solved(**options):
        """Share of clips whose frames are put into order by their mean brightness."""
        pretext = build(**{**PLAIN, **options})
        frames, targets = pretext.views(drifting, generator())
        ranks = frames.mean(dim=(2, 3, 4)).argsort(dim=1).argsort(dim=1).tolist()
        orders = [pretext.orders.tolist()[target] for target in targets.tolist()]
        hits = [rank in (order, order[::-1]) for rank, order in zip(ranks, orders, strict=True)]
        return sum(hits) / len(hits)

    assert solved() == 1
    assert solved(drift=0.2) < 0.15  # chance is 1/12


@pytest.mark.parametrize("kind", ["opn", "verify"])
def test_still_films_give_the_order_away_to_no_network(kind):
    still = noisy(240, frames=1).expand(-1, 6, -1, -1, -1)
    pretext = build(kind=kind, jitter=0, split_channels=False, mirror=0.0).eval()
    frames, targets = pretext.views(Batch(still, None), generator())
    assert (frames == frames[:, :1]).all()
    first, other = (
        pretext.views(Batch(still, None), generator(seed))[0].sort(dim=0).values for seed in (1, 2)
    )
    assert torch.equal(first, other)  # whatever the order, the network sees the same
    scores = pretext.head(pretext.backbone(frames.flatten(0, 1)).pooled)
    shares = torch.zeros(len(targets.unique())).index_add(0, pretext.classes, pretext.shares)
    hits = (scores.argmax(dim=1) == targets).float().mean().item()
    assert hits == pytest.approx(shares[scores.argmax(dim=1)].mean().item(), abs=0.1)


def test_heads_equal_their_formulas():
    options = Order.Options(features=6, hidden=5, dropout=0.0)
    torch.manual_seed(0)
    pooled = torch.randn(3 * 4, 7)
    head = PairHead(7, 4, 12, options).eval()
    frames = head.frame(pooled).view(3, 4, 6)
    expected = [
        head.pair(torch.cat([frames[:, first], frames[:, second]], dim=1))
        for first, second in itertools.combinations(range(4), 2)
    ]
    torch.testing.assert_close(head(pooled), head.classify(torch.cat(expected, dim=1)))
    head = FrameHead(7, 4, 2, options).eval()
    frames = head.frame(pooled).view(3, 24)
    torch.testing.assert_close(head(pooled), head.classify(frames))


def test_the_floor_is_the_loss_of_guessing():
    assert build().floor(None) == pytest.approx(math.log(12))
    assert build(frames=3).floor(None) == pytest.approx(math.log(3))
    entropy = -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
    assert build(kind="verify").floor(None) == pytest.approx(entropy)


@pytest.mark.parametrize("kind", ["opn", "verify"])
def test_order_learns_where_frames_are_numbered(kind):
    pretext = build(4, kind=kind, **PLAIN)
    optimizer = torch.optim.Adam(pretext.parameters(), lr=0.01)
    clips = Batch(numbered(64, frames=5, size=4).inputs * 40, None)
    for step in range(60):
        output = pretext(pretext.views(clips, generator(step)))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    record = pretext.eval().held_out(clips, generator(99))
    assert record["held_out_accuracy"] > 0.9
    assert record["held_out_loss"] < 0.5 * pretext.floor(None)


def test_views_depend_on_the_generator_and_not_on_the_global_one():
    pretext = build(drift=0.2)
    clips = Batch(noisy(), None)
    first, again, other = (pretext.views(clips, generator(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_pictures_show_the_frames_in_their_order():
    columns = build(**PLAIN).pictures(numbered(4), generator())
    assert list(columns) == ["shown 1", "shown 2", "shown 3", "shown 4"]
    assert all(picture.shape == (4, 3, SIZE, SIZE) for picture in columns.values())


def test_gray_films_are_reported_where_channels_are_split():
    def films(frames):
        stored = StoredFilms(["film"], frames, torch.tensor([0, len(frames)]))
        return ClipExamples(stored, torch.tensor([[0, 0, 1]]), VideoSpec(SIZE, len(frames)))

    color = noisy(1)[0]
    gray = color[:, :1].expand(-1, 3, -1, -1).contiguous()
    pretext = build()
    pretext.fit(films(color))
    assert pretext.diagnose({}) is None
    pretext.fit(films(gray))
    assert "split_channels changes nothing" in pretext.diagnose({})
    pretext = build(split_channels=False)
    pretext.fit(films(gray))
    assert pretext.diagnose({}) is None


def test_short_clips_and_crops_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="draws 4 frames from a clip, and these have 3"):
        Order.backbone_spec(Order.Options(), VideoSpec(SIZE, 3))
    with pytest.raises(UserError, match="draws 5 frames"):
        Order.backbone_spec(Order.Options(kind="verify"), VideoSpec(SIZE, 4))
    assert Order.backbone_spec(Order.Options(), VideoSpec(SIZE, 4)) == ImageSpec(SIZE)
    with pytest.raises(UserError, match=r"pretext\.crop: 15 does not fit .* set crop: 14"):
        build(crop=15, jitter=1)
    with pytest.raises(UserError, match="no patch"):
        build(jitter=8)
    with pytest.raises(ValueError, match="three of five"):
        Order.Options(kind="verify", frames=3)


def test_the_default_crop_is_a_multiple_of_the_patch():
    vit = build_backbone("vit-tiny", {"patch": 8, "depth": 1, "width": 24}, ImageSpec(64))
    pretext = Order(Order.Options(), vit)
    assert (pretext.crop, pretext.jitter) == (56, 4)
