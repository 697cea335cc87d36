"""Tracking through files: perfect features, what is written, memory, and mistakes."""

import sys
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from sslrun import cli
from sslrun.data.image.masks import read_mask
from sslrun.errors import UserError
from sslrun.protocols.propagate import Propagate, PropagateOptions
from sslrun.stages import track as module
from sslrun.stages.track import (
    COLORS,
    PART,
    Footage,
    Movie,
    Sheet,
    follow,
    open_footage,
    open_writer,
    paint,
    read_first_mask,
    scale_to,
    write_mask,
)

SIZE = 24


class Identities(torch.nn.Module):
    """A backbone whose features are the one-hot value of each pixel: perfect features."""

    def dense(self, inputs, layer=None):
        values = (inputs[:, 0] * 8).round().long()
        return F.one_hot(values, 9).permute(0, 3, 1, 2).float()


def moving_masks(frames=6):
    masks = torch.zeros(frames, SIZE, SIZE, dtype=torch.uint8)
    for time in range(frames):
        masks[time, 3:9, 2 * time : 2 * time + 6] = 1
        masks[time, 14:20, 12 - time : 18 - time] = 4
    return masks


def as_frames(masks):
    return (masks[:, None].float() / 8 * 255).round().byte().expand(-1, 3, -1, -1)


def write_film(folder, masks):
    folder.mkdir()
    for number, frame in enumerate(as_frames(masks)):
        Image.fromarray(frame.permute(1, 2, 0).numpy()).save(folder / f"{number:03d}.png")
    Image.fromarray(masks[0].numpy()).save(folder.parent / "first.png")
    return folder


def test_perfect_features_follow_the_objects_of_a_folder_of_frames(tmp_path):
    masks = moving_masks(PART + 3)
    footage = open_footage(write_film(tmp_path / "film", masks), None)
    first = read_first_mask(tmp_path / "first.png", tmp_path / "film", footage.shape)
    followed = list(
        follow(Propagate(PropagateOptions()), Identities(), footage.parts(), first, (SIZE, SIZE))
    )
    assert torch.equal(torch.stack([frame for frame, _ in followed]), as_frames(masks))
    assert torch.equal(torch.stack([mask for _, mask in followed]), masks)
    assert open_footage(tmp_path / "film", 4).length == 4


def test_memory_does_not_grow_with_the_length_of_the_film():
    arrays = []

    def parts(count):
        for _ in range(count):
            array = np.zeros((2, 3, 12, 12), np.uint8)
            arrays.append(weakref.ref(array))
            yield torch.from_numpy(array)  # keeps the array until no view of its frames is left
            del array

    first, most = moving_masks()[0, :12, :12], 0
    protocol = Propagate(PropagateOptions(context=3))
    for _ in follow(protocol, Identities(), parts(20), first, (12, 12)):
        most = max(most, sum(array() is not None for array in arrays))
    assert len(arrays) == 20
    assert 1 <= most <= 3


def test_sides_for_the_backbone_keep_the_proportions_and_are_multiples_of_its_patch():
    assert scale_to((480, 854), 224, 16) == (224, 400)
    assert scale_to((100, 60), 30, 4) == (48, 32)
    assert scale_to((64, 64), 64, 1) == (64, 64)


