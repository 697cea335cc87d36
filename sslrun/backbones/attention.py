"""The computation of attention from queries, keys and values: to all tokens, or to near ones.

Shape legend: B sequences, H heads, T queries, S keys, d features of a head, K tokens of a block, N
blocks of a sequence.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """Mix values (B, H, S, d) by the products of queries (B, H, T, d) and keys (B, H, S, d).

    `mask` is bool, broadcastable to (B, H, T, S), and True where attention is allowed. On CPUs
    bfloat16 is computed in float32, because its backward kernel is several times slower there.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(
                q.float(), k.float(), v.float(), mask, dropout_p=dropout, is_causal=causal
            )
    return F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout, is_causal=causal)


class Band(NamedTuple):
    """Which of its nearest tokens each token attends to; see `make_band`."""

    mask: Tensor
    """(B * N, 1, K, 3 K) bool: for each block, from its tokens to those of it and its neighbors."""


MIN_BLOCKS = 7
"""Blocks of the shortest sequence in which `attend_locally` is faster than a mask over all tokens,
measured on a CPU without dropout. With dropout it is faster from 5 blocks on."""


def make_band(documents: Tensor, reach: int, causal: bool = False) -> Band:
    """Let each token attend to those of its document that are at most `reach` tokens away.

    Args:
        documents: (B, T) number of each token's document, not negative. Padding has a number of its
            own, so that no row is empty.
        reach: Largest distance between two tokens that attend to each other.
        causal: Also forbid later tokens.

    Sequences are cut into blocks of `reach` tokens, the last one filled up by tokens of a document
    -1. Example: with a reach of 2, five tokens of one document are the blocks 0 1, 2 3 and 4 -. The
    second one's keys are 0 1 2 3 4 -, and its rows of the mask 1 1 1 1 1 0 and 0 1 1 1 1 0.
    """
    queries = _cut(documents, reach, -1)
    keys = _join_neighbors(queries, -1)
    steps = torch.arange(3 * reach, device=documents.device)
    # From a query to a key: keys begin a block before the queries.
    distances = steps - reach - steps[:reach, None]
    near = (distances >= -reach) & (distances <= (0 if causal else reach))
    mask = (queries[..., :, None] == keys[..., None, :]) & near
    return Band(mask.flatten(0, 1)[:, None])


def attend_locally(q: Tensor, k: Tensor, v: Tensor, band: Band, dropout: float = 0.0) -> Tensor:
    """Mix values (B, H, T, d) of near tokens, in time and memory linear in T.

    The result is that of `attend` with the band's mask at full size. Sequences are cut into blocks,
    and a block attends to itself and its two neighbors, 3 K keys for each query, as in the window
    of BigBird (Zaheer et al. 2020, arXiv:2007.14062); the mask makes the window exact. All blocks
    are one batch of `scaled_dot_product_attention`, so that a CPU, CUDA and torch.compile take the
    same path. FlashAttention has windows in its kernel, but not on CPUs; torch's `flex_attention`
    has to be compiled. This was measured on CPUs only.
    """
    reach = band.mask.shape[2]
    # As (B, T, H, d), the order of tokens in memory: cutting needs no copy, and neighbors one.
    queries, keys, values = (_cut(x.transpose(1, 2), reach, 0) for x in (q, k, v))
    mixed = attend(
        _batch(queries),
        _batch(_join_neighbors(keys, 0)),
        _batch(_join_neighbors(values, 0)),
        band.mask,
        dropout=dropout,
    )
    rows = mixed.transpose(1, 2).unflatten(0, queries.shape[:2]).flatten(1, 2)
    return rows[:, : q.shape[2]].transpose(1, 2)


def _batch(blocks: Tensor) -> Tensor:
    """Turn blocks (B, N, K, H, d) into a batch of sequences (B * N, H, K, d)."""
    return blocks.flatten(0, 1).transpose(1, 2)


def _cut(x: Tensor, size: int, fill: int) -> Tensor:
    """Cut (B, T, ...) into blocks (B, N, size, ...), the last one filled up with `fill`."""
    missing = (0, 0) * (x.ndim - 2) + (0, -x.shape[1] % size)
    return F.pad(x, missing, value=fill).unflatten(1, (-1, size))


def _join_neighbors(blocks: Tensor, fill: int) -> Tensor:
    """Put each block of (B, N, K, ...) between its neighbors: (B, N, 3 K, ...).

    Before the first block and after the last there is `fill`.
    """
    both_ends = (0, 0) * (blocks.ndim - 2) + (1, 1)
    padded = F.pad(blocks, both_ends, value=fill)
    return torch.cat([padded[:, :-2], padded[:, 1:-1], padded[:, 2:]], dim=2)
