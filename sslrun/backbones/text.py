"""The base of text backbones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sslrun.backbones.base import Backbone
from sslrun.data.specs import TextSpec
from sslrun.errors import UserError


class TextBackbone(Backbone):
    """A network over tokens. Pooled features are those of the token at which a whole sequence is read."""

    takes = TextSpec
    offers = frozenset({"tokens"})
    spec: TextSpec

    def __init__(self, options: Any, spec: TextSpec) -> None:
        super().__init__(options, spec)
        longest = getattr(options, "positions", None)
        if longest is not None and spec.length > longest:
            raise UserError(
                f"{self.name}: sequences of {spec.length} tokens are longer than its {longest} positions: "
                f"lower data.length to {longest}, or raise backbone.positions before pretraining"
            )

    @classmethod
    def limits(cls, options: Any) -> dict[str, int]:
        positions = getattr(options, "positions", None)
        return {} if positions is None else {"length": positions}

    @property
    def embedding(self) -> Tensor:
        """Token embeddings (V, E), which a head that predicts tokens may share."""
        raise NotImplementedError

    @property
    def causal(self) -> bool:
        """Whether no token sees a later one."""
        return False


def check_heads(name: str, width: int, heads: int) -> None:
    """UserError unless `width` is a multiple of `heads`."""
    if width % heads:
        raise UserError(f"{name}: width {width} is not a multiple of heads {heads}")


def last_real(real: Tensor) -> Tensor:
    """Position (B,) of the last token that is not padding."""
    places = torch.arange(real.shape[1], device=real.device)
    return torch.where(real, places, -1).amax(dim=1).clamp_min(0)


def gather_tokens(tokens: Tensor, places: Tensor) -> Tensor:
    """Pick tokens (B, D) from (B, T, D) at places (B,), or tokens (B, K, D) at places (B, K)."""
    index = places if places.ndim == 2 else places[:, None]
    found = tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))
    return found if places.ndim == 2 else found[:, 0]
