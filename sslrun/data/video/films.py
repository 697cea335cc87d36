"""Films, and the clips that are drawn from them.

A clip is a film, a first frame, and a skip: every skip-th frame from the first one on.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sslrun.data.examples import Batch, Examples
from sslrun.data.image.images import prefetch
from sslrun.data.specs import VideoSpec
from sslrun.data.splits import carve
from sslrun.errors import UserError

VOID = 255
"""Label of pixels that are not scored."""

log = logging.getLogger(__name__)


class Films(ABC):
    """A set of films of any lengths, whose frames are read by number."""

    names: Sequence[str]
    """One name for each film, for messages."""
    lengths: Tensor
    """(films,) int64: number of frames of each film."""
    has_masks: bool
    """Whether frames have masks of objects."""
    has_points: bool = False
    """Whether frames have points, such as a person's joints."""

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

    def read_points(self, film: int, frames: Tensor) -> Tensor:
        """Read points of frames (n,) of a film: (n, J, 2) float32, on the CPU.

        They are x and y in pixels of the frame, whose first pixel has its center at 0, and NaN
        where a point is absent.

        Raises:
            UserError: the films have no points.
        """
        raise UserError(f"{self.names[film]}: this film has no points")


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
    points: Tensor | None = None
    """(F, J, 2) float32."""

    @property
    def lengths(self) -> Tensor:  # type: ignore[override]
        return self.starts.diff()

    @property
    def has_masks(self) -> bool:  # type: ignore[override]
        return self.masks is not None

    @property
    def has_points(self) -> bool:  # type: ignore[override]
        return self.points is not None

    def read(self, film: int, frames: Tensor) -> Tensor:
        return self.frames[(self.starts[film] + frames).to(self.frames.device)].cpu()

    def read_masks(self, film: int, frames: Tensor) -> Tensor:
        if self.masks is None:
            return super().read_masks(film, frames)
        return self.masks[self.starts[film] + frames]

    def read_points(self, film: int, frames: Tensor) -> Tensor:
        if self.points is None:
            return super().read_points(film, frames)
        return self.points[self.starts[film] + frames]

    def to(self, device: torch.device) -> StoredFilms:
        """Place the frames on a device; masks, points and positions stay on the CPU."""
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

    def points(self, part: slice) -> Tensor:
        """Read points of frames (n, J, 2) float32 on the CPU; see `Films.read_points`."""
        return self.films.read_points(self.film, self.numbers[part])


