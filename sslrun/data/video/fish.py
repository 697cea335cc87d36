"""Films of fish from above: masks by background subtraction, identities by linking."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from sslrun.data.cache import cache_root, cache_tensors, digest_key
from sslrun.data.examples import Batch
from sslrun.data.source import Source, sources
from sslrun.data.specs import VideoSpec
from sslrun.data.stores import Split, describe_local_folders, find_local_folder, fingerprint
from sslrun.data.video.decoding import FilmReader, Framing, open_film
from sslrun.data.video.films import VOID, ClipExamples, StoredFilms
from sslrun.data.video.folders import ClipOptions
from sslrun.errors import UserError

FISH_FORMAT = 1
"""Part of every cache key. Raise it when masks or links change."""
EVERY = 8
"""The background is the median of every eighth frame."""
DARKER = 40
"""A fish is darker than the background by more than this, of 255."""
SMALLEST = 60
"""A component of at most as many pixels is no fish."""
REACH = 40.0
"""Largest distance in pixels between the centers of a fish in consecutive frames."""


class Tracks(NamedTuple):
    """Where the fish of a film are. A track is a fish in consecutive frames, or some that touch."""

    pixels: Tensor
    """(P,) int64: pixels of fish in all frames, row by row, one frame after the other."""
    owners: Tensor
    """(P,) int64: the track of each pixel."""
    starts: Tensor
    """(frames + 1,) int64: position of each frame's first pixel, and the end."""
    centers: Tensor
    """(tracks, frames, 2) float32: row and column of each track's center; NaN where it is not."""
    single: Tensor
    """(tracks,) bool: whether a track is one fish."""
    shape: Tensor
    """(2,) int64: height and width of the film."""

    def paint(self, frame: int) -> Tensor:
        """Return the map (H, W) int64 of a frame: 1 + track, or 0 where there is no fish."""
        part = slice(int(self.starts[frame]), int(self.starts[frame + 1]))
        painted = torch.zeros(int(self.shape.prod()), dtype=torch.int64)
        painted[self.pixels[part]] = 1 + self.owners[part]
        return painted.view(*self.shape.tolist())


class FishOptions(ClipOptions):
    """Options of clips around fish."""

    path: Path | None = None
    """Folder that holds test_A.avi and test_B.avi; default: fish in SSLRUN_DATA or in data."""
    skip: int = Field(3, ge=1)
    """Distance between two frames of a clip, in frames of the film."""
    test_frames: int = Field(8, ge=3)
    """Number of frames in a clip of the test split."""
    crop: int = Field(128, ge=16, le=900)
    """Side of the square around a fish, in pixels of the film; it is resized to size. It stays
    where it is during a clip."""


