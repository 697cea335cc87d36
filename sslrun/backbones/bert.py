"""BERT (Devlin et al., NAACL 2019): a Transformer encoder of text.

Weights can be exported to and loaded from transformers.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from sslrun.backbones.attention import MIN_BLOCKS, make_band
from sslrun.backbones.base import Exported, Features, backbones
from sslrun.backbones.text import TextBackbone, check_heads, gather_tokens, last_real
from sslrun.backbones.transformer import (
    BERT_STYLE,
    STD,
    Block,
    BlockStyle,
    Mask,
    Stack,
    initialize,
)
from sslrun.data.specs import TextSpec
from sslrun.data.text.sequences import Tokens
from sslrun.errors import UserError
from sslrun.registry import Options

BASE = 10_000.0
"""Base of rotary positions (Su et al. 2021)."""
FAST_STYLE = BlockStyle(eps=1e-12, bias=False, rotary=BASE, gated=True)
"""A modern block with about as many parameters as BERT's."""


class Bert(TextBackbone):
    """Post-norm Transformer over token, position and segment embeddings.

    BERT: Devlin et al., NAACL 2019 (arXiv:1810.04805). `pooled` is the tanh of a linear map of
    [CLS], which next-sentence prediction and fine-tuning read. In a causal model [CLS] sees no
    other token, so the last real token takes its place.

    `fast` selects a modern block of the same shape. With `window: 128`, `theta: 160000` and
    `dropout: 0` it is close to ModernBERT (Warner et al. 2024, arXiv:2412.13663). Deviations: the
    gated MLP has as many parameters as BERT's, 8 / 3 widths instead of 1.5; the first block keeps
    its norm; there are embeddings of segments; padding is avoided by batches of similar lengths and
    by packing instead of being removed in the network.
    """

    class Options(Options):
        causal: bool = False
        """Let tokens attend only to earlier ones, in pretraining and after: the left-to-right row
        of BERT's Table 5."""
        dropout: float = Field(0.1, ge=0, lt=1)
        """Dropout rate on embeddings, attention weights and the output of each branch."""
        positions: int = Field(512, ge=8)
        """Number of positions: the longest sequence, in tokens."""
        fast: bool = False
        """Use pre-norm, rotary positions, a gated GELU and no biases instead of the paper's block
        (as ModernBERT, Warner et al. 2024, and cramming, Geiping and Goldstein 2023)."""
        norm: Literal["layer", "rms"] = "layer"
        """Kind of the blocks' norms: LayerNorm, or RMSNorm (Zhang and Sennrich 2019)."""
        window: int | None = Field(None, ge=2)
        """Attention window of two in three layers, in tokens, half on each side; the first layer
        and every third from it attend to all (ModernBERT: 128). It saves time in sequences of
        at least 3.5 windows. Default: all layers attend to all."""
        theta: float = Field(BASE, gt=1)
        """Base of the rotary positions of `fast`, in layers that attend to all tokens (ModernBERT:
        160,000, and 10,000 up to sequences of 1,024 tokens). Layers with a window have 10,000."""
        depth: int | None = Field(None, ge=1)
        """Number of layers; default: the named model's."""
        width: int | None = Field(None, ge=1)
        """Width of a token; default: the named model's."""
        heads: int | None = Field(None, ge=1)
        """Number of attention heads; default: the named model's."""
        std: float = Field(STD, gt=0)
        """Standard deviation of initial linear maps. The paper's value suits widths of at least
        768; narrow models learn faster with about 1 / sqrt(width)."""
        word_std: float = Field(STD, gt=0)
        """Standard deviation of initial word embeddings. A larger value such as 0.1 gives words
        more weight than positions and segments, which keep 0.02."""

        @model_validator(mode="after")
        def _consistent(self) -> Bert.Options:
            if self.theta != BASE and not self.fast:
                raise ValueError("theta is the base of rotary positions, which need fast: true")
            return self

        def choices(self) -> list[str]:
            return (
                ["whole sequences are read at their last token, because [CLS] sees no other token"]
                if self.causal
                else []
            )

    offers = frozenset({"tokens", "attention", "segments", "causal", "embed"})
    exports = ("transformers",)
    shape: ClassVar[tuple[int, int]]
    """Depth and width of the named model; its heads are 64 wide."""
    options: Options

    def __init__(self, options: Options, spec: TextSpec) -> None:
        super().__init__(options, spec)
        depth, width, heads = self.shape_of(options)
        check_heads(self.name, width, heads)
        if options.fast and width // heads % 2:
            raise UserError(
                f"{self.name}: heads are {width // heads} wide, but rotary positions need an even "
                "width: change backbone.width or backbone.heads"
            )
        self.width = width
        self.depth = depth + 1
        self.token_embed = nn.Embedding(spec.vocab, width)
        self.segment_embed = nn.Embedding(2, width)
        self.position_embed = None if options.fast else nn.Embedding(options.positions, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(options.dropout)
        self.style = replace(FAST_STYLE if options.fast else BERT_STYLE, kind=options.norm)
        whole = replace(self.style, rotary=options.theta) if options.fast else self.style
        styles = [self.style if self.is_local(number) else whole for number in range(depth)]
        self.blocks = Stack(Block(width, heads, style, dropout=options.dropout) for style in styles)
        self.final_norm = self.style.make_norm(width) if options.fast else nn.Identity()
        self.pooler = nn.Linear(width, width)
        initialize(self, options.std)
        with torch.no_grad():
            self.token_embed.weight *= options.word_std / STD

    @classmethod
    def shape_of(cls, options: Bert.Options) -> tuple[int, int, int]:
        """Depth, width and heads: those of the options, else the named model's."""
        depth, width = cls.shape
        width = options.width or width
        return options.depth or depth, width, options.heads or max(1, width // 64)

    @property
    def embedding(self) -> Tensor:
        return self.token_embed.weight

    @property
    def causal(self) -> bool:
        return self.options.causal

    def embed(self, inputs: Tokens) -> Tensor:
        """Embed tokens with their positions and segments: (B, T, D)."""
        x = self.token_embed(inputs.ids) + self.segment_embed(inputs.segments)
        if self.position_embed is not None:
            x = x + self.position_embed(torch.arange(x.shape[1], device=x.device))
        return self.dropout(self.norm(x))

    def is_local(self, number: int) -> bool:
        """Whether the block of that number, from 0, attends to a window."""
        return self.options.window is not None and number % 3 > 0

    def attention(self, inputs: Tokens) -> Tensor:
        """Attention weights (B, heads, T, T) of the last block; row t holds those of token t."""
        causal = self.options.causal or inputs.causal
        whole = inputs.attendable()
        near = None if self.options.window is None else self._near_mask(inputs, whole)
        masks = [near if self.is_local(number) else whole for number in range(len(self.blocks))]
        return self.blocks.attention(self.embed(inputs), masks, causal)

    def _masks(self, inputs: Tokens, causal: bool) -> list[Mask]:
        """The attention mask of each block: of all tokens, or of those in the window.

        The choice of a band depends on the sequences' length, not on their content.
        """
        whole, window = inputs.attendable(), self.options.window
        near: Mask = whole
        if window is not None:
            length, reach = inputs.ids.shape[1], window // 2
            if length >= MIN_BLOCKS * reach:
                near = make_band(inputs.documents, reach, causal)
            elif length > reach + 1:
                near = self._near_mask(inputs, whole)
        return [near if self.is_local(number) else whole for number in range(len(self.blocks))]

    def _near_mask(self, inputs: Tokens, whole: Tensor | None) -> Tensor:
        """The mask `whole`, within the window."""
        assert self.options.window is not None
        places = torch.arange(inputs.ids.shape[1], device=inputs.ids.device)
        distances = (places[:, None] - places).abs()
        near = distances <= self.options.window // 2
        if whole is None:
            return near
        # Padding far from text attends to itself, so that no row is empty.
        return (near & whole) | (distances == 0)

    def forward(self, inputs: Tokens) -> Features:
        causal = self.options.causal or inputs.causal
        layers = self.blocks.states(self.embed(inputs), self._masks(inputs, causal), causal)
        layers[-1] = x = self.final_norm(layers[-1])
        real = inputs.real
        read = last_real(real) if causal else torch.zeros_like(inputs.ids[:, 0])
        return Features(
            torch.tanh(self.pooler(gather_tokens(x, read))),
            x,
            read=read,
            mask=real,
            layers=tuple(layers),
        )

    def layers(self) -> list[list[nn.Parameter]]:
        embeddings = [
            self.token_embed,
            self.segment_embed,
            self.norm,
            *([self.position_embed] if self.position_embed else []),
        ]
        blocks = [list(block.parameters()) for block in self.blocks]
        blocks[-1] += [*self.final_norm.parameters(), *self.pooler.parameters()]
        return [[*nn.ModuleList(embeddings).parameters()], *blocks]

    def export(self, library: str) -> Exported:
        return Exported(self.to_transformers(), {"config.json": self.transformers_config()})

    def to_transformers(self) -> dict[str, Tensor]:
        """Return the weights under the names of transformers' BertModel.

        Raises:
            UserError: the model is `fast`, or has other norms or a window, for which transformers
                has no class.
        """
        parts = {"fast", "norm", "window"}
        modern = self.options.model_dump(include=parts, exclude_defaults=True)
        for option, value in modern.items():
            raise UserError(
                f"{self.name}: transformers has no counterpart of {option}: {str(value).lower()}"
            )
        renamed: dict[str, Tensor] = {}
        for name, tensor in self.state_dict().items():
            if ".attn.qkv." in name:
                block, kind = name.split(".")[1], name.rsplit(".", 1)[1]
                for part, piece in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                    renamed[f"encoder.layer.{block}.attention.self.{part}.{kind}"] = piece
            else:
                renamed[_rename(name, TRANSFORMERS_NAMES)] = tensor
        return renamed

    def transformers_config(self) -> dict[str, Any]:
        """Return the configuration of transformers' model.

        A causal model is a decoder there, and transformers still pools its [CLS].
        """
        depth, width, heads = self.shape_of(self.options)
        return {
            "architectures": ["BertModel"],
            "model_type": "bert",
            "vocab_size": len(self.embedding),
            "hidden_size": width,
            "num_hidden_layers": depth,
            "num_attention_heads": heads,
            "intermediate_size": 4 * width,
            "max_position_embeddings": self.options.positions,
            "type_vocab_size": 2,
            "hidden_act": "gelu",
            "hidden_dropout_prob": self.options.dropout,
            "attention_probs_dropout_prob": self.options.dropout,
            "layer_norm_eps": 1e-12,
            "is_decoder": self.options.causal,
        }

    def own_names(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename the weights of transformers' BertModel, or of a model with a head on it.

        Heads are left out.
        """
        tensors = {_modernize(name): tensor for name, tensor in tensors.items()}
        names = [(theirs, ours) for ours, theirs in TRANSFORMERS_NAMES]
        renamed: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            if not name.startswith(("embeddings.", "encoder.", "pooler.")) or name.endswith(
                "position_ids"
            ):
                continue
            match = re.fullmatch(r"encoder\.layer\.(\d+)\.attention\.self\.query\.(\w+)", name)
            if match:
                parts = [tensors[name.replace("query", part)] for part in ("query", "key", "value")]
                renamed[f"blocks.{match[1]}.attn.qkv.{match[2]}"] = torch.cat(parts)
            elif ".attention.self." not in name:
                renamed[_rename(name, names)] = tensor
        return renamed


TRANSFORMERS_NAMES = [
    ("token_embed.", "embeddings.word_embeddings."),
    ("segment_embed.", "embeddings.token_type_embeddings."),
    ("position_embed.", "embeddings.position_embeddings."),
    ("pooler.", "pooler.dense."),
    (".attn.proj.", ".attention.output.dense."),
    (".norm1.", ".attention.output.LayerNorm."),
    (".mlp.fc1.", ".intermediate.dense."),
    (".mlp.fc2.", ".output.dense."),
    (".norm2.", ".output.LayerNorm."),
    ("blocks.", "encoder.layer."),
]
"""Parts of parameter names: here, and in transformers."""


def _modernize(name: str) -> str:
    """Translate a name of old checkpoints: `gamma` and `beta` of norms, and the prefix `bert.`."""
    name = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)
    return re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name).removeprefix("bert.")


def _rename(name: str, pairs: list[tuple[str, str]]) -> str:
    """Replace the parts of a parameter name by `pairs` of (old, new)."""
    if name.startswith("norm."):
        return name.replace("norm.", "embeddings.LayerNorm.")
    if name.startswith("embeddings.LayerNorm."):
        return name.replace("embeddings.LayerNorm.", "norm.")
    attention = ".attention.output." in name
    for old, new in pairs:
        if old in name and not (attention and old in (".output.dense.", ".output.LayerNorm.")):
            name = name.replace(old, new)
    return name


def _bert(name: str, depth: int, width: int, about: str) -> None:
    tags = {"__doc__": about, "__module__": __name__, "shape": (depth, width)}
    backbones.register(name)(type(name, (Bert,), tags))


_bert("bert-tiny", 2, 128, "BERT of 2 layers, 128 wide (Turc et al. 2019).")
_bert("bert-mini", 4, 256, "BERT of 4 layers, 256 wide (Turc et al. 2019).")
_bert("bert-small", 4, 512, "BERT of 4 layers, 512 wide (Turc et al. 2019).")
_bert("bert-medium", 8, 512, "BERT of 8 layers, 512 wide (Turc et al. 2019).")
_bert("bert-base", 12, 768, "BERT_BASE: 12 layers, 768 wide (Devlin et al. 2019).")
_bert("bert-large", 24, 1024, "BERT_LARGE: 24 layers, 1024 wide (Devlin et al. 2019).")
