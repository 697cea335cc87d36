"""Fish: components, links between frames, and clips around one fish."""

import numpy as np
import pytest
import torch

from sslrun.data.source import sources
from sslrun.data.splits import load_splits
from sslrun.data.video.films import VOID
from sslrun.data.video.fish import Linker, Tracks, find_components, number_objects
from sslrun.errors import UserError


def test_components_are_opened_and_small_ones_are_dropped():
    mask = np.zeros((60, 60), bool)
    mask[5:15, 5:15] = True
    mask[10, 15:30] = True  # a line that opening removes
    mask[10:20, 30:40] = True
    mask[50:55, 50:55] = True  # 25 pixels
    sizes = [component.shape[1] for component in find_components(mask)]
    assert sizes == [97, 96]  # a cross removes the corners, and leaves a pixel of the line
    rows, columns = find_components(mask)[1]
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (10, 19, 30, 39)


def test_identities_end_where_fish_touch_and_what_touches_is_no_single_fish():
    linker = Linker()
    frames = [
        [[10, 10], [10, 50]],
        [[10, 20], [10, 40]],
        [[10, 30]],  # both are nearest to it
        [[10, 22], [10, 38]],
        [[10, 10], [10, 45], [90, 90]],
    ]
    tracks = [linker.add(np.array(centers, float)) for centers in frames]
    assert tracks == [[0, 1], [0, 1], [2], [3, 4], [3, 4, 5]]
    assert linker.single == [True, True, False, True, True, True]
    centers = linker.centers(5)
    assert centers[0, :2].tolist() == [[10, 10], [10, 20]]
    assert centers[0, 2:].isnan().all()


def test_objects_are_those_of_the_first_frame_and_later_ones_are_void():
    centers = torch.zeros(3, 4, 2)
    centers[2, :2] = torch.nan
    shape = torch.tensor([2, 3])
    empty = torch.zeros(0, dtype=torch.int64)
    tracks = Tracks(empty, empty, torch.zeros(5).long(), centers, torch.ones(3).bool(), shape)
    maps = torch.tensor([[[1, 0, 2], [0, 0, 0]], [[0, 1, 2], [3, 0, 0]]])
    masks = number_objects(maps, tracks, 0, 2)
    assert masks.tolist() == [[[1, 0, 2], [0, 0, 0]], [[0, 1, 2], [VOID, 0, 0]]]
    assert number_objects(maps.flip(0), tracks, 0, 2) is None  # track 3 is not in every frame
    assert number_objects(torch.zeros_like(maps), tracks, 0, 2) is None


@pytest.fixture
def pond(tmp_path, write_film):
    """A folder with two films of two dark squares that swim to the right on their own rows."""
    generator = np.random.default_rng(0)
    for name in ("test_A.avi", "test_B.avi"):
        frames = np.full((64, 96, 160, 3), 200, np.uint8)
        frames += generator.integers(0, 20, (1, 96, 160, 1), dtype=np.uint8)
        for number, frame in enumerate(frames):
            for row, speed in ((15, 2), (65, 1)):
                left = (10 + speed * number) % 140
                frame[row : row + 12, left : left + 12] = 40
        write_film(tmp_path / name, frames, "mpeg4", gop=1)
    return tmp_path


def test_clips_are_cut_around_fish_with_masks_that_move_with_them(pond):
    options = sources["fish"].Options(path=pond, size=24, crop=48, frames=3, skip=2, test_frames=4)
    examples = sources["fish"](options).load("train")
    assert examples.spec.frames == 3
    assert len(examples) >= 16
    frames = examples.films.frames.unflatten(0, (-1, 3))[:, :, 0].float()
    masks = examples.labels
    assert masks.shape == frames.shape
    assert (masks[:, 0] == 1).flatten(1).any(dim=1).all()
    fish, water = frames[masks == 1], frames[masks == 0]
    assert fish.mean() < 80 < 170 < water.mean()
    columns = torch.arange(24.0)
    centers = ((masks == 1) * columns).sum((2, 3)) / (masks == 1).sum((2, 3))
    # Two frames of one or two pixels each, at half the size.
    assert set(centers.diff(dim=1).round().flatten().tolist()) <= {1.0, 2.0}
    assert sources["fish"](options).load("test").spec.frames == 4


def test_validation_clips_of_fish_come_later_than_training_clips(pond):
    options = sources["fish"].Options(path=pond, size=24, crop=48, frames=3, skip=2)
    splits = load_splits("fish", options)
    numbers = [
        [int(splits.train.films.names[film].rpartition(" ")[2]) for film in part.clips[:, 0]]
        for part in (splits.train, splits.val)
    ]
    assert max(numbers[0]) + 2 * 5 <= min(numbers[1])


def test_films_of_fish_that_are_missing_or_too_short_are_named(pond):
    source = sources["fish"]
    with pytest.raises(UserError, match=r"test_A\.avi: no fish swims apart .+ for 97 frames"):
        source(source.Options(path=pond, frames=49, skip=2)).load("train")
    (pond / "test_B.avi").unlink()
    with pytest.raises(UserError, match=r"test_B\.avi: no such file"):
        source(source.Options(path=pond)).load("test")
