"""Span corruption with an encoder-decoder (T5, Raffel et al., JMLR 2020, arXiv:1910.10683)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from sslrun.backbones.decoder import Decoder
from sslrun.backbones.search import Search
from sslrun.backbones.text import TextBackbone, embedding_of
from sslrun.data.examples import Batch
from sslrun.data.text.sequences import IGNORED, Tokens
from sslrun.errors import UserError
from sslrun.pretexts.base import pretexts
from sslrun.pretexts.language import LanguageOptions, LanguagePretext, Pairs, entropy
from sslrun.training.learner import Output


class DenoisingViews(NamedTuple):
    """Sequences with spans cut out, and the spans."""

    tokens: Tokens
    """Input of the encoder, with one [MASK] in place of each span."""
    decoder_ids: Tensor
    """(B, S): input of the decoder, the previous target; [CLS] at the beginning of a document."""
    targets: Tensor
    """(B, S): output of the decoder, [MASK] and the tokens of each span; [SEP] at the end."""
    documents: Tensor
    """(B, S): the document of each target; 0: padding."""


@pretexts.register("denoise")
class Denoise(LanguagePretext):
    """Cut spans out of the text and let a decoder generate them.

    The encoder-decoder of Vaswani et al. (2017, arXiv:1706.03762), trained by the span corruption
    of T5 (Raffel et al., JMLR 2020, arXiv:1910.10683). The backbone is the encoder; the decoder
    belongs to the pretext task. Encoder, decoder and softmax share one embedding, as in both
    papers. With rate 0.4 and mean span 2:

        text      the cat sat on the mat
        encoder   the [MASK] on the [MASK]
        targets   [MASK] cat sat [MASK] mat [SEP]

    Deviations: the sentinel of every span is [MASK], because BERT's vocabulary has no others; the
    order of spans tells them apart. Positions, norms and the head before the softmax are BERT's, so
    that every text backbone can be the encoder.
    """

    version = 2  # keeps its decoder
    keeps = ("decoder",)

    class Options(LanguageOptions):
        pairs: Pairs = "drop"
        rate: float = Field(0.15, gt=0, lt=0.9)
        """Share of tokens that are cut out."""
        span: float = Field(3.0, ge=1)
        """Mean number of tokens in a span."""
        depth: int = Field(2, ge=1)
        """Number of layers in the decoder."""

    options: Options

    def __init__(self, options: Options, backbone: TextBackbone) -> None:
        super().__init__(options, backbone)
        if backbone.causal:
            raise UserError(
                "pretext 'denoise' needs an encoder that reads both sides, "
                f"but '{backbone.name}' is causal: take a backbone that is not, or pretext 'ltr'"
            )
        self.tokenizer = backbone.spec.tokenizer
        self.decoder = Decoder(backbone, options.depth, "denoise")

    def views(self, batch: Batch, generator: torch.Generator) -> DenoisingViews:
        """Cut spans out of the batch; see the example above."""
        tokens = self.tokens(batch)
        ids, tokenizer = tokens.ids, self.tokenizer
        inner = tokens.real & (ids != tokenizer.cls) & (ids != tokenizer.sep)
        cut = self._spans(inner, generator)
        starts = cut & ~F.pad(cut, (1, 0))[:, :-1]
        targets, documents = self._decoder_targets(tokens, cut, starts)
        begins = documents != F.pad(documents, (1, 0))[:, :-1]
        previous = torch.where(targets == IGNORED, tokenizer.pad, targets).roll(1, dims=1)
        decoder_ids = torch.where(begins, tokenizer.cls, previous)
        return DenoisingViews(self._shorten(tokens, cut, starts), decoder_ids, targets, documents)

    def _shorten(self, tokens: Tokens, cut: Tensor, starts: Tensor) -> Tokens:
        """Replace each span of the tokens `cut` (B, T) by one [MASK] at its first token."""
        ids, tokenizer = tokens.ids, self.tokenizer
        kept = (tokens.real & ~cut) | starts
        # Tokens that are cut go to column T, which `_scatter_to` drops.
        places = torch.where(kept, kept.cumsum(dim=1) - 1, ids.shape[1])
        return Tokens(
            _scatter_to(torch.where(starts, tokenizer.mask, ids), places, tokenizer.pad),
            _scatter_to(tokens.segments, places, 0),
            _scatter_to(tokens.documents, places, 0),
            packed=tokens.packed,
        )

    def _decoder_targets(
        self, tokens: Tokens, cut: Tensor, starts: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The decoder's targets (B, S), and the document (B, S) of each.

        `slots` and `marks` (B, T) are the columns of the cut tokens and of the [MASK] before each
        span; column S is dropped.
        """
        ids, tokenizer = tokens.ids, self.tokenizer
        length = max(4, int(ids.shape[1] * self.options.rate * (1 + 1 / self.options.span)) + 3)
        length = min(length, ids.shape[1])  # each span is preceded by a token that is kept
        slots = torch.where(cut, cut.cumsum(dim=1) + starts.cumsum(dim=1) - 1, length)
        marks = torch.where(starts, slots - 1, length)
        is_mark = _scatter_to(starts.long(), marks, 0, length) > 0
        targets = _scatter_to(ids, slots, IGNORED, length)
        targets = torch.where(is_mark, tokenizer.mask, targets)
        documents = _scatter_to(tokens.documents, slots, 0, length)
        documents = documents.maximum(_scatter_to(tokens.documents, marks, 0, length))
        end = (cut.sum(dim=1) + starts.sum(dim=1))[:, None]
        last = documents.gather(1, (end - 1).clamp_min(0)).clamp_min(1)
        return targets.scatter(1, end, tokenizer.sep), documents.scatter(1, end, last)

    def forward(self, views: DenoisingViews) -> Output:
        features, shared = self.backbone(views.tokens), embedding_of(self.backbone)
        documents = views.documents[:, None, :, None]
        mask = documents == views.documents[:, None, None, :]
        memory_mask = documents == views.tokens.documents[:, None, None, :]
        memory_mask = memory_mask | (documents == 0)  # padding needs something to attend to
        x = self.decoder(views.decoder_ids, features.tokens, shared, mask, memory_mask)
        loss, accuracy = self.decoder.loss(x, shared, views.targets)
        return Output(loss, {"accuracy": accuracy})

    def samples(self, batch: Batch, generator: torch.Generator) -> list[str]:
        """The first document of each sequence with gaps, and what decoder and text fill in.

        The most likely tokens are written one after the other, without a look at the text.
        """
        tokens = self.tokens(batch)
        tokens = tokens.keep_only(tokens.documents == 1)
        views = self.views(batch._replace(inputs=tokens), generator)
        memory = self.backbone(views.tokens).tokens
        assert memory is not None
        written = self.decoder.generate(
            memory,
            embedding_of(self.backbone),
            views.tokens.real[:, None, None],
            self.tokenizer,
            Search(longest=views.targets.shape[1]),
        )
        lines = []
        for ids, real, *filled in zip(
            views.tokens.ids, views.tokens.real, written, views.targets, strict=True
        ):
            text = self.tokenizer.decode(ids[real].tolist()).replace("[MASK]", "___")
            ours, true = (self._describe_spans(targets.tolist()) for targets in filled)
            lines.append(f"{text} -> {ours} (true: {true})")
        return lines

    def _describe_spans(self, targets: list[int]) -> str:
        """Render the decoder's targets as the spans, with | between them."""
        text = self.tokenizer.decode(self.tokenizer.until_end(targets))
        return " | ".join(span.strip() for span in text.split("[MASK]")[1:])

    def without_context(self, shares: Tensor) -> float:
        """Entropy, in nats, of the decoder's targets for a full sequence.

        The targets are the tokens cut out, one [MASK] for each span, and [SEP].
        """
        cut = max(1, round((self.backbone.spec.length - 2) * self.options.rate))
        others = torch.tensor([max(1, round(cut / self.options.span)), 1.0], dtype=shares.dtype)
        counts = torch.cat([cut * shares, others])
        return entropy(counts / counts.sum())

    def _spans(self, inner: Tensor, generator: torch.Generator) -> Tensor:
        """Choose the tokens (B, T) to cut out of those that are `inner` (B, T).

        As in T5, random segments that are kept and random segments that are cut alternate. If fewer
        spans fit than wanted, only those are cut. A segment that contains a separator is cut up to
        the separator.
        """
        count = inner.sum(dim=1)
        wanted = (count * self.options.rate).round().clamp_min(1)
        spans = (wanted / self.options.span).round().clamp_min(1)
        cut = wanted.minimum(count - 1).clamp_min(0)
        spans = spans.minimum(wanted).minimum(count - wanted).clamp_min(1).long()
        most = int(inner.shape[1])
        kept_lengths = _segment_lengths((count - cut).long(), spans, most, generator)
        cut_lengths = _segment_lengths(cut.long(), spans, most, generator)
        # Ends (B, 2 * most) of the segments; segment (B, T) of each token: odd ones are cut.
        ends = torch.stack([kept_lengths, cut_lengths], dim=2).flatten(1).cumsum(dim=1)
        rank = inner.cumsum(dim=1) - 1
        segment = torch.searchsorted(ends, rank.clamp_min(0), right=True).clamp_max(2 * most - 1)
        passed = (~inner).cumsum(dim=1)
        at_start = torch.full_like(ends, most).scatter_reduce(
            1, segment, torch.where(inner, passed, most), "amin"
        )
        return inner & (segment % 2 == 1) & (passed == at_start.gather(1, segment))


