"""NNCLR (Dwibedi et al., ICCV 2021, arXiv:2104.14548)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from sslrun import distributed
from sslrun.backbones.base import Backbone
from sslrun.pretexts.base import pretexts
from sslrun.pretexts.heads import mlp
from sslrun.pretexts.queue import Queue
from sslrun.pretexts.views import MultiView, ViewOptions, cross_pairs
from sslrun.training.learner import Output


@pretexts.register("nnclr")
class NNCLR(MultiView):
    """Recognize the nearest neighbor of the other view, taken from a queue, among the batch's.

    Dwibedi, Aytar, Tompson, Sermanet & Zisserman, ICCV 2021 (arXiv:2104.14548). Each view's
    projection is replaced by its nearest neighbor in a queue of earlier images' projections, and
    must recognize the prediction of the other view among those of the batch on all devices. The
    loss is symmetric. The queue takes the projections of the first view after each step.

    Each view has its own batch statistics, over all devices. With more than two views, the loss is
    the mean over all pairs of a view with another global view; neighbors are those of global views.
    This is our choice.
    """

    class Options(ViewOptions):
        temperature: float = Field(default=0.1, gt=0)
        """Temperature of the softmax."""
        queue: int = Field(default=98304, ge=1)
        """Number of projections in the queue; 98,304 in the paper, for ImageNet."""
        hidden: int = Field(default=2048, ge=2)
        """Width of the projector's two hidden layers."""
        predictor: int = Field(default=4096, ge=2)
        """Width of the predictor's hidden layer."""
        projection: int = Field(default=256, ge=2)
        """Width of the vectors that are compared."""

    most_views = None
    takes_crops = True

    options: Options

    def __init__(self, options: Options, backbone: Backbone) -> None:
        super().__init__(options, backbone)
        hidden = [options.hidden] * 2
        self.projector = mlp([backbone.width, *hidden, options.projection], last_norm=True)
        self.predictor = mlp([options.projection, options.predictor, options.projection])
        initial = torch.randn(options.queue, options.projection)
        self.queue = Queue(F.normalize(initial, dim=1))
        self._pushed: list[Tensor] = []
        """Projections (N, D) of the first view, one tensor for each part of the batch."""

    def forward(self, views: tuple[Tensor, ...]) -> Output:
        projected = [self.projector(self.backbone(view).pooled) for view in views]
        predicted = [self.predictor(vectors) for vectors in projected]
        queue = self.queue.vectors
        found = [nearest(vectors, queue) for vectors in projected[: self.options.views]]
        pairs = cross_pairs(len(found), len(views))
        terms = [
            neighbor_nce(queue[found[target]], predicted[view], self.options.temperature)
            for view, target in pairs
        ]
        losses, hits = (torch.stack(values) for values in zip(*terms, strict=True))
        if self.training:
            first = F.normalize(projected[0].detach().float(), dim=1)
            self._pushed.append(distributed.gather(first))
        metrics = {"accuracy": hits.mean(), "neighbors": distinct_share(found[0], len(queue))}
        return Output(losses.mean(), metrics)

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Replace the oldest projections in the queue."""
        self.queue.push(torch.cat(self._pushed))
        self._pushed.clear()


@torch.no_grad()
def nearest(vectors: Tensor, queue: Tensor) -> Tensor:
    """Index (B,) of the most similar of the unit vectors `queue` (Q, D) to each of (B, D)."""
    with torch.autocast(vectors.device.type, enabled=False):
        return (F.normalize(vectors.float(), dim=1) @ queue.T).argmax(dim=1)


def neighbor_nce(neighbors: Tensor, predicted: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """NNCLR's loss of neighbors (B, D), unit vectors, and predictions (B, D) of the other view.

    -log exp(n_i.p_i / t) / sum over j of exp(n_i.p_j / t), with p normalized and j in the batches
    of all ranks, averaged over the batch (the paper's eq. 4). Returns the loss and the share of
    neighbors to which the prediction of their own image is the most similar, both 0-d.
    """
    with torch.autocast(predicted.device.type, enabled=False):
        every_prediction = distributed.gather(F.normalize(predicted.float(), dim=1))
        scores = neighbors @ every_prediction.T / temperature
        targets = torch.arange(len(neighbors), device=neighbors.device)
        targets = targets + distributed.rank() * len(neighbors)
        loss = F.cross_entropy(scores, targets)
        return loss, (scores.detach().argmax(dim=1) == targets).float().mean()


def distinct_share(indices: Tensor, size: int) -> Tensor:
    """The number of distinct values among indices (B,) below `size`, as a share of B; 0-d.

    It falls toward 1 / B if all images have the same neighbor.
    """
    used = torch.zeros(size, device=indices.device)
    used[indices] = 1.0
    return used.sum() / len(indices)
