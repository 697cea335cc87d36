"""Write pictures: columns of images with titles, as one PNG."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from sslrun.errors import UserError
from sslrun.files import replacing

CELL = 96
"""Smallest side at which an image is drawn, in pixels; smaller images are enlarged."""
GAP = 4
TITLE = 16
"""Height of the line of titles, in pixels."""


def write_sheet(path: Path, columns: Mapping[str, Tensor]) -> None:
    """Draw columns of images (B, 3, H, W) in [0, 1] under their titles, one row per example.

    Images are enlarged by a whole factor, so that their pixels stay sharp. Raises UserError if the
    file cannot be written.
    """
    drawn = {title: [to_picture(image) for image in images] for title, images in columns.items()}
    sizes = [picture.size for column in drawn.values() for picture in column]
    width, height = (max(axis) for axis in zip(*sizes, strict=True))
    rows = max(len(column) for column in drawn.values())
    sheet = Image.new(
        "RGB",
        (GAP + len(drawn) * (width + GAP), TITLE + GAP + rows * (height + GAP)),
        "white",
    )
    draw = ImageDraw.Draw(sheet)
    for index, (title, column) in enumerate(drawn.items()):
        left = GAP + index * (width + GAP)
        draw.text((left, 2), title, fill="black")
        for row, picture in enumerate(column):
            sheet.paste(picture, (left, TITLE + GAP + row * (height + GAP)))
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
