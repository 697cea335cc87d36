"""Left-to-right language modeling (GPT, Radford et al. 2018)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sslrun.backbones.text import TextBackbone
from sslrun.backbones.token_head import TokenHead
from sslrun.data.examples import Batch
from sslrun.data.text.sequences import Tokens
from sslrun.errors import UserError
from sslrun.pretexts.base import pretexts
from sslrun.pretexts.language import LanguageOptions, LanguagePretext, following
from sslrun.training.learner import Output


@pretexts.register("ltr")
class Ltr(LanguagePretext):
    """Predict each token from the tokens before it, without masking.

    This is GPT's objective (Radford et al. 2018). With BERT's inputs and head it is the
    left-to-right row of BERT's Table 5 (Devlin et al., NAACL 2019). The backbone must be causal,
    and stays causal in fine-tuning.
    """

    keeps = ("head",)
    can_score = True

    class Options(LanguageOptions):
        pass

    options: Options

    def __init__(self, options: Options, backbone: TextBackbone) -> None:
        super().__init__(options, backbone)
        if not backbone.causal:
            raise UserError(
                "pretext 'ltr' predicts the next token, "
                f"but '{backbone.name}' lets every token see the next one: "
                "set backbone.causal: true for a bert, or take a gpt, a one-directional lstm, "
                "or pretext 'mlm'"
            )
        self.head = TokenHead(backbone.width, backbone.spec.vocab, backbone.embedding.shape[1])

    def views(self, batch: Batch, generator: torch.Generator) -> Tokens:
        return self.tokens(batch)

    def forward(self, views: Tokens) -> Output:
        features = self.backbone(views)
        assert features.tokens is not None
        loss, accuracy = self.head.loss(features.tokens, self.backbone.embedding, following(views))
        return Output(loss, {"accuracy": accuracy})

    def log_probs(self, tokens: Tokens) -> Tensor:
        """Log-probability (B, T) of each token given those before it; 0 at the first."""
        features = self.backbone(tokens).tokens
        assert features is not None
        scores = self.head(features[:, :-1], self.backbone.embedding).float().log_softmax(dim=-1)
        return F.pad(scores.gather(2, tokens.ids[:, 1:, None])[..., 0], (1, 0))
