"""J and F by hand-made cases, and by a second implementation."""

import itertools
import math

import pytest
import torch

from sslrun.tasks.segmentation import (
    boundary,
    contour_accuracy,
    region_similarity,
    summarize,
)


def square(size, top, left, side):
    mask = torch.zeros(size, size, dtype=torch.bool)
    mask[top : top + side, left : left + side] = True
    return mask


def naive_boundary(mask):
    """A pixel differs from the pixel on its right, below it, or diagonally below."""
    height, width = mask.shape
    edges = torch.zeros_like(mask)
    for row, column in itertools.product(range(height), range(width)):
        below, right = min(row + 1, height - 1), min(column + 1, width - 1)
        here = mask[row, column]
        edges[row, column] = (
            here != mask[row, right] or here != mask[below, column] or here != mask[below, right]
        )
    return edges


def naive_contour(predicted, truth, radius):
    ours, theirs = naive_boundary(predicted).nonzero(), naive_boundary(truth).nonzero()
    if len(ours) == 0 or len(theirs) == 0:
        return float(len(ours) == len(theirs))
    near = torch.cdist(ours.double(), theirs.double()) <= radius + 1e-9
    precision = near.any(dim=1).double().mean().item()
    recall = near.any(dim=0).double().mean().item()
    return 2 * precision * recall / max(precision + recall, 1e-12)


def test_region_similarity_of_hand_made_masks():
    a, b = square(5, 0, 0, 2), square(5, 1, 1, 2)
    assert region_similarity(a, a) == 1
    assert region_similarity(a, b) == pytest.approx(1 / 7)
    assert region_similarity(a, square(5, 3, 3, 2)) == 0
    empty = torch.zeros(5, 5, dtype=torch.bool)
    assert region_similarity(empty, empty) == 1
    assert region_similarity(a, empty) == 0
    # Without the column that only `a` has, one pixel of four is common.
    real = torch.ones(5, 5, dtype=torch.bool)
    real[:, 0] = False
    assert region_similarity(a, b, real) == pytest.approx(1 / 5)


def test_boundaries_are_one_pixel_wide_as_in_the_definition():
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(6, 9, 7, generator=generator) > 0.5
    assert torch.equal(boundary(masks), torch.stack([naive_boundary(mask) for mask in masks]))
    assert not boundary(torch.ones(1, 4, 4, dtype=torch.bool)).any()


@pytest.mark.parametrize("radius", [1, 2])
def test_contour_accuracy_equals_a_search_for_the_nearest_boundary(radius):
    generator = torch.Generator().manual_seed(1)
    first, second = (torch.rand(8, 3, 3, generator=generator) > 0.5 for _ in range(2))
    first, second = (
        mask.repeat_interleave(5, dim=1).repeat_interleave(4, dim=2) for mask in (first, second)
    )
    expected = [naive_contour(*pair, radius) for pair in zip(first, second, strict=True)]
    torch.testing.assert_close(
        contour_accuracy(first, second, radius).double(), torch.tensor(expected, dtype=torch.double)
    )


def test_a_shift_within_the_tolerance_does_not_matter():
    # The diagonal of 200 x 200 pixels is 283, and 0.008 of it is 2.26: rounded up, 3 pixels.
    truth = square(200, 50, 50, 60)[None]
    assert contour_accuracy(square(200, 53, 50, 60)[None], truth) == 1
    assert contour_accuracy(square(200, 54, 54, 60)[None], truth) < 0.1
    empty = torch.zeros_like(truth)
    assert contour_accuracy(empty, empty) == 1
    assert contour_accuracy(empty, truth) == 0
    assert contour_accuracy(truth, empty) == 0


def test_recall_and_decay_of_scores_by_hand():
    mean, recall, decay = summarize(torch.tensor([1.0, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2, 0.0]))
    assert mean == pytest.approx(52.5)
    assert recall == pytest.approx(50)
    # Quarters of 8 frames end at 1, 3, 4 (4.5 rounds to even), 6 and 8.
    assert decay == pytest.approx(100 * ((1 + 1 + 0.8) / 3 - (0.2 + 0.2 + 0.0) / 3))
    long = torch.linspace(1, 0, 400)
    assert summarize(long)[2] == pytest.approx(75, abs=1)
    assert math.isfinite(summarize(torch.tensor([0.5]))[2])
