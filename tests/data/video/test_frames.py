"""Single frames of films as images."""

import pytest
import torch

from sslrun.data.source import sources
from sslrun.data.specs import ImageSpec, VideoSpec
from sslrun.data.splits import load_splits
from sslrun.data.video.films import ClipExamples, StoredFilms
from sslrun.data.video.frames import FramesOptions, frames_of

FILMS = {"name": "moving-digits", "size": 16, "films": 40, "test_films": 8, "labels": "pattern"}


def overlapping():
    """Clips of three frames from two films; the frame (film 0, number 2) is in two clips."""
    frames = torch.arange(9, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4)
    films = StoredFilms(["a", "b"], frames.contiguous(), torch.tensor([0, 5, 9]))
    clips = torch.tensor([[0, 0, 1], [0, 2, 1], [1, 0, 1]])
    return ClipExamples(films, clips, VideoSpec(4, 3), torch.tensor([0, 1, 2]), ("x", "y", "z"))


def test_every_frame_is_listed_once_with_its_first_clips_class():
    frames = frames_of(overlapping())
    assert frames.spec == ImageSpec(4)
    (batch,) = frames.batches([torch.arange(len(frames))], torch.device("cpu"))
    assert batch.inputs.shape == (8, 3, 4, 4)
    assert batch.inputs[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert batch.labels.tolist() == frames.labels.tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    part = frames.subset(torch.tensor([7, 3]))
    (batch,) = part.to(torch.device("cpu")).batches([torch.tensor([0, 1])], torch.device("cpu"))
    assert batch.inputs[:, 0, 0, 0].tolist() == [7, 3]


def test_films_are_held_out_whole():
    options = FramesOptions(of=FILMS)
    splits = load_splits("frames", options)
    clips = load_splits("moving-digits", options.films[1])
    for split in ("train", "val", "test"):
        frames, whole = getattr(splits, split), getattr(clips, split)
        assert len(frames) == len(whole) * whole.spec.frames
    assert splits.classes == clips.classes
    films = [set(part.clips.clips[:, 0].tolist()) for part in (splits.train, splits.val)]
    assert not films[0] & films[1]
    assert len(splits.train_and_val) == len(splits.train) + len(splits.val)


def test_frames_of_films_with_masks_have_no_labels():
    splits = load_splits("frames", FramesOptions(of={**FILMS, "labels": "masks"}))
    (batch,) = splits.train.batches([torch.arange(4)], torch.device("cpu"))
    assert batch.labels is None
    assert splits.train.labels is None
    assert batch.inputs.shape == (4, 3, 16, 16)


def test_without_validation_films_there_are_no_validation_frames():
    assert sources["frames"](FramesOptions(of={**FILMS, "validation": 0})).splits == (
        "train",
        "test",
    )


def test_options_are_those_of_the_films():
    spelled_out = FramesOptions(of={**FILMS, "frames": 4})
    assert spelled_out.of == FramesOptions(of=FILMS).of
    assert FramesOptions(of="moving-digits") == FramesOptions()
    source = sources["frames"](spelled_out)
    spec, batch = source.sketch(3)
    assert spec == ImageSpec(16)
    assert batch.inputs.shape == (3, 3, 16, 16)


@pytest.mark.parametrize(
    ("of", "message"),
    [
        ("digits", "is image data"),
        ("no-such", "no such data set"),
        ({"name": "moving-digits", "sise": 3}, "does not take sise"),
        (3, "should name a data set"),
    ],
)
def test_other_data_and_options_are_refused(of, message):
    with pytest.raises(ValueError, match=message):
        FramesOptions(of=of)
