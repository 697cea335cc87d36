"""GPT-2 (Radford et al. 2019): a causal Transformer over text.

Weights can be exported to and loaded from transformers.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from sslrun.backbones.base import Exported, Features, backbones
from sslrun.backbones.text import TextBackbone, check_heads, gather_tokens, last_real
from sslrun.backbones.transformer import Block, BlockStyle, Stack, initialize, layers_of
from sslrun.data.specs import TextSpec
from sslrun.data.text.sequences import Tokens
from sslrun.registry import Options

GPT_STYLE = BlockStyle(eps=1e-5, activation=partial(F.gelu, approximate="tanh"))
"""The block of GPT-2's code."""


class Gpt(TextBackbone):
    """Pre-norm causal Transformer over token and position embeddings (Radford et al. 2019).

    Pooled features are those of the last real token.
    """

    class Options(Options):
        dropout: float = Field(0.1, ge=0, lt=1)
        """Dropout rate on embeddings, attention weights and the output of each branch."""
        positions: int = Field(1024, ge=8)
        """Number of positions: the longest sequence, in tokens."""
        depth: int | None = Field(None, ge=1)
        """Number of layers; default: the named model's."""
        width: int | None = Field(None, ge=1)
        """Width of a token; default: the named model's. Heads are 64 wide; a narrower model has one
        head."""

    offers = frozenset({"tokens", "attention"})
    exports = ("transformers",)
    shape: ClassVar[tuple[int, int]]
    """Depth and width of the named model."""
    options: Options

    def __init__(self, options: Options, spec: TextSpec) -> None:
        super().__init__(options, spec)
        depth, width = options.depth or self.shape[0], options.width or self.shape[1]
        heads = max(1, width // 64)
        check_heads(self.name, width, heads)
        self.width = width
        self.depth = depth + 1
        self.token_embed = nn.Embedding(spec.vocab, width)
        self.position_embed = nn.Embedding(options.positions, width)
        self.dropout = nn.Dropout(options.dropout)
        self.blocks = Stack(
            Block(width, heads, GPT_STYLE, dropout=options.dropout) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-5)
        initialize(self)

    @property
    def embedding(self) -> Tensor:
        return self.token_embed.weight

    @property
    def causal(self) -> bool:
        return True

    def _embed(self, inputs: Tokens) -> Tensor:
        """Embed tokens with their positions: (B, T, D)."""
        places = torch.arange(inputs.ids.shape[1], device=inputs.ids.device)
        return self.dropout(self.token_embed(inputs.ids) + self.position_embed(places))

    def attention(self, inputs: Tokens) -> Tensor:
        """Attention weights (B, heads, T, T) of the last block; row t holds those of token t."""
        return self.blocks.attention(self._embed(inputs), inputs.attendable(), causal=True)

    def forward(self, inputs: Tokens) -> Features:
        layers = self.blocks.states(self._embed(inputs), inputs.attendable(), causal=True)
        layers[-1] = x = self.norm(layers[-1])
        read = last_real(inputs.real)
        return Features(
            gather_tokens(x, read), x, read=read, mask=inputs.real, layers=tuple(layers)
        )

    def layers(self) -> list[list[nn.Parameter]]:
        return layers_of(self, self.blocks, self.norm)

    def export(self, library: str) -> Exported:
        return Exported(self.to_transformers(), {"config.json": self.transformers_config()})

    def to_transformers(self) -> dict[str, Tensor]:
        """Return the weights as transformers' GPT2Model names them; its matrices are transposed."""
        renamed = {}
        for name, tensor in self.state_dict().items():
            for ours, theirs in TRANSFORMERS_NAMES:
                name = name.replace(ours, theirs)
            renamed[name] = tensor.T if TRANSPOSED.search(name) else tensor
        return renamed

    def transformers_config(self) -> dict[str, Any]:
        """Return the configuration of transformers' model."""
        dropout = self.options.dropout
        return {
            "architectures": ["GPT2Model"],
            "model_type": "gpt2",
            "vocab_size": len(self.embedding),
            "n_embd": self.width,
            "n_layer": self.depth - 1,
            "n_head": max(1, self.width // 64),
            "n_positions": self.options.positions,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "resid_pdrop": dropout,
            "embd_pdrop": dropout,
            "attn_pdrop": dropout,
        }

    def own_names(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename the weights of transformers' GPT2Model, or of a model with a head on it.

        Heads and the buffers of causal masks are left out.
        """
        renamed = {}
        for name, tensor in tensors.items():
            name = name.removeprefix("transformer.")
            is_ours = name.startswith(("wte.", "wpe.", "h.", "ln_f."))
            if not is_ours or re.search(r"\.attn\.(masked_)?bias$", name):
                continue
            transposed = TRANSPOSED.search(name)
            for ours, theirs in TRANSFORMERS_NAMES:
                name = name.replace(theirs, ours)
            renamed[name] = tensor.T.contiguous() if transposed else tensor
        return renamed


TRANSPOSED = re.compile(r"(c_attn|c_proj|c_fc)\.weight$")
"""Names of the matrices that GPT2Model holds transposed."""
TRANSFORMERS_NAMES = [
    ("token_embed.", "wte."),
    ("position_embed.", "wpe."),
    ("blocks.", "h."),
    (".norm1.", ".ln_1."),
    (".norm2.", ".ln_2."),
    (".attn.qkv.", ".attn.c_attn."),
    (".attn.proj.", ".attn.c_proj."),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
    ("norm.", "ln_f."),
]
"""Parts of parameter names: here, and in transformers."""


def _gpt(name: str, depth: int, width: int, about: str) -> None:
    tags = {"__doc__": about, "__module__": __name__, "shape": (depth, width)}
    backbones.register(name)(type(name, (Gpt,), tags))


_gpt("gpt-tiny", 2, 128, "GPT-2 of 2 layers, 128 wide.")
_gpt("gpt-mini", 4, 256, "GPT-2 of 4 layers, 256 wide.")
_gpt("gpt-base", 12, 768, "GPT-2 small: 12 layers, 768 wide (Radford et al. 2019).")
