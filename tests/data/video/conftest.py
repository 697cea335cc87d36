"""Small films, written by the tests."""

import numpy as np
import pytest
import torch


@pytest.fixture
def write_film():
    """Return `write(path, frames)`, which writes frames (n, H, W, 3) uint8 as a film.

    It is compressed without loss in color, except for rounding.
    """
    av = pytest.importorskip("av")

    def write(path, frames, codec="libx264rgb", gop=5):
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), "w") as container:
            options = {"crf": "0"} if codec == "libx264rgb" else {}
            stream = container.add_stream(codec, rate=10, options=options)
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = "rgb24" if codec == "libx264rgb" else "yuv420p"
            stream.codec_context.gop_size = gop
            for frame in frames:
                picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
                for packet in stream.encode(picture):
                    container.mux(packet)
            for packet in stream.encode():
                container.mux(packet)
        return path

    return write


@pytest.fixture
def counting_frames():
    """Return `frames(count, height, width)`: uint8 frames whose every value is 10 times its number.

    The left half of the blue channel is 255.
    """

    def frames(count, height=16, width=24):
        values = torch.arange(count)[:, None, None, None] * 10
        pictures = values.expand(-1, height, width, 3).clone().byte()
        pictures[:, :, : width // 2, 2] = 255
        return pictures.numpy()

    return frames


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SSLRUN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SSLRUN_WORKERS", "0")
