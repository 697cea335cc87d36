"""Guesses of masked language models at hidden tokens, to be shown to people."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sslrun.backbones.text import TextBackbone, embedding_of, gather_tokens
from sslrun.backbones.token_head import TokenHead
from sslrun.data.examples import Batch
from sslrun.data.text.sequences import IGNORED
from sslrun.pretexts.language import LanguagePretext
from sslrun.pretexts.masking import MaskedViews

LENGTH, HIDDEN, BEST = 32, 4, 5
"""Number of tokens of a text that are read, of those that are hidden, and of guesses at each."""


@dataclass(frozen=True)
class Guess:
    """What a model expects at a hidden token."""

    place: int
    """Index of the token in its text."""
    probability: float
    """Probability of the true token."""
    rank: int
    """Number of tokens that are at least as probable as the true one, itself included."""
    best: list[tuple[str, float]]
    """The most probable tokens, with their probabilities."""


@dataclass(frozen=True)
class MaskedText:
    """A text with hidden tokens."""

    tokens: list[str]
    """The text, without special tokens and with the true tokens at hidden places."""
    guesses: list[Guess]


def hide_few(pretext: LanguagePretext, batch: Batch, generator: torch.Generator) -> MaskedViews:
    """Replace `HIDDEN` random tokens by [MASK] in the first `LENGTH` of each sequence.

    The rest of a sequence becomes padding, as do documents after the first.
    """
    tokens = pretext.tokens(batch)
    near = torch.arange(tokens.ids.shape[1], device=tokens.ids.device) < LENGTH
    tokens = tokens.keep_only((tokens.documents == 1) & near)
    ids, words = tokens.ids, pretext.words(tokens)
    noise = torch.rand(ids.shape, generator=generator, device=ids.device).masked_fill(~words, 2.0)
    chosen = noise.topk(min(HIDDEN, ids.shape[1]), dim=1, largest=False).indices
    places = chosen.sort(dim=1).values
    targets = torch.where(words.gather(1, places), ids.gather(1, places), IGNORED)
    mask = pretext.backbone.spec.tokenizer.mask
    hidden = ids.scatter(1, places, torch.where(targets == IGNORED, ids.gather(1, places), mask))
    return MaskedViews(tokens._replace(ids=hidden), places, targets, None)


def score_hidden(
    backbone: TextBackbone, head: TokenHead, views: MaskedViews, shift: int = 0
) -> Tensor:
    """Scores (B, K, V) of the hidden tokens, read `shift` places before them."""
    features = backbone(views.tokens).tokens
    assert features is not None
    places = (views.places - shift).clamp_min(0)
    return head(gather_tokens(features, places), embedding_of(backbone))


def list_guesses(pretext: LanguagePretext, views: MaskedViews, scores: Tensor) -> list[MaskedText]:
    """List the guesses of scores (B, K, V) for each sequence with hidden tokens."""
    strings, probabilities = pretext.backbone.spec.tokenizer.strings, scores.float().softmax(dim=-1)
    words = pretext.words(views.tokens).tolist()
    texts = []
    for row, ids in enumerate(views.tokens.ids.tolist()):
        places, targets = views.places[row].tolist(), views.targets[row].tolist()
        columns = [column for column, target in enumerate(targets) if target != IGNORED]
        hidden = {places[column]: targets[column] for column in columns}
        kept = [place for place, is_word in enumerate(words[row]) if is_word]
        tokens = [strings[hidden.get(place, ids[place])] for place in kept]
        guesses = [
            _describe(
                kept.index(places[column]), targets[column], probabilities[row, column], strings
            )
            for column in columns
        ]
        if guesses:
            texts.append(MaskedText(tokens, guesses))
    return texts


def _describe(place: int, target: int, shares: Tensor, strings: list[str]) -> Guess:
    """Describe the probabilities (V,) of a hidden token whose true one is `target`."""
    best = shares.topk(min(BEST, len(shares)))
    named = [
        (strings[token], round(share, 4))
        for share, token in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]
    rank = int((shares >= shares[target]).sum())
    return Guess(place, round(float(shares[target]), 4), rank, named)
