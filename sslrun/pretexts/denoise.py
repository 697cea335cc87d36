"""Span corruption with an encoder-decoder."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from sslrun.backbones.text import TextBackbone, check_heads
from sslrun.backbones.transformer import Block, Stack, initialise
from sslrun.data.examples import Batch
from sslrun.data.text.sequences import IGNORED, Tokens
from sslrun.errors import UserError
from sslrun.pretexts.base import pretexts
from sslrun.pretexts.language import LanguageOptions, LanguagePretext, Pairs, TokenHead, embedding_of, entropy
from sslrun.training.learner import Output


class Corrupted(NamedTuple):
    """Sequences with spans cut out, and the spans."""

    tokens: Tokens
    """What the encoder reads: each span is one [MASK]."""
    given: Tensor
    """(B, S) what the decoder reads: the target before, and [CLS] where a document begins."""
    targets: Tensor
    """(B, S) what it must name: of each span [MASK] and its tokens, then [SEP]."""
    documents: Tensor
    """(B, S) the document that each target is of; 0: padding."""


@pretexts.register("denoise")
class Denoise(LanguagePretext):
    """Cut spans out of the text and have a decoder tell them: the encoder-decoder of Vaswani et al. (2017) trained by the
    span corruption of T5 (Raffel et al., JMLR 2020). The backbone is the encoder; the decoder goes with the pretext.

    Encoder, decoder and softmax share one embedding, as in both. Deviates: each span's sentinel is [MASK], which BERT's
    vocabulary has, the order of the spans telling them apart; positions and norms are BERT's, and so is the head before
    the softmax.
    """

    class Options(LanguageOptions):
        pairs: Pairs = "drop"
        rate: float = Field(0.15, gt=0, lt=0.9)
        """Share of the tokens cut out."""
        span: float = Field(3.0, ge=1)
        """Mean tokens of a span."""
        depth: int = Field(2, ge=1)
        """Layers of the decoder."""

    options: Options

    def __init__(self, options: Options, backbone: TextBackbone) -> None:
        super().__init__(options, backbone)
        if backbone.causal:
            raise UserError(
                f"pretext 'denoise' needs an encoder that reads both sides, and '{backbone.name}' is causal"
            )
        self.tokenizer, width = backbone.spec.tokenizer, backbone.width
        shared = embedding_of(backbone)
        self.table = nn.Embedding(backbone.spec.vocab, width) if shared is None or shared.shape[1] != width else None
        self.position_embed = nn.Embedding(backbone.spec.length + 2, width)
        heads = max(1, width // 64)
        check_heads("the decoder of 'denoise'", width, heads)
        self.blocks = Stack(
            Block(width, heads, norm="post", cross=True, dropout=0.1, eps=1e-12) for _ in range(options.depth)
        )
        for each in (self.table, self.position_embed, self.blocks):
            if each is not None:
                initialise(each)
        self.head = TokenHead(width, backbone.spec.vocab, width)

    def views(self, batch: Batch, generator: torch.Generator) -> Corrupted:
        tokens = self.tokens(batch)
        ids, tokenizer = tokens.ids, self.tokenizer
        inner = tokens.real & (ids != tokenizer.cls) & (ids != tokenizer.sep)
        cut = self._spans(inner, generator)
        starts = cut & ~F.pad(cut, (1, 0))[:, :-1]
        kept = (tokens.real & ~cut) | starts
        place = kept.cumsum(dim=1) - 1
        target = torch.where(kept, place, ids.shape[1])  # what is left out lands in a column that is dropped
        short = Tokens(
            _moved(torch.where(starts, tokenizer.mask, ids), target, tokenizer.pad),
            _moved(tokens.segments, target, 0),
            _moved(tokens.documents, target, 0),
            packed=tokens.packed,
        )
        length = max(4, int(ids.shape[1] * self.options.rate * (1 + 1 / self.options.span)) + 3)
        length = min(length, ids.shape[1])  # each span has a token before it that is kept
        at = torch.where(cut, cut.cumsum(dim=1) + starts.cumsum(dim=1) - 1, length)
        marks = torch.where(starts, at - 1, length)
        told = _moved(ids, at, IGNORED, length)
        told = torch.where(_moved(starts.long(), marks, 0, length) > 0, tokenizer.mask, told)
        of = _moved(tokens.documents, at, 0, length).maximum(_moved(tokens.documents, marks, 0, length))
        end = (cut.sum(dim=1) + starts.sum(dim=1))[:, None]
        told = told.scatter(1, end, tokenizer.sep)
        of = of.scatter(1, end, of.gather(1, (end - 1).clamp_min(0)).clamp_min(1))
        begins = of != F.pad(of, (1, 0))[:, :-1]
        given = torch.where(told == IGNORED, tokenizer.pad, told).roll(1, dims=1)
        return Corrupted(short, torch.where(begins, tokenizer.cls, given), told, of)

    def forward(self, views: Corrupted) -> Output:
        features = self.backbone(views.tokens)
        table = self.backbone.embedding if self.table is None else self.table.weight
        places = torch.arange(views.given.shape[1], device=views.given.device)
        x = F.embedding(views.given, table) + self.position_embed(places)
        of = views.documents[:, None, :, None]
        mask = of == views.documents[:, None, None, :]
        memory_mask = (of == views.tokens.documents[:, None, None, :]) | (of == 0)  # what pads must see something
        x = self.blocks(x, mask, causal=True, memory=features.tokens, memory_mask=memory_mask)
        loss, accuracy = self.head.loss(x, table, views.targets)
        return Output(loss, {"accuracy": accuracy})

    def without_context(self, shares: Tensor) -> float:
        """The entropy of what the decoder names in a full sequence: the tokens cut out, a sentinel a span, and [SEP]."""
        cut = max(1, round((self.backbone.spec.length - 2) * self.options.rate))
        others = torch.tensor([max(1, round(cut / self.options.span)), 1.0], dtype=shares.dtype)
        told = torch.cat([cut * shares, others])
        return entropy(told / told.sum())

    def _spans(self, inner: Tensor, generator: torch.Generator) -> Tensor:
        """(B, T) which tokens are cut out: T5's alternation of random segments kept and cut, of as many as fit. A segment
        that a separator divides is cut as far as that."""
        count = inner.sum(dim=1)
        cut = (count * self.options.rate).round().clamp_min(1)
        spans = (cut / self.options.span).round().clamp_min(1)
        cut, spans = cut.minimum(count - 1).clamp_min(0), spans.minimum(cut).minimum(count - cut).clamp_min(1)
        most = int(inner.shape[1])
        lengths = [_divided(total.long(), spans.long(), most, generator) for total in (count - cut, cut)]
        ends = torch.stack(lengths, dim=2).flatten(1).cumsum(dim=1)
        rank = inner.cumsum(dim=1) - 1
        segment = torch.searchsorted(ends, rank.clamp_min(0), right=True).clamp_max(2 * most - 1)
        passed = (~inner).cumsum(dim=1)
        at_start = torch.full_like(ends, most).scatter_reduce(1, segment, torch.where(inner, passed, most), "amin")
        return inner & (segment % 2 == 1) & (passed == at_start.gather(1, segment))


def _divided(total: Tensor, parts: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """(B, most) lengths of `parts` (B,) random segments that make up `total` (B,), each 1 at least; then zeros."""
    noise = torch.rand(len(total), most, generator=generator, device=total.device)
    place = torch.arange(most, device=total.device)
    # A segment begins at 0 and at parts - 1 other places below total.
    noise = noise.masked_fill((place == 0) | (place >= total[:, None]), 2.0)
    rank = noise.argsort(dim=1).argsort(dim=1)
    begins = ((rank < parts[:, None] - 1) & (noise < 1.5)) | (place == 0)
    segment = begins.cumsum(dim=1) - 1
    ones = (place < total[:, None]).long()
    return torch.zeros_like(segment).scatter_add(1, segment, ones)


def _moved(values: Tensor, places: Tensor, fill: int, width: int | None = None) -> Tensor:
    """`values` (B, T) put at `places` (B, T) of rows (B, width) filled with `fill`; place `width` is nowhere."""
    width = width or values.shape[1]
    out = values.new_full((len(values), width + 1), fill)
    return out.scatter(1, places.clamp_max(width), values)[:, :width]
