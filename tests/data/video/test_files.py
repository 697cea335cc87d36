"""Films on disk: stored or streamed they give the same clips, and damaged ones are skipped."""

import pytest
import torch
from PIL import Image

from sslrun.data.image.images import UnreadableError
from sslrun.data.specs import VideoSpec
from sslrun.data.video import files
from sslrun.data.video.decoding import Framing
from sslrun.data.video.files import FrameFolders, open_film_files, store_films
from sslrun.data.video.films import ClipExamples, StoredFilms, draw_clips
from sslrun.errors import UserError


@pytest.fixture
def two_films(tmp_path, write_film, counting_frames):
    paths = [tmp_path / "films" / name for name in ("a.mp4", "b.mp4")]
    write_film(paths[0], counting_frames(9))
    write_film(paths[1], counting_frames(6) + 100)
    return [str(path) for path in paths]


def clips_of(films, **options):
    return ClipExamples(films, draw_clips(films, 3, 2, 1), VideoSpec(8, 3), **options)


@pytest.mark.parametrize("workers", [0, 1])
def test_streamed_films_give_the_clips_of_stored_ones(two_films, monkeypatch, workers):
    monkeypatch.setenv("SSLRUN_WORKERS", str(workers))
    streamed, kept = open_film_files(two_films, Framing(8), False, None)
    stored, _ = store_films(streamed, False, None)
    assert isinstance(stored, StoredFilms)
    assert kept.tolist() == [0, 1]
    assert stored.lengths.tolist() == streamed.lengths.tolist() == [9, 6]
    first, second = clips_of(stored), clips_of(streamed)
    assert first.nbytes == 15 * 3 * 64
    assert second.nbytes is None
    order = [torch.tensor([6, 0, 3, 5]), torch.tensor([1, 2])]
    device = torch.device("cpu")
    for a, b in zip(first.batches(order, device), second.batches(order, device), strict=True):
        assert torch.equal(a.inputs, b.inputs)
        assert a.labels is b.labels is None
    assert a.inputs[:, :, 0, 0, 7].tolist() == [[10, 30, 50], [20, 40, 60]]
    assert torch.equal(first.shot(6).frames(slice(1, 3)), second.shot(6).frames(slice(1, 3)))


def test_films_are_decoded_once_and_then_read_from_the_cache(two_films, monkeypatch):
    streamed, _ = open_film_files(two_films, Framing(8), False, None)
    stored, _ = store_films(streamed, False, None)
    monkeypatch.setattr(files, "open_film", lambda path: pytest.fail(f"{path} is opened again"))
    files._keep_open.cache_clear()
    again, _ = open_film_files(two_films, Framing(8), False, None)
    assert torch.equal(store_films(again, False, None)[0].frames, stored.frames)


def test_films_that_do_not_fit_into_memory_are_streamed(two_films, monkeypatch):
    streamed, _ = open_film_files(two_films, Framing(8), False, None)
    monkeypatch.setattr(files, "MAX_TENSOR_BYTES", 15 * 3 * 64 - 1)
    assert store_films(streamed, False, None)[0] is streamed
    monkeypatch.setattr(files, "MAX_TENSOR_BYTES", 15 * 3 * 64)
    assert isinstance(store_films(streamed, False, None)[0], StoredFilms)


def damage_middle(path):
    content = bytearray(path.read_bytes())
    start = content.index(b"mdat") + 40
    content[start : start + 4000] = b"\xff" * len(content[start : start + 4000])
    path.write_bytes(content)


@pytest.mark.parametrize("limit", [0, 2**20])
def test_damaged_films_end_the_run_or_are_skipped(
    tmp_path, write_film, two_films, monkeypatch, caplog, limit
):
    noise = torch.randint(0, 256, (6, 16, 24, 3)).byte().numpy()
    damaged = write_film(tmp_path / "damaged.mp4", noise)
    damage_middle(damaged)
    empty = tmp_path / "empty.mp4"
    empty.write_bytes(b"")
    paths = [str(empty), two_films[0], str(damaged), two_films[1]]
    with pytest.raises(UnreadableError, match=r"empty\.mp4: cannot be decoded"):
        open_film_files(paths, Framing(8), False, None)
    opened, kept = open_film_files(paths, Framing(8), True, None)
    assert kept.tolist() == [1, 2, 3]
    monkeypatch.setattr(files, "MAX_TENSOR_BYTES", limit)
    films, kept = store_films(opened, True, None)
    assert kept.tolist() == [0, 2]
    assert "skipped 1 films" in caplog.text
    assert films.lengths.tolist() == [9, 6]
    assert films.read(1, torch.tensor([5]))[0, 0, 0, 7] == 150
    with pytest.raises(UnreadableError, match=r"damaged\.mp4: cannot be decoded"):
        opened.read(1, torch.arange(6))
    with pytest.raises(UnreadableError, match="and neither can any other film"):
        open_film_files([str(empty)], Framing(8), True, None)


def write_pictures(folder, frames, mode="RGB", suffix=".png"):
    folder.mkdir(parents=True)
    paths = []
    for number, frame in enumerate(frames):
        paths.append(str(folder / f"{number:03}{suffix}"))
        Image.fromarray(frame).convert(mode).save(paths[-1])
    return paths


def test_frames_in_folders_are_color_and_of_one_size(tmp_path, counting_frames):
    gray = write_pictures(tmp_path / "gray", counting_frames(4)[..., 0], "L")
    color = write_pictures(tmp_path / "color", counting_frames(3))
    films = FrameFolders(["gray", "color"], [gray, color], Framing(8))
    assert films.read(0, torch.tensor([3, 1]))[:, :, 2, 2].tolist() == [[30] * 3, [10] * 3]
    assert films.read(1, torch.tensor([2]))[0, :, 2, 0].tolist() == [20, 20, 255]
    Image.new("RGB", (24, 18)).save(color[1])
    with pytest.raises(UserError, match=r"001\.png: is 24x18, but the first frame .+ 24x16"):
        films.read(1, torch.tensor([1]))


def test_a_batch_of_whole_frames_of_different_shapes_is_refused(tmp_path, counting_frames):
    wide = write_pictures(tmp_path / "wide", counting_frames(3, 8, 24))
    square = write_pictures(tmp_path / "square", counting_frames(3, 8, 8))
    films = FrameFolders(["wide", "square"], [wide, square], Framing(8, whole=True))
    examples = ClipExamples(films, draw_clips(films, 3, 1, 1), VideoSpec(8, 3, width=24))
    assert examples.shot(0).frames(slice(None)).shape == (3, 3, 8, 24)
    with pytest.raises(UserError, match="set whole: false"):
        list(examples.batches([torch.tensor([0, 1])], torch.device("cpu")))
