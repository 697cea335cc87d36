"""Sources of video that need no files: films of moving digits."""

from __future__ import annotations

from abc import abstractmethod
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
    cross,
    draw_motion,
    draw_points,
    draw_textures,
    pan,
    relight,
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
    scale: tuple[float, float] = (0.3, 0.45)
    """Smallest and largest side of an object, as a share of the frame's side."""
    speed: float = Field(0.06, ge=0, le=1)
    """Largest distance that an object moves from frame to frame, as a share of the frame's side."""
    camera: float = Field(0.02, ge=0, le=1)
    """Largest distance that the background moves from frame to frame, as a share of the side."""
    turning: float = Field(0.2, ge=0)
    """Largest turn of an object from frame to frame, in radians."""
    occlusion: float = Field(0.0, ge=0, le=1)
    """Share of the films in which the second object, if any, crosses the first one and hides it."""
    lighting: float = Field(0.05, ge=0, le=1)
    """Largest change of brightness, and of the logarithm of contrast, from frame to frame."""
    noise: float = Field(0.02, ge=0, le=1)
    """Standard deviation of noise in each pixel, of values in [0, 1]."""
    drift: float = Field(0.0, ge=0, le=1)
    """Share by which the brightness rises with each frame: a planted shortcut to frames' order."""
    labels: Literal["masks", "points", "pattern"] = "masks"
    """Labels: masks of the objects in each frame; five points of each object, for the task
    `keypoints`; or the kind of motion, for films of one object."""


