"""Heads of pretext tasks."""

from __future__ import annotations

import itertools

from torch import nn


def mlp(
    widths: list[int], *, norm: bool = True, last_norm: bool = False, last_affine: bool = True, last_bias: bool = True
) -> nn.Sequential:
    """Linear maps between `widths`, with batch norm (if `norm`) and ReLU between them.

    `last_norm`: a batch norm, with scale and shift if `last_affine`, after the last map, which then has no bias.
    """
    layers: list[nn.Module] = []
    last = len(widths) - 2
    for at, (before, after) in enumerate(itertools.pairwise(widths)):
        normed = norm if at < last else last_norm
        layers.append(nn.Linear(before, after, bias=not normed and (at < last or last_bias)))
        if normed:
            layers.append(nn.BatchNorm1d(after, affine=at < last or last_affine))
        if at < last:
            layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)
