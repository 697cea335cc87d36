"""Heads that pretext tasks put on a backbone."""

from __future__ import annotations

import itertools

from torch import nn


def mlp(
    widths: list[int],
    *,
    norm: bool = True,
    last_norm: bool = False,
    last_affine: bool = True,
    last_bias: bool = True,
) -> nn.Sequential:
    """A multilayer perceptron: linear maps between `widths`, with batch norm (if `norm`) and ReLU between them.

    `last_norm` adds a batch norm after the last map, with scale and shift if `last_affine`; a
    linear map before a batch norm has no bias. `last_bias` gives the last map a bias if no norm
    follows it.
    """
    layers: list[nn.Module] = []
    last = len(widths) - 2
    for index, (before, after) in enumerate(itertools.pairwise(widths)):
        normed = norm if index < last else last_norm
        layers.append(nn.Linear(before, after, bias=not normed and (index < last or last_bias)))
        if normed:
            layers.append(nn.BatchNorm1d(after, affine=index < last or last_affine))
        if index < last:
            layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)
