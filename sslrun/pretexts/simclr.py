"""SimCLR (Chen, Kornblith, Norouzi & Hinton, ICML 2020, arXiv:2002.05709)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from sslrun import distributed
from sslrun.backbones.base import Backbone
from sslrun.pretexts.base import pretexts
from sslrun.pretexts.heads import mlp
from sslrun.pretexts.views import MultiView, ViewOptions
from sslrun.training.learner import Output


@pretexts.register("simclr")
class SimCLR(MultiView):
    """Recognize the other view of the same image among all other views of the batch.

    Chen et al., ICML 2020 (arXiv:2002.05709). Both views go through the network together, and batch
    norm uses the statistics of all devices, as in the authors' code.
    """

    class Options(ViewOptions):
        temperature: float = Field(default=0.1, gt=0)
        """Temperature of the softmax. The paper uses 0.1 for ImageNet and 0.5 for CIFAR-10."""
        projection: int = Field(default=128, ge=2)
        """Width of the vectors that are compared."""
        hidden: int | None = Field(default=None, ge=2)
        """Width of the projection head's hidden layer; default: the backbone's width."""

    options: Options

    def __init__(self, options: Options, backbone: Backbone) -> None:
        super().__init__(options, backbone)
        hidden = options.hidden or backbone.width
        # The authors' head ends in a batch norm without shift.
        self.head = mlp([backbone.width, hidden, options.projection], last_norm=True)
        self.head[-1].bias.requires_grad_(False)

    def forward(self, views: tuple[Tensor, Tensor]) -> Output:
        projected = self.head(self.backbone(torch.cat(views)).pooled)
        loss, hits = nt_xent(
            projected[: len(views[0])], projected[len(views[0]) :], self.options.temperature
        )
        return Output(loss, {"accuracy": hits})


def nt_xent(first: Tensor, second: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """NT-Xent loss of two views' projections (B, D).

    l(i, j) = -log exp(s_ij / t) / sum over k != i of exp(s_ik / t), with s the cosine similarity,
    averaged over all 2N ordered positive pairs of the batches of all ranks. Each rank returns the
    mean over its own pairs; averaging gradients over ranks then gives the gradient for the whole
    batch. Returns the loss, and the share of views whose other view is the most similar; both are
    0-d.
    """
    with torch.autocast(first.device.type, enabled=False):
        # `local` (2B, D) holds this rank's views, and `views` (2N, D) those of all ranks, by rank.
        # Within a rank the first views come before the second.
        local = F.normalize(torch.cat([first, second]).float(), dim=1)
        count, rank = len(first), distributed.rank()
        views = distributed.gather(local)
        place = torch.arange(2 * count, device=local.device)
        positive = rank * 2 * count + (place + count) % (2 * count)
        similarity = local @ views.T / temperature
        similarity = similarity.scatter(1, (rank * 2 * count + place)[:, None], -torch.inf)
        loss = F.cross_entropy(similarity, positive)
        hits = (similarity.detach().argmax(dim=1) == positive).float().mean()
    return loss, hits
