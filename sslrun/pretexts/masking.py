"""The part that tasks on hidden tokens share: which tokens are hidden, and by what."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from sslrun.backbones.text import TextBackbone, embedding_of
from sslrun.backbones.token_head import TokenHead
from sslrun.data.text.sequences import IGNORED, Tokens
from sslrun.errors import UserError
from sslrun.pretexts.language import LanguageOptions, LanguagePretext

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


class MaskedOptions(LanguageOptions):
    """Options that all tasks on hidden tokens share."""

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
    def _shares(self) -> MaskedOptions:
        if self.mask + self.replace > 1 + 1e-9:
            raise ValueError("mask and replace are shares of the chosen tokens: together 1 at most")
        return self


def check_both_sides(name: str, backbone: TextBackbone) -> None:
    """Check that the backbone of the pretext task `name` is not causal; raises UserError if so."""
    if backbone.causal:
        raise UserError(
            f"pretext '{name}' predicts tokens from both sides, but '{backbone.name}' reads only "
            "one: take pretext 'ltr', or a backbone that is not causal"
        )


class MaskedPretext(LanguagePretext):
    """Base class of tasks on hidden tokens; see `Mlm` for which are chosen."""

    options: MaskedOptions
    continues: Tensor

    def __init__(self, options: MaskedOptions, backbone: TextBackbone) -> None:
        super().__init__(options, backbone)
        check_both_sides(self.name, backbone)
        self.tokenizer = backbone.spec.tokenizer
        self.register_buffer("continues", self.tokenizer.continues, persistent=False)

    def hide(
        self, tokens: Tokens, generator: torch.Generator, rate: float, related: Tensor | None = None
    ) -> MaskedViews:
        """Choose tokens and hide them.

        Noise (3, B, T) decides: its first part which tokens are chosen, the second what a chosen
        token becomes, and the third which random token replaces it. `wanted` (B,) tokens are chosen
        in each sequence, and K = `most` in the longest.
        """
        ids = tokens.ids
        static = self.options.masking == "static"
        noise = _static_noise(ids, tokens.real) if static else _noise(ids, generator)
        allowed = self.words(tokens)
        wanted = _chosen_counts(tokens.real.sum(dim=1), rate)
        most = max(1, round(ids.shape[1] * rate))
        order = noise[0]
        if self.options.whole_words:
            order, allowed = self._whole_words(order, ids, allowed, wanted, most)
        ranked, places = order.masked_fill(~allowed, 2.0).topk(most, dim=1, largest=False)
        chosen = (torch.arange(most, device=ids.device) < wanted[:, None]) & (ranked < 1.5)
        original = ids.gather(1, places)
        hidden = self._disguise(original, noise[1].gather(1, places), noise[2].gather(1, places))
        ids = ids.scatter(1, places, torch.where(chosen, hidden, original))
        targets = torch.where(chosen, original, IGNORED)
        return MaskedViews(tokens._replace(ids=ids), places, targets, related)

    def _disguise(self, original: Tensor, fate: Tensor, replacement: Tensor) -> Tensor:
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


def pseudo_log_probs(
    backbone: TextBackbone, head: TokenHead, tokens: Tokens, shift: int = 0
) -> Tensor:
    """Log-probability (B, T) of each token while it alone is [MASK].

    Their sum is the pseudo-log-likelihood (Salazar et al., ACL 2020, arXiv:1910.14659). The head
    predicts a token from the features `shift` places before it.
    """
    columns = []
    for place in range(tokens.ids.shape[1]):
        ids = tokens.ids.clone()
        ids[:, place] = backbone.spec.tokenizer.mask
        features = backbone(tokens._replace(ids=ids)).tokens
        assert features is not None
        scores = head(features[:, max(0, place - shift)], embedding_of(backbone)).float()
        columns.append(scores.log_softmax(dim=-1).gather(1, tokens.ids[:, place, None]))
    return torch.cat(columns, dim=1)


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
