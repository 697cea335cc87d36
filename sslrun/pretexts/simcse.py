"""SimCSE (Gao, Yao and Chen, EMNLP 2021, arXiv:2104.08821)."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import nn

from sslrun.backbones.text import TextBackbone, gather_tokens
from sslrun.backbones.transformer import initialize
from sslrun.data.examples import Batch, Examples
from sslrun.data.specs import TextSpec
from sslrun.data.text.sequences import Documents, Tokens
from sslrun.errors import UserError
from sslrun.pretexts.base import Pretext, PretextOptions, pretexts
from sslrun.pretexts.mocov3 import match
from sslrun.training.learner import Output


@pretexts.register("simcse")
class SimCse(Pretext):
    """Recognize the same sentence, read again with other dropout, in the batch.

    SimCSE, unsupervised: Gao, Yao and Chen, EMNLP 2021 (arXiv:2104.08821). Each sentence goes
    through the network twice. The loss is the cross-entropy of the cosine similarities of the first
    readings to all second ones, divided by the temperature. A linear map and a tanh follow [CLS] in
    training only, so that evaluations should read it with `task: {pool: cls}`. Of a corpus each
    sentence is an example; labeled texts are taken as they are.

    The paper starts from the weights of BERT, as `pretrain: {init: RUN}` does.
    """

    reads = TextSpec
    backbone: TextBackbone

    class Options(PretextOptions):
        temperature: float = Field(0.05, gt=0)
        """Temperature of the softmax."""

    options: Options

    def __init__(self, options: Options, backbone: TextBackbone) -> None:
        """Raises UserError for a backbone without dropout, which reads a sentence twice alike."""
        super().__init__(options, backbone)
        dropouts = [module.p for module in backbone.modules() if isinstance(module, nn.Dropout)]
        if not any(dropouts):
            raise UserError(
                f"pretext 'simcse' compares two readings with different dropout, but "
                f"'{backbone.name}' as configured has none: set backbone.dropout: 0.1"
            )
        self.head = nn.Sequential(nn.Linear(backbone.width, backbone.width), nn.Tanh())
        initialize(self.head)

    def arrange(self, examples: Examples, seed: int) -> Examples:
        """Split documents into sentences."""
        return examples.split() if isinstance(examples, Documents) else examples

    def views(self, batch: Batch, generator: torch.Generator) -> Tokens:
        """Each sentence twice: (2B, T), the second readings last."""
        tokens: Tokens = batch.inputs
        return tokens.map(lambda tensor: torch.cat([tensor, tensor]))

    def forward(self, views: Tokens) -> Output:
        features = self.backbone(views)
        assert features.tokens is not None
        assert features.read is not None
        first, second = self.head(gather_tokens(features.tokens, features.read)).chunk(2)
        loss, accuracy = match(first, second, self.options.temperature)
        return Output(loss, {"accuracy": accuracy})
