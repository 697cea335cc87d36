"""Blockwise masks of patches (Bao et al., BEiT, ICLR 2022, arXiv:2106.08254)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

ROUNDS = 30
"""Number of blocks that are proposed for each mask."""
ASPECT = 0.3
"""Smallest ratio of a block's height to its width; the largest is 1 / 0.3."""


def block_masks(targets: Tensor, rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Draw a mask (B, rows, columns) bool for each image, which is a union of random blocks.

    `targets` (B,) int64 holds the largest number of patches to mask in each image. A block has at
    least a ninth of the patches of the shorter side squared, an area that is uniform up to the
    number of patches left, and an aspect ratio that is log-uniform in [0.3, 1 / 0.3]. A proposed
    block is skipped if it is as high or wide as the image or exceeds the number of patches left.

    Deviation from BEiT's and iBOT's code, which stop after ten blocks in a row were skipped: all
    masks of a batch are drawn at once, from 30 proposals each, without waiting for the device.
    """
    count, device = len(targets), targets.device
    masks = torch.zeros(count, rows, columns, dtype=torch.bool, device=device)
    row, column = torch.arange(rows, device=device), torch.arange(columns, device=device)
    smallest = (min(rows, columns) // 3) ** 2
    draws = torch.rand(ROUNDS, 4, count, generator=generator, device=device)
    for area, aspect, vertical, horizontal in draws.unbind():
        left_over = targets - masks.sum(dim=(1, 2))
        areas = (smallest + area * (left_over - smallest)).clamp_min(0)
        ratios = torch.exp(math.log(ASPECT) * (1 - 2 * aspect))
        heights, widths = (areas * ratios).sqrt().round(), (areas / ratios).sqrt().round()
        tops = (vertical * (rows - heights + 1)).floor()
        lefts = (horizontal * (columns - widths + 1)).floor()
        inside_rows = _between(row, tops, heights)
        inside_columns = _between(column, lefts, widths)
        union = masks | (inside_rows[:, :, None] & inside_columns[:, None, :])
        fits = (heights < rows) & (widths < columns) & (union.sum(dim=(1, 2)) <= targets)
        masks = torch.where(fits[:, None, None], union, masks)
    return masks


def _between(places: Tensor, starts: Tensor, lengths: Tensor) -> Tensor:
    """Whether each of the places (N,) is in [start, start + length): (B, N) bool."""
    return (places >= starts[:, None]) & (places < (starts + lengths)[:, None])
