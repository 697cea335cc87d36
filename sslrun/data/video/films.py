"""Films, and the clips that are drawn from them.

A clip is a film, a first frame, and a skip: every skip-th frame from the first one on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sslrun.data.examples import Batch, Examples, to_device
from sslrun.data.specs import VideoSpec
from sslrun.errors import UserError

VOID = 255
"""Label of pixels that are not scored."""


class Films(ABC):
    """A set of films of any lengths, whose frames are read by number."""

    names: Sequence[str]
    """One name for each film, for messages."""
    lengths: Tensor
    """(films,) int64: number of frames of each film."""
    has_masks: bool
    """Whether frames have masks of objects."""

    @abstractmethod
    def read(self, film: int, frames: Tensor) -> Tensor:
        """Read frames (n,) int64 of a film: (n, C, H, W) uint8, on the CPU.

        Raises:
            UserError: the film cannot be decoded; the message names it.
        """

    def read_masks(self, film: int, frames: Tensor) -> Tensor:
        """Read masks of frames (n,) of a film: (n, H, W) uint8, on the CPU.

        0 is background, `VOID` not scored, and any other number an object.

        Raises:
            UserError: the films have no masks.
        """
        raise UserError(f"{self.names[film]}: this film has no masks of objects")


@dataclass(frozen=True)
class StoredFilms(Films):
    """Films that are decoded and in memory, one after the other; on the CPU or on a device."""

    names: Sequence[str]
    frames: Tensor
    """(F, C, H, W) uint8: the frames of all films."""
    starts: Tensor
    """(films + 1,) int64: position of each film's first frame, and the end."""
    masks: Tensor | None = None
    """(F, H, W) uint8."""

    @property
    def lengths(self) -> Tensor:  # type: ignore[override]
        return self.starts.diff()

    @property
    def has_masks(self) -> bool:  # type: ignore[override]
        return self.masks is not None

    def read(self, film: int, frames: Tensor) -> Tensor:
        return self.frames[(self.starts[film] + frames).to(self.frames.device)].cpu()

    def read_masks(self, film: int, frames: Tensor) -> Tensor:
        if self.masks is None:
            return super().read_masks(film, frames)
        return self.masks[self.starts[film] + frames]

    def to(self, device: torch.device) -> StoredFilms:
        """Place the frames on a device; masks and positions stay on the CPU."""
        return replace(self, frames=self.frames.to(device))


@dataclass(frozen=True)
class Shot:
    """Some frames of one film in order, read when they are asked for."""

    films: Films
    film: int
    numbers: Tensor
    """(T,) int64: numbers of the frames within the film."""

    @property
    def name(self) -> str:
        return self.films.names[self.film]

    def __len__(self) -> int:
        return len(self.numbers)

    def frames(self, part: slice) -> Tensor:
        """Read frames (n, C, H, W) uint8 on the CPU."""
        return self.films.read(self.film, self.numbers[part])

    def masks(self, part: slice) -> Tensor:
        """Read masks of frames (n, H, W) uint8 on the CPU; see `Films.read_masks`."""
        return self.films.read_masks(self.film, self.numbers[part])


@dataclass(frozen=True)
class ClipExamples(Examples):
    """Clips (T, C, H, W) uint8 of films, with the labels of clips or the masks of their frames."""

    films: Films
    clips: Tensor
    """(N, 3) int64: film, first frame and skip of each clip."""
    spec: VideoSpec
    clip_labels: Tensor | None = None
    """(N,) int64: class of each clip; None: the labels are the masks (N, T, H, W), if there are
    any."""
    classes: tuple[str, ...] = ()
    whole: bool = False
    """Whether a shot is a whole film; else it is a clip."""

    def __len__(self) -> int:
        return len(self.clips)

    def shot(self, index: int) -> Shot:
        """The frames of a clip, or of its whole film."""
        film = int(self.clips[index, 0])
        if self.whole:
            return Shot(self.films, film, torch.arange(int(self.films.lengths[film])))
        return Shot(self.films, film, self.frame_numbers(torch.tensor([index]))[0])

    @property
    def labels(self) -> Tensor | None:  # type: ignore[override]
        if self.clip_labels is not None or not self.films.has_masks:
            return self.clip_labels
        return self._masks(torch.arange(len(self)))

    @property
    def strata(self) -> Tensor | None:
        """Classes of clips; clips with masks all count as one class."""
        if self.clip_labels is None and self.films.has_masks:
            return torch.zeros(len(self), dtype=torch.int64)
        return self.clip_labels

    @property
    def nbytes(self) -> int | None:
        return self.films.frames.nbytes if isinstance(self.films, StoredFilms) else None

    def to(self, device: torch.device) -> ClipExamples:
        if not isinstance(self.films, StoredFilms):
            raise NotImplementedError("films that are decoded while training stay on their disk")
        return replace(self, films=self.films.to(device))

    def subset(self, indices: Tensor) -> ClipExamples:
        labels = None if self.clip_labels is None else self.clip_labels[indices]
        return replace(self, clips=self.clips[indices], clip_labels=labels)

    def frame_numbers(self, indices: Tensor) -> Tensor:
        """The numbers (B, T) int64 of the frames of clips, within their films."""
        _, first, skip = self.clips[indices].T
        return first[:, None] + skip[:, None] * torch.arange(self.spec.frames)

    def batches(self, indices: Iterable[Tensor], device: torch.device) -> Iterator[Batch]:
        for chosen in indices:
            labels: Tensor | None
            if self.clip_labels is not None:
                labels = self.clip_labels[chosen]
            else:
                labels = self._masks(chosen) if self.films.has_masks else None
            labels = None if labels is None else to_device(labels, device)
            yield Batch(to_device(self._read(chosen), device), labels)

    def _read(self, indices: Tensor) -> Tensor:
        """Read clips (B, T, C, H, W): in one step if the films are in memory."""
        numbers = self.frame_numbers(indices)
        films = self.clips[indices, 0]
        if isinstance(self.films, StoredFilms):
            places = self.films.starts[films][:, None] + numbers
            return self.films.frames[places.to(self.films.frames.device)]
        return torch.stack(
            [self.films.read(film, row) for film, row in zip(films.tolist(), numbers, strict=True)]
        )

    def _masks(self, indices: Tensor) -> Tensor:
        """Read the masks (B, T, H, W) of clips."""
        rows = zip(self.clips[indices, 0].tolist(), self.frame_numbers(indices), strict=True)
        return torch.stack([self.films.read_masks(film, row) for film, row in rows])


def draw_clips(films: Films, frames: int, skip: int, stride: int) -> Tensor:
    """List the clips (N, 3) of `frames` frames that films hold, one every `stride` frames.

    Raises:
        UserError: no film is long enough.
    """
    span = (frames - 1) * skip + 1
    rows = [
        (film, first, skip)
        for film, length in enumerate(films.lengths.tolist())
        for first in range(0, length - span + 1, stride)
    ]
    if not rows:
        longest = int(films.lengths.max()) if len(films.lengths) else 0
        raise UserError(
            f"clips of {frames} frames with skip {skip} span {span} frames, but the longest film "
            f"has {longest}: lower frames or skip"
        )
    return torch.tensor(rows, dtype=torch.int64)
