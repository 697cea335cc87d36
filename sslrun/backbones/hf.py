"""Text encoders of the transformers library (an optional extra), by name or from a folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from sslrun import registry
from sslrun.backbones.base import Features, backbones
from sslrun.backbones.text import TextBackbone, last_real
from sslrun.data.specs import TextSpec
from sslrun.data.text.sequences import Tokens
from sslrun.errors import UserError
from sslrun.hub import reach_hub


@backbones.register("hf")
class TransformersEncoder(TextBackbone):
    """A pretrained encoder of the transformers library, as `hf:NAME` or `hf:FOLDER`.

    It can be evaluated or trained further. The recipe must name its tokenizer, as data:
    {tokenizer: {hub: ...}}. Only safetensors files are read, and no remote code is run. Pooled
    features are the mean over tokens. A causal encoder is read at its last token, as every causal
    backbone.
    """

    shorthand = "model"
    counterpart = "hf-image"

    class Options(registry.Options):
        model: str = Field(min_length=1)
        """Name of a model on the hub, or a folder that holds one."""
        pretrained: bool = True
        """Whether to load the pretrained weights. False: random weights in the same architecture;
        `scratch` sets this."""

        def files(self) -> list[Path]:
            """The model's folder, if `model` is one."""
            return [folder] if (folder := Path(self.model)).is_dir() else []

    def __init__(self, options: Options, spec: TextSpec) -> None:
        super().__init__(options, spec)
        self.encoder: Any = load_encoder(options.model, options.pretrained)
        table = getattr(self.encoder.get_input_embeddings(), "weight", None)
        if table is None:
            raise UserError(
                f"{options.model}: is not an encoder of text: it has no token embeddings"
            )
        if len(table) < spec.vocab:
            raise UserError(
                f"{options.model}: has {len(table)} embeddings, but the tokenizer has "
                f"{spec.vocab} entries: set data.tokenizer to the model's own, as {{hub: NAME}} or "
                "{file: FOLDER/tokenizer.json}"
            )
        self.width = int(self.encoder.config.hidden_size)
        self.depth = int(self.encoder.config.num_hidden_layers) + 1
        self._causal = self._is_causal()

    @torch.no_grad()
    def _is_causal(self) -> bool:
        """Whether the first token's features ignore the second token.

        Compares two sequences of the full length that differ in the second token only.

        Raises:
            UserError: the encoder cannot read sequences of that length, or needs other inputs.
        """
        ids = torch.full((2, self.spec.length), self.spec.tokenizer.sep)
        ids[1, 1] = self.spec.tokenizer.cls
        was_training = self.encoder.training
        try:
            one, other = self.encoder.eval()(
                input_ids=ids, attention_mask=torch.ones_like(ids)
            ).last_hidden_state[:, 0]
        except (RuntimeError, IndexError):  # the lookup of a position that does not exist
            positions = getattr(self.encoder.config, "max_position_embeddings", "fewer")
            raise UserError(
                f"{self.options.model}: sequences of {self.spec.length} tokens are longer than its "
                f"{positions} positions: lower data.length"
            ) from None
        except (ValueError, TypeError) as error:  # it also needs a decoder's input, or images
            cause = " ".join(str(error).split())[:200]
            raise UserError(
                f"{self.options.model}: is not an encoder of text alone: {cause}"
            ) from None
        finally:
            self.encoder.train(was_training)
        return torch.equal(one, other)

    @property
    def embedding(self) -> Tensor:
        """Token embeddings (V, E), without the rows that pad some tables beyond the vocabulary."""
        return self.encoder.get_input_embeddings().weight[: self.spec.vocab]

    @property
    def causal(self) -> bool:
        return self._causal

    def forward(self, inputs: Tokens) -> Features:
        real = inputs.real
        mask = real.long()
        allowed = inputs.attendable() if inputs.packed else None
        if allowed is not None:
            allowed = allowed.tril() if self._causal else allowed
            # A float mask (B, 1, T, T), which is added to the attention scores.
            mask = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)
        arguments: dict[str, Any] = {"input_ids": inputs.ids, "attention_mask": mask}
        if getattr(self.encoder.config, "type_vocab_size", 0) > 1:
            arguments["token_type_ids"] = inputs.segments
        outputs = self.encoder(**arguments, output_hidden_states=True)
        x = outputs.last_hidden_state
        mean = (x * real[..., None]).sum(1) / real.sum(1, keepdim=True)
        read = last_real(real) if self._causal else torch.zeros_like(inputs.ids[:, 0])
        return Features(mean, x, read=read, mask=real, layers=tuple(outputs.hidden_states))

    def layers(self) -> list[list[nn.Parameter]]:
        return [list(self.parameters())]


def load_encoder(model: str, pretrained: bool, dropout: bool = True) -> Any:
    """Load an encoder of transformers by name or folder, or build it with random weights.

    `dropout` keeps the configuration's rates of dropout and of stochastic depth; else they are 0.

    Raises:
        UserError: transformers is not installed, or the model cannot be loaded.
    """
    config = load_config(model)
    from transformers import AutoModel

    if not dropout:
        _switch_off_dropout(config)
    with _loading(model):
        if pretrained:
            return AutoModel.from_pretrained(
                model, config=config, use_safetensors=True, trust_remote_code=False
            )
        return AutoModel.from_config(config)


def load_config(model: str) -> Any:
    """Load the configuration of a model of transformers, by name or folder.

    Raises:
        UserError: transformers is not installed, or the model cannot be loaded.
    """
    try:
        import transformers.utils.logging
        from transformers import AutoConfig
    except ImportError:
        raise UserError(
            "backbone 'hf' needs transformers: pip install 'sslrun[transformers]'"
        ) from None
    if not Path(model).is_dir():
        reach_hub()
    transformers.utils.logging.disable_progress_bar()  # reading the file takes only a moment
    with _loading(model):
        return AutoConfig.from_pretrained(model, trust_remote_code=False)


@contextmanager
def _loading(model: str) -> Iterator[None]:
    """Report the errors of transformers as one line."""
    try:
        yield
    except (OSError, ValueError) as error:
        cause = " ".join(str(error).split())[:200]
        raise UserError(f"{model}: can't be loaded: {cause}") from None


def _switch_off_dropout(config: Any) -> None:
    """Set every rate of dropout and of stochastic depth in a configuration to 0."""
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
