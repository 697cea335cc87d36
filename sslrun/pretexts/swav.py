"""SwAV (Caron et al., NeurIPS 2020, arXiv:2006.09882)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from sslrun import distributed
from sslrun.backbones.base import Backbone
from sslrun.pretexts.base import pretexts
from sslrun.pretexts.heads import mlp
from sslrun.pretexts.queue import Queue
from sslrun.pretexts.views import MultiView, ViewOptions, cross_pairs, encode_by_size
from sslrun.training.learner import Output

FEWEST = 1.5
"""Effective number of prototypes in use below which all images are assigned to one of them."""


@pretexts.register("swav")
class SwAV(MultiView):
    """Predict from one view to which prototypes another view of the image is assigned.

    Caron et al., NeurIPS 2020 (arXiv:2006.09882). The assignments of the global views are balanced
    over the prototypes by the Sinkhorn-Knopp algorithm on the batches of all devices; each other
    view predicts them. Prototypes are unit vectors: they are normalized before each step, and are
    the last layer that `pretrain.freeze_last` keeps fixed at first. As in the authors' code
    (github.com/facebookresearch/swav), views of one size go through the backbone together, the
    projector takes all views together, and batch norm uses the statistics of all devices.

    With small batches, a queue of earlier projections takes part in the balancing.

    Deviation: the queue is filled from the first step on and is used after a share of the training;
    the authors' starts at an epoch, and is filled from then on.
    """

    class Options(ViewOptions):
        prototypes: int = Field(default=3000, ge=2)
        """Number of prototypes."""
        projection: int = Field(default=128, ge=2)
        """Width of the vectors that are compared with prototypes."""
        hidden: int = Field(default=2048, ge=2)
        """Width of the projector's hidden layer."""
        temperature: float = Field(default=0.1, gt=0)
        """Temperature of the predictions' softmax."""
        epsilon: float = Field(default=0.05, ge=0.02)
        """Entropy regularization of the assignments: smaller values give sharper assignments. Below
        0.02 their exponentials leave the range of float32."""
        iterations: int = Field(default=3, ge=0)
        """Iterations of the Sinkhorn-Knopp algorithm. 0: assignments are a softmax of each view by
        itself, without balancing, and collapse."""
        queue: int = Field(default=0, ge=0)
        """Number of earlier projections of each global view that take part in the balancing; 0: no
        queue. The authors use 3,840 with batches of 256."""
        queue_from: float = Field(default=0.075, ge=0, le=1)
        """Share of the training after which the queue is used, if it is full; the authors' 15 of
        200 epochs by default."""

    most_views = None
    takes_crops = True

    options: Options
    queue_started: Tensor

    def __init__(self, options: Options, backbone: Backbone) -> None:
        super().__init__(options, backbone)
        self.projector = mlp([backbone.width, options.hidden, options.projection])
        self.prototypes = nn.Linear(options.projection, options.prototypes, bias=False)
        self.queue: Queue | None = None
        if options.queue:
            # (size, V, D): one vector of each global view for an image.
            self.queue = Queue(torch.zeros(options.queue, options.views, options.projection))
        self.register_buffer("queue_started", torch.zeros((), dtype=torch.bool))
        self._pushed: list[Tensor] = []
        """Projections (N, V, D) of the global views, one tensor for each part of the batch."""

    def last_layer(self) -> list[nn.Parameter]:
        return list(self.prototypes.parameters())

    @torch.no_grad()
    def before_step(self, progress: float) -> None:
        """Normalize the prototypes."""
        self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))
        self.queue_started.fill_(progress >= self.options.queue_from)

    def forward(self, views: tuple[Tensor, ...]) -> Output:
        pooled = encode_by_size(lambda images: self.backbone(images).pooled, views)
        projected = F.normalize(self.projector(torch.cat(pooled)).float(), dim=1)
        with torch.autocast(projected.device.type, enabled=False):
            scores = self.prototypes(projected).chunk(len(views))
            predicted = [F.log_softmax(view / self.options.temperature, dim=1) for view in scores]
            count = self.options.views
            assigned = [self._assign(view, index) for index, view in enumerate(scores[:count])]
            pairs = cross_pairs(count, len(views))
            losses = [
                -(assigned[target] * predicted[view]).sum(dim=1).mean() for view, target in pairs
            ]
            loss = torch.stack(losses).mean()
        if self.training and self.queue is not None:
            first = torch.stack(projected.detach().chunk(len(views))[:count], dim=1)
            self._pushed.append(distributed.gather(first))
        used = effective_number(predicted[0].detach().exp())
        return Output(loss, {"prototypes": used})

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Replace the oldest projections in the queue."""
        if self.queue is not None:
            self.queue.push(torch.cat(self._pushed))
        self._pushed.clear()

    def diagnose(self, metrics: Mapping[str, float]) -> str | None:
        """Name the collapse of all images to one prototype, which balancing should prevent."""
        used = metrics.get("prototypes")
        if used is None or used >= FEWEST:
            return None
        return (
            f"collapse to one prototype (effective number {used:.2f} of "
            f"{self.options.prototypes}): check pretext.iterations and pretext.epsilon"
        )

    @torch.no_grad()
    def _assign(self, scores: Tensor, view: int) -> Tensor:
        """Assignments (B, K) of a global view to the prototypes, from its scores (B, K)."""
        scores = scores.detach()
        count = len(scores)
        weights = scores.new_ones(count)
        if self.queue is not None:
            # Each rank adds its part of the queue; a row of weight 0 does not count.
            earlier = self.queue.vectors[distributed.rank() :: distributed.world_size(), view]
            scores = torch.cat([scores, self.prototypes(earlier)])
            use = (self.queue.is_full & self.queue_started).to(weights.dtype)
            weights = torch.cat([weights, use.expand(len(earlier))])
        return sinkhorn(scores, weights, self.options.epsilon, self.options.iterations)[:count]


@torch.no_grad()
def sinkhorn(scores: Tensor, weights: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Assign rows of scores (B, K) to K prototypes, balanced over the rows of all ranks.

    Start from exp(scores / epsilon), then alternately divide columns, so that each prototype has an
    equal share of all rows, and rows, so that each sums to 1. `weights` (B,) is 1 for rows that
    count and 0 for others. Returns (B, K), whose rows sum to 1.
    """
    # Scores of unit vectors are at most 1; a constant cancels and keeps exponentials in range.
    assigned = torch.exp((scores - 1) / epsilon) * weights[:, None]
    for _ in range(iterations):
        totals = assigned.sum(dim=0)
        distributed.add_up(totals)
        assigned = assigned / totals.clamp_min(1e-30)
        assigned = assigned / assigned.sum(dim=1, keepdim=True).clamp_min(1e-30)
    return assigned / assigned.sum(dim=1, keepdim=True).clamp_min(1e-30)


def effective_number(shares: Tensor) -> Tensor:
    """Exponential of the entropy of the mean of distributions (B, K), in [1, K]; 0-d."""
    mean = shares.mean(dim=0)
    return torch.special.entr(mean).sum().exp()
