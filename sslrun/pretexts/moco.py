"""Momentum contrast, version 2.

He et al., CVPR 2020 (arXiv:1911.05722); Chen et al. 2020 (arXiv:2003.04297).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from sslrun import distributed
from sslrun.backbones.base import Backbone
from sslrun.data.examples import Batch
from sslrun.errors import UserError
from sslrun.pretexts.base import pretexts
from sslrun.pretexts.heads import mlp
from sslrun.pretexts.views import MultiView, Teacher, ViewOptions
from sslrun.training.learner import Output
from sslrun.training.norm import has_batch_norm, split_norms


@pretexts.register("moco")
class MoCo(MultiView):
    """Recognize the other view of an image among a queue of other images' views.

    MoCo v2: He et al., CVPR 2020 (arXiv:1911.05722); Chen et al. 2020 (arXiv:2003.04297).

    A query and its key must not share batch statistics: that would reveal which of the keys belongs
    to the query. Each device therefore has its own batch norm, and keys are shuffled over devices
    before the key encoder (He et al., section 3.3). On one device, `norm_splits` has the same
    effect, as in the authors' CIFAR demonstration (github.com/facebookresearch/moco,
    colab/moco_cifar10_demo.ipynb), which loses 4 % without it. `head`, `queue`, `momentum` and
    `temperature` are by default those of version 2 on ImageNet; `head: linear` is that of version 1
    and of the demonstration.
    """

    class Options(ViewOptions):
        sync_norm: bool = False
        """Compute batch norm's statistics over the batches of all devices together. Off in the
        paper, because it lets queries recognize their keys by the statistics that they share."""
        norm_splits: int = Field(default=1, ge=1)
        """Number of parts of a device's batch that batch norm treats as if each were on a device of
        its own, in both encoders, with keys in shuffled order; 8 in the authors' CIFAR
        demonstration. With `accumulate`, it splits each part of the batch."""
        head: Literal["mlp", "linear"] = "mlp"
        """mlp: a hidden layer as wide as the backbone, as in version 2. linear: a linear map, as in
        version 1 and in the authors' CIFAR demonstration."""
        queue: int = Field(default=65536, ge=1)
        """Number of keys in the queue; 4096 in the authors' CIFAR demonstration."""
        momentum: float = Field(default=0.999, ge=0, le=1)
        """Momentum of the key encoder; 0.99 in the authors' CIFAR demonstration."""
        temperature: float = Field(default=0.2, gt=0)
        """Temperature of the softmax."""
        projection: int = Field(default=128, ge=2)
        """Width of the vectors that are compared."""

        @model_validator(mode="after")
        def _split_or_synchronized(self) -> MoCo.Options:
            if self.sync_norm and self.norm_splits > 1:
                raise ValueError("sync_norm: true and norm_splits contradict each other: set one")
            return self

    options: Options
    queue: Tensor
    place: Tensor

    def __init__(self, options: Options, backbone: Backbone) -> None:
        super().__init__(options, backbone)
        self.has_norm = has_batch_norm(backbone)
        if options.norm_splits > 1:
            if not self.has_norm:
                raise UserError(
                    f"pretext.norm_splits: the backbone '{backbone.name}' has no batch norm to "
                    "split: leave it out"
                )
            split_norms(backbone, options.norm_splits)
        hidden = [backbone.width] if options.head == "mlp" else []
        self.head = mlp([backbone.width, *hidden, options.projection], norm=False)
        self.teacher = Teacher(backbone, self.head)
        self.register_buffer(
            "queue", F.normalize(torch.randn(options.queue, options.projection), dim=1)
        )
        self.register_buffer("place", torch.zeros((), dtype=torch.int64))
        self._keys: list[Tensor] = []
        """Keys of the current batch: one tensor (B, D) for each part of the batch."""

    @property
    def batch_multiple(self) -> int:
        return self.options.norm_splits

    @property
    def shuffles_keys(self) -> bool:
        """Whether keys are encoded in another order, because batch norm sees parts of the batch."""
        over_devices = distributed.world_size() > 1 and not self.options.sync_norm
        return self.options.norm_splits > 1 or (self.has_norm and over_devices)

    def views(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, ...]:
        """The queries' and the keys' images, each (B, 3, size, size).

        If `shuffles_keys`, the keys are this device's share of all devices' keys in a random order,
        and the order (world * B,) comes third.
        """
        queries, keys = super().views(batch, generator)
        if not self.shuffles_keys:
            return queries, keys
        count = len(keys) * distributed.world_size()
        order = torch.randperm(count, generator=generator, device=keys.device)
        distributed.copy_from_main(order)
        return queries, distributed.gather(keys)[distributed.share(order)], order

    def forward(self, views: tuple[Tensor, ...]) -> Output:
        queries = F.normalize(self.head(self.backbone(views[0]).pooled).float(), dim=1)
        encoded = F.normalize(self.teacher(views[1]).float(), dim=1)
        every_key = distributed.gather(encoded)
        if len(views) == 3:
            every_key = every_key[views[2].argsort()]
        keys = distributed.share(every_key)
        if self.training:
            self._keys.append(every_key)
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
