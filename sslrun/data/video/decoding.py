"""Decode films by frame number, with torchcodec or PyAV, and bring frames to one size."""

from __future__ import annotations

import importlib
import importlib.util
from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sslrun.data.image.images import UnreadableError
from sslrun.errors import UserError

NEAR = 8
"""A decoder goes on to a keyframe that is at most this many frames ahead, instead of seeking it."""


class FilmReader(ABC):
    """A film that is open for reading frames by number."""

    length: int
    """Number of frames."""
    rate: float
    """Frames per second."""

    @abstractmethod
    def __init__(self, path: str) -> None:
        """Open a film.

        Raises:
            UnreadableError: it cannot be opened, or holds no video.
        """

    @abstractmethod
    def read(self, frames: Tensor) -> Tensor:
        """Decode frames (n,) int64 as RGB, (n, 3, H, W) uint8; ascending ones are fast.

        Raises:
            UnreadableError: a frame cannot be decoded.
        """


class TorchcodecReader(FilmReader):
    """A film that torchcodec decodes."""

    def __init__(self, path: str) -> None:
        self._path = path
        with _explain(path, (RuntimeError, ValueError, OSError)):
            self._film = _import_torchcodec()(path, num_ffmpeg_threads=1)
        self.length = int(self._film.metadata.num_frames or 0)
        self.rate = float(self._film.metadata.average_fps or 0)

    def read(self, frames: Tensor) -> Tensor:
        with _explain(self._path, (RuntimeError, ValueError, IndexError)):
            pictures: Tensor = self._film.get_frames_at(indices=frames.tolist()).data
        return pictures


class AvReader(FilmReader):
    """A film that PyAV decodes.

    Frames are numbered by their times, which are read without decoding. The decoder seeks the last
    keyframe before a frame, or goes on from where it is if that is nearer.
    """

    def __init__(self, path: str) -> None:
        import av

        self._path = path
        with _explain(path, (av.FFmpegError, OSError, ValueError)):
            self._container = av.open(path)
            if not self._container.streams.video:
                raise ValueError("it holds no video")
            self._stream = self._container.streams.video[0]
            self._stream.codec_context.thread_count = 1
            packets = self._container.demux(self._stream)
            times = sorted((time, packet.is_keyframe) for packet, time in _timed(packets))
        self._times = [time for time, _ in times]
        self._keys = [number for number, (_, is_key) in enumerate(times) if is_key] or [0]
        self._pictures: Iterator[Any] | None = None
        self._position = -1
        """Number of the frame that was decoded last."""
        self.length = len(times)
        self.rate = float(self._stream.average_rate or 0)

    def read(self, frames: Tensor) -> Tensor:
        import av

        with _explain(self._path, (av.FFmpegError, OSError, ValueError, IndexError)):
            pictures = [self._decode(number) for number in frames.tolist()]
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)

    def _decode(self, number: int) -> np.ndarray:
        """Decode one frame as (H, W, 3) uint8. Raises ValueError if the film does not give it."""
        key = self._keys[max(0, bisect_right(self._keys, number) - 1)]
        if self._pictures is None or number <= self._position or key > self._position + NEAR:
            self._seek(key)
        picture = self._advance(number)
        if picture is None:  # a keyframe that does not serve to start from
            self._seek(0)
            picture = self._advance(number)
        if picture is None:
            raise ValueError(f"frame {number} of {self.length} is damaged")
        return np.asarray(picture.to_ndarray(format="rgb24"))

    def _seek(self, key: int) -> None:
        self._container.seek(self._times[key], stream=self._stream)
        self._pictures = self._container.decode(self._stream)

    def _advance(self, number: int) -> Any | None:
        """Decode up to a frame; None if it does not come."""
        assert self._pictures is not None
        for picture in self._pictures:
            self._position = bisect_left(self._times, picture.pts)
            if picture.pts >= self._times[number]:
                return picture if picture.pts == self._times[number] else None
        self._pictures = None
        return None


def _timed(packets: Iterator[Any]) -> Iterator[tuple[Any, int]]:
    """Yield packets that hold a frame to show, with its time. Raises ValueError if one has none."""
    for packet in packets:
        if packet.size and not packet.is_discard:
            time = packet.dts if packet.pts is None else packet.pts
            if time is None:
                raise ValueError("its frames have no times: convert it to .mp4")
            yield packet, time


