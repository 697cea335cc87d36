"""What the pretext tasks on text share: how they lay text out, and the head that names tokens."""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from sslrun.backbones.text import TextBackbone
from sslrun.data.examples import Batch, Examples
from sslrun.data.specs import TextSpec
from sslrun.data.text.sequences import IGNORED, Documents, Tokens
from sslrun.pretexts.base import Pretext, PretextOptions

Pairs = Annotated[
    Literal["keep", "next", "drop"],
    Field(
        description="keep: BERT's pairs of segments, of which half do not belong together (RoBERTa suspects that BERT's row "
        "without next-sentence prediction kept them; Liu et al. 2019). next: pairs whose second segment goes on from the "
        "first, always. drop: full sequences of running text."
    ),
]


class LanguageOptions(PretextOptions):
    """How text is laid out."""

    pairs: Pairs = "keep"
    dupes: int = Field(1, ge=1)
    """Times that the corpus is laid out, each time divided anew; an epoch goes through all. BERT: 10."""
    cross_documents: bool = False
    """With `pairs: drop`: tokens attend to other documents of their sequence too."""

    @model_validator(mode="after")
    def _one_layout(self) -> LanguageOptions:
        if self.cross_documents and self.pairs != "drop":
            raise ValueError("cross_documents: true needs pairs: drop; the segments of a pair see each other as it is")
        return self


