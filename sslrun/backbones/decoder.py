"""The decoder of an encoder-decoder: it writes a sequence from the features of a text backbone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslrun.backbones.search import Search, beam_search
from sslrun.backbones.text import TextBackbone, check_heads, embedding_of
from sslrun.backbones.token_head import TokenHead
from sslrun.backbones.transformer import BERT_STYLE, STD, Block, Cache, Stack, initialize
from sslrun.data.text.sequences import IGNORED
from sslrun.data.text.tokenizer import Tokenizer


class Decoder(nn.Module):
    """A causal Transformer with cross-attention (Vaswani et al. 2017, arXiv:1706.03762).

    Blocks, positions, and the head before the softmax are BERT's. Linear maps of the blocks start
    with the deviation `std` of the backbone's options, if it has that option. Encoder, decoder and
    softmax share the encoder's embedding, which every method gets as `shared`, unless it is of
    another width than the features: then the decoder has its own.

    Shape legend: B sequences, T tokens of the decoder, S tokens of the encoder, D features.
    """

    def __init__(self, backbone: TextBackbone, depth: int, user: str) -> None:
        """Build `depth` layers for a backbone; `user` is the name in messages.

        Raises:
            UserError: the backbone's width is not a multiple of the number of heads.
        """
        super().__init__()
        width, vocab = backbone.width, backbone.spec.vocab
        shared = embedding_of(backbone)
        self.table = (
            nn.Embedding(vocab, width) if shared is None or shared.shape[1] != width else None
        )
        self.position_embed = nn.Embedding(backbone.spec.length + 2, width)
        heads = max(1, width // 64)
        check_heads(f"the decoder of '{user}'", width, heads)
        self.blocks = Stack(
            Block(width, heads, BERT_STYLE, cross=True, dropout=0.1) for _ in range(depth)
        )
        for module in (self.table, self.position_embed, self.blocks):
            if module is not None:
                initialize(module, getattr(backbone.options, "std", STD))
        self.head = TokenHead(width, vocab, width)

    def forward(
        self,
        ids: Tensor,
        memory: Tensor,
        shared: Tensor | None,
        mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Features (B, T, D) of the tokens `ids` (B, T), given the encoder's `memory` (B, S, D).

        Masks and the cache are as in `Attention`; with a cache, `ids` follow those of earlier
        calls.
        """
        start = 0 if cache is None else cache.length
        places = torch.arange(start, start + ids.shape[1], device=ids.device)
        x = F.embedding(ids, self.embedding(shared)) + self.position_embed(places)
        return self.blocks(x, mask, True, memory, memory_mask, cache)

    def embedding(self, shared: Tensor | None) -> Tensor:
        """The embedding (V, D) of its tokens: its own, else the encoder's."""
        table = shared if self.table is None else self.table.weight
        assert table is not None
        return table

    def loss(self, x: Tensor, shared: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy and accuracy of features (B, T, D) at targets (B, T); see `TokenHead`."""
        return self.head.loss(x, self.embedding(shared), targets)

    @torch.no_grad()
    def generate(
        self,
        memory: Tensor,
        shared: Tensor | None,
        memory_mask: Tensor | None,
        tokenizer: Tokenizer,
        search: Search,
    ) -> Tensor:
        """Write a sequence for each of an encoder's outputs (B, S, D); see `beam_search`.

        Keys and values of the tokens so far are kept, so that each step computes one token.
        """
        count = len(memory)
        memory = memory.repeat_interleave(search.beams, dim=0)
        if memory_mask is not None:
            memory_mask = memory_mask.repeat_interleave(search.beams, dim=0)
        cache = Cache()

        def next_token(prefixes: Tensor, origin: Tensor) -> Tensor:
            nonlocal cache
            cache = cache.select(origin)
            x = self(prefixes[:, -1:], memory, shared, None, memory_mask, cache)
            return self.log_probs(x[:, -1], shared)

        return beam_search(next_token, count, tokenizer, search, memory.device)

    def log_probs(self, x: Tensor, shared: Tensor | None) -> Tensor:
        """Log-probabilities (..., V) of the next token, from features (..., D)."""
        scores: Tensor = self.head(x, self.embedding(shared))
        return scores.float().log_softmax(dim=-1)


def previous_tokens(targets: Tensor, tokenizer: Tokenizer) -> Tensor:
    """The decoder's input (B, T) that teaches targets (B, T): [CLS], then the previous targets."""
    written = torch.where(targets == IGNORED, tokenizer.pad, targets)
    return F.pad(written, (1, 0), value=tokenizer.cls)[:, :-1]
