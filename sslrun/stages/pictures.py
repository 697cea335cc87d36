"""Write pictures: columns of images with titles, or matrices with labels, as one PNG."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from sslrun.errors import UserError
from sslrun.files import replacing

CELL = 96
"""Smallest side at which an image is drawn, in pixels; smaller images are enlarged."""
GAP = 4
TITLE = 16
"""Height of a line of titles, in pixels."""
CHARACTER = 6
"""Width of a character of the default font, in pixels; it is the largest."""
SQUARE = 14
"""Side of an entry of a matrix, in pixels."""
ACROSS = 4
"""Largest number of matrices beside each other."""


def write_sheet(path: Path, columns: Mapping[str, Tensor]) -> None:
    """Draw columns of images (B, 3, H, W) in [0, 1] under their titles, one row per example.

    See `draw_sheet`. Raises UserError if the file cannot be written.
    """
    _save(draw_sheet(columns), path)


def draw_sheet(columns: Mapping[str, Tensor]) -> Image.Image:
    """Draw columns of images (B, 3, H, W) in [0, 1] under their titles, one row per example.

    Images are enlarged by a whole factor, so that their pixels stay sharp. Titles wider than their
    column take several lines.
    """
    drawn = {title: [to_picture(image) for image in images] for title, images in columns.items()}
    sizes = [picture.size for column in drawn.values() for picture in column]
    width, height = (max(axis) for axis in zip(*sizes, strict=True))
    rows = max(len(column) for column in drawn.values())
    titles = [textwrap.wrap(title, width // CHARACTER) for title in drawn]
    top = TITLE * max(len(lines) for lines in titles)
    sheet = Image.new(
        "RGB",
        (GAP + len(drawn) * (width + GAP), top + GAP + rows * (height + GAP)),
        "white",
    )
    draw = ImageDraw.Draw(sheet)
    for index, (lines, column) in enumerate(zip(titles, drawn.values(), strict=True)):
        left = GAP + index * (width + GAP)
        for number, line in enumerate(lines):
            draw.text((left, 2 + number * TITLE), line, fill="black")
        for row, picture in enumerate(column):
            sheet.paste(picture, (left, top + GAP + row * (height + GAP)))
    return sheet


def write_matrices(path: Path, matrices: Mapping[str, Tensor], labels: Sequence[str]) -> None:
    """Draw matrices (T, T) in [0, 1] under their titles, with a label for each row and column.

    See `draw_matrices`. Raises UserError if the file cannot be written.
    """
    _save(draw_matrices(matrices, labels), path)


def draw_matrices(
    matrices: Mapping[str, Tensor], labels: Sequence[str], most: int = ACROSS
) -> Image.Image:
    """Draw matrices (T, T) in [0, 1] under their titles, with a label for each row and column.

    White is 0 and black is 1. Matrices stand beside each other, at most `most` in a row.
    """
    margin = max(_text_width(label) for label in labels) + 2 * GAP
    side = len(labels) * SQUARE
    width, height = margin + side + GAP, TITLE + margin + side + GAP
    across = min(most, len(matrices))
    down = -(-len(matrices) // across)
    sheet = Image.new("RGB", (across * width, down * height), "white")
    names = _draw_labels(labels, margin)
    for index, (title, matrix) in enumerate(matrices.items()):
        left, top = index % across * width, index // across * height
        ImageDraw.Draw(sheet).text((left + margin, top + 2), title, fill="black")
        sheet.paste(names.rotate(90, expand=True), (left + margin, top + TITLE))
        sheet.paste(names, (left, top + TITLE + margin))
        inverted = (1 - matrix).expand(3, -1, -1)
        sheet.paste(to_picture(inverted, side), (left + margin, top + TITLE + margin))
    return sheet


def _draw_labels(labels: Sequence[str], width: int) -> Image.Image:
    """Draw one label under the other, aligned to the right."""
    picture = Image.new("RGB", (width, len(labels) * SQUARE), "white")
    draw = ImageDraw.Draw(picture)
    for index, label in enumerate(labels):
        draw.text((width - GAP - _text_width(label), index * SQUARE + 1), label, fill="black")
    return picture


def _text_width(text: str) -> int:
    """Width of a drawn text, in pixels."""
    return math.ceil(ImageFont.load_default().getlength(text))


def _save(sheet: Image.Image, path: Path) -> None:
    """Write a PNG, and its folder if it is missing. Raises UserError if that is impossible."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            sheet.save(temporary, format="PNG")
    except OSError as error:
        raise UserError(f"{path}: can't be written: {error.strerror}") from None


def to_picture(image: Tensor, smallest: int = CELL) -> Image.Image:
    """Convert an image (C, H, W) in [0, 1], enlarged by a whole factor to at least `smallest`.

    Of more than three channels the first three are drawn; otherwise the first, in gray.
    """
    image = image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)
    pixels = (image.detach().float().cpu().clamp(0, 1) * 255).round().byte()
    picture = Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))
    factor = max(1, -(-smallest // min(picture.size)))
    width, height = picture.size
    return picture.resize((width * factor, height * factor), Image.Resampling.NEAREST)
