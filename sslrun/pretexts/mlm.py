"""Masked language modeling, with or without next-sentence prediction (BERT)."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from sslrun.backbones.text import TextBackbone, gather_tokens
from sslrun.data.examples import Batch, Examples
from sslrun.data.text.sequences import IGNORED, Documents, Tokens
from sslrun.errors import UserError
from sslrun.pretexts.base import pretexts
from sslrun.pretexts.language import (
    LanguageOptions,
    LanguagePretext,
    TokenHead,
    embedding_of,
    entropy,
)
from sslrun.training.learner import Output

RATE = 0.15
"""BERT's share of chosen tokens. Every held-out loss is measured at it, so that losses of other
rates compare."""


class MaskedViews(NamedTuple):
    """Sequences with some tokens hidden."""

    tokens: Tokens
    """What the backbone reads."""
    places: Tensor
    """(B, K) positions of the chosen tokens. K is the same for all sequences; surplus positions
    have no target."""
    targets: Tensor
    """(B, K) the original tokens; `IGNORED` at surplus positions."""
    related: Tensor | None
    """(B,) 0 where the second segment continues the first, 1 where it is from elsewhere; None
    without pairs."""


@pretexts.register("mlm")
class Mlm(LanguagePretext):
    """Predict hidden tokens from both sides.

    BERT: Devlin et al., NAACL 2019 (arXiv:1810.04805). In each sequence exactly `round(rate *
    tokens)` tokens are chosen: at least one, and never a special one. 80 % of them become [MASK],
    10 % a random token, and 10 % stay. Loss and head cover the chosen tokens only. With `nsp`,
    [CLS] predicts whether the second segment continues the first.

    Deviation: tokens are chosen again each time a sequence is read. BERT's own code chose ten
    times, once for each of its `dupes`; `masking: static` comes close to it.
    """

    class Options(LanguageOptions):
        nsp: bool = False
        """Add next-sentence prediction to the loss, as BERT does."""
        rate: float = Field(RATE, gt=0, lt=1)
        """Share of tokens that are chosen."""
        mask: float = Field(0.8, ge=0, le=1)
        """Share of the chosen tokens that become [MASK]."""
        replace: float = Field(0.1, ge=0, le=1)
        """Share of the chosen tokens that become a random token; the rest stay."""
        whole_words: bool = False
        """Choose either all pieces of a word or none."""
        masking: Literal["dynamic", "static"] = "dynamic"
        """dynamic: tokens are chosen again each time a sequence is read. static: always the same
        tokens of a sequence, as in BERT's own code."""

        @model_validator(mode="after")
        def _consistent(self) -> Mlm.Options:
            if self.nsp and self.pairs != "keep":
                raise ValueError("nsp: true needs pairs: keep")
            if self.mask + self.replace > 1 + 1e-9:
                raise ValueError(
                    "mask and replace are shares of the chosen tokens: together 1 at most"
                )
            return self

        def choices(self) -> list[str]:
            if self.nsp:
                return []
            if self.pairs == "keep":
                return [
                    "without next-sentence prediction the pairs of segments stay, and only its loss is dropped"
                ]
            if self.pairs == "next":
                return [
                    "without next-sentence prediction the second segment of a pair always continues the first"
                ]
            return [
                "without next-sentence prediction full sequences of running text take the place of pairs"
            ]

    options: Options
    continues: Tensor

    def __init__(self, options: Options, backbone: TextBackbone) -> None:
        super().__init__(options, backbone)
        if backbone.causal:
            raise UserError(
                f"pretext 'mlm' predicts tokens from both sides, but '{backbone.name}' sees only one: "
                "take pretext 'ltr', or a backbone that is not causal"
            )
        self.tokenizer = backbone.spec.tokenizer
        self.register_buffer("continues", self.tokenizer.continues, persistent=False)
        table = embedding_of(backbone)
        self.head = TokenHead(
            backbone.width, backbone.spec.vocab, None if table is None else table.shape[1]
        )
        self.nsp = nn.Linear(backbone.width, 2) if options.nsp else None

    def arrange(self, examples: Examples, seed: int) -> Examples:
        if self.options.nsp and not isinstance(examples, Documents):
            raise UserError(
                "next-sentence prediction needs documents of several sentences, but the data are labeled texts: "
                "name a corpus, or set pretext.nsp to false"
            )
        return super().arrange(examples, seed)

    def views(self, batch: Batch, generator: torch.Generator) -> MaskedViews:
        return self._mask(batch, generator, self.options.rate)

    def forward(self, views: MaskedViews) -> Output:
        features = self.backbone(views.tokens)
        assert features.tokens is not None
        loss, accuracy = self.head.loss(
            gather_tokens(features.tokens, views.places), embedding_of(self.backbone), views.targets
        )
        metrics = {"mlm_loss": loss.detach(), "mlm_accuracy": accuracy}
        if self.nsp is not None and views.related is not None:
            related = self.nsp(features.pooled).float()
            nsp_loss = F.cross_entropy(related, views.related)
            right = (related.detach().argmax(dim=1) == views.related).float().mean()
            metrics |= {"nsp_loss": nsp_loss.detach(), "nsp_accuracy": right}
            loss = loss + nsp_loss
        return Output(loss, metrics)

    def held_out(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Metrics at BERT's rate. The loss is that of the masked tokens, without next-sentence prediction."""
        metrics = self(self._mask(batch, generator, RATE)).metrics
        return {
            "held_out_loss": metrics["mlm_loss"],
            **{f"held_out_{k}": v for k, v in metrics.items() if k != "mlm_loss"},
        }

    def without_context(self, shares: Tensor) -> float:
        """The loss of a model that knows only how often tokens occur.

        Under [MASK] it is the entropy of tokens. For the other chosen tokens it is the entropy
        given the token that is shown, which may be the original one: H(original, shown) - H(shown).
        """
        mask, replace = self.options.mask, self.options.replace
        kept = (1 - mask - replace) * shares
        replaced = replace * shares / len(shares)  # by each token of the vocabulary
        both = (len(shares) - 1) * entropy(replaced) + entropy(
            kept + replaced
        )  # original and shown
        shown = entropy(kept + replace / len(shares))
        return mask * entropy(shares) + both - shown

    def _mask(self, batch: Batch, generator: torch.Generator, rate: float) -> MaskedViews:
        tokens = self.tokens(batch)
        ids, tokenizer = tokens.ids, self.tokenizer
        noise = (
            _static_noise(ids, tokens.real)
            if self.options.masking == "static"
            else _noise(ids, generator)
        )
        allowed = (
            tokens.real & (ids != tokenizer.cls) & (ids != tokenizer.sep) & (ids != tokenizer.pad)
        )
        wanted, most = (
            _chosen_counts(tokens.real.sum(dim=1), rate),
            max(1, round(ids.shape[1] * rate)),
        )
        order = noise[0]
        if self.options.whole_words:
            order, allowed = self._whole_words(order, ids, allowed, wanted, most)
        ranked, places = order.masked_fill(~allowed, 2.0).topk(most, dim=1, largest=False)
        chosen = (torch.arange(most, device=ids.device) < wanted[:, None]) & (ranked < 1.5)
        targets = torch.where(chosen, ids.gather(1, places), IGNORED)
        fate, other = noise[1].gather(1, places), noise[2].gather(1, places)
        new = torch.where(fate < self.options.mask, tokenizer.mask, ids.gather(1, places))
        random = (fate >= self.options.mask) & (fate < self.options.mask + self.options.replace)
        new = torch.where(
            random, (other * tokenizer.vocab).long().clamp_max(tokenizer.vocab - 1), new
        )
        new = torch.where(chosen, new, ids.gather(1, places))
        return MaskedViews(
            tokens._replace(ids=ids.scatter(1, places, new)), places, targets, batch.labels
        )

    def _whole_words(
        self, noise: Tensor, ids: Tensor, allowed: Tensor, wanted: Tensor, most: int
    ) -> tuple[Tensor, Tensor]:
        """Choose words at random until `wanted` (B,) pieces are chosen, as BERT's own code does.

        Returns an order (B, T) in which the pieces of a word are adjacent, and which pieces (B, T)
        may be chosen. Words with more pieces than are still wanted are skipped.
        """
        first = ~self.continues[ids]
        first[:, 0] = True
        places = torch.arange(ids.shape[1], device=ids.device)
        word = torch.where(first, places, 0).cummax(dim=1).values
        order = noise.gather(1, word)
        pieces = torch.zeros_like(ids).scatter_add(1, word, allowed.long()).gather(1, word)
        chosen, left = torch.zeros_like(allowed), wanted
        for _ in range(most):
            fits = allowed & ~chosen & (pieces <= left[:, None])
            lowest = order.masked_fill(~fits, 2.0).argmin(dim=1, keepdim=True)
            taken = fits & (word == word.gather(1, lowest)) & fits.gather(1, lowest)
            chosen, left = chosen | taken, left - taken.sum(dim=1)
        return order, chosen


def _chosen_counts(lengths: Tensor, rate: float) -> Tensor:
    """The number of tokens (B,) to choose in sequences of such lengths, at least one.

    Computed in float64, as Python does, because float32 rounds some halves the other way. Apple's
    GPUs have no float64.
    """
    exact = lengths.float() if lengths.device.type == "mps" else lengths.double()
    return (exact * rate).round().clamp_min(1).long()


def _noise(ids: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform noise (3, B, T) in [0, 1)."""
    return torch.rand(3, *ids.shape, generator=generator, device=ids.device)


def _static_noise(ids: Tensor, real: Tensor) -> Tensor:
    """Noise (3, B, T) in [0, 1) that is a function of the sequence alone, however far it is padded.

    It is a hash (splitmix64) of the ids and the position.
    """
    place = torch.arange(ids.shape[1], device=ids.device)
    sequence = ((ids + 1) * _splitmix(place + 1) * real).sum(dim=1, keepdim=True)
    kinds = torch.arange(3, device=ids.device)[:, None, None]
    return (
        (_splitmix(sequence + _splitmix(place) + _splitmix(kinds + 7919)) >> 11) & (2**24 - 1)
    ).float() / 2**24


def _splitmix(x: Tensor) -> Tensor:
    x = x * -7046029254386353131
    x = (x ^ (x >> 30)) * -4658895280553007687
    x = (x ^ (x >> 27)) * -7723592293110705685
    return x ^ (x >> 31)
