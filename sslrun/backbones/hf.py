"""Any text encoder of transformers (an optional extra), by name or from a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from sslrun.backbones.base import Features, backbones
from sslrun.backbones.text import TextBackbone, last_real
from sslrun.data.specs import TextSpec
from sslrun.data.text.sequences import Tokens
from sslrun.errors import UserError
from sslrun.hub import reach_hub
from sslrun.registry import Options


@backbones.register("hf")
class TransformersEncoder(TextBackbone):
    """A pretrained encoder of the transformers library, as `hf:NAME` or `hf:FOLDER`: evaluated as it is, or trained on.

    Its own tokenizer must be named, as data: {tokenizer: {hub: ...}}. Only safetensors are read, no
    code of others is run. Pooled: the mean of its tokens. One that reads left to right is read at
    its last token, as any causal backbone.
    """

    shorthand = "model"

    class Options(Options):
        model: str = Field(min_length=1)
        """A name on the hub, or a folder."""
        pretrained: bool = True
        """False: of its shape alone, with random weights; `scratch` sets it so."""

        def files(self) -> list[Path]:
            """The folder, where it is one."""
            return [folder] if (folder := Path(self.model)).is_dir() else []

    def __init__(self, options: Options, spec: TextSpec) -> None:
        super().__init__(options, spec)
        try:
            import transformers.utils.logging
            from transformers import AutoConfig, AutoModel
        except ImportError:
            raise UserError(
                "backbone 'hf' needs transformers: pip install 'sslrun[transformers]'"
            ) from None
        if not Path(options.model).is_dir():
            reach_hub()
        transformers.utils.logging.disable_progress_bar()  # of reading a file, which takes a moment
        try:
            if options.pretrained:
                encoder = AutoModel.from_pretrained(
                    options.model, use_safetensors=True, trust_remote_code=False
                )
            else:
                encoder = AutoModel.from_config(
                    AutoConfig.from_pretrained(options.model, trust_remote_code=False)
                )
        except (OSError, ValueError) as error:
            raise UserError(
                f"{options.model}: can't be loaded: {' '.join(str(error).split())[:200]}"
            ) from None
        self.encoder: Any = encoder
        table = getattr(self.encoder.get_input_embeddings(), "weight", None)
        if table is None:
            raise UserError(f"{options.model}: is no encoder of text: it has no token embeddings")
        if len(table) < spec.vocab:
            raise UserError(
                f"{options.model}: has {len(table)} embeddings, the tokenizer {spec.vocab} entries: "
                f"give data.tokenizer the model's own, as {{hub: NAME}} or {{file: FOLDER/tokenizer.json}}"
            )
        self.width = int(self.encoder.config.hidden_size)
        self.depth = int(self.encoder.config.num_hidden_layers) + 1
        self._causal = self._reads_one_side()

    @torch.no_grad()
    def _reads_one_side(self) -> bool:
        """Whether the first token sees the second, told by changing it, in a sequence as long as any may be. UserError: it
        can't read such a one."""
        ids = torch.full((2, self.spec.length), self.spec.tokenizer.sep)
        ids[1, 1] = self.spec.tokenizer.cls
        was_training = self.encoder.training
        try:
            one, other = self.encoder.eval()(
                input_ids=ids, attention_mask=torch.ones_like(ids)
            ).last_hidden_state[:, 0]
        except (RuntimeError, IndexError):  # positions are looked up, and there are no more
            places = getattr(self.encoder.config, "max_position_embeddings", "fewer")
            raise UserError(
                f"{self.options.model}: sequences of {self.spec.length} tokens are longer than it can read, which has "
                f"{places} positions: lower data.length"
            ) from None
        except (ValueError, TypeError) as error:  # it wants a decoder's input besides, or images
            cause = " ".join(str(error).split())[:200]
            raise UserError(f"{self.options.model}: is no encoder of text alone: {cause}") from None
        finally:
            self.encoder.train(was_training)
        return torch.equal(one, other)

    @property
    def embedding(self) -> Tensor:
        """Without the rows beyond the tokenizer's entries, to which some tables are padded."""
        return self.encoder.get_input_embeddings().weight[: self.spec.vocab]

    @property
    def causal(self) -> bool:
        return self._causal

    def forward(self, inputs: Tokens) -> Features:
        real = inputs.real
        mask = real.long()
        if (
            inputs.packed and (allowed := inputs.attendable()) is not None
        ):  # as numbers to be added to scores
            allowed = allowed.tril() if self._causal else allowed
            mask = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)
        given: dict[str, Any] = {"input_ids": inputs.ids, "attention_mask": mask}
        if getattr(self.encoder.config, "type_vocab_size", 0) > 1:
            given["token_type_ids"] = inputs.segments
        found = self.encoder(**given, output_hidden_states=True)
        x = found.last_hidden_state
        mean = (x * real[..., None]).sum(1) / real.sum(1, keepdim=True)
        read = last_real(real) if self._causal else torch.zeros_like(inputs.ids[:, 0])
        return Features(mean, x, read=read, mask=real, layers=tuple(found.hidden_states))

    def layers(self) -> list[list[nn.Parameter]]:
        return [list(self.parameters())]
