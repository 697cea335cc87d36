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


def test_a_long_title_takes_more_lines_and_moves_the_images_down(tmp_path):
    image = torch.ones(1, 3, 32, 32)
    path = tmp_path / "sheet.png"
    write_sheet(path, {"image": image, "a title of three lines that is very long": 0 * image})
    sheet = np.asarray(Image.open(path))
    assert sheet.shape[0] == 3 * TITLE + GAP + CELL + GAP
    top, left = 3 * TITLE + GAP, 2 * GAP + CELL
    assert (sheet[top : top + CELL, left : left + CELL] == 0).all()
    assert (sheet[2 * TITLE : 3 * TITLE, left:] < 128).any()  # the third line is drawn
