"""Left-to-right language modelling."""

from __future__ import annotations

import torch

from sslrun.backbones.text import TextBackbone
from sslrun.data.examples import Batch
from sslrun.data.text.sequences import Tokens
from sslrun.errors import UserError
from sslrun.pretexts.base import pretexts
from sslrun.pretexts.language import LanguageOptions, LanguagePretext, TokenHead, following
from sslrun.training.learner import Output


@pretexts.register("ltr")
class Ltr(LanguagePretext):
    """Name each token from those before it, and no masking: GPT's objective (Radford et al. 2018), and the left-to-right
    row of BERT's Table 5 with BERT's inputs and head. The backbone must be causal, and stays so when it is fine-tuned."""

    class Options(LanguageOptions):
        pass

    options: Options

    def __init__(self, options: Options, backbone: TextBackbone) -> None:
        super().__init__(options, backbone)
        if not backbone.causal:
            raise UserError(
                f"pretext 'ltr' predicts the next token, which every token of '{backbone.name}' sees: "
                "set backbone.causal: true of a bert, take a gpt or an lstm of one direction, or pretext 'mlm'"
            )
        self.head = TokenHead(backbone.width, backbone.spec.vocab, backbone.embedding.shape[1])

    def views(self, batch: Batch, generator: torch.Generator) -> Tokens:
        return self.tokens(batch)

    def forward(self, views: Tokens) -> Output:
        features = self.backbone(views)
        assert features.tokens is not None
        loss, accuracy = self.head.loss(features.tokens, self.backbone.embedding, following(views))
        return Output(loss, {"accuracy": accuracy})
