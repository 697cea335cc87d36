"""GPT-BERT (Charpentier and Samuel, BabyLM 2024, arXiv:2410.24159)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from sslrun.backbones.text import TextBackbone, gather_tokens
from sslrun.backbones.token_head import TokenHead
from sslrun.data.examples import Batch
from sslrun.data.text.sequences import IGNORED, Tokens
from sslrun.pretexts.base import pretexts
from sslrun.pretexts.guesses import MaskedText, hide_few, list_guesses, score_hidden
from sslrun.pretexts.language import following
from sslrun.pretexts.masking import (
    RATE,
    MaskedOptions,
    MaskedPretext,
    MaskedViews,
    pseudo_log_probs,
)
from sslrun.training.learner import Output


class HybridViews(NamedTuple):
    """The two parts of a batch."""

    masked: MaskedViews
    """Sequences with hidden tokens; each is predicted at the place before its own."""
    causal: Tokens | None
    """Sequences in which each token is predicted from those before it; None in a batch of one."""


@pretexts.register("gpt-bert")
class GptBert(MaskedPretext):
    """Predict the next token: from the left in some sequences, hidden in the others.

    GPT-BERT: Charpentier and Samuel, BabyLM 2024 (arXiv:2410.24159). One network and one head are
    a left-to-right and a masked language model. Hidden tokens are predicted at the place before
    their own (masked next-token prediction), so that both parts predict what follows a place. The
    loss is the mean of the parts' losses, weighted by their numbers of sequences, as the authors'
    code averages over devices, each with one kind of sequences. The backbone is evaluated as a
    bidirectional one.

    Deviations: the network is the recipe's, without the authors' changes of the Transformer. Tokens
    are hidden as in BERT, one by one and at a constant rate; the authors hide spans, and lower the
    rate from 0.3 to 0.15. Each batch is divided, not the devices. The first token of a document in
    running text has no place before it, and is never predicted.
    """

    needs = ("causal",)
    keeps = ("head",)
    can_score = True

    class Options(MaskedOptions):
        causal: float = Field(1 / 16, gt=0, lt=1)
        """Share of the sequences that are read from left to right, rounded to at least one and at
        most all but one of a batch. The authors' code: 1/16."""

    options: Options

    def __init__(self, options: Options, backbone: TextBackbone) -> None:
        super().__init__(options, backbone)
        backbone.require("causal", "pretext 'gpt-bert'")
        self.head = TokenHead(backbone.width, backbone.spec.vocab, backbone.embedding.shape[1])

    def views(self, batch: Batch, generator: torch.Generator) -> HybridViews:
        tokens, count = self.tokens(batch), len(batch.inputs.ids)
        causal = min(max(1, round(count * self.options.causal)), count - 1)
        order = torch.randperm(count, generator=generator, device=tokens.ids.device)
        left, right = order[:causal], order[causal:]
        return HybridViews(
            self._hide_next(tokens.subset(right), generator, self.options.rate),
            tokens.subset(left)._replace(causal=True) if causal else None,
        )

    def _hide_next(self, tokens: Tokens, generator: torch.Generator, rate: float) -> MaskedViews:
        """Hide tokens, and move their places to the tokens before them in the same document."""
        views = self.hide(tokens, generator, rate)
        before = (views.places - 1).clamp_min(0)
        same = tokens.documents.gather(1, before) == tokens.documents.gather(1, views.places)
        return views._replace(places=before, targets=torch.where(same, views.targets, IGNORED))

    def forward(self, views: HybridViews) -> Output:
        masked, causal, table = views.masked, views.causal, self.backbone.embedding
        features = gather_tokens(self._features(masked.tokens), masked.places)
        loss, accuracy = self.head.loss(features, table, masked.targets)
        metrics = {"masked_loss": loss.detach(), "masked_accuracy": accuracy}
        if causal is not None:
            causal_loss, accuracy = self.head.loss(self._features(causal), table, following(causal))
            metrics |= {"causal_loss": causal_loss.detach(), "causal_accuracy": accuracy}
            share = len(causal.ids) / (len(causal.ids) + len(masked.places))
            loss = (1 - share) * loss + share * causal_loss
        return Output(loss, metrics)

    def _features(self, tokens: Tokens) -> Tensor:
        features = self.backbone(tokens).tokens
        assert features is not None
        return features

    def held_out(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Metrics of both kinds on all sequences, at BERT's masking rate.

        The loss is that of hidden tokens, to be compared with `mlm`.
        """
        tokens = self.tokens(batch)
        masked = self._hide_next(tokens, generator, RATE)
        metrics = self(HybridViews(masked, tokens._replace(causal=True))).metrics
        return {
            "held_out_loss": metrics["masked_loss"],
            **{f"held_out_{name}": value for name, value in metrics.items()},
        }

    def guesses(self, batch: Batch, generator: torch.Generator) -> list[MaskedText]:
        views = hide_few(self, batch, generator)
        return list_guesses(self, views, score_hidden(self.backbone, self.head, views, shift=1))

    def log_probs(self, tokens: Tokens) -> Tensor:
        """Log-probability (B, T) of each token given all others; see `pseudo_log_probs`."""
        return pseudo_log_probs(self.backbone, self.head, tokens, shift=1)
