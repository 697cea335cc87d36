"""The attention block that all Transformers share: ViT, BERT, GPT and the encoder-decoder.

The models differ in what they embed and in which tokens may attend to which. Masks, causality and
cross-attention are arguments of the block (Vaswani et al. 2017, arXiv:1706.03762). Parameters have
timm's names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sslrun.backbones.attention import Band, attend, attend_locally

Map = Callable[[Tensor], Tensor]
Mask = Tensor | Band | None
"""What tokens may attend to; see `Attention.forward`."""
AnyMask = TypeVar("AnyMask", bound=Mask)


class Cache(dict["Attention", tuple[Tensor, Tensor]]):
    """The keys and values (B, heads, S, d) that each attention layer has computed so far.

    For decoding token by token. A layer that gets a cache attends to what is there and to its new
    input, and adds the keys and values of that input. Those of a memory are computed once.
    """

    @property
    def length(self) -> int:
        """Number of tokens so far, which are those of the first layer: it attends to its input."""
        return next(iter(self.values()))[0].shape[2] if self else 0

    def select(self, rows: Tensor) -> Cache:
        """The cache of sequences (R,) of the batch, by index; they may repeat."""
        return Cache({layer: (k[rows], v[rows]) for layer, (k, v) in self.items()})


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017).

    Queries are computed from x (B, T, D); keys and values from x or from `memory` (B, S, D). With
    `rotary`, queries and keys are rotated by their position, on this base.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        bias: bool = True,
        dropout: float = 0.0,
        rotary: float | None = None,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of heads {heads}")
        self.heads = heads
        self.dropout = dropout
        self.rotary = rotary
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.proj = nn.Linear(width, width, bias=bias)

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        mask: Mask = None,
        causal: bool = False,
        cache: Cache | None = None,
    ) -> Tensor:
        """Attend, and return (B, T, D).

        `mask` is bool, broadcastable to (B, heads, T, S), and True where attention is allowed; each
        row needs at least one True. `causal` also forbids later positions. A `Band` lets tokens of
        x attend to near ones alone, and says itself whether to later ones. With a `cache`, x
        follows the input of earlier calls, and S counts that input, too.
        """
        q, k, v = self._qkv(x, memory, cache)
        dropout = self.dropout if self.training else 0.0
        if isinstance(mask, Band):
            mixed = attend_locally(q, k, v, mask, dropout)
        else:
            if causal and (mask is not None or cache is not None):
                earlier = _no_later(q, k)
                mask, causal = earlier if mask is None else mask & earlier, False
            mixed = attend(q, k, v, mask, causal, dropout)
        return self.proj(mixed.transpose(1, 2).flatten(2))

    def weights(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        mask: Tensor | None = None,
        causal: bool = False,
    ) -> Tensor:
        """Attention weights (B, heads, T, S) of `forward`, before dropout; rows sum to 1."""
        q, k, _ = self._qkv(x, memory)
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        if causal:
            scores = scores.masked_fill(~_no_later(q, k), float("-inf"))
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return scores.softmax(dim=-1)

    def _qkv(
        self, x: Tensor, memory: Tensor | None, cache: Cache | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, heads, T, d), and keys and values (B, heads, S, d)."""
        past = None if cache is None else cache.get(self)
        if memory is not None:
            width = x.shape[-1]
            bias = (
                (None, None) if self.qkv.bias is None else self.qkv.bias.split((width, 2 * width))
            )
            q = self._split(F.linear(x, self.qkv.weight[:width], bias[0]))
            if past is None:
                both = F.linear(memory, self.qkv.weight[width:], bias[1])
                past = self._split(both[..., :width]), self._split(both[..., width:])
            k, v = past
        else:
            q, k, v = (self._split(part) for part in self.qkv(x).chunk(3, dim=-1))
            if self.rotary:
                start = 0 if past is None else past[0].shape[2]
                q, k = rotate(q, self.rotary, start), rotate(k, self.rotary, start)
            if past is not None:
                k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        if cache is not None:
            cache[self] = k, v
        return q, k, v

    def _split(self, x: Tensor) -> Tensor:
        """Split (B, T, D) into heads (B, heads, T, d)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def rotate(x: Tensor, base: float, start: int = 0) -> Tensor:
    """Rotate queries or keys (B, heads, T, d) by angles proportional to their position.

    The first of them is at position `start`.

    Rotary embeddings (Su et al. 2021, arXiv:2104.09864; their base is 10,000): positions affect the
    product of a query and a key only through their distance.
    """
    half = x.shape[-1] // 2
    places = torch.arange(start, start + x.shape[-2], device=x.device, dtype=torch.float32)
    rates = base ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angles = (places[:, None] * rates)[:, None]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    # In memory heads stay inside of tokens, so that `attend_locally` cuts blocks without a copy.
    first, second = x.transpose(1, 2).chunk(2, dim=-1)
    rotated = torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
    return rotated.transpose(1, 2)


def _no_later(q: Tensor, k: Tensor) -> Tensor:
    """Causal mask (T, S) for queries (..., T, d) of the last T of S keys (..., S, d)."""
    queries, keys = q.shape[-2], k.shape[-2]
    return torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)


class Mlp(nn.Module):
    """Two linear maps with an activation between them: the second half of a block."""

    def __init__(
        self, width: int, hidden: int, activation: Map = F.gelu, bias: bool = True
    ) -> None:
        super().__init__()
        self.activation = activation
        self.fc1 = nn.Linear(width, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class GatedMlp(nn.Module):
    """An MLP with a gate: the activated half of the first map times its other half.

    GLU variants: Shazeer 2020 (arXiv:2002.05202).
    """

    def __init__(
        self, width: int, hidden: int, activation: Map = F.gelu, bias: bool = True
    ) -> None:
        super().__init__()
        self.activation = activation
        self.fc1 = nn.Linear(width, 2 * hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(self.activation(gate) * value)


class DropPath(nn.Module):
    """Drop a residual branch for random examples (stochastic depth; Huang et al., ECCV 2016)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return branch
        kept = branch.new_empty(len(branch), *[1] * (branch.ndim - 1)).bernoulli_(1 - self.rate)
        return branch * kept / (1 - self.rate)