@sources.register("fish")
class Fish(Source):
    """Clips around zebrafish that swim in groups of eight, with masks of each; gray.

    The films test_A.avi (to train) and test_B.avi (to test) of idtracker.ai, Romero-Ferrero et al.,
    Nature Methods 2019. Masks are what is darker than the median frame, and identities link the
    nearest components of consecutive frames; clips in which fish touch are left out. All thresholds
    are our choice.
    """

    gives = VideoSpec
    task = "masks"
    splits = ("train", "test")
    Options = FishOptions
    options: FishOptions
    FILES: ClassVar[dict[str, str]] = {"train": "test_A.avi", "test": "test_B.avi"}
    homepage = "https://idtracker.ai"

    def load(self, split: Split) -> ClipExamples:
        if split not in self.splits:
            raise UserError(f"{self.name}: has no split '{split}', only {', '.join(self.splits)}")
        options = self.options
        path = self._find_folder() / self.FILES[split]
        if not path.is_file():
            raise UserError(f"{path}: no such file: get it at {self.homepage}")
        count = options.test_frames if split == "test" else options.frames
        step = options.stride or count * options.skip
        key = {"format": FISH_FORMAT, "files": fingerprint([str(path)])}
        windows = [count, options.skip, step, options.crop, options.size]

        def compute() -> dict[str, Tensor]:
            return self._draw(path, self._track(path, key), count, step)

        stored = cache_tensors(_cache_file("clips", key | {"windows": windows}), compute)
        sections = stored["sections"]
        clips = torch.tensor([[index, 0, 1] for index in range(len(sections))])
        names = [f"{path.name} from frame {first}" for first in sections[:, 1].tolist()]
        starts = torch.arange(len(sections) + 1) * count
        films = StoredFilms(names, stored["frames"], starts, stored["masks"])
        return ClipExamples(films, clips, VideoSpec(options.size, count), sections=sections)

    def _track(self, path: Path, key: dict[str, object]) -> Tracks:
        """Find the fish in every frame of a film, once."""

        def compute() -> dict[str, Tensor]:
            return find_fish(open_film(str(path)))._asdict()

        return Tracks(**cache_tensors(_cache_file("tracks", key), compute))

    def _draw(self, path: Path, tracks: Tracks, count: int, step: int) -> dict[str, Tensor]:
        """Cut the clips of a film: frames (N * T, 3, S, S), masks (N * T, S, S) and sections."""
        film, options = open_film(str(path)), self.options
        framing = Framing(options.size)
        length = len(tracks.starts) - 1
        span = (count - 1) * options.skip + 1
        frames, masks, sections = [], [], []
        for first in range(0, length - span + 1, step):
            numbers = torch.arange(first, first + span, options.skip)
            pictures = film.read(numbers)
            maps = torch.stack([tracks.paint(number) for number in numbers.tolist()])
            for rows, columns in place_windows(tracks, first, first + span, options.crop):
                owners = maps[:, rows, columns]
                clip_masks = number_objects(framing.masks(owners), tracks, first, first + span)
                if clip_masks is not None:
                    frames.append(framing.frames(pictures[..., rows, columns]))
                    masks.append(clip_masks)
                    sections.append([0, first, first + span])
            if self.progress:
                self.progress(f"{self.name}: {path.name}", first + span, length)
        if not sections:
            raise UserError(
                f"{path}: no fish swims apart from the others for {span} frames: lower data.frames "
                "or data.skip"
            )
        stored = {"frames": torch.cat(frames), "masks": torch.cat(masks)}
        return stored | {"sections": torch.tensor(sections)}

    def sketch(self, count: int) -> tuple[VideoSpec, Batch]:
        options = self.options
        shape = (count, options.frames, 3, options.size, options.size)
        clips = torch.randint(0, 256, shape, dtype=torch.uint8)
        return VideoSpec(options.size, options.frames), Batch(clips, None)

    def check_available(self) -> None:
        self._find_folder()

    def _find_folder(self) -> Path:
        folder = self.options.path or find_local_folder(self.name)
        if folder is None or not folder.is_dir():
            where = "not on this machine" if folder is None else f"{folder}: no such folder"
            raise UserError(
                f"{self.name}: {where}: put {' and '.join(self.FILES.values())} (from "
                f"{self.homepage}) at data/{self.name}, or name their folder with path"
            )
        return folder

    @classmethod
    def describe(cls) -> dict[str, str]:
        return {
            "splits": "train test_A.avi, test test_B.avi; the last tenth of train is carved for "
            "validation",
            "labels": "masks of the fish in each frame",
            "homepage": cls.homepage,
            "license": "GPL-3",
            "searched": describe_local_folders(cls.name),
        }


def _cache_file(kind: str, key: dict[str, object]) -> Path:
    return cache_root() / "films" / f"fish-{kind}-{digest_key(key)}.safetensors"


# ---------------------------------------------------------------- masks and identities


def find_fish(film: FilmReader) -> Tracks:
    """Find the fish in every frame of a film, and link them over frames."""
    sample = _read_gray(film, torch.arange(0, film.length, EVERY))
    background = np.median(sample, axis=0)
    darkest = (background - DARKER).clip(min=0)
    darkest = np.ceil(darkest).astype(np.uint8)  # bytes are compared faster
    linker = Linker()
    pixels, owners, starts = [], [], [0]
    for number in range(film.length):
        frame = _read_gray(film, torch.tensor([number]))[0]
        components = find_components(frame < darkest)
        centers = np.array([np.mean(component, axis=1) for component in components])
        for component, track in zip(components, linker.add(centers.reshape(-1, 2)), strict=True):
            pixels.append(component[0] * frame.shape[1] + component[1])
            owners.append(np.full(component.shape[1], track))
        starts.append(starts[-1] + sum(component.shape[1] for component in components))
    return Tracks(
        torch.from_numpy(np.concatenate([np.empty(0, np.int64), *pixels])),
        torch.from_numpy(np.concatenate([np.empty(0, np.int64), *owners])),
        torch.tensor(starts),
        linker.centers(film.length),
        torch.tensor(linker.single),
        torch.tensor(background.shape),
    )


