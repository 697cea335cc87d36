"""The base class of text backbones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sslrun.backbones.base import Backbone
from sslrun.backbones.transformer import BlockStyle
from sslrun.data.specs import TextSpec
from sslrun.errors import UserError


class TextBackbone(Backbone):
    """A network over tokens; pooled features are those of the token that stands for a sequence."""

    takes = TextSpec
    offers = frozenset({"tokens"})
    spec: TextSpec
    style: BlockStyle
    """The kind of the blocks. Capability "embed"."""

    def __init__(self, options: Any, spec: TextSpec) -> None:
        super().__init__(options, spec)
        longest = getattr(options, "positions", None)
        if longest is not None and spec.length > longest:
            raise UserError(
                f"{self.name}: sequences of {spec.length} tokens are longer than its {longest} "
                f"positions: lower data.length to {longest}, or raise backbone.positions before "
                "pretraining"
            )

    @classmethod
    def limits(cls, options: Any) -> dict[str, int]:
        positions = getattr(options, "positions", None)
        return {} if positions is None else {"length": positions}

    @property
    def embedding(self) -> Tensor:
        """Token embeddings (V, E), which heads that predict tokens may share."""
        raise NotImplementedError

    @property
    def causal(self) -> bool:
        """Whether tokens attend only to earlier ones."""
        return False


def embedding_of(backbone: TextBackbone) -> Tensor | None:
    """The backbone's token embeddings (V, E); None if it reads characters, as ELMo does."""
    try:
        return backbone.embedding
    except NotImplementedError:
        return None


def check_heads(name: str, width: int, heads: int) -> None:
    """Check that `width` is a multiple of `heads`.

    Raises:
        UserError: it is not; the message begins with `name`.
    """
    if width % heads:
        raise UserError(f"{name}: width {width} is not a multiple of heads {heads}")


def last_real(real: Tensor) -> Tensor:
    """Index (B,) of the last token that is not padding, from the mask `real` (B, T)."""
    places = torch.arange(real.shape[1], device=real.device)
    return torch.where(real, places, -1).amax(dim=1).clamp_min(0)


def gather_tokens(tokens: Tensor, places: Tensor) -> Tensor:
    """Pick from tokens (B, T, D): (B, D) at places (B,), or (B, K, D) at places (B, K)."""
    index = places if places.ndim == 2 else places[:, None]
    picked = tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))
    return picked if places.ndim == 2 else picked[:, 0]
