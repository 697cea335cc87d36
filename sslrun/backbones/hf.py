"""Any text encoder of transformers (an optional extra), by name or from a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from sslrun.backbones.base import Features, backbones
from sslrun.backbones.text import TextBackbone
from sslrun.data.sequences import TextSpec, Tokens
from sslrun.errors import UserError
from sslrun.hub import hub_or_offline
from sslrun.registry import Options


@backbones.register("hf", shorthand="model")
class TransformersEncoder(TextBackbone):
    """A pretrained encoder of the transformers library, as `hf:NAME` or `hf:FOLDER`: evaluated as it is, or trained on.

    Its own tokenizer must be named, as data: {tokenizer: {hub: ...}}. Only safetensors are read, no code of others is
    run. Pooled: the mean of its tokens.
    """

    class Options(Options):
        model: str = Field(min_length=1)
        """A name on the hub, or a folder."""
        pretrained: bool = True
        """False: of its shape alone, with random weights; `scratch` sets it so."""

    def __init__(self, options: Options, spec: TextSpec) -> None:
        super().__init__(options, spec)
        try:
            import transformers.utils.logging
            from transformers import AutoConfig, AutoModel
        except ImportError:
            raise UserError("backbone 'hf' needs transformers: pip install 'sslrun[transformers]'") from None
        if not Path(options.model).is_dir():
            hub_or_offline()
        transformers.utils.logging.disable_progress_bar()  # of reading a file, which takes a moment
        try:
            if options.pretrained:
                encoder = AutoModel.from_pretrained(options.model, use_safetensors=True, trust_remote_code=False)
            else:
                encoder = AutoModel.from_config(AutoConfig.from_pretrained(options.model, trust_remote_code=False))
        except (OSError, ValueError) as error:
            raise UserError(f"{options.model}: can't be loaded: {' '.join(str(error).split())[:200]}") from None
        self.encoder: Any = encoder
        table = self.encoder.get_input_embeddings().weight
        if len(table) < spec.vocab:
            raise UserError(
                f"{options.model}: has {len(table)} embeddings, the tokenizer {spec.vocab} entries: "
                f"give data.tokenizer the model's own, as {{hub: NAME}} or {{file: FOLDER/tokenizer.json}}"
            )
        self.width = int(self.encoder.config.hidden_size)
        self.depth = int(self.encoder.config.num_hidden_layers) + 1

    @property
    def embedding(self) -> Tensor:
        return self.encoder.get_input_embeddings().weight

    def forward(self, inputs: Tokens) -> Features:
        real = inputs.real
        mask = real.long()
        if (inputs.documents > 1).any():  # packed: to tokens of the same document, as numbers to be added to scores
            mask = torch.where(inputs.attendable(), 0.0, torch.finfo(torch.float32).min)
        given: dict[str, Any] = {"input_ids": inputs.ids, "attention_mask": mask}
        if getattr(self.encoder.config, "type_vocab_size", 0) > 1:
            given["token_type_ids"] = inputs.segments
        found = self.encoder(**given, output_hidden_states=True)
        x = found.last_hidden_state
        mean = (x * real[..., None]).sum(1) / real.sum(1, keepdim=True)
        return Features(mean, x, read=torch.zeros_like(inputs.ids[:, 0]), mask=real, layers=tuple(found.hidden_states))

    def layers(self) -> list[list[nn.Parameter]]:
        return [list(self.parameters())]
