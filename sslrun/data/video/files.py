"""Films on disk, as files or as folders of pictures: streamed, or decoded once and cached."""

from __future__ import annotations

import logging
import os
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from sslrun.data.cache import cache_root, cache_tensors, digest_key
from sslrun.data.examples import ProgressCallback
from sslrun.data.image.images import (
    MAX_TENSOR_BYTES,
    UnreadableError,
    count_workers,
    read_rgb,
    read_shape,
)
from sslrun.data.image.masks import read_mask
from sslrun.data.stores import fingerprint
from sslrun.data.video.decoding import FilmReader, Framing, open_film
from sslrun.data.video.films import Films, StoredFilms
from sslrun.errors import UserError

FILM_FORMAT = 1
"""Part of every cache key. Raise it when decoding changes."""
CHUNK = 32
"""Frames of a film that are decoded before they are resized, to limit memory."""
OPEN_FILMS = 16
"""Film files that a process keeps open."""

log = logging.getLogger(__name__)


class DiskFilms(Films):
    """Films that are read from disk when their frames are asked for. Picklable, for workers."""

    framing: Framing

    @abstractmethod
    def select(self, films: Tensor) -> Self:
        """Return the films (M,) int64 of these."""

    @abstractmethod
    def files(self) -> Iterable[str]:
        """Return every file that the films are read from."""

    def read(self, film: int, frames: Tensor) -> Tensor:
        wanted, places = frames.unique(return_inverse=True)
        parts = [self.framing.frames(self.decode(film, part)) for part in wanted.split(CHUNK)]
        return torch.cat(parts)[places]

    @abstractmethod
    def decode(self, film: int, frames: Tensor) -> Tensor:
        """Decode ascending frames (n,) int64 of a film in full, (n, 3, H, W) uint8.

        Raises:
            UnreadableError: the film cannot be decoded.
        """


@dataclass(frozen=True)
class FilmFiles(DiskFilms):
    """Films in files that a video library decodes."""

    names: Sequence[str]
    """Paths of the files."""
    lengths: Tensor
    framing: Framing
    has_masks = False

    def select(self, films: Tensor) -> FilmFiles:
        names = [self.names[film] for film in films.tolist()]
        return replace(self, names=names, lengths=self.lengths[films])

    def files(self) -> Iterable[str]:
        return self.names

    def decode(self, film: int, frames: Tensor) -> Tensor:
        return _keep_open(self.names[film], os.getpid()).read(frames)


@lru_cache(maxsize=OPEN_FILMS)
def _keep_open(path: str, process: int) -> FilmReader:
    """Open a film, once in a process: forked processes would share its place in the file."""
    return open_film(path)


@dataclass(frozen=True)
class FrameFolders(DiskFilms):
    """Films whose frames are pictures, in a folder for each film, with masks or points if any."""

    names: Sequence[str]
    """Paths of the folders."""
    pictures: Sequence[Sequence[str]]
    """Paths of each film's pictures, in order."""
    framing: Framing
    masks: Sequence[Sequence[str]] | None = None
    """Paths of the mask of each picture."""
    points: Sequence[Tensor] | None = None
    """(T, J, 2) float32 for each film: points in pixels of its pictures as they are."""

    @property
    def lengths(self) -> Tensor:  # type: ignore[override]
        return torch.tensor([len(pictures) for pictures in self.pictures])

    @property
    def has_masks(self) -> bool:  # type: ignore[override]
        return self.masks is not None

    @property
    def has_points(self) -> bool:  # type: ignore[override]
        return self.points is not None

    def select(self, films: Tensor) -> FrameFolders:
        def pick(values: Sequence[Any]) -> list[Any]:
            return [values[film] for film in films.tolist()]

        return replace(
            self,
            names=pick(self.names),
            pictures=pick(self.pictures),
            masks=None if self.masks is None else pick(self.masks),
            points=None if self.points is None else pick(self.points),
        )

    def files(self) -> Iterable[str]:
        for paths in (*self.pictures, *(self.masks or ())):
            yield from paths

    def decode(self, film: int, frames: Tensor) -> Tensor:
        paths = [self.pictures[film][number] for number in frames.tolist()]
        shape = self._shape(film)
        pictures = []
        for path in paths:
            pictures.append(read_rgb(path))
            if (found := pictures[-1].shape[:2]) != shape:
                raise UnreadableError(
                    f"{path}: is {found[1]}x{found[0]}, but the first frame of the film is "
                    f"{shape[1]}x{shape[0]}: give all of them one size"
                )
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)

    def read_masks(self, film: int, frames: Tensor) -> Tensor:
        if self.masks is None:
            return super().read_masks(film, frames)
        shape, masks = self._shape(film), []
        for number in frames.tolist():
            path = self.masks[film][number]
            masks.append(read_mask(Path(path)))
            if tuple(masks[-1].shape) != shape:
                raise UserError(
                    f"{path}: is {masks[-1].shape[1]}x{masks[-1].shape[0]}, but its frame is "
                    f"{shape[1]}x{shape[0]}: a mask should have the size of its frame"
                )
        return self.framing.masks(torch.stack(masks))

    def read_points(self, film: int, frames: Tensor) -> Tensor:
        if self.points is None:
            return super().read_points(film, frames)
        return self.framing.points(self.points[film][frames], *self._shape(film))

    def _shape(self, film: int) -> tuple[int, int]:
        return _shape_of(self.pictures[film][0])


_shape_of = lru_cache(maxsize=4096)(read_shape)


