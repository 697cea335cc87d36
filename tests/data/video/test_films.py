"""Films and clips of them, and films of moving digits: masks, motion and splits."""

import pytest
import torch

from sslrun.data.source import sources
from sslrun.data.specs import InputSpec, VideoSpec
from sslrun.data.splits import load_splits
from sslrun.data.video.films import ClipExamples, StoredFilms, draw_clips
from sslrun.data.video.sources import _digit_pictures
from sslrun.data.video.sprites import PATTERNS, Motion, compose, draw_motion, pan, relight
from sslrun.errors import UserError


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def counting_films(*lengths):
    """Films whose frames have the value of their number, over all films."""
    count = sum(lengths)
    frames = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    return StoredFilms([f"film {n}" for n in range(len(lengths))], frames.contiguous(), starts)


def test_clips_are_every_start_that_fits_and_hold_every_skip_th_frame():
    films = counting_films(7, 3, 5)
    clips = draw_clips(films, frames=3, skip=2, stride=1)
    assert clips.tolist() == [[0, 0, 2], [0, 1, 2], [0, 2, 2], [2, 0, 2]]
    examples = ClipExamples(films, clips, VideoSpec(2, 3))
    (batch,) = examples.batches([torch.tensor([2, 3])], torch.device("cpu"))
    assert batch.inputs.shape == (2, 3, 3, 2, 2)
    assert batch.inputs[:, :, 0, 0, 0].tolist() == [[2, 4, 6], [10, 12, 14]]
    assert batch.labels is None
    assert examples.shot(3).frames(slice(1, 2))[0, 0, 0, 0] == 12
    whole = ClipExamples(films, clips, VideoSpec(2, 3), whole=True)
    assert len(whole.shot(0)) == 7
    with pytest.raises(UserError, match="span 9 frames, but the longest film has 7"):
        draw_clips(films, frames=5, skip=2, stride=1)


def test_the_spec_of_clips_is_saved_and_gives_that_of_a_frame(tmp_path):
    VideoSpec(24, 4).save(tmp_path)
    assert InputSpec.load(tmp_path) == VideoSpec(24, 4)
    assert VideoSpec(24, 4).frame.size == 24


def test_objects_are_drawn_where_they_are_and_later_ones_hide_earlier_ones():
    backgrounds = torch.zeros(1, 1, 3, 8, 8)
    square = torch.ones(1, 4, 4, 4)
    red, green = square.clone(), square.clone()
    red[:, 1:3], green[:, [0, 2]] = 0, 0
    # Half sides of the frame: an object of half side 0.5 around (-0.5, -0.5) covers a quarter.
    quarter = Motion(torch.full((1, 1, 2), -0.5), torch.full((1, 1), 0.5), torch.zeros(1, 1))
    middle = Motion(torch.zeros(1, 1, 2), torch.full((1, 1), 0.5), torch.zeros(1, 1))
    frames, masks = compose(backgrounds, [red, green], [quarter, middle])
    expected = torch.zeros(8, 8, dtype=torch.uint8)
    expected[:4, :4] = 1
    expected[2:6, 2:6] = 2
    assert torch.equal(masks[0, 0], expected)
    assert (frames[0, 0, 0][expected == 1] > 0.8).all()
    assert (frames[0, 0, 1][expected == 2] > 0.8).all()
    assert (frames[0, 0][:, 7, 7] == 0).all()


def test_patterns_move_as_their_names_say():
    patterns = torch.arange(len(PATTERNS)).repeat(20)
    motion = draw_motion(patterns, 5, 0.02, (0.1, 0.1), 0.0, generator())
    steps = motion.centers.diff(dim=1)
    for name, axis, sign in (("right", 0, 1), ("left", 0, -1), ("down", 1, 1), ("up", 1, -1)):
        chosen = steps[patterns == PATTERNS.index(name)]
        assert (sign * chosen[..., axis] > 0).float().mean() > 0.9  # except at a border
        assert chosen[..., 1 - axis].abs().max() < 1e-6
    growing = motion.scales[patterns == PATTERNS.index("growing")]
    assert (growing.diff(dim=1) > 0).all()
    still = steps[patterns == PATTERNS.index("growing")]
    assert still.abs().max() < 1e-6


