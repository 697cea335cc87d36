"""Films are decoded by number, and frames, masks and points are brought to one size alike."""

import importlib.util
import sys
import types

import pytest
import torch

from sslrun.data.image.images import UnreadableError
from sslrun.data.video import decoding
from sslrun.data.video.decoding import AvReader, Framing, TorchcodecReader, find_reader, open_film
from sslrun.errors import UserError


@pytest.fixture
def fresh_reader():
    """Look for decoders again, before and after the test."""
    find_reader.cache_clear()
    yield
    find_reader.cache_clear()


@pytest.mark.parametrize("codec", ["libx264rgb", "mpeg4"])
def test_frames_in_any_order_equal_those_read_in_order(tmp_path, write_film, codec):
    noise = torch.randint(0, 256, (23, 16, 24, 3), generator=torch.Generator().manual_seed(0))
    path = write_film(tmp_path / "film.mp4", noise.byte().numpy(), codec)
    film = AvReader(str(path))
    assert (film.length, film.rate) == (23, 10)
    in_order = AvReader(str(path)).read(torch.arange(23))
    assert in_order.shape == (23, 3, 16, 24)
    if codec == "libx264rgb":
        assert torch.equal(in_order, noise.byte().permute(0, 3, 1, 2))
    for numbers in ([22, 0, 7, 7, 8, 21], [3], [2], [20, 19, 18], [0, 22]):
        assert torch.equal(film.read(torch.tensor(numbers)), in_order[numbers]), numbers


def test_a_damaged_film_is_named(tmp_path, write_film, counting_frames):
    path = write_film(tmp_path / "film.mp4", counting_frames(20), codec="mpeg4")
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(path.read_bytes()[:300])
    with pytest.raises(UnreadableError, match=r"broken\.mp4: cannot be decoded \(.+skip_corrupt"):
        open_film(str(broken))
    text = tmp_path / "text.mp4"
    text.write_text("not a film")
    with pytest.raises(UnreadableError, match=r"text\.mp4: cannot be decoded"):
        AvReader(str(text))
    with pytest.raises(UnreadableError, match=r"film\.mp4: cannot be decoded"):
        AvReader(str(path)).read(torch.tensor([20]))


def test_without_a_decoder_the_message_names_the_extra(monkeypatch, fresh_reader):
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    with pytest.raises(UserError, match=r"pip install 'sslrun\[video\]'"):
        open_film("film.mp4")


class FakeDecoder:
    """Stands for torchcodec's decoder; the empty film says whether its libraries load."""

    loads = True

    def __init__(self, source, num_ffmpeg_threads=None):
        if source == b"":
            raise RuntimeError("no stream" if self.loads else "Could not load libtorchcodec.")
        if source == "bad.mp4":
            raise RuntimeError("Decoder.cpp:41,\nCould not open input file")
        self.metadata = types.SimpleNamespace(num_frames=9, average_fps=25.0)

    def get_frames_at(self, indices):
        frames = torch.tensor(indices, dtype=torch.uint8)[:, None, None, None]
        return types.SimpleNamespace(data=frames.expand(-1, 3, 4, 4))


@pytest.mark.parametrize("loads", [True, False])
def test_torchcodec_decodes_if_it_finds_ffmpeg_and_pyav_otherwise(monkeypatch, fresh_reader, loads):
    pytest.importorskip("av")
    torchcodec = types.ModuleType("torchcodec")
    torchcodec.__spec__ = importlib.util.spec_from_loader("torchcodec", None)
    decoders = types.ModuleType("torchcodec.decoders")
    decoders.VideoDecoder = type("Decoder", (FakeDecoder,), {"loads": loads})
    monkeypatch.setitem(sys.modules, "torchcodec", torchcodec)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", decoders)
    assert find_reader() is (TorchcodecReader if loads else AvReader)
    if loads:
        film = open_film("film.mp4")
        assert (film.length, film.rate) == (9, 25.0)
        assert film.read(torch.tensor([4, 2]))[:, 0, 0, 0].tolist() == [4, 2]
        with pytest.raises(UnreadableError, match=r"bad\.mp4: cannot be decoded \(Could not open"):
            open_film("bad.mp4")


def test_torchcodec_and_pyav_agree(tmp_path, write_film):
    if not decoding._can_load_torchcodec():
        pytest.skip("torchcodec does not load here")
    noise = torch.randint(0, 256, (12, 32, 48, 3)).byte().numpy()
    path = str(write_film(tmp_path / "film.mp4", noise, "mpeg4"))
    numbers = torch.tensor([7, 2, 11])
    first, second = TorchcodecReader(path), AvReader(path)
    assert (first.length, first.rate) == (second.length, second.rate)
    assert torch.equal(first.read(numbers), second.read(numbers))


def test_frames_are_cut_to_their_central_square_and_resized():
    ramp = torch.arange(24, dtype=torch.uint8).mul(10).expand(1, 3, 16, 24)
    small = Framing(8).frames(ramp)
    assert small.shape == (1, 3, 8, 8)
    assert small.is_contiguous()
    # The square is columns 4 to 19, and each pixel is about the mean of two columns.
    assert small[0, 0, 0, 2:6].tolist() == [85, 105, 125, 145]
    whole = Framing(8, whole=True).frames(ramp)
    assert whole.shape == (1, 3, 8, 12)
    assert torch.equal(Framing(16, whole=True).frames(ramp), ramp)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("shape", [(16, 24), (30, 20)])
def test_masks_and_points_follow_their_frames(whole, shape):
    framing = Framing(10, whole)
    frame = torch.zeros(1, 3, *shape, dtype=torch.uint8)
    row, column = shape[0] // 2 - 3, shape[1] // 2 + 2
    frame[..., row - 1 : row + 2, column - 1 : column + 2] = 255
    small = framing.frames(frame)[0, 0].double()
    mask = framing.masks((frame[:, 0] > 0).byte() * 7)[0]
    assert mask.shape == small.shape
    assert set(mask.unique().tolist()) == {0, 7}
    assert small[mask == 7].mean() > 3 * small[mask == 0].mean()
    # The point at the center of the bright square is at the center of its brightness.
    point = framing.points(torch.tensor([[[column, row]]]).float(), *shape)[0, 0]
    weights = small / small.sum()
    center = torch.stack([
        (weights.sum(0) * torch.arange(small.shape[1])).sum(),
        (weights.sum(1) * torch.arange(small.shape[0])).sum(),
    ])  # fmt: skip
    assert torch.allclose(point.double(), center, atol=0.1)
