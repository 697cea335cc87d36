"""Barlow Twins (Zbontar et al., ICML 2021, arXiv:2103.03230)."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from sslrun import distributed
from sslrun.backbones.base import Backbone
from sslrun.data.image.augment import Augmentation
from sslrun.pretexts.base import pretexts
from sslrun.pretexts.heads import mlp
from sslrun.pretexts.views import MultiView, ViewOptions, symmetric_pairs
from sslrun.training.learner import Output


@pretexts.register("barlow")
class BarlowTwins(MultiView):
    """Make each dimension of the projections correlate across two views, and with no other one.

    Zbontar et al., ICML 2021 (arXiv:2103.03230). Batch norm uses the statistics of all devices, as
    in the authors' code. With more than two views, the loss is the mean over all pairs of a view
    with another global view, as VICRegL does for VICReg's invariance (Bardes et al., NeurIPS 2022,
    arXiv:2210.01571).
    """

    most_views = None
    takes_crops = True

    class Options(ViewOptions):
        augmentation: Augmentation = Augmentation.byol_first()
        """Augmentation of the first view; default: BYOL's."""
        second: Augmentation | None = Augmentation.byol_second()
        """Augmentation of the second view; default: BYOL's."""
        width: int = Field(default=8192, ge=2)
        """Width of the projector's three layers."""
        off_diagonal: float = Field(default=0.0051, gt=0)
        """Weight lambda of the redundancy term (the squared off-diagonal correlations)."""
        scale: float = Field(default=1.0, gt=0)
        """Factor on the loss. solo-learn has 0.1 for CIFAR-10. It matters beside weight decay, and
        to parameters whose learning rate LARS does not adapt."""

    options: Options

    def __init__(self, options: Options, backbone: Backbone) -> None:
        super().__init__(options, backbone)
        self.projector = mlp([backbone.width, *[options.width] * 3], last_bias=False)

    def forward(self, views: tuple[Tensor, ...]) -> Output:
        projected = [self.projector(self.backbone(view).pooled) for view in views]
        total, weights = projected[0].new_zeros((), dtype=torch.float32), 0
        for target, view, weight in symmetric_pairs(self.options.views, len(views)):
            pair_loss = barlow_loss(projected[target], projected[view], self.options.off_diagonal)
            total = total + weight * pair_loss
            weights += weight
        return Output(self.options.scale * (total / weights))


def barlow_loss(first: Tensor, second: Tensor, off_diagonal: float) -> Tensor:
    """Barlow Twins' loss of two views' projections (B, D), as a 0-d tensor.

    sum_i (1 - C_ii)^2 + lambda sum_{i != j} C_ij^2, where C (D, D) is the correlation of the two
    projections over the batches of all ranks, and lambda is `off_diagonal`.
    """
    with torch.autocast(first.device.type, enabled=False):
        first, second = (distributed.gather(view.float()) for view in (first, second))
        a, b = (
            (view - view.mean(dim=0)) / (view.var(dim=0, correction=0) + 1e-5).sqrt()
            for view in (first, second)
        )
        correlation = a.T @ b / len(a)
        diagonal = correlation.diagonal()
        return (1 - diagonal).square().sum() + off_diagonal * (
            correlation.square().sum() - diagonal.square().sum()
        )
