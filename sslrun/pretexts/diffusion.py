"""Masked diffusion (MDLM; Sahoo et al., NeurIPS 2024, arXiv:2406.07524)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sslrun.backbones.text import TextBackbone, embedding_of
from sslrun.backbones.token_head import TokenHead
from sslrun.data.examples import Batch
from sslrun.data.text.sequences import IGNORED, Tokens
from sslrun.pretexts.base import pretexts
from sslrun.pretexts.guesses import MaskedText, hide_few, list_guesses, score_hidden
from sslrun.pretexts.language import LanguageOptions, LanguagePretext, Pairs
from sslrun.pretexts.masking import check_both_sides, pseudo_log_probs
from sslrun.training.learner import Output

LEAST_RATE = 1e-3
"""The lowest masking rate, as in the authors' code."""


class DiffusedViews(NamedTuple):
    """Sequences, each with tokens hidden at a rate of its own."""

    tokens: Tokens
    """Inputs of the backbone."""
    targets: Tensor
    """(B, T): the hidden tokens; `IGNORED` elsewhere."""
    weights: Tensor
    """(B, T): 1 / rate."""
    words: Tensor
    """0-d: the number of tokens that could be hidden."""


@pretexts.register("diffusion")
class Diffusion(LanguagePretext):
    """Predict hidden tokens at every masking rate: a diffusion model of text.

    MDLM: Sahoo et al., NeurIPS 2024 (arXiv:2406.07524). Each token of a sequence becomes [MASK]
    with probability t, a rate uniform in (0, 1]. The loss is the sum of the cross-entropies of the
    hidden tokens, each divided by t, per token: in expectation over t it is the negative evidence
    lower bound, in nats per token. As in the authors' code, a batch has one rate in each of B equal
    intervals of [0.001, 1], the network does not get the rate, and [MASK] has probability 0.

    Special tokens are never hidden, which is our choice: the bound is that of the words, given the
    layout.
    """

    keeps = ("head",)
    can_score = True

    class Options(LanguageOptions):
        pairs: Pairs = "drop"

    options: Options

    def __init__(self, options: Options, backbone: TextBackbone) -> None:
        super().__init__(options, backbone)
        check_both_sides(self.name, backbone)
        table, mask = embedding_of(backbone), backbone.spec.tokenizer.mask
        self.head = TokenHead(
            backbone.width, backbone.spec.vocab, None if table is None else table.shape[1], mask
        )

    def views(self, batch: Batch, generator: torch.Generator) -> DiffusedViews:
        tokens = self.tokens(batch)
        ids, words = tokens.ids, self.words(tokens)
        rates = spread_rates(len(ids), generator, ids.device)[:, None]
        noise = torch.rand(ids.shape, generator=generator, device=ids.device)
        hidden = words & (noise < rates)
        mask = self.backbone.spec.tokenizer.mask
        return DiffusedViews(
            tokens._replace(ids=torch.where(hidden, mask, ids)),
            torch.where(hidden, ids, IGNORED),
            (1 / rates).expand(ids.shape),
            words.sum(),
        )

    def forward(self, views: DiffusedViews) -> Output:
        features = self.backbone(views.tokens).tokens
        assert features is not None
        table = embedding_of(self.backbone)
        mean, accuracy = self.head.loss(features, table, views.targets, views.weights)
        hidden = (views.targets != IGNORED).sum()
        loss = mean * hidden / views.words.clamp_min(1)
        return Output(loss, {"nats_per_token": loss.detach(), "accuracy": accuracy})

    def guesses(self, batch: Batch, generator: torch.Generator) -> list[MaskedText]:
        views = hide_few(self, batch, generator)
        return list_guesses(self, views, score_hidden(self.backbone, self.head, views))

    def log_probs(self, tokens: Tokens) -> Tensor:
        """Log-probability (B, T) of each token given all others; see `pseudo_log_probs`."""
        return pseudo_log_probs(self.backbone, self.head, tokens)


def spread_rates(count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Draw rates (B,) in [0.001, 1], one in each of B equal intervals, in random order.

    Each is uniform; together they vary the loss less than independent ones do.
    """
    noise = torch.rand(count, generator=generator, device=device)
    places = torch.randperm(count, generator=generator, device=device)
    return LEAST_RATE + (1 - LEAST_RATE) * (places + noise) / count
