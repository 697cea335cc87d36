"""Sources of films on disk, and the splits that are carved from them."""

import numpy as np
import pytest
import torch
from PIL import Image

from sslrun.data.source import sources
from sslrun.data.specs import InputSpec, VideoSpec
from sslrun.data.splits import load_splits
from sslrun.data.video.films import ClipExamples, StoredFilms, draw_clips
from sslrun.errors import UserError

CPU = torch.device("cpu")


def load(name, split, **options):
    return build(name, **options).load(split)


def build(name, **options):
    return sources[name](sources[name].Options(**options))


def write_frames(folder, count, height=16, width=24):
    folder.mkdir(parents=True)
    for number in range(count):
        picture = np.full((height, width, 3), 10 * number, np.uint8)
        Image.fromarray(picture).save(folder / f"{number:05}.jpg", quality=100)


def write_masks(folder, count, height=16, width=24, objects=1):
    folder.mkdir(parents=True)
    for number in range(count):
        mask = Image.new("P", (width, height))
        mask.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0] + 247 * [0, 0, 0])
        pixels = np.zeros((height, width), np.uint8)
        pixels[4:8, number : number + 4] = objects
        mask.putdata(pixels.ravel().tolist())
        mask.save(folder / f"{number:05}.png")


def still_films(*lengths):
    starts = torch.tensor([0, *lengths]).cumsum(0)
    frames = torch.zeros(int(starts[-1]), 3, 2, 2, dtype=torch.uint8)
    return StoredFilms([f"film {n}" for n in range(len(lengths))], frames, starts)


# ---------------------------------------------------------------- splits


def test_whole_films_are_carved_and_none_is_on_both_sides():
    films = still_films(*[9] * 8)
    classes = torch.arange(8) % 2
    clips = draw_clips(films, 3, 1, 1)
    examples = ClipExamples(films, clips, VideoSpec(2, 3), classes[clips[:, 0]], ("a", "b"))
    rest, carved = examples.divide(0.25)
    assert len(rest) + len(carved) == len(examples)
    held_out = examples.subset(carved).clips[:, 0].unique()
    assert not set(held_out.tolist()) & set(examples.subset(rest).clips[:, 0].tolist())
    assert classes[held_out].tolist().count(0) == classes[held_out].tolist().count(1) == 1
    counted, _ = examples.divide(14)
    assert torch.equal(counted, rest)
    with pytest.raises(UserError, match="56 clips are to be held out, but there are 56"):
        examples.divide(56)


def test_the_end_of_a_single_film_is_carved_with_a_gap():
    examples = ClipExamples(
        still_films(100), draw_clips(still_films(100), 4, 2, 1), VideoSpec(2, 4)
    )
    rest, carved = examples.divide(0.2)
    frames = examples.frame_numbers(torch.arange(len(examples)))
    assert frames[carved].max() == 99
    assert len(carved) == round(0.2 * len(examples))
    assert frames[carved].min() - frames[rest].max() > 7
    short = ClipExamples(still_films(9), draw_clips(still_films(9), 4, 2, 1), VideoSpec(2, 4))
    with pytest.raises(UserError, match="the film has only 3 clips"):
        short.divide(0.5)


def test_films_of_one_recording_stay_together_even_in_a_selection():
    films = still_films(*[4] * 6)
    clips = draw_clips(films, 2, 1, 1)
    sections = torch.tensor([[7, 0, 4], [7, 0, 4], [3, 0, 4], [3, 0, 4], [5, 0, 4], [5, 0, 4]])
    examples = ClipExamples(films, clips, VideoSpec(2, 2), sections=sections)
    rest, carved = examples.divide(0.34)
    owners = sections[examples.subset(carved).clips[:, 0], 0]
    assert len(owners) == 6
    assert len(owners.unique()) == 1
    rest_again, carved_again = examples.subset(rest).divide(0.5)
    both = (rest_again, carved_again)
    assert [len(sections[clips[rest][part][:, 0], 0].unique()) for part in both] == [1, 1]


def test_a_spec_of_frames_that_are_not_square_is_saved(tmp_path):
    spec = VideoSpec(24, 4, width=32)
    spec.save(tmp_path)
    assert InputSpec.load(tmp_path) == spec
    assert spec.frame.shape == (24, 32)
    VideoSpec(24, 4).save(tmp_path)
    assert "width" not in (tmp_path / "spec.json").read_text()


# ---------------------------------------------------------------- films of the user