class DrawnFilms(Source):
    """Base class of sources whose films are drawn: objects that move over backgrounds.

    Masks and identities are exact. The films follow from the options alone. With speed, camera and
    turning 0 nothing moves, and with lighting 0 nothing but the noise changes.
    """

    gives = VideoSpec
    task = "masks"
    splits = ("train", "test")
    options: SpriteOptions

    @abstractmethod
    def draw_objects(self, count: int, is_test: bool, generator: torch.Generator) -> Tensor:
        """Draw pictures (count, 4, h, h) of one object for each film: color and alpha in [0, 1]."""

    @abstractmethod
    def draw_backgrounds(
        self, count: int, frames: int, is_test: bool, generator: torch.Generator
    ) -> Tensor:
        """Draw the backgrounds (count, frames, 3, size, size), in [0, 1]."""

    def load(self, split: Split) -> ClipExamples:
        options = self.options
        is_test = split == "test"
        count = options.test_films if is_test else options.films
        # Clips to classify all have one length.
        follows = is_test and options.labels != "pattern"
        frames = options.test_frames if follows else options.frames
        generator = torch.Generator().manual_seed(derive_seed(0, is_test))
        parts = [
            self._draw(min(CHUNK, count - start), frames, is_test, generator)
            for start in range(0, count, CHUNK)
        ]
        films, masks, points, patterns = (torch.cat(column) for column in zip(*parts, strict=True))
        stored = StoredFilms(
            [f"film {number}" for number in range(count)],
            films.flatten(0, 1),
            torch.arange(count + 1) * frames,
            None if options.labels == "points" else masks.flatten(0, 1),
            points.flatten(0, 1) if options.labels == "points" else None,
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
    def default_task(cls, options: SpriteOptions) -> str:
        return {"masks": "masks", "points": "keypoints", "pattern": "clips"}[options.labels]

    def _draw(
        self, count: int, frames: int, is_test: bool, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Draw films (B, T, 3, S, S), with masks (B, T, S, S), points (B, T, P, 2), and patterns.

        The patterns (B,) are those of the first object.
        """
        options = self.options
        backgrounds = self.draw_backgrounds(count, frames, is_test, generator)
        most = 1 if options.labels == "pattern" else options.objects
        present = torch.randint(1, most + 1, (count,), generator=generator)
        pictures, motions, patterns = [], [], []
        for number in range(most):
            objects = self.draw_objects(count, is_test, generator)
            objects[:, 3] *= (present > number)[:, None, None]
            pictures.append(objects)
            patterns.append(torch.randint(0, len(PATTERNS), (count,), generator=generator))
            motions.append(
                draw_motion(
                    patterns[-1],
                    frames,
                    2 * options.speed,
                    options.scale,
                    options.turning,
                    generator,
                )
            )
        if options.occlusion and most > 1:
            crossing = torch.rand(count, generator=generator) < options.occlusion
            motions[1] = cross(motions[1], motions[0], crossing, generator)
        films, masks = compose(backgrounds, pictures, motions)
        lit = relight(films, options.lighting, options.drift, options.noise, generator)
        points = draw_points(pictures, motions, masks)
        return (lit * 255).round().byte(), masks, points, patterns[0]

    def sketch(self, count: int) -> tuple[VideoSpec, Batch]:
        options = self.options
        shape = (count, options.frames, 3, options.size, options.size)
        clips = torch.randint(0, 256, shape, dtype=torch.uint8)
        return VideoSpec(options.size, options.frames), Batch(clips, None)


@sources.register("moving-digits")
class MovingDigits(DrawnFilms):
    """Films of handwritten digits that move, turn and hide each other: no download.

    The digits are scans of scikit-learn's set. Each is filled with a random texture, over a texture
    of the same statistics that moves as under a camera, and the light changes from frame to frame,
    so that color alone does not follow a digit. Training and test films show different scans.
    """

    version = 2

    class Options(SpriteOptions):
        textured: bool = True
        """Fill digits and backgrounds with textures. Otherwise each has one color, and digits are
        brighter, so that a single frame shows where they are."""

    options: Options

    def draw_objects(self, count: int, is_test: bool, generator: torch.Generator) -> Tensor:
        digits = _digit_pictures(is_test)
        chosen = torch.randint(0, len(digits), (count,), generator=generator)
        if not self.options.textured:
            colors = BRIGHTEST - CONTRAST * torch.rand(count, 3, 1, 1, generator=generator)
            return torch.cat([colors.expand(-1, -1, ENLARGED, ENLARGED), digits[chosen]], dim=1)
        # The texture of a whole frame, at the scale at which digits of medium size are drawn.
        side = round(2 * ENLARGED / sum(self.options.scale))
        start = (side - ENLARGED) // 2
        window = slice(start, start + ENLARGED)
        textures = draw_textures(count, side, generator)[:, :, window, window]
        return torch.cat([textures, digits[chosen]], dim=1)

    def draw_backgrounds(
        self, count: int, frames: int, is_test: bool, generator: torch.Generator
    ) -> Tensor:
        size, camera = self.options.size, self.options.camera
        if not self.options.textured:
            colors = CONTRAST * torch.rand(count, 1, 3, 1, 1, generator=generator)
            return colors.expand(-1, frames, -1, size, size)
        side = size + round(camera * size * frames) + 1
        return pan(draw_textures(count, side, generator), frames, size, 2 * camera, generator)

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
MARGIN = 3
"""Width of the empty border around a digit, in pixels."""
THICKENED = 5
"""Side of the square, in pixels, that each point of a stroke becomes."""
BRIGHTEST, CONTRAST = 0.8, 0.3
"""Without textures, channels of backgrounds are below `CONTRAST`, and those of digits between
`BRIGHTEST` - `CONTRAST` and `BRIGHTEST`, so that brightness may rise by a quarter."""
ENLARGED = 32
"""Side that digits of 8x8 pixels are enlarged to before they are drawn."""


def _digit_pictures(is_test: bool) -> Tensor:
    """Alpha (N, 1, ENLARGED, ENLARGED) of the scans for training, or of those for the test.

    Every fourth scan is for the test.
    """
    pixels, _ = read_digits()
    chosen = torch.arange(len(pixels)) % 4 == 3
    alpha = torch.from_numpy(pixels)[chosen if is_test else ~chosen].float() / 16
    side = ENLARGED - 2 * MARGIN
    enlarged = F.interpolate(alpha[:, None], (side, side), mode="bicubic", antialias=True)
    enlarged = F.pad(enlarged, (MARGIN,) * 4)
    thickened = F.max_pool2d(enlarged, THICKENED, stride=1, padding=THICKENED // 2)
    return (1.5 * thickened).clamp(0, 1)
