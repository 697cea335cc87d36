"""A queue of vectors of earlier batches."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Queue(nn.Module):
    """The last vectors (size, ...) that were pushed, in buffers; equal on all devices."""

    vectors: Tensor
    place: Tensor
    """0-d int64: where the next vector goes, which holds the oldest one."""
    count: Tensor
    """0-d int64: how many vectors were pushed, at most the size."""

    def __init__(self, initial: Tensor) -> None:
        super().__init__()
        self.register_buffer("vectors", initial)
        self.register_buffer("place", torch.zeros((), dtype=torch.int64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def push(self, vectors: Tensor) -> None:
        """Replace the oldest vectors by these (N, ...); if they are too many, keep the last."""
        size = len(self.vectors)
        vectors = vectors[-size:]
        slots = (self.place + torch.arange(len(vectors), device=vectors.device)) % size
        self.vectors[slots] = vectors
        self.place.copy_((self.place + len(vectors)) % size)
        self.count.copy_((self.count + len(vectors)).clamp(max=size))

    @property
    def is_full(self) -> Tensor:
        """Whether every place holds a pushed vector; a 0-d bool tensor."""
        return self.count == len(self.vectors)