def test_a_folder_of_films_with_classes(tmp_path, write_film, counting_frames):
    for name in ("train/jump/a.mp4", "train/jump/b.mp4", "train/run/c.avi", "test/run/d.mp4"):
        codec = "mpeg4" if name.endswith("avi") else "libx264rgb"
        write_film(tmp_path / name, counting_frames(10), codec)
    train = load("films", "train", path=tmp_path, size=8, frames=2, skip=3)
    assert train.classes == ("jump", "run")
    assert train.clips[:, 1:].tolist() == [[0, 3], [6, 3]] * 3
    assert train.labels.tolist() == [0, 0, 0, 0, 1, 1]
    (batch,) = train.batches([torch.tensor([1])], CPU)
    assert batch.inputs[0, :, 0, 0, 7].tolist() == [60, 90]
    test = load("films", "test", path=tmp_path, size=8, frames=2, stride=1)
    assert (len(test), test.labels.unique().tolist()) == (9, [1])
    spec, batch = build("films", path=tmp_path, size=8, whole=True).sketch(2)
    assert batch.inputs.shape == (2, 4, 3, 8, spec.width)


def test_films_without_classes_have_no_labels_and_are_split_by_film(
    tmp_path, write_film, counting_frames
):
    for name in "abcdef":
        write_film(tmp_path / f"{name}.mp4", counting_frames(8))
    options = sources["films"].Options(path=tmp_path, size=8, stride=1)
    splits = load_splits("films", options)
    parts = [splits.train, splits.val, splits.test]
    owners = [set(part.clips[:, 0].tolist()) for part in parts]
    assert sorted(film for part in owners for film in part) == list(range(6))
    assert splits.train.labels is None


@pytest.mark.parametrize("name", ["films", "frame-folders"])
def test_a_folder_without_films_is_refused(tmp_path, name):
    (tmp_path / "notes.txt").write_text("nothing here")
    with pytest.raises(UserError, match=r"holds no (films|pictures) \(\.\w+"):
        load(name, "train", path=tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        load(name, "train", path=tmp_path / "absent")


def test_clips_longer_than_every_film_are_refused(tmp_path, write_film, counting_frames, caplog):
    write_film(tmp_path / "a.mp4", counting_frames(5))
    with pytest.raises(UserError, match="span 10 frames, but the longest film has 5"):
        load("films", "train", path=tmp_path, frames=4, skip=3)
    write_film(tmp_path / "b.mp4", counting_frames(10))
    assert len(load("films", "train", path=tmp_path, frames=4, skip=3)) == 1
    assert "left out 1 films" in caplog.text


def test_frame_folders_have_masks_and_test_films_are_followed_whole(tmp_path):
    for name, count in (("train/a", 6), ("train/b", 5), ("test/c", 7)):
        write_frames(tmp_path / "films" / name, count)
        write_masks(tmp_path / "masks" / name, count)
    options = {"path": tmp_path / "films", "masks": tmp_path / "masks", "size": 8, "frames": 2}
    train, test = (load("frame-folders", split, **options) for split in ("train", "test"))
    assert isinstance(train.films, StoredFilms)
    assert train.labels.shape == (5, 2, 8, 8)
    assert set(train.labels.unique().tolist()) == {0, 1}
    assert len(test) == 1
    assert len(test.shot(0)) == 7
    # The square is columns 4 to 19 of 24, two to a pixel: the mask of frame 6 is columns 6 to 9.
    assert test.shot(0).masks(slice(6, 7))[0, 3].tolist() == [0, 1, 1, 0, 0, 0, 0, 0]
    with pytest.raises(UserError, match="has 7 frames, but a clip spans 9"):
        load("frame-folders", "test", **{**options, "frames": 9})
    (tmp_path / "masks" / "test" / "c" / "00003.png").unlink()
    with pytest.raises(UserError, match=r"00003\.png: no such file: it should be the mask of"):
        load("frame-folders", "test", **options)


# ---------------------------------------------------------------- published sets


@pytest.fixture
def davis(tmp_path):
    (tmp_path / "ImageSets" / "2017").mkdir(parents=True)
    for split, name, width in (("train", "bear", 32), ("train", "boat", 32), ("val", "cat", 40)):
        write_frames(tmp_path / "JPEGImages" / "480p" / name, 6, width=width)
        write_masks(tmp_path / "Annotations" / "480p" / name, 6, width=width, objects=2)
        with open(tmp_path / "ImageSets" / "2017" / f"{split}.txt", "a") as file:
            file.write(f"{name}\n")
    return tmp_path


def test_davis_is_followed_at_its_own_shape_through_whole_films(davis):
    test = load("davis", "test", path=davis, size=8)
    shot = test.shot(0)
    assert shot.name.endswith("cat")
    assert shot.frames(slice(2, 5)).shape == (3, 3, 8, 20)
    assert shot.masks(slice(0, 6)).shape == (6, 8, 20)
    assert set(shot.masks(slice(0, 6)).unique().tolist()) == {0, 2}
    assert test.spec == VideoSpec(8, 4, width=20)
    train = load("davis", "train", path=davis, size=8, whole=False, frames=3)
    assert (len(train), train.spec) == (4, VideoSpec(8, 3))
    assert isinstance(train.films, StoredFilms)


def test_davis_names_what_is_missing(davis, monkeypatch):
    listed = davis / "ImageSets" / "2017" / "val.txt"
    listed.write_text("cat\n\ndog\n")
    with pytest.raises(UserError, match=r"val\.txt:3: names dog, but there is no .+480p/dog"):
        load("davis", "test", path=davis)
    listed.write_text("")
    with pytest.raises(UserError, match=r"val\.txt: is empty"):
        load("davis", "test", path=davis)
    monkeypatch.setenv("SSLRUN_DATA", str(davis / "absent"))
    monkeypatch.chdir(davis)
    with pytest.raises(UserError, match="davis: not on this machine: put the folder DAVIS"):
        build("davis").check_available()


def test_ucf101_reads_its_lists_and_keeps_scenes_together(tmp_path, write_film, counting_frames):
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "classInd.txt").write_text("1 Archery\n2 Bowling\n")
    rows = []
    for number, action in enumerate(("Archery", "Bowling"), start=1):
        for scene in (1, 2, 3):
            for take in (1, 2):
                name = f"{action}/v_{action}_g{scene:02}_c{take:02}.avi"
                write_film(tmp_path / "UCF-101" / name, counting_frames(6), "mpeg4")
                rows.append((scene, f"{name} {number}", name))
    (lists / "trainlist02.txt").write_text("".join(f"{row}\n" for s, row, _ in rows if s > 1))
    (lists / "testlist02.txt").write_text("".join(f"{name}\n" for s, _, name in rows if s == 1))
    options = sources["ucf101"].Options(path=tmp_path, size=8, frames=3, fold=2)
    splits = load_splits("ucf101", options)
    assert splits.classes == ("Archery", "Bowling")
    assert splits.test.labels.tolist() == [0] * 4 + [1] * 4
    scenes = [
        {splits.train.films.names[film].split("_")[-2] for film in part.clips[:, 0].tolist()}
        for part in (splits.train, splits.val)
    ]
    assert [len(splits.train), len(splits.val)] == [8, 8]
    assert scenes in ([{"g02"}, {"g03"}], [{"g03"}, {"g02"}]) or all(len(s) == 2 for s in scenes)
    with open(lists / "trainlist02.txt", "a") as file:
        file.write("Archery/v_Archery_g09_c01.avi 1\n")
    with pytest.raises(UserError, match=r"trainlist02\.txt:9: names Archery/v_Archery_g09_c01"):
        load("ucf101", "train", path=tmp_path, fold=2)
    (lists / "trainlist01.txt").write_text("Archery/x.avi 1\n")
    (tmp_path / "UCF-101" / "Archery" / "x.avi").touch()
    with pytest.raises(UserError, match=r"trainlist01\.txt:1: Archery/x\.avi has no scene"):
        load("ucf101", "train", path=tmp_path)