@dataclass(frozen=True)
class BlockStyle:
    """The kind of a block: the same for all blocks of a model, and different between models."""

    norm: Literal["pre", "post"] = "pre"
    """Position of the norms: before each branch, or after its residual sum."""
    kind: Literal["layer", "rms"] = "layer"
    """Kind of the norms: LayerNorm, or RMSNorm, which neither centers nor shifts."""
    eps: float = 1e-6
    """Epsilon of the norms."""
    bias: bool = True
    """Whether linear maps and norms have biases."""
    activation: Map = F.gelu
    """Activation of the MLP."""
    gated: bool = False
    """Whether the MLP is a `GatedMlp`, with as many parameters."""
    rotary: float | None = None
    """Base of the rotation of self-attention's queries and keys by their position; None: none."""
    expansion: int = 4
    """Hidden width of the MLP, as a multiple of the block's width."""

    def make_norm(self, width: int) -> nn.Module:
        """Build a norm of this style over `width` features."""
        if self.kind == "rms":
            return nn.RMSNorm(width, eps=self.eps)
        return nn.LayerNorm(width, eps=self.eps, bias=self.bias)


VIT_STYLE = BlockStyle()
"""The block of ViT: pre-norm, GELU, biases."""
BERT_STYLE = BlockStyle(norm="post", eps=1e-12)
"""The block of BERT: post-norm."""