def _read_gray(film: FilmReader, frames: Tensor) -> np.ndarray:
    """Read frames (n, H, W) uint8 of a gray film."""
    return torch.cat([film.read(part)[:, 0] for part in frames.split(EVERY)]).numpy()


def find_components(mask: np.ndarray) -> list[np.ndarray]:
    """Return rows and columns (2, n) of each component of a mask (H, W) that is large enough.

    The mask is opened once first, which removes thin lines such as reflections at the border.
    Opening a component depends on no other one, so that only its own box is opened.
    """
    from scipy import ndimage

    labels, _ = ndimage.label(mask)
    components = []
    for number, box in enumerate(ndimage.find_objects(labels), start=1):
        part = labels[box] == number
        if part.sum() <= SMALLEST:
            continue
        opened, count = ndimage.label(ndimage.binary_opening(part))
        corner = np.array([[box[0].start], [box[1].start]])
        pieces = (np.stack((opened == piece).nonzero()) for piece in range(1, count + 1))
        components += [piece + corner for piece in pieces if piece.shape[1] > SMALLEST]
    return components


class Linker:
    """Links components of consecutive frames into tracks.

    A component goes on with a track if each is the other's nearest, and neither is the nearest of a
    third; else it begins a track. One that is the nearest of two tracks is several fish that touch.
    """

    def __init__(self) -> None:
        self.single: list[bool] = []
        """Whether each track is one fish."""
        self._frames: list[tuple[list[int], np.ndarray]] = []
        """The tracks and the centers (n, 2) of each frame's components."""

    def add(self, centers: np.ndarray) -> list[int]:
        """Add the centers (n, 2) of the next frame's components, and return their tracks."""
        tracks = [-1] * len(centers)
        if self._frames:
            earlier, places = self._frames[-1]
            forward, backward = _nearest(places, centers), _nearest(centers, places)
            for index in range(len(centers)):
                sources = np.flatnonzero(forward == index)
                if len(sources) == 1 and (backward == sources[0]).sum() == 1:
                    tracks[index] = earlier[sources[0]]
                else:
                    tracks[index] = self._begin(single=len(sources) < 2)
        else:
            tracks = [self._begin(single=True) for _ in centers]
        self._frames.append((tracks, centers))
        return tracks

    def _begin(self, single: bool) -> int:
        self.single.append(single)
        return len(self.single) - 1

    def centers(self, length: int) -> Tensor:
        """Return the centers (tracks, frames, 2) float32; NaN where a track is not."""
        centers = torch.full((len(self.single), length, 2), torch.nan)
        for frame, (tracks, places) in enumerate(self._frames):
            centers[tracks, frame] = torch.from_numpy(places).float()
        return centers


def _nearest(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the index (n,) of the point of `second` that is nearest to each of `first`, or -1."""
    if not len(second):
        return np.full(len(first), -1)
    distances = np.linalg.norm(first[:, None] - second[None], axis=2)
    return np.where(distances.min(axis=1) <= REACH, distances.argmin(axis=1), -1)


# ---------------------------------------------------------------- clips


def place_windows(tracks: Tracks, first: int, end: int, side: int) -> Iterator[tuple[slice, slice]]:
    """Yield rows and columns of a square around each fish that has one track from `first` to `end`.

    Its center is the mean of the fish's, as far as it stays within the film.
    """
    for track in _lasting(tracks, first, end).nonzero()[:, 0].tolist():
        corner = (tracks.centers[track, first:end].mean(dim=0) - side / 2).round().long()
        top, left = corner.minimum(tracks.shape - side).clamp(min=0).tolist()
        yield slice(top, top + side), slice(left, left + side)


def _lasting(tracks: Tracks, first: int, end: int) -> Tensor:
    """Return which tracks (tracks,) bool are one fish in all frames from `first` to `end`."""
    return tracks.single & tracks.centers[:, first:end, 0].isfinite().all(dim=1)


def number_objects(maps: Tensor, tracks: Tracks, first: int, end: int) -> Tensor | None:
    """Number the fish of a clip's first frame from 1: maps (T, S, S) of 1 + track, to masks uint8.

    Fish that come later are `VOID`. None if one of the first frame is lost before `end`.
    """
    present = maps[0].unique()
    present = present[present > 0]
    if not len(present) or not _lasting(tracks, first, end)[present - 1].all():
        return None
    masks = torch.where(maps > 0, VOID, 0).byte()
    for number, owner in enumerate(present.tolist(), start=1):
        masks[maps == owner] = number
    return masks
