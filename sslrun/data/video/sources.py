"""Sources of video that need no files: films of moving digits."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from sslrun.data.examples import Batch
from sslrun.data.image.sources import read_digits
from sslrun.data.source import Source, SourceOptions, sources
from sslrun.data.specs import VideoSpec
from sslrun.data.stores import Split
from sslrun.data.video.films import ClipExamples, StoredFilms
from sslrun.data.video.sprites import (
    PATTERNS,
    compose,
    draw_motion,
    draw_textures,
    pan,
)
from sslrun.seeds import derive_seed


class VideoOptions(SourceOptions):
    """Options of sources of video."""

    size: int = Field(64, ge=8)
    """Side of a frame, in pixels."""
    frames: int = Field(4, ge=2)
    """Number of frames in a clip to train on."""
    test_frames: int = Field(8, ge=2)
    """Number of frames in a clip of the test split, if masks are followed there."""


class SpriteOptions(VideoOptions):
    """Options of films that are drawn."""

    films: int = Field(1000, ge=8)
    """Number of films in the training split."""
    test_films: int = Field(60, ge=4)
    """Number of films in the test split."""
    objects: int = Field(2, ge=1, le=8)
    """Largest number of objects in a film; films have 1 to `objects`."""
    scale: tuple[float, float] = (0.25, 0.4)
    """Smallest and largest side of an object, as a share of the frame's side."""
    speed: float = Field(0.06, ge=0, le=1)
    """Largest distance that an object moves from frame to frame, as a share of the frame's side."""
    camera: float = Field(0.02, ge=0, le=1)
    """Largest distance that the background moves from frame to frame, as a share of the side."""
    turning: float = Field(0.2, ge=0)
    """Largest turn of an object from frame to frame, in radians."""
    labels: Literal["masks", "pattern"] = "masks"
    """Labels: masks of the objects in each frame, or the kind of motion, for films of one
    object."""


@sources.register("moving-digits")
class MovingDigits(Source):
    """Films of handwritten digits that move, turn and hide each other: no download.

    The digits are scans of scikit-learn's set in random colors, over random textures that move as
    under a camera. Masks and identities are exact. Training and test films show different scans.
    The films follow from the options alone.
    """

    gives = VideoSpec
    task = "masks"
    splits = ("train", "test")

    class Options(SpriteOptions):
        pass

    def load(self, split: Split) -> ClipExamples:
        options = self.options
        is_test = split == "test"
        count = options.test_films if is_test else options.films
        # Clips to classify all have one length.
        follows = is_test and options.labels == "masks"
        frames = options.test_frames if follows else options.frames
        generator = torch.Generator().manual_seed(derive_seed(0, is_test))
        digits = _digit_pictures(is_test)
        parts = [
            self._draw(digits, min(CHUNK, count - start), frames, generator)
            for start in range(0, count, CHUNK)
        ]
        films, masks, patterns = (torch.cat(column) for column in zip(*parts, strict=True))
        stored = StoredFilms(
            [f"film {number}" for number in range(count)],
            films.flatten(0, 1),
            torch.arange(count + 1) * frames,
            masks.flatten(0, 1),
        )
        clips = torch.stack(
            [torch.arange(count), torch.zeros(count).long(), torch.ones(count).long()], dim=1
        )
        by_pattern = options.labels == "pattern"
        return ClipExamples(
            stored,
            clips,
            VideoSpec(options.size, frames),
            patterns if by_pattern else None,
            PATTERNS if by_pattern else (),
        )

    @classmethod
    def default_task(cls, options: Options) -> str:  # type: ignore[override]
        return "clips" if options.labels == "pattern" else cls.task

    def _draw(
        self, digits: Tensor, count: int, frames: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draw films (B, T, 3, S, S), masks (B, T, S, S), and the patterns (B,) of object 1."""
        options = self.options
        size = options.size
        side = size + round(options.camera * size * frames) + 1
        backgrounds = pan(
            draw_textures(count, side, generator), frames, size, 2 * options.camera, generator
        )
        most = 1 if options.labels == "pattern" else options.objects
        present = torch.randint(1, most + 1, (count,), generator=generator)
        pictures, motions, first = [], [], torch.zeros(count, dtype=torch.int64)
        for number in range(most):
            patterns = torch.randint(0, len(PATTERNS), (count,), generator=generator)
            first = patterns if number == 0 else first
            chosen = torch.randint(0, len(digits), (count,), generator=generator)
            color = torch.rand(count, 3, 1, 1, generator=generator) * 0.8 + 0.2
            alpha = digits[chosen] * (present > number)[:, None, None, None]
            pictures.append(torch.cat([color.expand(-1, -1, *alpha.shape[-2:]), alpha], dim=1))
            motions.append(
                draw_motion(
                    patterns, frames, 2 * options.speed, options.scale, options.turning, generator
                )
            )
        films, masks = compose(backgrounds, pictures, motions)
        return films, masks, first

    def sketch(self, count: int) -> tuple[VideoSpec, Batch]:
        options = self.options
        shape = (count, options.frames, 3, options.size, options.size)
        clips = torch.randint(0, 256, shape, dtype=torch.uint8)
        return VideoSpec(options.size, options.frames), Batch(clips, None)

    @classmethod
    def count(cls) -> int | None:
        return 1_000

    @classmethod
    def describe(cls) -> dict[str, str]:
        return {
            "splits": "train 1,000 films and test 60, of different scans; a tenth of train is "
            "carved for validation",
            "labels": "masks of the objects, or one of eight kinds of motion",
            "homepage": "https://archive.ics.uci.edu/dataset/80",
            "license": "CC BY 4.0",
            "searched": "scikit-learn",
        }


CHUNK = 250
"""Films drawn at a time, to limit memory."""
ENLARGED = 32
"""Side that digits of 8x8 pixels are enlarged to before they are drawn."""


def _digit_pictures(is_test: bool) -> Tensor:
    """Alpha (N, 1, ENLARGED, ENLARGED) of the scans for training, or of those for the test.

    Every fourth scan is for the test.
    """
    pixels, _ = read_digits()
    chosen = torch.arange(len(pixels)) % 4 == 3
    alpha = torch.from_numpy(pixels)[chosen if is_test else ~chosen].float() / 16
    enlarged = F.interpolate(alpha[:, None], (ENLARGED, ENLARGED), mode="bicubic", antialias=True)
    return (1.5 * enlarged).clamp(0, 1)
