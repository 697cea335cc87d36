"""Follow the objects of a mask through any film with a backbone's features, and draw them."""

from __future__ import annotations

import colorsys
import importlib.util
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sslrun.backbones.base import Backbone
from sslrun.data.image.images import UnreadableError
from sslrun.data.image.masks import read_mask
from sslrun.data.specs import ImageSpec, VideoSpec
from sslrun.data.video.decoding import Framing, open_film
from sslrun.data.video.files import DiskFilms, FilmFiles, FrameFolders
from sslrun.data.video.films import VOID
from sslrun.data.video.folders import list_pictures
from sslrun.errors import UserError
from sslrun.files import replacing
from sslrun.protocols.propagate import Propagate, PropagateOptions
from sslrun.recipe import Recipe
from sslrun.runs import check_output
from sslrun.stages.pictures import write_sheet
from sslrun.stages.subject import open_backbone
from sslrun.tasks.following import FollowingOptions
from sslrun.tasks.masks import Masks, objects_of
from sslrun.training.device import Compute

PART = 8
"""Frames read at a time."""
SHOWN = 8
"""Largest number of frames on a contact sheet."""
THUMBNAIL = 192
"""Longer side of a frame on a contact sheet, in pixels."""
TINT = 0.5
"""Share of a mask's color in the pixels of an object."""
GOLDEN = 0.618034
"""Distance of the hues of neighboring objects, as a share of the circle."""
RATE = 10.0
"""Frames per second of a film whose rate is unknown."""


@dataclass(frozen=True)
class Request:
    """What to follow, by which backbone, and where to write."""

    reference: str
    """See `open_backbone`."""
    video: Path
    """A film, or a folder with the pictures of one."""
    mask: Path
    """The mask of the first frame, whose pixels are numbers of objects."""
    output: Path
    """The film to write, or with the suffix .png, a contact sheet."""
    masks: Path | None = None
    """Folder to write the masks to."""
    layer: int | None = None
    """Layer of the backbone to read; None: that of the recipe's `propagate`, else the last."""
    size: int | None = None
    """Length of a frame's shorter side for the backbone, in pixels; None: that of training."""
    frames: int | None = None
    """Largest number of frames; None: all."""
    seed: int = 0
    runs: Path = Path("runs")
    overrides: tuple[str, ...] = ()
    """Changes to the recipe."""


def track(request: Request, compute: Compute) -> list[str]:
    """Write a film, or a contact sheet, with the objects in colors; return what to report.

    Raises UserError for a backbone without a grid of features, and for inputs that do not fit.
    """
    check_output(request.output)
    footage = open_footage(request.video, request.frames)
    first = read_first_mask(request.mask, request.video, footage.shape)
    backbone, recipe = open_backbone(
        request.reference,
        request.overrides,
        size=request.size,
        seed=request.seed,
        runs=request.runs,
    )
    compute.put(backbone).eval()
    backbone.require("dense", "sslrun track")
    if not isinstance(backbone.spec, ImageSpec):
        raise UserError(
            f"sslrun track needs a backbone of images, but '{backbone.name}' takes "
            f"{backbone.spec.kind} data"
        )
    options, seen = _find_options(recipe)
    if request.layer is not None:
        options = options.model_copy(update={"layer": request.layer})
    shape = scale_to(footage.shape, request.size or backbone.spec.size, backbone.patch)
    given = first.to(compute.device)
    writer = open_writer(request.output, footage)
    with writer, torch.inference_mode():
        followed = follow(Propagate(options), backbone, footage.parts(), given, shape, seen)
        for number, (frame, mask) in enumerate(followed):
            writer.add(number, frame, paint(frame, mask))
            if request.masks is not None:
                write_mask(request.masks / f"{number:05d}.png", mask)
    return _report(request, writer.path, footage, objects_of(first))