def test_a_panning_window_stays_within_its_picture():
    ramp = torch.arange(20.0).expand(6, 3, 20, 20)
    frames = pan(ramp, 5, 8, 0.5, generator())
    assert frames.shape == (6, 5, 3, 8, 8)
    assert frames.diff(dim=-1).eq(1).all()  # no pixel repeats or is made up
    assert frames.diff(dim=1).abs().amax() > 0


def load(split, **options):
    source = sources["moving-digits"]
    return source(source.Options(**{"size": 24, "films": 12, "test_films": 5} | options)).load(
        split
    )


def test_moving_digits_are_the_same_films_each_time_with_masks_of_what_moves():
    first, again, test = load("train"), load("train"), load("test")
    assert torch.equal(first.films.frames, again.films.frames)
    assert first.labels.shape == (12, 4, 24, 24)
    assert test.labels.shape == (5, 8, 24, 24)
    assert set(first.labels.unique().tolist()) <= {0, 1, 2}
    assert (first.labels.flatten(1) > 0).any(dim=1).all()
    splits = load_splits(
        "moving-digits", sources["moving-digits"].Options(size=24, films=12, test_films=5)
    )
    assert len(splits.train) + len(splits.val) == 12


def test_training_and_test_films_show_different_scans():
    train, test = _digit_pictures(False).flatten(1), _digit_pictures(True).flatten(1)
    assert len(train) + len(test) == 1797
    assert torch.cdist(test[:100], train).min() > 0


def test_labels_may_be_the_kind_of_motion_of_a_single_object():
    examples = load("train", labels="pattern", objects=3)
    assert examples.classes == PATTERNS
    assert examples.labels.shape == (12,)
    assert examples.films.masks.unique().tolist() == [0, 1]


def test_objects_are_textured_as_their_backgrounds_are():
    examples = load("train", lighting=0, noise=0, films=60, objects=1, speed=0, camera=0, turning=0)
    frames, masks = examples.films.frames.float(), examples.films.masks
    inside = frames.transpose(0, 1)[:, masks > 0]
    outside = frames.transpose(0, 1)[:, masks == 0]
    torch.testing.assert_close(inside.mean(dim=1), outside.mean(dim=1), rtol=0.15, atol=0)
    torch.testing.assert_close(inside.std(dim=1), outside.std(dim=1), rtol=0.25, atol=0)
    within = [
        frame[:, mask > 0].std(dim=1).mean() for frame, mask in zip(frames, masks, strict=True)
    ]
    assert torch.stack(within).mean() > 10


def test_films_in_which_nothing_moves_and_the_light_stays_are_still():
    still = {"speed": 0, "camera": 0, "turning": 0, "lighting": 0, "noise": 0}
    clips = load("train", **still).films.frames.unflatten(0, (12, 4))
    assert torch.equal(clips, clips[:, :1].expand_as(clips))
    drifting = load("train", **still, drift=0.01).films.frames.unflatten(0, (12, 4)).float()
    brightness = drifting.flatten(2).mean(dim=2)
    torch.testing.assert_close(brightness / brightness[:, :1], torch.tensor(
        [[1, 1.01, 1.02, 1.03]]).expand(12, -1), rtol=2e-3, atol=0)  # fmt: skip


def test_light_walks_in_steps_no_larger_than_asked_and_noise_is_as_strong_as_asked():
    gray = torch.full((200, 6, 1, 4, 4), 0.5)
    lit = relight(gray, 0.05, 0, 0, generator())[..., 0, 0, 0]
    steps = lit.diff(dim=1).abs()
    assert steps.max() <= 0.05 + 1e-6
    assert steps.max() > 0.045
    assert (lit[:, 0] - 0.5).abs().max() <= 0.15 + 1e-6
    bright = torch.full_like(gray, 0.6)
    contrast = (relight(bright, 0.05, 0, 0, generator())[..., 0, 0, 0] - lit).log()
    assert contrast.diff(dim=1).abs().max() <= 0.05 + 1e-4
    noisy = relight(gray, 0, 0, 0.1, generator())
    assert noisy.std() == pytest.approx(0.1, rel=0.02)