def _segment_lengths(total: Tensor, parts: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Lengths (B, most) of `parts` (B,) random segments that add up to `total` (B,).

    Each length is at least 1; zeros follow the last one.
    """
    noise = torch.rand(len(total), most, generator=generator, device=total.device)
    place = torch.arange(most, device=total.device)
    # Segments begin at 0 and at parts - 1 other places below total.
    noise = noise.masked_fill((place == 0) | (place >= total[:, None]), 2.0)
    rank = noise.argsort(dim=1).argsort(dim=1)
    begins = ((rank < parts[:, None] - 1) & (noise < 1.5)) | (place == 0)
    segment = begins.cumsum(dim=1) - 1
    ones = (place < total[:, None]).long()
    return torch.zeros_like(segment).scatter_add(1, segment, ones)


def _scatter_to(values: Tensor, places: Tensor, fill: int, width: int | None = None) -> Tensor:
    """Write `values` (B, T) at columns `places` (B, T) of rows (B, width) filled with `fill`.

    Values at place `width` are dropped:

    values [7 8 9], places [2 3 0], width 3, fill 0 -> [9 0 7]
    """
    width = width or values.shape[1]
    out = values.new_full((len(values), width + 1), fill)
    return out.scatter(1, places.clamp_max(width), values)[:, :width]