def test_jhmdb_has_points_in_pixels_of_the_frames_that_are_read(tmp_path):
    from scipy.io import savemat

    (tmp_path / "splits").mkdir()
    (tmp_path / "splits" / "wave_test_split1.txt").write_text("one.avi 1\ntwo.avi 2\n")
    positions = np.zeros((2, 15, 5))
    positions[0], positions[1] = 13.0, np.arange(5) + 1.0  # counted from 1
    for name in ("one", "two"):
        write_frames(tmp_path / "Rename_Images" / "wave" / name, 6, 16, 24)
        folder = tmp_path / "joint_positions" / "wave" / name
        folder.mkdir(parents=True)
        savemat(folder / "joint_positions.mat", {"pos_img": positions})
    test = load("jhmdb", "test", path=tmp_path, size=32, frames=2)
    points = test.shot(0).points(slice(1, 6))
    assert test.films.has_points
    assert points.dtype == torch.float32
    assert points.shape == (5, 15, 2)
    # A pixel of the picture becomes two by two: the center of pixel 12 is between 24 and 25.
    assert points[0, 3].tolist() == [24.5, 2.5]
    assert points[-1].isnan().all()
    assert test.shot(0).frames(slice(0, 1)).shape == (1, 3, 32, 48)
    train = load("jhmdb", "train", path=tmp_path, size=16, whole=False, frames=2)
    assert isinstance(train.films, StoredFilms)
    assert train.labels.shape == (3, 2, 15, 2)
    assert train.labels[0, 1, 0].tolist() == [8, 1]
    with pytest.raises(UserError, match="this film has no points"):
        still_films(3).read_points(0, torch.tensor([0]))
    (tmp_path / "joint_positions" / "wave" / "two" / "joint_positions.mat").write_text("no")
    with pytest.raises(UserError, match=r"joint_positions\.mat: cannot be read as positions"):
        load("jhmdb", "test", path=tmp_path)
