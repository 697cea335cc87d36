"""Attentive probing: a head that attends to the tokens of a frozen backbone."""

from __future__ import annotations

import math
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from sslrun.backbones.base import Backbone, Features
from sslrun.backbones.transformer import STD, Attention, Mlp, initialize
from sslrun.data.examples import Batch
from sslrun.errors import UserError
from sslrun.protocols.base import Bench, Protocol, Scores, protocols
from sslrun.tasks.base import Task, TaskLearner, TaskOptions
from sslrun.training.device import Precision
from sslrun.training.learner import Output
from sslrun.training.schedule import Schedule

CACHED = 2**31
"""Largest number of bytes of tokens that are kept on the device."""
EFFICIENT_QUERIES = 32
"""Number of queries of the efficient probe in its paper."""


class AttentiveOptions(Schedule):
    """Options of attentive probing.

    Defaults are those of V-JEPA's probe of images (Bardes et al. 2024, arXiv:2404.08471, and
    configs/evals of its authors' code): AdamW, a rate of 0.001 that falls along a cosine, 20
    epochs.
    """

    epochs: float | None = Field(20, gt=0)
    """Number of passes over the labeled examples. Give this or `steps`."""
    weight_decay: float = Field(0.001, ge=0)
    """Weight decay, decoupled in adamw."""
    block: bool = True
    """true: V-JEPA's probe, a cross-attention block with an MLP, read by learned queries. false:
    efficient probing (Psomas et al., ICLR 2026, arXiv:2506.10178): each learned query attends
    without a projection of keys, and pools its own share of the features."""
    queries: int | None = Field(None, ge=1)
    """Number of learned queries; default: 1 with `block`, whose outputs are averaged; without, the
    largest number up to 32 that divides the width."""
    heads: int | None = Field(None, ge=1)
    """Number of heads of `block: true`; default: as many as are 64 wide."""
    augment: bool = True
    """Augment training images as the task says, and run the frozen backbone in every step. false:
    compute the tokens of images once, without augmentation, if they fit into 2 GiB."""

    @model_validator(mode="before")
    @classmethod
    def _steps_replace_default_epochs(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("steps") is not None and "epochs" not in values:
            return {**values, "epochs": None}
        return values

    @model_validator(mode="after")
    def _heads_need_block(self) -> AttentiveOptions:
        if self.heads is not None and not self.block:
            raise ValueError("heads go with block: true; queries take their place without a block")
        return self


class CrossAttentionPool(nn.Module):
    """Pool tokens by learned queries and one block of cross-attention (V-JEPA's attentive probe).

    Queries have a residual connection around the attention and around the MLP. As in the authors'
    code, tokens have a norm before attention, and queries have none.
    """

    def __init__(self, width: int, queries: int, heads: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.empty(queries, width))
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, 4 * width)
        initialize(self)
        nn.init.trunc_normal_(self.queries, std=STD)
        with torch.no_grad():
            for linear in (self.attn.proj, self.mlp.fc2):
                linear.weight.div_(math.sqrt(2))

    def forward(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Pool tokens (B, T, D) to (B, D); `mask` (B, T) is False at padding."""
        allowed = None if mask is None else mask[:, None, None]
        x = self.queries.expand(len(tokens), -1, -1)
        x = x + self.attn(x, memory=self.norm1(tokens), mask=allowed)
        x = x + self.mlp(self.norm2(x))
        return x.mean(dim=1)


class EfficientPool(nn.Module):
    """Pool tokens by learned queries that attend to them directly (efficient probing).

    Query j gives attention weights over the tokens, by which share j of the projected tokens is
    averaged. The shares side by side have the backbone's width. As in the authors' code, a batch
    norm without scale and shift follows: features that are nearly equal for all images would learn
    slowly without it.
    """

    def __init__(self, width: int, queries: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(queries, width) * STD)
        self.values = nn.Linear(width, width, bias=False)
        self.norm = nn.BatchNorm1d(width, affine=False, eps=1e-6)

    def weights(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Attention weights (B, Q, T); rows sum to 1."""
        scores = self.queries @ tokens.transpose(1, 2) * tokens.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], float("-inf"))
        return scores.softmax(dim=-1)

    def forward(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Pool tokens (B, T, D) to (B, D); `mask` (B, T) is False at padding.

        Shapes: values (B, Q, T, D / Q), weights (B, Q, 1, T).
        """
        values = self.values(tokens).unflatten(-1, (len(self.queries), -1)).transpose(1, 2)
        pooled = self.weights(tokens, mask)[:, :, None] @ values
        return self.norm(pooled.flatten(1))


class AttentiveHead(nn.Module):
    """Pool the tokens of the features, and apply the task's linear head."""

    def __init__(self, pool: nn.Module, linear: nn.Module) -> None:
        super().__init__()
        self.pool = pool
        self.linear = linear

    def forward(self, features: Features) -> Tensor:
        """Outputs (B, C)."""
        return self.linear(self.pool(features.tokens, features.mask))


class AttentiveLearner(TaskLearner):
    """An attentive head on a frozen backbone.

    With `augment` false, training examples are not augmented. With `cached`, training batches hold
    tokens (B, T, D) in place of raw inputs.
    """

    def __init__(
        self, backbone: Backbone, task: Task, head: AttentiveHead, augment: bool, cached: bool
    ) -> None:
        super().__init__(backbone, task, head, frozen=True)
        self.augment = augment
        self.cached = cached

    def readout(self, features: Features) -> Features:
        return self.task.join(features)

    def views(self, batch: Batch, generator: torch.Generator) -> tuple[Any, Any]:
        if self.augment:
            return self.task.views(batch, generator)
        return batch.inputs if self.cached else self.task.inputs(batch), batch.labels

    def forward(self, views: tuple[Any, Any]) -> Output:
        if not self.cached:
            return super().forward(views)
        tokens, targets = views
        features = Features(tokens[:, 0], tokens)
        return Output(self.task.loss(self._apply_head(features), targets))


@protocols.register("attentive")
class Attentive(Protocol):
    """Train a head that attends to the frozen tokens (attentive probing).

    Linear probes misjudge models whose pooled features were not trained: with efficient probing,
    MAE's ViT-B gains 7.7 points on ImageNet over a linear probe (67.8 and 75.5 %, in the table of
    the authors' code, github.com/billpsomas/efficient-probing).
    """

    Options = AttentiveOptions
    options: AttentiveOptions
    synonyms = ("EP", "attentive probe", "attentive probing", "efficient probing")

    @classmethod
    def supports(cls, task: type[Task], options: TaskOptions) -> str | None:
        if options.reads_order:
            return "attends to the tokens of all frames alike, without their order: take pool: mean"
        if options.linear:
            return None
        return f"needs one output per example, which the task '{task.name}' does not have"

    def needs(self) -> tuple[str, ...]:
        return ("tokens",)

    def check_backbone(self, backbone: Backbone) -> None:
        """Raise UserError if queries or heads do not divide the backbone's width."""
        backbone.require("tokens", "attentive")
        self._pool(backbone.width)

    def trains(self, options: TaskOptions) -> bool:
        return True

    def head_obstacle(self) -> str | None:
        return "does not read the backbone's pooled features"

    def refit_obstacle(self) -> str | None:
        return None

    @property
    def precision(self) -> Precision:
        return self.options.precision

    def run(self, bench: Bench) -> Scores:
        backbone = bench.backbone()
        self.check_backbone(backbone)
        tokens = None if self.options.augment else bench.tokens(bench.learned, CACHED)
        torch.manual_seed(bench.seed)
        head = AttentiveHead(
            self._pool(backbone.width), bench.task.head(backbone.width, backbone.depth)
        )
        learner = AttentiveLearner(
            backbone, bench.task, head, self.options.augment, tokens is not None
        )
        trained = bench.train(
            learner, self.options, self.name, split=bench.learned, examples=tokens
        )
        bench.keep_head(trained.head)
        return Scores({split: bench.evaluate(trained, split) for split in bench.scored})

    def _pool(self, width: int) -> nn.Module:
        """Build the pooling module for tokens of a width. Raises UserError if it does not fit."""
        if self.options.block:
            heads = self.options.heads or max(1, width // 64)
            _check_divisor("heads", heads, width)
            return CrossAttentionPool(width, self.options.queries or 1, heads)
        queries = self.options.queries or largest_divisor(width, EFFICIENT_QUERIES)
        _check_divisor("queries", queries, width)
        return EfficientPool(width, queries)


def largest_divisor(width: int, most: int) -> int:
    """The largest divisor of `width` that is at most `most`."""
    return max(count for count in range(1, most + 1) if width % count == 0)


def _check_divisor(option: str, value: int, width: int) -> None:
    if width % value:
        near = largest_divisor(width, value)
        raise UserError(
            f"attentive.{option}: {value} does not divide the backbone's width, {width}: "
            f"set {option}: {near}"
        )