@dataclass(frozen=True)
class ClipExamples(Examples):
    """Clips (T, C, H, W) uint8 of films, with labels of clips, or masks or points of frames.

    Films that are not stored are decoded by worker processes, ahead of their use.
    """

    films: Films
    clips: Tensor
    """(N, 3) int64: film, first frame and skip of each clip."""
    spec: VideoSpec
    clip_labels: Tensor | None = None
    """(N,) int64: class of each clip; None: the labels are the masks (N, T, H, W) or the points
    (N, T, J, 2), if there are any."""
    classes: tuple[str, ...] = ()
    whole: bool = False
    """Whether a shot is a whole film; else it is a clip."""
    sections: Tensor | None = None
    """(films, 3) int64: the recording that each film is a part of, its first frame there, and the
    frame after its last; clips of one recording are akin. None: each film is a recording."""

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
        return self._labels(torch.arange(len(self)))

    @property
    def strata(self) -> Tensor | None:
        """Classes of clips; clips with masks or points all count as one class."""
        if self.clip_labels is None and (self.films.has_masks or self.films.has_points):
            return torch.zeros(len(self), dtype=torch.int64)
        return self.clip_labels

    def divide(self, amount: float) -> tuple[Tensor, Tensor] | None:
        """Carve off whole recordings, balanced over classes; or the end of a single one.

        From a single recording, clips that end less than their own length before the first one
        that is carved off are left out.
        """
        sections = self._clip_sections()
        recordings, owners = sections[:, 0].unique(return_inverse=True)
        if len(recordings) == len(self):
            return None
        if amount >= len(self):
            raise UserError(
                f"data.validation: {amount} clips are to be held out, but there are {len(self)}: "
                "give a smaller number"
            )
        share = amount / len(self) if amount >= 1 else amount
        if len(recordings) == 1:
            return _divide_time(sections[:, 1:], share)
        strata = torch.zeros(len(recordings), dtype=torch.int64)
        if self.clip_labels is not None:
            strata[owners] = self.clip_labels
        _, carved = carve(strata, share)
        is_carved = torch.isin(owners, carved)
        return (~is_carved).nonzero()[:, 0], is_carved.nonzero()[:, 0]

    def _clip_sections(self) -> Tensor:
        """Return the recording (N, 3) of each clip, the clip's first frame there, and its end."""
        if self.sections is not None:
            return self.sections[self.clips[:, 0]]
        numbers = self.frame_numbers(torch.arange(len(self)))
        return torch.stack([self.clips[:, 0], numbers[:, 0], numbers[:, -1] + 1], dim=1)

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
        if isinstance(self.films, StoredFilms):
            for batch in indices:
                yield Batch(*self._load(batch)).to(device)
            return
        for loaded, _ in prefetch(self._load, indices, device):
            yield Batch(*loaded).to(device)

    def _load(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        """Read clips (B, T, C, H, W) and their labels."""
        return self._read(indices), self._labels(indices)

    def _read(self, indices: Tensor) -> Tensor:
        """Read clips (B, T, C, H, W): in one step if the films are in memory."""
        if not isinstance(self.films, StoredFilms):
            return self._gather(indices, self.films.read)
        films, numbers = self.clips[indices, 0], self.frame_numbers(indices)
        places = self.films.starts[films][:, None] + numbers
        return self.films.frames[places.to(self.films.frames.device)]

    def _labels(self, indices: Tensor) -> Tensor | None:
        """Read the labels of clips; None if there are none."""
        if self.clip_labels is not None:
            return self.clip_labels[indices]
        if self.films.has_masks:
            return self._gather(indices, self.films.read_masks)
        return self._gather(indices, self.films.read_points) if self.films.has_points else None

    def _gather(self, indices: Tensor, read: Callable[[int, Tensor], Tensor]) -> Tensor:
        """Read what belongs to the frames of clips, (B, T, ...), film by film.

        Raises:
            UserError: the frames of films have different shapes.
        """
        owners, numbers = self.clips[indices, 0], self.frame_numbers(indices)
        gathered: Tensor | None = None
        for film in owners.unique().tolist():
            chosen = owners == film
            values = read(film, numbers[chosen].flatten())
            if gathered is None:
                gathered = values.new_empty(*numbers.shape, *values.shape[1:])
            if gathered.shape[2:] != values.shape[1:]:
                raise UserError(
                    f"{self.films.names[film]}: its frames have another shape than those of other "
                    "films, so that clips make no batch: set whole: false, which crops them"
                )
            gathered[chosen] = values.unflatten(0, (-1, numbers.shape[1]))
        assert gathered is not None
        return gathered


def _divide_time(sections: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Carve the last `share` of clips off; `sections` (N, 2) are their first frames and ends."""
    first, end = sections.T
    order = first.argsort(stable=True)
    cut = first[order[min(len(order) - 1, round(len(order) * (1 - share)))]]
    rest = (end + (end - first) <= cut).nonzero()[:, 0]
    if not len(rest):
        raise UserError(
            f"the film has only {len(sections)} clips, too few to hold out some that are apart "
            "from the others in time: lower stride or frames, or add films"
        )
    return rest, (first >= cut).nonzero()[:, 0]


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
    if short := int((films.lengths < span).sum()):
        log.warning("left out %d films shorter than a clip, which spans %d frames", short, span)
    return torch.tensor(rows, dtype=torch.int64)