def _report(request: Request, path: Path, footage: Footage, objects: list[int]) -> list[str]:
    """Say what was written, and why not the film if it was not."""
    numbers = ", ".join(map(str, objects))
    lines = [f"{path}: {footage.length} frames, with the objects {numbers}"]
    if path != request.output:
        lines.append(
            f"{request.output}: not written, because PyAV, which encodes films, is missing: pip "
            "install 'sslrun[video]'"
        )
    if request.masks is not None:
        lines.append(f"{request.masks}: the masks of all frames")
    return lines


def _find_options(recipe: Recipe | None) -> tuple[PropagateOptions, FollowingOptions]:
    """Return the options of `propagate` and of its task in the recipe, if it has the protocol."""
    for evaluation in recipe.evaluate.values() if recipe is not None else ():
        options, task = evaluation.options["propagate"], evaluation.task.options
        if isinstance(options, PropagateOptions) and isinstance(task, FollowingOptions):
            return options, task
    return PropagateOptions(), FollowingOptions()


# ---------------------------------------------------------------- the film and its first mask


class Footage(NamedTuple):
    """A film that is read in order."""

    films: DiskFilms
    length: int
    """Number of frames to read."""
    rate: float
    """Frames per second."""
    shape: tuple[int, int]
    """Height and width of a frame."""

    def parts(self) -> Iterator[Tensor]:
        """Yield all frames (n, 3, H, W) uint8 in order, `PART` at a time."""
        for numbers in torch.arange(self.length).split(PART):
            yield _decode(self.films, numbers)


def open_footage(path: Path, limit: int | None) -> Footage:
    """Open a film, or a folder with a picture for each frame; read at most `limit` frames.

    Raises UserError if there is none, or it cannot be decoded.
    """
    films: DiskFilms
    if path.is_dir():
        films = FrameFolders([str(path)], [list_pictures(path)], Framing(1))
        rate = RATE
    elif path.is_file():
        try:
            film = open_film(str(path))
        except UnreadableError as error:
            raise error.without_option from None
        films = FilmFiles([str(path)], torch.tensor([film.length]), Framing(1))
        rate = film.rate or RATE
    else:
        raise UserError(f"{path}: no such film, or folder of its frames")
    length = int(films.lengths[0])
    height, width = _decode(films, torch.arange(1)).shape[2:]
    return Footage(films, length if limit is None else min(limit, length), rate, (height, width))


def _decode(films: DiskFilms, numbers: Tensor) -> Tensor:
    try:
        return films.decode(0, numbers)
    except UnreadableError as error:
        raise error.without_option from None


def read_first_mask(path: Path, video: Path, shape: tuple[int, int]) -> Tensor:
    """Read the mask (H, W) uint8 of a film's first frame.

    In a mask of 0 and 255 alone, as programs for painting write it, 255 is the object. Raises
    UserError if it has no object, or another shape than the frame.
    """
    mask = read_mask(path)
    if tuple(mask.shape) != shape:
        raise UserError(
            f"{path}: is {mask.shape[1]}x{mask.shape[0]}, but the frames of {video} are "
            f"{shape[1]}x{shape[0]}: a mask should have the size of the first frame"
        )
    if mask.unique().tolist() == [0, VOID]:
        mask = (mask == VOID).byte()
    if not objects_of(mask):
        raise UserError(
            f"{path}: has no object to follow: pixels of objects should be numbers from 1 to 254"
        )
    return mask


# ---------------------------------------------------------------- following


def scale_to(shape: tuple[int, int], size: int, patch: int) -> tuple[int, int]:
    """Height and width whose shorter side is `size`; both are multiples of the patch."""
    scale = size / min(shape)
    height, width = (max(patch, round(side * scale / patch) * patch) for side in shape)
    return height, width


