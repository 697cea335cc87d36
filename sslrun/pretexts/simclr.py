"""SimCLR (Chen, Kornblith, Norouzi & Hinton, ICML 2020)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from sslrun import distributed
from sslrun.backbones.base import Backbone
from sslrun.pretexts.base import pretexts
from sslrun.pretexts.heads import mlp
from sslrun.pretexts.views import TwoViewOptions, TwoViews
from sslrun.training.learner import Output


@pretexts.register("simclr")
class SimCLR(TwoViews):
    """Tell the other view of the same image from all other views of the batch. Chen et al., ICML 2020.

    Both views go through the network together, as in the authors' code; batch norm's statistics are of one device.
    """

    class Options(TwoViewOptions):
        temperature: float = Field(default=0.1, gt=0)
        """Of the softmax; 0.1 for ImageNet, 0.5 for CIFAR-10 in the paper."""
        projection: int = Field(default=128, ge=2)
        """Width of the vectors that are compared."""
        hidden: int | None = Field(default=None, ge=2)
        """Width of the projection head's hidden layer; default: the backbone's."""

    options: Options

    def __init__(self, options: Options, backbone: Backbone) -> None:
        super().__init__(options, backbone)
        hidden = options.hidden or backbone.width
        # The authors' head ends in a batch norm without shift.
        self.head = mlp([backbone.width, hidden, options.projection], last_norm=True)
        self.head[-1].bias.requires_grad_(False)

    def forward(self, views: tuple[Tensor, Tensor]) -> Output:
        projected = self.head(self.backbone(torch.cat(views)).pooled)
        loss, hits = nt_xent(projected[: len(views[0])], projected[len(views[0]) :], self.options.temperature)
        return Output(loss, {"accuracy": hits})


def nt_xent(first: Tensor, second: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """NT-Xent of projections (B, D) of two views, and the share of views whose other view is the most similar.

    l(i, j) = -log exp(s_ij / t) / sum over k != i of exp(s_ik / t), s the cosine similarity, averaged over all 2N
    ordered positive pairs of all ranks' batches. Each rank gives the mean over its own: the mean over ranks, which is
    what gradients are averaged to, is the whole batch's loss.
    """
    with torch.autocast(first.device.type, enabled=False):
        own = F.normalize(torch.cat([first, second]).float(), dim=1)
        count, rank = len(first), distributed.rank()
        everyone = distributed.gather(own)
        # Rank by rank: that rank's first views, then its second ones.
        place = torch.arange(2 * count, device=own.device)
        positive = rank * 2 * count + (place + count) % (2 * count)
        similarity = own @ everyone.T / temperature
        similarity = similarity.scatter(1, (rank * 2 * count + place)[:, None], -torch.inf)
        loss = F.cross_entropy(similarity, positive)
        hits = (similarity.detach().argmax(dim=1) == positive).float().mean()
    return loss, hits
