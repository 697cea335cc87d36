"""The head that predicts tokens, and its loss without the scores of a whole batch in memory."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import repeat
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslrun.data.text.sequences import IGNORED


class TokenHead(nn.Module):
    """BERT's head over the vocabulary: linear, GELU, norm, then the embedding matrix and a bias.

    `embedding_width` is the width of the matrix that is shared with the backbone; None: the head
    has a matrix of its own. The token `impossible` has probability 0; None: none has.
    """

    def __init__(
        self,
        width: int,
        vocab: int,
        embedding_width: int | None,
        impossible: int | None = None,
    ) -> None:
        super().__init__()
        self.impossible = impossible
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
        """Scores (..., V) of features (..., D)."""
        return F.linear(self._inner(x), self._table(embedding), self._offset())

    def loss(
        self,
        x: Tensor,
        embedding: Tensor | None,
        targets: Tensor,
        weights: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy and accuracy of features (..., D) at targets (...), both 0-d.

        Targets that are `IGNORED` do not count. `weights` (...) multiply the cross-entropies, whose
        sum is still divided by the number of targets. The scores are computed in parts, because
        those of a whole batch exceed a GPU's memory, or a CPU's cache.
        """
        rows = self._rows(x)
        table, bias = self._table(embedding), self._offset()
        inner, flat = self._inner(x).flatten(0, -2), targets.flatten()
        count = (targets != IGNORED).sum().clamp_min(1)
        factors = None if weights is None else weights.flatten()
        if len(flat) > rows and torch.is_grad_enabled():
            losses, right = cast(
                tuple[Tensor, Tensor], SummedLoss.apply(inner, table, bias, flat, factors, rows)
            )
        else:
            parts = zip(inner.split(rows), flat.split(rows), _split(factors, rows), strict=False)
            sums = [_sum_losses(part, table, bias, *wanted) for part, *wanted in parts]
            losses = torch.stack([part_loss for part_loss, _ in sums]).sum()
            right = torch.stack([part_right for _, part_right in sums]).sum()
        return losses / count, right / count

    @torch.no_grad()
    def draw(self, x: Tensor, embedding: Tensor | None, noise: Tensor) -> Tensor:
        """Draw a token for each of the features (..., D), by uniform `noise` (...) in [0, 1).

        It is the first whose cumulative probability exceeds the noise. Scores are computed in
        parts, as in `loss`.
        """
        rows = self._rows(x)
        drawn = []
        table, inner = self._table(embedding), self._inner(x).flatten(0, -2)
        for part, level in zip(inner.split(rows), noise.flatten().split(rows), strict=True):
            reached = F.linear(part, table, self._offset()).float().softmax(dim=-1).cumsum(dim=-1)
            # Rounding may leave the last sum below the noise.
            drawn.append((reached <= level[:, None] * reached[:, -1:]).sum(dim=-1))
        return torch.cat(drawn).view(noise.shape)

    def _rows(self, x: Tensor) -> int:
        """Number of features whose scores are in memory at once."""
        return max(1, (CPU_SCORES if x.device.type == "cpu" else GPU_SCORES) // len(self.bias))

    def _inner(self, x: Tensor) -> Tensor:
        """The features that the embedding matrix multiplies: (..., E)."""
        return self.norm(F.gelu(self.dense(x)))

    def _offset(self) -> Tensor:
        """The bias (V,), -inf for the impossible token."""
        if self.impossible is None:
            return self.bias
        places = torch.arange(len(self.bias), device=self.bias.device)
        return self.bias.masked_fill(places == self.impossible, float("-inf"))

    def _table(self, embedding: Tensor | None) -> Tensor:
        """The embedding matrix (V, E): the head's own, else the shared one."""
        table = self.weight if self.weight is not None else embedding
        assert table is not None
        return table


CPU_SCORES = 2**23
"""Number of scores in memory at once on a CPU: 32 MiB of float32. Products of smaller matrices are
slower."""
GPU_SCORES = 2**28
"""Number of scores in memory at once on a GPU."""


def _split(factors: Tensor | None, rows: int) -> Iterable[Tensor | None]:
    """Split factors (N,) into parts of `rows`; without factors, endless None."""
    return repeat(None) if factors is None else factors.split(rows)


def _sum_losses(
    x: Tensor, table: Tensor, bias: Tensor, targets: Tensor, factors: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy of x (N, E) at targets (N,), and the number of right predictions.

    Targets that are `IGNORED` do not count. `factors` (N,) multiply the cross-entropies.
    """
    scores = F.linear(x, table, bias).float()
    if factors is None:
        losses = F.cross_entropy(scores, targets, ignore_index=IGNORED, reduction="sum")
    else:
        each = F.cross_entropy(scores, targets, ignore_index=IGNORED, reduction="none")
        losses = (each * factors).sum()
    return losses, (scores.detach().argmax(dim=-1) == targets).sum()  # no id equals IGNORED


class SummedLoss(torch.autograd.Function):
    """`_sum_losses` in parts of `rows` rows, which computes gradients in the forward pass.

    Each part adds to the gradients while its scores are in memory. Autograd would keep the scores
    of all parts for the backward pass, or compute them twice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        table: Tensor,
        bias: Tensor,
        targets: Tensor,
        factors: Tensor | None,
        rows: int,
    ) -> tuple[Tensor, Tensor]:
        """Sums for x (N, E), table (V, E), bias (V,), targets (N,) and factors (N,).

        Matrices are multiplied in autocast's precision; gradients are summed in float32.
        """
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        losses = torch.zeros((), device=x.device)
        right = torch.zeros((), dtype=torch.int64, device=x.device)
        x_grad, table_grad, bias_grad = (
            torch.zeros_like(part, dtype=torch.float32) for part in (x, table, bias)
        )
        with torch.autocast(device, enabled=False):
            weight, offset = table.to(dtype), bias.to(dtype)
            split = (each.split(rows) for each in (x.to(dtype), targets, x_grad))
            for part, wanted, part_grad, factor in zip(*split, _split(factors, rows), strict=False):
                scores = F.linear(part, weight, offset).float()
                part_loss, part_right = _replace_scores_by_gradient(scores, wanted, factor)
                losses += part_loss
                right += part_right
                bias_grad += scores.sum(dim=0)
                scores = scores.to(dtype)
                part_grad.copy_(scores @ weight)
                table_grad += scores.T @ part
        ctx.mark_non_differentiable(right)
        ctx.save_for_backward(
            x_grad.to(x.dtype), table_grad.to(table.dtype), bias_grad.to(bias.dtype)
        )
        return losses, right

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients of the forward pass by the gradient of the summed loss."""
        return *(gradients[0] * saved for saved in ctx.saved_tensors), None, None, None


def _replace_scores_by_gradient(
    scores: Tensor, targets: Tensor, factors: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Overwrite scores (N, V) by the gradient of the summed cross-entropy at targets (N,).

    The gradient is the softmax minus 1 at the target, times the factors (N,) if there are any, and
    zero in rows without a target. Returns the sum and the number of right predictions, both 0-d.
    """
    known = (targets != IGNORED).float()[:, None]
    if factors is not None:
        known = known * factors[:, None]
    truth = targets.clamp_min(0)[:, None]
    best = scores.argmax(dim=1, keepdim=True)
    right = (best[:, 0] == targets).sum()  # no id equals IGNORED
    highest, true_scores = scores.gather(1, best), scores.gather(1, truth)
    total = scores.sub_(highest).exp_().sum(dim=1, keepdim=True)
    loss = ((total.log() + highest - true_scores) * known).sum()
    scores.mul_(known / total).scatter_add_(1, truth, -known)
    return loss, right
