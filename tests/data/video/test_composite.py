"""Films of objects with alpha over textures, photographs and films; and objects that cross."""

import numpy as np
import pytest
import torch
from PIL import Image

from sslrun.data.source import sources
from sslrun.data.video import composite
from sslrun.data.video.films import VOID
from sslrun.data.video.sprites import Motion, compose, cross
from sslrun.errors import UserError


@pytest.fixture
def folder(tmp_path):
    """Objects of one color each: eight circles in two classes."""
    y, x = np.mgrid[:20, :20] - 9.5
    for number in range(8):
        path = tmp_path / "stamps" / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        rgba = np.full((20, 20, 4), 30 * number, np.uint8)
        rgba[..., 3] = 255 * (x**2 + y**2 < 81)
        Image.fromarray(rgba).save(path)
    return tmp_path


STILL = {"speed": 0, "camera": 0, "turning": 0}


def load(folder, split, **options):
    source = sources["composite"]
    options = {"size": 24, "films": 12, "test_films": 8, "path": folder / "stamps"} | options
    return source(source.Options(**options)).load(split)


def shades(examples):
    """The shades that fill objects: those of many pixels under the masks."""
    films = examples.films
    values = films.frames[:, 0][films.masks == 1]
    counts = values.long().bincount(minlength=256)
    return {n for n in range(0, 240, 30) if counts[n] > 50}


def test_test_films_show_other_objects_than_training_films(folder):
    train = load(folder, "train", films=60, objects=1)
    test = load(folder, "test", test_films=40, objects=1)
    assert torch.equal(load(folder, "train", films=60, objects=1).films.frames, train.films.frames)
    first, second = shades(train), shades(test)
    assert first
    assert second
    assert not first & second


def test_photographs_are_backgrounds_of_their_split(folder):
    (folder / "photos").mkdir()
    for number in range(8):
        Image.new("RGB", (50, 40), (10 + number, 0, 0)).save(folder / "photos" / f"{number}.png")
    found = {}
    for split in ("train", "test"):
        options = {"backgrounds": folder / "photos", "films": 40, "test_films": 40}
        films = load(folder, split, scale=(0.2, 0.2), **options).films
        found[split] = set(films.frames[:, 0].flatten(1).mode(dim=1).values.tolist())
    assert len(found["test"]) == 2
    assert len(found["train"]) == 6
    assert not found["train"] & found["test"]


def test_the_test_shows_the_last_quarter_of_films(folder, monkeypatch):
    frames = torch.arange(80, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 36, 48)
    monkeypatch.setattr(composite, "read_film", lambda path, size: frames)
    (folder / "films").mkdir()
    (folder / "films" / "a.mp4").touch()
    options = {"backgrounds": folder / "films", "scale": (0.1, 0.1), **STILL}
    for split, low, high in (("train", 0, 59), ("test", 60, 79)):
        films = load(folder, split, **options).films
        corner = films.frames[:, 0].flatten(1).mode(dim=1).values.view(-1, films.starts[1])
        assert corner.diff(dim=1).eq(1).all()  # the film runs
        assert corner.min() >= low
        assert corner.max() <= high
    with pytest.raises(UserError, match=r"a\.mp4: has 80 frames, too few for clips of 30"):
        load(folder, "test", test_frames=30, **options)


def test_a_real_film_is_read_with_its_shorter_side_resized(tmp_path):
    av = pytest.importorskip("av")
    path = tmp_path / "film.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for number in range(5):
            pixels = np.full((32, 48, 3), 40 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    film = composite.read_film(path, 16)
    assert film.shape == (5, 3, 16, 24)
    assert (film.float().mean(dim=(1, 2, 3)) - 40 * torch.arange(5)).abs().max() < 8
    path.write_bytes(b"no film")
    with pytest.raises(UserError, match="cannot be decoded") as raised:
        composite.read_film(path, 16)
    assert "skip_corrupt" not in str(raised.value)


def test_crossing_paths_meet_after_the_first_frame():
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(2, 10, 5, 2, generator=generator)
    first, second = (Motion(c, torch.ones(10, 5), torch.zeros(10, 5)) for c in centers)
    chosen = torch.arange(10) < 6
    moved = cross(second, first, chosen, generator)
    distance = (moved.centers - first.centers).norm(dim=2)
    assert (distance[chosen, 1:].amin(dim=1) < 1e-5).all()
    assert torch.equal(moved.centers[~chosen], second.centers[~chosen])
    torch.testing.assert_close(moved.centers.diff(dim=1), second.centers.diff(dim=1))


def test_occlusion_hides_more_of_the_first_object(folder):
    options = {"films": 40, "objects": 2, "scale": (0.3, 0.3)}
    areas = []
    for occlusion in (0.0, 1.0):
        films = load(folder, "train", occlusion=occlusion, **options).films
        areas.append((films.masks == 1).sum())
    assert areas[1] < 0.9 * areas[0]


def test_an_object_that_the_first_frame_hides_is_void_later():
    square = torch.ones(1, 4, 8, 8)
    still = Motion(torch.zeros(1, 2, 2), torch.full((1, 2), 0.5), torch.zeros(1, 2))
    moving = Motion(torch.tensor([[[0.0, 0.0], [0.5, 0.0]]]), still.scales, still.angles)
    _, masks = compose(torch.zeros(1, 2, 3, 16, 16), [square, square], [still, moving])
    assert set(masks[0, 0].unique().tolist()) == {0, 2}
    assert set(masks[0, 1].unique().tolist()) == {0, 2, VOID}


def test_missing_folders_are_errors(folder):
    with pytest.raises(UserError, match="no such folder"):
        load(folder / "nowhere", "train")
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match="empty: holds no films and 0 photographs"):
        load(folder, "train", backgrounds=folder / "empty")