# ---------------------------------------------------------------- read once, cached


def open_film_files(
    paths: Sequence[str],
    framing: Framing,
    skip_corrupt: bool,
    progress: ProgressCallback | None,
) -> tuple[FilmFiles, Tensor]:
    """Open film files, and return them with the indices (M,) of those that can be opened.

    Raises:
        UnreadableError: a film cannot be opened, unless `skip_corrupt`; or none can.
    """
    lengths = torch.zeros(len(paths), dtype=torch.int64)

    def measure(film: int) -> None:
        lengths[film] = open_film(paths[film]).length

    def compute() -> dict[str, Tensor]:
        return {"kept": _visit(paths, measure, skip_corrupt, progress), "lengths": lengths}

    key = {"format": FILM_FORMAT, "files": fingerprint(paths), "skip_corrupt": skip_corrupt}
    found = cache_tensors(_cache_file("lengths", key), compute)
    kept = found["kept"]
    _warn_skipped(len(paths) - len(kept))
    return FilmFiles(paths, found["lengths"], framing).select(kept), kept


def store_films(
    films: DiskFilms, skip_corrupt: bool, progress: ProgressCallback | None
) -> tuple[Films, Tensor]:
    """Decode films once into one tensor that is cached on disk, or leave large ones to be streamed.

    Whole frames are streamed, too, as films may have different shapes. Returns the films and the
    indices (M,) of those that can be decoded.

    Raises:
        UnreadableError: a film cannot be decoded, unless `skip_corrupt`; or none can.
    """
    size = films.framing.size
    is_large = int(films.lengths.sum()) * 3 * size**2 > MAX_TENSOR_BYTES
    is_streamed = films.framing.whole or is_large
    if is_streamed and not skip_corrupt:
        return films, torch.arange(len(films.names))

    def compute() -> dict[str, Tensor]:
        if not is_streamed:
            return _decode_all(films, skip_corrupt, progress)
        return {"kept": _visit(films.names, decode, skip_corrupt, progress)}

    def decode(film: int) -> None:
        for part in torch.arange(int(films.lengths[film])).split(CHUNK):
            films.read(film, part)

    key = {"format": FILM_FORMAT, "files": fingerprint(films.files()), "size": size}
    key |= {"whole": films.framing.whole, "skip_corrupt": skip_corrupt, "streamed": is_streamed}
    key |= {"masks": films.has_masks}
    tensors = cache_tensors(_cache_file("films", key), compute)
    kept = tensors["kept"]
    _warn_skipped(len(films.names) - len(kept))
    films = films.select(kept)
    if is_streamed:
        return films, kept
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), films.lengths.cumsum(0)])
    points = None
    if films.has_points:
        numbers = [torch.arange(length) for length in films.lengths.tolist()]
        points = torch.cat([films.read_points(film, row) for film, row in enumerate(numbers)])
    return StoredFilms(films.names, tensors["frames"], starts, tensors.get("masks"), points), kept


def _decode_all(
    films: DiskFilms, skip_corrupt: bool, progress: ProgressCallback | None
) -> dict[str, Tensor]:
    """Decode all "frames" (F, 3, size, size) and "masks"; "kept" are the films that can be."""
    starts = [0, *films.lengths.cumsum(0).tolist()]
    size = films.framing.size
    frames = torch.empty(starts[-1], 3, size, size, dtype=torch.uint8)
    masks = torch.empty(starts[-1], size, size, dtype=torch.uint8) if films.has_masks else None

    def decode(film: int) -> None:
        for part in torch.arange(int(films.lengths[film])).split(CHUNK):
            places = starts[film] + part
            frames[places] = films.read(film, part)
            if masks is not None:
                masks[places] = films.read_masks(film, part)

    kept = _visit(films.names, decode, skip_corrupt, progress)
    is_kept = torch.zeros(len(films.names), dtype=torch.bool)
    is_kept[kept] = True
    rows = is_kept.repeat_interleave(films.lengths)
    tensors = {"kept": kept, "frames": frames if rows.all() else frames[rows]}
    return tensors if masks is None else tensors | {"masks": masks[rows]}


def _visit(
    names: Sequence[str],
    visit: Callable[[int], None],
    skip_corrupt: bool,
    progress: ProgressCallback | None,
) -> Tensor:
    """Call `visit(film)` with every film, from several threads.

    Returns the indices (M,) of the films that could be decoded.

    Raises:
        UnreadableError: a film cannot be decoded and must not be skipped, or none can be decoded.
    """

    def attempt(film: int) -> bool:
        try:
            visit(film)
        except UnreadableError:
            if not skip_corrupt:
                raise
            return False
        return True

    decodable = []
    with ThreadPoolExecutor(max(1, count_workers())) as executor:
        try:
            for film, is_decodable in enumerate(executor.map(attempt, range(len(names)))):
                decodable.append(is_decodable)
                if progress:
                    progress("films", film + 1, len(names))
        except BaseException:
            executor.shutdown(cancel_futures=True)
            raise
    if not any(decodable):
        raise UnreadableError(f"{names[0]}: cannot be decoded, and neither can any other film")
    return torch.tensor(decodable).nonzero()[:, 0]


def _cache_file(kind: str, key: dict[str, Any]) -> Path:
    return cache_root() / "films" / f"{kind}-{digest_key(key)}.safetensors"


def _warn_skipped(count: int) -> None:
    if count:
        log.warning("skipped %d films that cannot be decoded", count)
