"""Films of photographed objects that move over films, photographs or textures."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from sslrun.data.image.images import UnreadableError
from sslrun.data.image.stamps import Stamp, Stamps, open_image
from sslrun.data.source import sources
from sslrun.data.splits import TEST_FRACTION, carve
from sslrun.data.stores import IMAGE_SUFFIXES, find_files
from sslrun.data.video.decoding import Framing, open_film
from sslrun.data.video.folders import FILM_SUFFIXES
from sslrun.data.video.sources import DrawnFilms, SpriteOptions
from sslrun.data.video.sprites import draw_textures, pan
from sslrun.errors import UserError

SIDE = 64
"""Side of the pictures of objects, in pixels."""
LONGEST = 1000
"""Largest number of frames of a film that backgrounds are cut from; later ones are not read."""
ROOM = 1.5
"""Shorter side of a background, in sides of the frame that is cut out of it."""


@sources.register("composite")
class Composite(DrawnFilms):
    """Films of photographed objects with alpha that move over films, photographs or textures.

    Objects are PNG files with alpha, in folders, as those of the set `stamps`. Masks and identities
    are exact, also where objects hide each other. The test split has other objects, and other
    photographs; of each film its last quarter, which training has not seen. All settings are
    our choice.
    """

    class Options(SpriteOptions):
        path: Path | None = None
        """Folder of the objects; default: stamps in SSLRUN_DATA or in data."""
        backgrounds: Path | None = None
        """Folder of films or photographs to move over; default: random textures."""
        lighting: float = Field(0.0, ge=0, le=1)
        """Largest change of brightness, and of the logarithm of contrast, from frame to frame."""
        noise: float = Field(0.0, ge=0, le=1)
        """Standard deviation of noise in each pixel, of values in [0, 1]."""

    options: Composite.Options

    def draw_objects(self, count: int, is_test: bool, generator: torch.Generator) -> Tensor:
        pictures = self._pictures["test" if is_test else "train"]
        return pictures[torch.randint(0, len(pictures), (count,), generator=generator)]

    def draw_backgrounds(
        self, count: int, frames: int, is_test: bool, generator: torch.Generator
    ) -> Tensor:
        size, camera = self.options.size, self.options.camera
        if self.options.backgrounds is None:
            side = size + round(camera * size * frames) + 1
            return pan(draw_textures(count, side, generator), frames, size, 2 * camera, generator)
        scenes = self._scenes["test" if is_test else "train"]
        chosen = torch.randint(0, len(scenes), (count,), generator=generator).tolist()
        return torch.stack([self._cut(scenes[number], frames, generator) for number in chosen])

    def _cut(self, scene: Tensor, frames: int, generator: torch.Generator) -> Tensor:
        """Cut frames (frames, 3, size, size) out of a scene (T, 3, H, W) uint8.

        A photograph (T = 1) moves as under a camera.
        """
        size = self.options.size
        if len(scene) == 1:
            square = _cut_square(scene, min(scene.shape[2:]), generator) / 255
            return pan(square, frames, size, 2 * self.options.camera, generator)[0]
        first = int(torch.randint(0, len(scene) - frames + 1, (1,), generator=generator))
        return _cut_square(scene[first : first + frames], size, generator) / 255

    @cached_property
    def _stamps(self) -> Stamps:
        return Stamps(Stamps.Options(path=self.options.path), self.progress)

    @cached_property
    def _pictures(self) -> dict[str, Tensor]:
        """The objects (N, 4, SIDE, SIDE) of each split."""
        return {
            split: torch.stack([_to_picture(stamp) for stamp in stamps])
            for split, stamps in self._stamps.stamps.items()
        }

    @cached_property
    def _scenes(self) -> dict[str, list[Tensor]]:
        """The films (T, 3, H, W) uint8 of each split, or its photographs, with T = 1."""
        folder = self.options.backgrounds
        assert folder is not None
        files = sorted(map(Path, find_files(folder, FILM_SUFFIXES)))
        if files:
            return self._split_films([read_film(path, self._side) for path in files], files)
        files = sorted(map(Path, find_files(folder, IMAGE_SUFFIXES)))
        if len(files) < 2:
            raise UserError(
                f"{folder}: holds no films and {len(files)} photographs, but at least a film or 2 "
                "photographs are needed: name another folder with data.backgrounds"
            )
        framing = Framing(self._side, whole=True)
        photographs = [framing.frames(_to_tensor(open_image(file, "RGB"))[None]) for file in files]
        parts = zip(self.splits, carve(len(files), TEST_FRACTION), strict=True)
        return {split: [photographs[index] for index in part.tolist()] for split, part in parts}

    def _split_films(self, films: list[Tensor], files: list[Path]) -> dict[str, list[Tensor]]:
        """Cut each film into the part for training and the later one for the test."""
        longest = max(self.options.frames, self.options.test_frames)
        for film, file in zip(films, files, strict=True):
            if len(film) * TEST_FRACTION < longest:
                raise UserError(
                    f"{file}: has {len(film)} frames, too few for clips of {longest} from the last "
                    "quarter: remove it, or lower data.frames and data.test_frames"
                )
        cuts = [len(film) - int(len(film) * TEST_FRACTION) for film in films]
        return {
            "train": [film[:cut] for film, cut in zip(films, cuts, strict=True)],
            "test": [film[cut:] for film, cut in zip(films, cuts, strict=True)],
        }

    @property
    def _side(self) -> int:
        """Shorter side of backgrounds, in pixels."""
        return round(ROOM * self.options.size)

    def check_available(self) -> None:
        self._stamps.check_available()

    @classmethod
    def describe(cls) -> dict[str, str]:
        return {
            "splits": "train 1,000 films and test 60, of different objects and backgrounds; a "
            "tenth of train is carved for validation",
            "labels": "masks or points of the objects, or one of eight kinds of motion",
            **{key: value for key, value in Stamps.describe().items() if key != "splits"},
        }


def _to_picture(stamp: Stamp) -> Tensor:
    """Fit an object into a transparent square (4, SIDE, SIDE), in [0, 1]."""
    from PIL import Image

    image = stamp.image.copy()
    scale = (SIDE - 4) / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    square = Image.new("RGBA", (SIDE, SIDE))
    square.paste(
        image.resize((width, height), Image.Resampling.BILINEAR),
        ((SIDE - width) // 2, (SIDE - height) // 2),
    )
    return _to_tensor(square) / 255


def _to_tensor(image: object) -> Tensor:
    """Convert an image to (C, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _cut_square(frames: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Cut a square at a random place, the same in all frames (T, 3, H, W)."""
    top, left = (
        int(torch.randint(0, length - side + 1, (1,), generator=generator))
        for length in frames.shape[2:]
    )
    return frames[:, :, top : top + side, left : left + side]


def read_film(path: Path, size: int) -> Tensor:
    """Read the first frames (T, 3, H, W) uint8 of a film, with the shorter side resized to `size`.

    Raises UserError if it cannot be decoded.
    """
    framing = Framing(size, whole=True)
    try:
        film = open_film(str(path))
        numbers = torch.arange(min(LONGEST, film.length)).split(16)
        return torch.cat([framing.frames(film.read(part)) for part in numbers])
    except UnreadableError as error:
        raise error.without_option from None