class LanguagePretext(Pretext):
    """A pretext task on text."""

    reads = TextSpec
    backbone: TextBackbone
    options: Any

    def arrange(self, examples: Examples, seed: int) -> Examples:
        """Documents in pairs or packed; a task's own texts (Krishna et al. 2023) as they are."""
        if not isinstance(examples, Documents):
            return examples
        given = self.options
        if given.pairs == "drop":
            return examples.pack(given.dupes)
        return examples.build_pairs(given.dupes, seed, random=0.5 if given.pairs == "keep" else 0.0)

    def tokens(self, batch: Batch) -> Tokens:
        """The batch's tokens, with the documents that may see each other."""
        tokens: Tokens = batch.inputs
        if self.options.cross_documents:
            return tokens._replace(documents=tokens.real.long(), packed=False)
        return tokens

    def held_out(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        output = self(self.views(batch, generator))
        return {"held_out_loss": output.loss, **{f"held_out_{name}": each for name, each in output.metrics.items()}}

    def floor(self, examples: Examples) -> float | None:
        if not isinstance(examples, Documents):
            return None
        counts = examples.count_unigrams().double()
        return self.without_context(counts / counts.sum())

    def without_context(self, shares: Tensor) -> float:
        """The lowest loss, in nats, of whoever knows nothing but how often each token occurs, `shares` (V,) of all: here
        their entropy."""
        return entropy(shares)


def embedding_of(backbone: TextBackbone) -> Tensor | None:
    """The backbone's token embeddings; None where it has none, as ELMo's characters."""
    try:
        return backbone.embedding
    except NotImplementedError:
        return None


def entropy(shares: Tensor) -> float:
    """In nats."""
    return -torch.xlogy(shares, shares).sum().item()


class TokenHead(nn.Module):
    """Scores of the vocabulary, as BERT's head: linear, GELU, norm, then the embedding matrix and a bias.

    `embedding_width`: of the matrix shared with the backbone; None: it has none, and the head makes its own.
    """

    def __init__(self, width: int, vocab: int, embedding_width: int | None) -> None:
        super().__init__()
        inner = embedding_width or width
        self.dense = nn.Linear(width, inner)
        self.norm = nn.LayerNorm(inner, eps=1e-12)
        self.bias = nn.Parameter(torch.zeros(vocab))
        self.weight = None if embedding_width else nn.Parameter(torch.empty(vocab, inner))
        nn.init.trunc_normal_(self.dense.weight, std=0.02)
        nn.init.zeros_(self.dense.bias)
        if self.weight is not None:
            nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, x: Tensor, embedding: Tensor | None) -> Tensor:
        """(..., D) to (..., V)."""
        return F.linear(self._inner(x), self._table(embedding), self.bias)

    def loss(self, x: Tensor, embedding: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy of x (..., D) at targets (...) that are not `IGNORED`, and the share named right.

        Some rows after the other: the scores of all tokens of a batch are more than a GPU's memory, or a cache, holds.
        """
        rows = max(1, (CPU_SCORES if x.device.type == "cpu" else GPU_SCORES) // len(self.bias))
        table, inner, flat = self._table(embedding), self._inner(x).flatten(0, -2), targets.flatten()
        count = (targets != IGNORED).sum().clamp_min(1)
        if len(flat) > rows and torch.is_grad_enabled():
            losses, right = cast(tuple[Tensor, Tensor], SummedLoss.apply(inner, table, self.bias, flat, rows))
        else:
            parts = zip(inner.split(rows), flat.split(rows), strict=True)
            found = [_summed(each, table, self.bias, wanted) for each, wanted in parts]
            losses, right = (torch.stack(each).sum() for each in zip(*found, strict=True))
        return losses / count, right / count

    def _inner(self, x: Tensor) -> Tensor:
        return self.norm(F.gelu(self.dense(x)))

    def _table(self, embedding: Tensor | None) -> Tensor:
        table = self.weight if self.weight is not None else embedding
        assert table is not None
        return table


CPU_SCORES = 2**23
"""Scores of tokens that are in memory at once: 32 MiB of float32. Fewer make narrow matrices, which multiply slowly."""
GPU_SCORES = 2**28
"""The same on a GPU."""


def _summed(x: Tensor, table: Tensor, bias: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy of x (N, E) at targets (N,) that are not `IGNORED`, and how many are named right."""
    scores = F.linear(x, table, bias).float()
    losses = F.cross_entropy(scores, targets, ignore_index=IGNORED, reduction="sum")
    return losses, (scores.detach().argmax(dim=-1) == targets).sum()  # no token is called IGNORED


class SummedLoss(torch.autograd.Function):
    """`_summed` in parts of so many rows, each of which adds to the gradient while its scores are at hand.

    A tape would keep the scores of all parts for the gradient, or compute them twice.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, bias: Tensor, targets: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """x (N, E), table (V, E), bias (V,), targets (N,); the matrices multiply in autocast's precision."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        summed, right = torch.zeros((), device=x.device), torch.zeros((), dtype=torch.int64, device=x.device)
        of_x, of_table, of_bias = (torch.zeros_like(each, dtype=torch.float32) for each in (x, table, bias))
        with torch.autocast(device, enabled=False):
            weight, offset = table.to(dtype), bias.to(dtype)
            for each, wanted, slope in zip(x.to(dtype).split(rows), targets.split(rows), of_x.split(rows), strict=True):
                scores = F.linear(each, weight, offset).float()
                known, truth = (wanted != IGNORED).float()[:, None], wanted.clamp_min(0)[:, None]
                best = scores.argmax(dim=1, keepdim=True)
                right += (best[:, 0] == wanted).sum()  # no token is called IGNORED
                highest, of_truth = scores.gather(1, best), scores.gather(1, truth)
                total = scores.sub_(highest).exp_().sum(dim=1, keepdim=True)
                summed += ((total.log() + highest - of_truth) * known).sum()
                # The gradient of the scores: probabilities, less 1 at the truth; nothing where there is none.
                scores.mul_(known / total).scatter_add_(1, truth, -known)
                of_bias += scores.sum(dim=0)
                scores = scores.to(dtype)
                slope.copy_(scores @ weight)
                of_table += scores.T @ each
        ctx.mark_non_differentiable(right)
        ctx.save_for_backward(
            *(g.to(each.dtype) for g, each in zip((of_x, of_table, of_bias), (x, table, bias), strict=True))
        )
        return summed, right

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return *(gradients[0] * each for each in ctx.saved_tensors), None, None


def following(tokens: Tokens) -> Tensor:
    """(B, T) the token after each within its document; `IGNORED` where there is none."""
    after = tokens.ids.roll(-1, dims=1)
    same = tokens.documents.roll(-1, dims=1) == tokens.documents
    same[:, -1] = False
    return torch.where(same & tokens.real, after, IGNORED)


def preceding(tokens: Tokens) -> Tensor:
    """(B, T) the token before each within its document; `IGNORED` where there is none."""
    before = tokens.ids.roll(1, dims=1)
    same = tokens.documents.roll(1, dims=1) == tokens.documents
    same[:, 0] = False
    return torch.where(same & tokens.real, before, IGNORED)