@contextmanager
def _explain(path: str, errors: tuple[type[Exception], ...]) -> Iterator[None]:
    """Raise an UnreadableError that names the film for any of a library's errors."""
    try:
        yield
    except errors as error:
        lines = (getattr(error, "strerror", None) or str(error)).strip().splitlines()
        cause = lines[-1][:200] if lines else type(error).__name__
        raise UnreadableError(
            f"{path}: cannot be decoded ({cause}): repair or remove it, or give skip_corrupt: true"
        ) from None


@cache
def find_reader() -> type[FilmReader]:
    """Return the reader of the library that decodes films here: torchcodec, else PyAV.

    Raises:
        UserError: neither is installed.
    """
    if _can_load_torchcodec():
        return TorchcodecReader
    if importlib.util.find_spec("av") is not None:
        return AvReader
    raise UserError(
        "no library that decodes films is here: pip install 'sslrun[video]' (PyAV, or torchcodec "
        "with a system FFmpeg)"
    )


def _import_torchcodec() -> Any:
    """Import torchcodec's class of films."""
    return importlib.import_module("torchcodec.decoders").VideoDecoder


def _can_load_torchcodec() -> bool:
    """Return whether torchcodec is installed and finds its FFmpeg libraries."""
    if importlib.util.find_spec("torchcodec") is None:
        return False
    try:
        _import_torchcodec()(b"")
    except (ImportError, OSError):
        return False
    except (RuntimeError, ValueError) as error:  # no FFmpeg, or the empty film is refused
        return "could not load" not in str(error).lower()
    return True


def open_film(path: str) -> FilmReader:
    """Open a film.

    Raises:
        UnreadableError: it cannot be decoded.
        UserError: no library that decodes films is installed.
    """
    reader = find_reader()(path)
    if not reader.length:
        raise UnreadableError(f"{path}: holds no frame: remove it, or give skip_corrupt: true")
    return reader


@dataclass(frozen=True)
class Framing:
    """How frames of any shape are brought to one size, with their masks and points.

    The central square is cut out and resized to `size` (bilinear, antialiased; masks to the nearest
    pixel). With `whole`, nothing is cut off: the shorter side is resized to `size`.
    """

    size: int
    whole: bool = False

    def shape(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width that a frame is brought to."""
        if not self.whole:
            return self.size, self.size
        scale = self.size / min(height, width)
        return round(height * scale), round(width * scale)

    def frames(self, frames: Tensor) -> Tensor:
        """Bring frames (n, 3, H, W) uint8 to size."""
        shape, cut = self.shape(*frames.shape[2:]), self._cut(frames)
        if cut.shape[2:] == shape:
            return cut.contiguous()
        # Bytes with the channels last are resized several times faster.
        cut = cut.contiguous(memory_format=torch.channels_last)
        return F.interpolate(cut, shape, mode="bilinear", antialias=True).contiguous()

    def masks(self, masks: Tensor) -> Tensor:
        """Bring masks (n, H, W) of any integer type to size."""
        cut, (height, width) = self._cut(masks), self.shape(*masks.shape[1:])
        rows = ((torch.arange(height) + 0.5) * (cut.shape[1] / height)).long()
        columns = ((torch.arange(width) + 0.5) * (cut.shape[2] / width)).long()
        return cut[:, rows[:, None], columns]

    def points(self, points: Tensor, height: int, width: int) -> Tensor:
        """Move points (n, J, 2), x and y in a frame of this height and width, to where they go."""
        new_height, new_width = self.shape(height, width)
        left, top = (0, 0) if self.whole else _margins(height, width)[::-1]
        sides = (width - 2 * left, height - 2 * top) if self.whole else (min(height, width),) * 2
        scale = points.new_tensor([new_width / sides[0], new_height / sides[1]])
        return (points - points.new_tensor([left, top]) + 0.5) * scale - 0.5

    def _cut(self, images: Tensor) -> Tensor:
        """Cut the central squares (..., side, side) of images (..., H, W)."""
        if self.whole:
            return images
        top, left = _margins(*images.shape[-2:])
        side = min(images.shape[-2:])
        return images[..., top : top + side, left : left + side]


def _margins(height: int, width: int) -> tuple[int, int]:
    """Return the rows above and the columns left of the central square."""
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2