class Block(nn.Module):
    """Attention and an MLP, usually four times as wide, each with a norm and a residual connection.

    `cross` adds attention to a memory between the two. Dropout is where BERT and GPT have it: on
    attention weights and on the output of each branch.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        style: BlockStyle = VIT_STYLE,
        *,
        cross: bool = False,
        dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        bias, activation = style.bias, style.activation
        self.pre = style.norm == "pre"
        self.norm1 = style.make_norm(width)
        self.attn = Attention(width, heads, bias, dropout, style.rotary)
        self.cross = Attention(width, heads, bias, dropout) if cross else None
        self.norm_cross = style.make_norm(width) if cross else None
        self.norm2 = style.make_norm(width)
        hidden = style.expansion * width
        self.mlp = (
            GatedMlp(width, hidden * 2 // 3, activation, bias)
            if style.gated
            else Mlp(width, hidden, activation, bias)
        )
        self.dropout = nn.Dropout(dropout)
        self.drop_path = DropPath(drop_path)

    def forward(
        self,
        x: Tensor,
        mask: Mask = None,
        causal: bool = False,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Transform tokens (B, T, D); masks and the cache are as in `Attention`.

        Raises:
            ValueError: `memory` (B, S, D) without `cross`, or the reverse.
        """
        if (memory is None) != (self.cross is None):
            raise ValueError("memory and cross-attention go together")
        x = self._add(x, self.norm1, lambda y: self.attn(y, None, mask, causal, cache))
        if self.cross is not None and self.norm_cross is not None:
            cross = self.cross
            x = self._add(x, self.norm_cross, lambda y: cross(y, memory, memory_mask, False, cache))
        return self._add(x, self.norm2, self.mlp)

    def attention(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """Self-attention weights (B, heads, T, T) that `forward` uses on `x`."""
        return self.attn.weights(self.norm1(x) if self.pre else x, mask=mask, causal=causal)

    def _add(self, x: Tensor, norm: nn.Module, branch: Map) -> Tensor:
        if self.pre:
            return x + self.drop_path(self.dropout(branch(norm(x))))
        return norm(x + self.drop_path(self.dropout(branch(x))))


Masks = Mask | list[Mask]
"""The attention mask of all blocks, or a list with one for each; None: no mask."""


class Stack(nn.ModuleList):
    """A sequence of blocks: the body of every Transformer."""

    recomputes = False
    """Whether training keeps the blocks' inputs alone, and computes the rest again for gradients.

    Random numbers are drawn again as before, so that gradients are the same.
    """

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        causal: bool = False,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Tokens (B, T, D) after the last block; the arguments are those of `Block`."""
        for block in self:
            x = self.through(block, x, mask, causal, memory, memory_mask, cache)
        return x

    def states(self, x: Tensor, masks: Masks = None, causal: bool = False) -> list[Tensor]:
        """Tokens (B, T, D) before the first block and after each block: depth + 1 tensors.

        There is one mask for all blocks, or a list with one for each.
        """
        states = [x]
        for block, mask in zip(self, self._spread(masks), strict=True):
            states.append(self.through(block, states[-1], mask, causal))
        return states

    def through(self, block: nn.Module, *arguments: Any) -> Tensor:
        """Return the output (B, T, D) of a block of this stack; `arguments` are in its order."""
        if self.recomputes and self.training and torch.is_grad_enabled():
            return checkpoint(block, *arguments, use_reentrant=False)
        return block(*arguments)

    def attention(
        self, x: Tensor, masks: Tensor | list[Tensor | None] | None = None, causal: bool = False
    ) -> Tensor:
        """Attention weights (B, heads, T, T) of the last block, for tokens (B, T, D)."""
        last, spread = self[-1], self._spread(masks)
        assert isinstance(last, Block)
        for block, mask in zip(self[:-1], spread[:-1], strict=True):
            x = block(x, mask, causal)
        return last.attention(x, spread[-1], causal)

    def _spread(self, masks: AnyMask | list[AnyMask]) -> list[AnyMask]:
        """Return a list with a mask for each block."""
        return masks if isinstance(masks, list) else [masks] * len(self)


def checkpoint_activations(network: nn.Module) -> bool:
    """Let all of a network's stacks recompute their blocks; return whether it has a stack."""
    stacks = [module for module in network.modules() if isinstance(module, Stack)]
    for stack in stacks:
        stack.recomputes = True
    return bool(stacks)


def layers_of(network: nn.Module, blocks: Stack, norm: nn.Module) -> list[list[nn.Parameter]]:
    """The parameters of a network by layer: all that is below the blocks, then each block.

    The final norm joins the last block, so that learning rates decay as in BEiT and MAE.
    """
    above = {*blocks.parameters(), *norm.parameters()}
    embeddings = [parameter for parameter in network.parameters() if parameter not in above]
    layers = [list(block.parameters()) for block in blocks]
    layers[-1] += norm.parameters()
    return [embeddings, *layers]


def depth_rates(highest: float, depth: int) -> list[float]:
    """Drop-path rates that rise linearly from 0 at the first block to `highest` at the last."""
    return [highest * block / max(1, depth - 1) for block in range(depth)]


STD = 0.02
"""Standard deviation of initial weights in the code of ViT and BERT."""


def initialize(module: nn.Module, std: float = STD) -> None:
    """Initialize a module as the code of ViT and BERT does.

    Linear maps are truncated-normal with standard deviation `std`, embeddings with `STD`, and
    biases are zero.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Embedding):
            nn.init.trunc_normal_(layer.weight, std=STD)
        elif isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
