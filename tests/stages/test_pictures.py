"""Sheets of pictures: places, enlargement and colors."""

import numpy as np
import torch
from PIL import Image

from sslrun.stages.pictures import CELL, GAP, TITLE, write_sheet


def test_a_sheet_holds_each_image_enlarged_in_its_place(tmp_path):
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "pictures" / "sheet.png"
    write_sheet(path, {"image": images, "inverted": 1 - images})
    sheet = np.asarray(Image.open(path))
    assert sheet.shape == (TITLE + GAP + 2 * (CELL + GAP), GAP + 2 * (CELL + GAP), 3)
    for column, expected in enumerate((images, 1 - images)):
        for row in range(2):
            top, left = TITLE + GAP + row * (CELL + GAP), GAP + column * (CELL + GAP)
            drawn = sheet[top : top + CELL : 3, left : left + CELL : 3]
            wanted = (expected[row] * 255).round().byte().permute(1, 2, 0).numpy()
            assert (drawn == wanted).all()
