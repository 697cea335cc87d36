"""Heads that pretext tasks put on a backbone."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from torch import nn


def check_width(width: int, heads: int) -> None:
    """Check the width of a Transformer with fixed sines and cosines of row and column.

    Raises:
        ValueError: it is no multiple of 4 or of the number of attention heads.
    """
    if width % 4 or width % heads:
        raise ValueError(f"width ({width}) must be a multiple of 4 and of heads ({heads})")


def mlp(
    widths: list[int],
    *,
    norm: bool = True,
    last_norm: bool = False,
    last_affine: bool = True,
    last_bias: bool = True,
    activation: Callable[[], nn.Module] = nn.ReLU,
) -> nn.Sequential:
    """Build a multilayer perceptron: linear maps, with batch norm (if `norm`) and ReLU between.

    `widths` holds the widths of input, hidden layers and output. `last_norm` adds a batch norm
    after the last map, with scale and shift if `last_affine`. A linear map before a batch norm has
    no bias; the last map, if no norm follows it, has a bias if `last_bias`.
    """
    layers: list[nn.Module] = []
    last = len(widths) - 2
    for index, (before, after) in enumerate(itertools.pairwise(widths)):
        normed = norm if index < last else last_norm
        layers.append(nn.Linear(before, after, bias=not normed and (index < last or last_bias)))
        if normed:
            layers.append(nn.BatchNorm1d(after, affine=index < last or last_affine))
        if index < last:
            layers.append(activation())
    return nn.Sequential(*layers)
