"""Masked language modeling, with or without next-sentence prediction (BERT)."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from sslrun.backbones.text import TextBackbone, embedding_of, gather_tokens
from sslrun.backbones.token_head import TokenHead
from sslrun.data.examples import Batch, Examples
from sslrun.data.text.sequences import IGNORED, Documents, Tokens
from sslrun.errors import UserError
from sslrun.pretexts.base import pretexts
from sslrun.pretexts.language import (
    LanguageOptions,
    LanguagePretext,
    entropy,
)
from sslrun.training.learner import Output

RATE = 0.15
"""Share of chosen tokens in BERT. All held-out losses are measured at this rate, so that they can
be compared between rates."""


class MaskedViews(NamedTuple):
    """Sequences with some tokens hidden."""

    tokens: Tokens
    """Inputs of the backbone."""
    places: Tensor
    """(B, K): positions of the chosen tokens. K is the same for all sequences; surplus positions
    have no target."""
    targets: Tensor
    """(B, K): the original tokens; `IGNORED` at surplus positions."""
    related: Tensor | None
    """(B,): 0 if the second segment continues the first, 1 if it is from another place; None
    without pairs."""


@pretexts.register("mlm")
class Mlm(LanguagePretext):
    """Predict hidden tokens from the tokens on both sides.

    BERT: Devlin et al., NAACL 2019 (arXiv:1810.04805). In each sequence `round(rate * tokens)`
    tokens are chosen: at least one, and never a special one. 80 % of them become [MASK], 10 %
    become a random token, and 10 % do not change. Head and loss cover the chosen tokens only. With
    `nsp`, [CLS] predicts whether the second segment continues the first.

    Deviation: tokens are chosen again each time a sequence is read, which needs no stored copies.
    BERT's code chose them ten times, once for each of its `dupes`; `masking: static` is close to
    it.
    """

    class Options(LanguageOptions):
        nsp: bool = False
        """Add next-sentence prediction to the loss, as BERT does."""
        rate: float = Field(RATE, gt=0, lt=1)
        """Share of tokens that are chosen."""
        mask: float = Field(0.8, ge=0, le=1)
        """Share of the chosen tokens that become [MASK]."""
        replace: float = Field(0.1, ge=0, le=1)
        """Share of the chosen tokens that become a random token; the others do not change."""
        whole_words: bool = False
        """Choose all pieces of a word or none (whole-word masking)."""
        masking: Literal["dynamic", "static"] = "dynamic"
        """When tokens are chosen. dynamic: each time a sequence is read. static: once for each
        sequence, as in BERT's code."""

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
            layout = {
                "keep": "the pairs of segments stay, and only its loss is dropped",
                "next": "the second segment of a pair always continues the first",
                "drop": "full sequences of running text take the place of pairs",
            }
            return [f"without next-sentence prediction {layout[self.pairs]}"]

    options: Options
    continues: Tensor

    def __init__(self, options: Options, backbone: TextBackbone) -> None:
        super().__init__(options, backbone)
        if backbone.causal:
            raise UserError(
                f"pretext 'mlm' predicts tokens from both sides, but '{backbone.name}' reads only "
                "one: take pretext 'ltr', or a backbone that is not causal"
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
                "next-sentence prediction needs documents of several sentences, but the data are "
                "labeled texts: name a corpus, or set pretext.nsp to false"
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
        """Metrics at BERT's masking rate; the loss excludes next-sentence prediction."""
        metrics = self(self._mask(batch, generator, RATE)).metrics
        return {
            "held_out_loss": metrics["mlm_loss"],
            **{f"held_out_{name}": value for name, value in metrics.items() if name != "mlm_loss"},
        }

    def without_context(self, shares: Tensor) -> float:
        """Lowest loss, in nats, of a model that knows only the tokens' frequencies `shares` (V,).

        For [MASK] it is the entropy of tokens. For the other chosen tokens it is the entropy given
        the token that is shown, which may be the original: H(original, shown) - H(shown).
        """
        mask, replace = self.options.mask, self.options.replace
        kept = (1 - mask - replace) * shares
        replaced = replace * shares / len(shares)  # by any one token of the vocabulary
        joint_entropy = (len(shares) - 1) * entropy(replaced) + entropy(kept + replaced)
        shown_entropy = entropy(kept + replace / len(shares))
        return mask * entropy(shares) + joint_entropy - shown_entropy

    def _mask(self, batch: Batch, generator: torch.Generator, rate: float) -> MaskedViews:
        """Choose tokens and hide them.

        Noise (3, B, T) decides: its first part which tokens are chosen, the second what a chosen
        token becomes, and the third which random token replaces it. `wanted` (B,) tokens are chosen
        in each sequence, and K = `most` in the longest.
        """
        tokens = self.tokens(batch)
        ids, tokenizer = tokens.ids, self.tokenizer
        static = self.options.masking == "static"
        noise = _static_noise(ids, tokens.real) if static else _noise(ids, generator)
        special = (ids == tokenizer.cls) | (ids == tokenizer.sep) | (ids == tokenizer.pad)
        allowed = tokens.real & ~special
        wanted = _chosen_counts(tokens.real.sum(dim=1), rate)
        most = max(1, round(ids.shape[1] * rate))
        order = noise[0]
        if self.options.whole_words:
            order, allowed = self._whole_words(order, ids, allowed, wanted, most)
        ranked, places = order.masked_fill(~allowed, 2.0).topk(most, dim=1, largest=False)
        chosen = (torch.arange(most, device=ids.device) < wanted[:, None]) & (ranked < 1.5)
        original = ids.gather(1, places)
        hidden = self._hide(original, noise[1].gather(1, places), noise[2].gather(1, places))
        ids = ids.scatter(1, places, torch.where(chosen, hidden, original))
        targets = torch.where(chosen, original, IGNORED)
        return MaskedViews(tokens._replace(ids=ids), places, targets, batch.labels)

    def _hide(self, original: Tensor, fate: Tensor, replacement: Tensor) -> Tensor:
        """Turn tokens (B, K) into [MASK] or random tokens, as uniform noise (B, K) decides."""
        mask, vocab = self.options.mask, self.tokenizer.vocab
        hidden = torch.where(fate < mask, self.tokenizer.mask, original)
        is_random = (fate >= mask) & (fate < mask + self.options.replace)
        random_ids = (replacement * vocab).long().clamp_max(vocab - 1)
        return torch.where(is_random, random_ids, hidden)

    def _whole_words(
        self, noise: Tensor, ids: Tensor, allowed: Tensor, wanted: Tensor, most: int
    ) -> tuple[Tensor, Tensor]:
        """Choose words at random until `wanted` (B,) pieces are chosen, as BERT's code does.

        A word with more pieces than are still wanted is skipped. Returns noise (B, T) that is equal
        for the pieces of a word, and a mask (B, T) of the chosen pieces.
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
    """Number of tokens (B,) to choose in sequences of the lengths (B,): at least one.

    It is computed in float64, as in Python, because float32 rounds some halves differently. Apple's
    GPUs have no float64.
    """
    exact = lengths.float() if lengths.device.type == "mps" else lengths.double()
    return (exact * rate).round().clamp_min(1).long()


def _noise(ids: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform noise (3, B, T) in [0, 1)."""
    return torch.rand(3, *ids.shape, generator=generator, device=ids.device)


def _static_noise(ids: Tensor, real: Tensor) -> Tensor:
    """Uniform noise (3, B, T) in [0, 1) that depends on the sequence alone, not on its padding.

    It is a hash (splitmix64) of the ids and the position.
    """
    place = torch.arange(ids.shape[1], device=ids.device)
    sequence = ((ids + 1) * _splitmix(place + 1) * real).sum(dim=1, keepdim=True)
    kinds = torch.arange(3, device=ids.device)[:, None, None]
    bits = _splitmix(sequence + _splitmix(place) + _splitmix(kinds + 7919)) >> 11
    return (bits & (2**24 - 1)).float() / 2**24


def _splitmix(x: Tensor) -> Tensor:
    """Hash int64 numbers."""
    x = x * -7046029254386353131
    x = (x ^ (x >> 30)) * -4658895280553007687
    x = (x ^ (x >> 27)) * -7723592293110705685
    return x ^ (x >> 31)
