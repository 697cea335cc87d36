"""SimCLR (Chen, Kornblith, Norouzi & Hinton, ICML 2020, arXiv:2002.05709)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from sslrun import distributed
from sslrun.backbones.base import Backbone
from sslrun.pretexts.base import pretexts
from sslrun.pretexts.heads import mlp
from sslrun.pretexts.views import MultiView, ViewOptions, encode_by_size
from sslrun.training.learner import Output


@pretexts.register("simclr")
class SimCLR(MultiView):
    """Recognize the other view of the same image among all other views of the batch.

    Chen et al., ICML 2020 (arXiv:2002.05709). Views of one size go through the network together,
    and batch norm uses the statistics of all devices, as in the authors' code. With more than two
    views, the loss is the mean over all pairs of views of an image, each against all global views
    of the batch: the loss of SupCon (Khosla et al., NeurIPS 2020, arXiv:2004.11362, eq. 2) where
    each image is a class. Local views are compared with the global ones only, which is our choice.
    """

    most_views = None
    takes_crops = True

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

    def forward(self, views: tuple[Tensor, ...]) -> Output:
        projected = encode_by_size(lambda images: self.head(self.backbone(images).pooled), views)
        count = self.options.views
        loss, hits = contrast(projected[:count], projected[count:], self.options.temperature)
        return Output(loss, {"accuracy": hits})


def nt_xent(first: Tensor, second: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """NT-Xent loss of two views' projections (B, D).

    l(i, j) = -log exp(s_ij / t) / sum over k != i of exp(s_ik / t), with s the cosine similarity,
    averaged over all 2N ordered positive pairs of the batches of all ranks. Returns the loss and
    the accuracy; see `contrast`.
    """
    return contrast([first, second], [], temperature)


def contrast(
    views: Sequence[Tensor], crops: Sequence[Tensor], temperature: float
) -> tuple[Tensor, Tensor]:
    """NT-Xent loss of V global views' and C local views' projections, each (B, D).

    l(i, j) = -log exp(s_ij / t) / sum over k != i of exp(s_ik / t), with s the cosine similarity, i
    any view, and j and k global views of the batches of all ranks. It is averaged over all pairs
    (i, j) of views of one image. Each rank returns the mean over its own pairs; averaging gradients
    over ranks then gives the gradient for the whole batch. Returns the loss, and the share of views
    for which a view of the same image is the most similar; both are 0-d.
    """
    with torch.autocast(views[0].device.type, enabled=False):
        # `anchors` ((V + C) B, D) holds this rank's views, the global ones first, and `keys`
        # (VN, D) the global views of all ranks, by rank. Row r of the global views and row r + mB
        # (modulo VB) belong to the same image.
        anchors = F.normalize(torch.cat([*views, *crops]).float(), dim=1)
        count = len(views[0])
        own = len(views) * count
        offset = distributed.rank() * own
        keys = distributed.gather(anchors[:own])
        place = torch.arange(len(anchors), device=anchors.device)
        similarity = anchors @ keys.T / temperature
        itself = (offset + place[:own])[:, None]
        similarity = torch.cat([similarity[:own].scatter(1, itself, -torch.inf), similarity[own:]])
        scores = F.log_softmax(similarity, dim=1)
        # The m-th positive of all anchors; the global ones have one less: themselves.
        shifted = [(place + m * count) % own for m in range(1, len(views))]
        terms = [F.nll_loss(scores[:own], offset + positive[:own]) for positive in shifted]
        loss = sum(terms[1:], terms[0]) / len(terms)
        if crops:
            pairs, local_pairs = len(terms) * len(views), len(views) * len(crops)
            positives = [*shifted, place % own]
            local_terms = [F.nll_loss(scores[own:], offset + p[own:]) for p in positives]
            local_loss = sum(local_terms[1:], local_terms[0]) / len(local_terms)
            loss = (pairs * loss + local_pairs * local_loss) / (pairs + local_pairs)
        nearest = similarity.detach().argmax(dim=1) - offset
        hits = (nearest % count == place % count) & (nearest >= 0) & (nearest < own)
    return loss, hits.float().mean()