def test_objects_are_painted_in_their_colors_and_masks_are_read_back(tmp_path):
    frame = torch.full((3, 2, 3), 100, dtype=torch.uint8)
    mask = torch.tensor([[0, 1, 2], [0, 255, 1]], dtype=torch.uint8)
    painted = paint(frame, mask)
    assert (painted[:, :, 0] == 100).all()
    assert (painted[:, 1, 1] == 100).all()
    assert painted[:, 0, 1].tolist() == [(100 + color) // 2 for color in COLORS[1].tolist()]
    assert not torch.equal(painted[:, 0, 1], painted[:, 0, 2])
    write_mask(tmp_path / "masks" / "0.png", mask)
    assert torch.equal(read_mask(tmp_path / "masks" / "0.png"), mask)


def footage_of(frames=20, shape=(30, 41)):
    return Footage(None, frames, 12.5, shape)


def test_a_contact_sheet_shows_evenly_spaced_frames_up_to_the_last(tmp_path):
    with Sheet(tmp_path / "sheet.png", footage_of()) as sheet:
        for number in range(20):
            frame = torch.full((3, 30, 41), number, dtype=torch.uint8)
            sheet.add(number, frame, frame)
    titles = list(sheet._columns)
    assert (len(titles), titles[0], titles[-1]) == (8, "frame 1", "frame 20")
    assert Image.open(tmp_path / "sheet.png").width > 8 * 41


def test_a_film_is_written_and_can_be_read(tmp_path):
    pytest.importorskip("av")
    with Movie(tmp_path / "new" / "film.mp4", footage_of()) as movie:
        for number in range(20):
            frame = torch.full((3, 30, 41), 10 * number, dtype=torch.uint8)
            movie.add(number, frame, frame)
    footage = open_footage(tmp_path / "new" / "film.mp4", None)
    assert (footage.length, footage.shape, footage.rate) == (20, (30, 40), 12.5)
    frames = torch.cat(list(footage.parts())).float()
    assert (frames[:, :, 5, 5] - 10 * torch.arange(20.0)[:, None]).abs().max() < 8


def test_an_interrupted_film_leaves_nothing(tmp_path):
    pytest.importorskip("av")
    frame = torch.zeros(3, 30, 41, dtype=torch.uint8)

    def interrupted():
        with Movie(tmp_path / "film.mp4", footage_of()) as movie:
            movie.add(0, frame, frame)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())


def test_without_an_encoder_a_contact_sheet_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    writer = open_writer(tmp_path / "film.mp4", footage_of())
    assert isinstance(writer, Sheet)
    assert writer.path == tmp_path / "film.png"


def test_a_mask_of_0_and_255_is_one_object_and_others_are_checked(tmp_path):
    mask = np.zeros((SIZE, SIZE), np.uint8)
    path = tmp_path / "first.png"
    Image.fromarray(mask).save(path)
    with pytest.raises(UserError, match=r"first.png: has no object to follow"):
        read_first_mask(path, tmp_path, (SIZE, SIZE))
    mask[3:9] = 255
    Image.fromarray(mask).save(path)
    assert read_first_mask(path, tmp_path, (SIZE, SIZE)).unique().tolist() == [0, 1]
    with pytest.raises(UserError, match=r"is 24x24, but the frames of .* are 30x20"):
        read_first_mask(path, tmp_path, (20, 30))
    with pytest.raises(UserError, match="no such film"):
        open_footage(tmp_path / "missing.mp4", None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: holds no pictures"):
        open_footage(tmp_path / "empty", None)


RECIPE = """
name: follow
backbone: {name: pixels, patch: 2}
pretext: null
data: {name: moving-digits, size: 24, films: 12, test_films: 5}
evaluate:
  moving-digits: {protocols: [propagate]}
propagate: {k: 3}
"""


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["sslrun", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return stopped.value.code or 0


def test_the_command_tracks_by_an_untrained_recipe(tmp_path, monkeypatch, capsys):
    write_film(tmp_path / "film", moving_masks())
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    arguments = ["track", recipe, tmp_path / "film", "--mask", tmp_path / "first.png"]
    arguments += ["-o", tmp_path / "out.png", "--masks", tmp_path / "masks", "--frames", 5]
    arguments += ["--device", "cpu", "--runs", tmp_path / "runs"]
    assert run(monkeypatch, *arguments) == 0
    assert "out.png: 5 frames, with the objects 1, 4" in capsys.readouterr().out
    found = [read_mask(path) for path in sorted((tmp_path / "masks").iterdir())]
    assert len(found) == 5
    truth = moving_masks()
    assert torch.equal(found[0], truth[0])
    assert (found[4] == truth[4]).float().mean() > 0.9
    Image.new("L", (9, 9), 1).save(tmp_path / "first.png")
    assert run(monkeypatch, *arguments) == 2
    assert "first.png: is 9x9" in capsys.readouterr().err
