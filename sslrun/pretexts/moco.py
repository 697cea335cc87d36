"""Momentum contrast, version 2.

He et al., CVPR 2020 (arXiv:1911.05722); Chen et al. 2020 (arXiv:2003.04297).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from sslrun import distributed
from sslrun.backbones.base import Backbone
from sslrun.pretexts.base import pretexts
from sslrun.pretexts.heads import mlp
from sslrun.pretexts.views import Teacher, TwoViewOptions, TwoViews
from sslrun.training.learner import Output


@pretexts.register("moco")
class MoCo(TwoViews):
    """Recognize the other view of an image among a queue of other images' views.

    MoCo v2: He et al., CVPR 2020 (arXiv:1911.05722); Chen et al. 2020 (arXiv:2003.04297).
    Deviation: keys are not shuffled across devices before the key encoder. Queries and keys have
    separate batch statistics anyway, because the two views go through different networks one after
    the other.
    """

    class Options(TwoViewOptions):
        queue: int = Field(default=65536, ge=1)
        """Number of keys in the queue; 4096 in the authors' CIFAR demonstration."""
        momentum: float = Field(default=0.999, ge=0, le=1)
        """Momentum of the key encoder; 0.99 in the authors' CIFAR demonstration."""
        temperature: float = Field(default=0.2, gt=0)
        """Temperature of the softmax."""
        projection: int = Field(default=128, ge=2)
        """Width of the vectors that are compared."""

    options: Options
    queue: Tensor
    place: Tensor

    def __init__(self, options: Options, backbone: Backbone) -> None:
        super().__init__(options, backbone)
        self.head = mlp([backbone.width, backbone.width, options.projection], norm=False)
        self.teacher = Teacher(backbone, self.head)
        self.register_buffer(
            "queue", F.normalize(torch.randn(options.queue, options.projection), dim=1)
        )
        self.register_buffer("place", torch.zeros((), dtype=torch.int64))
        self._keys: list[Tensor] = []
        """Keys of the current batch: one tensor (B, D) for each part of the batch."""

    def forward(self, views: tuple[Tensor, Tensor]) -> Output:
        queries = F.normalize(self.head(self.backbone(views[0]).pooled).float(), dim=1)
        keys = F.normalize(self.teacher(views[1]).float(), dim=1)
        if self.training:
            self._keys.append(distributed.gather(keys))
        loss, hits = info_nce(queries, keys, self.queue.clone(), self.options.temperature)
        return Output(loss, {"accuracy": hits})

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Move the key encoder toward the query encoder, and replace the oldest keys."""
        self.teacher.follow(self.backbone, self.head, self.options.momentum)
        keys = torch.cat(self._keys)[-self.options.queue :]
        slots = (self.place + torch.arange(len(keys), device=keys.device)) % self.options.queue
        self.queue[slots] = keys
        self.place.copy_((self.place + len(keys)) % self.options.queue)
        self._keys.clear()


def info_nce(
    queries: Tensor, keys: Tensor, queue: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """InfoNCE loss of unit vectors (B, D) against their keys (B, D) and a queue (K, D).

    -log exp(q.k / t) / (exp(q.k / t) + sum over the queue of exp(q.n / t)), averaged over the
    batch. Returns the loss and the share of queries whose own key is the most similar, both 0-d.
    """
    with torch.autocast(queries.device.type, enabled=False):
        positive = (queries * keys).sum(dim=1, keepdim=True)
        scores = torch.cat([positive, queries @ queue.T], dim=1) / temperature
        targets = torch.zeros(len(scores), dtype=torch.int64, device=scores.device)
        loss = F.cross_entropy(scores, targets)
        return loss, (scores.detach().argmax(dim=1) == 0).float().mean()
