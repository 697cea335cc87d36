"""Masked language modeling, with or without next-sentence prediction (BERT)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn

from sslrun.backbones.text import TextBackbone, embedding_of, gather_tokens
from sslrun.backbones.token_head import TokenHead
from sslrun.data.examples import Batch, Examples
from sslrun.data.text.sequences import Documents, Tokens
from sslrun.errors import UserError
from sslrun.pretexts.base import pretexts
from sslrun.pretexts.guesses import MaskedText, hide_few, list_guesses, score_hidden
from sslrun.pretexts.language import entropy
from sslrun.pretexts.masking import (
    RATE,
    MaskedOptions,
    MaskedPretext,
    MaskedViews,
    pseudo_log_probs,
)
from sslrun.training.learner import Output


@pretexts.register("mlm")
class Mlm(MaskedPretext):
    """Predict hidden tokens from the tokens on both sides.

    BERT: Devlin et al., NAACL 2019 (arXiv:1810.04805). In each sequence `round(rate * tokens)`
    tokens are chosen: at least one, and never a special one. 80 % of them become [MASK], 10 %
    become a random token, and 10 % do not change. Head and loss cover the chosen tokens only. With
    `nsp`, [CLS] predicts whether the second segment continues the first.

    Deviation: tokens are chosen again each time a sequence is read, which needs no stored copies.
    BERT's code chose them ten times, once for each of its `dupes`; `masking: static` is close to
    it.
    """

    keeps = ("head",)
    can_score = True

    class Options(MaskedOptions):
        nsp: bool = False
        """Add next-sentence prediction to the loss, as BERT does."""

        @model_validator(mode="after")
        def _consistent(self) -> Mlm.Options:
            if self.nsp and self.pairs != "keep":
                raise ValueError("nsp: true needs pairs: keep")
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

    def __init__(self, options: Options, backbone: TextBackbone) -> None:
        super().__init__(options, backbone)
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
        return self.hide(self.tokens(batch), generator, self.options.rate, batch.labels)

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
        metrics = self(self.hide(self.tokens(batch), generator, RATE, batch.labels)).metrics
        return {
            "held_out_loss": metrics["mlm_loss"],
            **{f"held_out_{name}": value for name, value in metrics.items() if name != "mlm_loss"},
        }

    def guesses(self, batch: Batch, generator: torch.Generator) -> list[MaskedText]:
        views = hide_few(self, batch, generator)
        return list_guesses(self, views, score_hidden(self.backbone, self.head, views))

    def log_probs(self, tokens: Tokens) -> Tensor:
        """Log-probability (B, T) of each token given all others; see `pseudo_log_probs`."""
        return pseudo_log_probs(self.backbone, self.head, tokens)

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
