"""Language modeling in both directions (ELMo; Peters et al., NAACL 2018, arXiv:1802.05365)."""

from __future__ import annotations

import torch

from sslrun.backbones.text import TextBackbone
from sslrun.backbones.token_head import TokenHead
from sslrun.data.examples import Batch
from sslrun.data.text.sequences import Tokens
from sslrun.pretexts.base import pretexts
from sslrun.pretexts.language import (
    LanguageOptions,
    LanguagePretext,
    Pairs,
    following,
    preceding,
)
from sslrun.training.learner import Output


@pretexts.register("bilm")
class BiLm(LanguagePretext):
    """Predict each token from the tokens before it, and separately from the tokens after it.

    ELMo: Peters et al., NAACL 2018 (arXiv:1802.05365). Two networks share their embeddings and
    their softmax. The loss is the mean of both directions.
    """

    needs = ("directions",)

    class Options(LanguageOptions):
        pairs: Pairs = "drop"

    options: Options

    def __init__(self, options: Options, backbone: TextBackbone) -> None:
        super().__init__(options, backbone)
        backbone.require("directions", "pretext 'bilm'")
        self.head = TokenHead(backbone.width // 2, backbone.spec.vocab, None)

    def views(self, batch: Batch, generator: torch.Generator) -> Tokens:
        return self.tokens(batch)

    def forward(self, views: Tokens) -> Output:
        features = self.backbone(views)
        assert features.tokens is not None
        ahead, back = features.tokens.chunk(2, dim=-1)
        forward_loss, forward_accuracy = self.head.loss(ahead, None, following(views))
        backward_loss, backward_accuracy = self.head.loss(back, None, preceding(views))
        loss = (forward_loss + backward_loss) / 2
        return Output(
            loss,
            {
                "forward_loss": forward_loss.detach(),
                "backward_loss": backward_loss.detach(),
                "accuracy": (forward_accuracy + backward_accuracy) / 2,
            },
        )