def follow(
    protocol: Propagate,
    backbone: Backbone,
    parts: Iterable[Tensor],
    first: Tensor,
    shape: tuple[int, int],
    seen: FollowingOptions,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each frame (3, H, W) uint8 of a film with its mask (H, W) uint8, on the CPU.

    The backbone sees frames of `shape`, in the colors of `seen`. No more than one part of the film
    is kept.
    """
    waiting: deque[Tensor] = deque()

    def resized() -> Iterator[Tensor]:
        for part in parts:
            waiting.extend(part)
            yield F.interpolate(part, shape, mode="bilinear", antialias=True)

    task = Masks(seen, VideoSpec(min(shape), PART), ())
    size = (first.shape[0], first.shape[1])
    for mask in protocol.stream(backbone, resized(), first, size, task):
        yield waiting.popleft(), mask.cpu()


# ---------------------------------------------------------------- drawing


def colors_of(numbers: int) -> Tensor:
    """Colors (numbers, 3) uint8 of objects by number; the hues of neighbors are far apart."""
    hues = [(number * GOLDEN) % 1 for number in range(numbers)]
    return (torch.tensor([colorsys.hsv_to_rgb(hue, 0.85, 1.0) for hue in hues]) * 255).byte()


COLORS = colors_of(256)


def paint(frame: Tensor, mask: Tensor) -> Tensor:
    """Draw a mask (H, W) over a frame (3, H, W) uint8, each object in a color of its own."""
    colors = COLORS[mask.long()].permute(2, 0, 1)
    mixed = ((1 - TINT) * frame + TINT * colors).byte()
    return torch.where((mask > 0) & (mask != VOID), mixed, frame)


def write_mask(path: Path, mask: Tensor) -> None:
    """Write a mask as a PNG with a palette, whose pixels are numbers of objects."""
    picture = Image.fromarray(mask.numpy(), mode="P")
    picture.putpalette([0, 0, 0, *COLORS[1:].flatten().tolist()])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    except OSError as error:
        raise UserError(f"{path}: can't be written: {error.strerror}") from None


class Sheet:
    """A contact sheet: frames that are evenly spaced in the film, above with their objects."""

    def __init__(self, path: Path, footage: Footage) -> None:
        self.path = path
        count = min(SHOWN, footage.length)
        self._chosen = set(torch.linspace(0, footage.length - 1, count).round().long().tolist())
        height, width = footage.shape
        scale = min(1.0, THUMBNAIL / max(height, width))
        self._shape = round(height * scale), round(width * scale)
        self._columns: dict[str, Tensor] = {}

    def __enter__(self) -> Self:
        return self

    def add(self, number: int, frame: Tensor, painted: Tensor) -> None:
        if number in self._chosen:
            pair = torch.stack([frame, painted])
            small = F.interpolate(pair, self._shape, mode="bilinear", antialias=True)
            self._columns[f"frame {number + 1}"] = small / 255

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        if kind is None:
            write_sheet(self.path, self._columns)


class Movie:
    """A film that PyAV writes: H.264, or MPEG-4 where that encoder is missing."""

    def __init__(self, path: Path, footage: Footage) -> None:
        self.path = path
        self._footage = footage
        self._files = ExitStack()

    def __enter__(self) -> Self:
        import av

        height, width = (side // 2 * 2 for side in self._footage.shape)  # encoders need even sides
        codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self._files.enter_context(replacing(self.path))
            container = av.open(str(temporary), "w", format=self.path.suffix[1:] or "mp4")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{self.path}: can't be written: {reason}") from None
        self._container: Any = self._files.enter_context(container)
        rate = Fraction(self._footage.rate).limit_denominator(1000)
        stream: Any = self._container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        self._stream = stream
        return self

    def add(self, number: int, frame: Tensor, painted: Tensor) -> None:
        import av

        pixels = painted[:, : self._stream.height, : self._stream.width].permute(1, 2, 0)
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels.numpy()), format="rgb24")
        self._container.mux(self._stream.encode(picture))

    def __exit__(self, kind: type[BaseException] | None, *details: Any) -> bool | None:
        if kind is None:
            self._container.mux(self._stream.encode(None))
        return self._files.__exit__(kind, *details)


def open_writer(path: Path, footage: Footage) -> Sheet | Movie:
    """Return what writes `path`: a sheet if its suffix is .png, or if PyAV is missing."""
    if path.suffix.lower() == ".png":
        return Sheet(path, footage)
    if importlib.util.find_spec("av") is None:
        return Sheet(path.with_suffix(".png"), footage)
    return Movie(path, footage)
