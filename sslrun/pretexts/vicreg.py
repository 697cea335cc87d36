"""VICReg (Bardes, Ponce & LeCun, ICLR 2022, arXiv:2105.04906)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from sslrun import distributed
from sslrun.backbones.base import Backbone
from sslrun.data.image.augment import Augmentation
from sslrun.pretexts.base import pretexts
from sslrun.pretexts.heads import mlp
from sslrun.pretexts.views import MultiView, ViewOptions, symmetric_pairs
from sslrun.training.learner import Output


@pretexts.register("vicreg")
class VICReg(MultiView):
    """Make two views similar, keep the variance of each dimension high and covariances low.

    Bardes, Ponce & LeCun, ICLR 2022 (arXiv:2105.04906). Batch norm uses the statistics of all
    devices, as in the authors' code. With more than two views, the invariance is the mean over all
    pairs of a view with another global view, and variance and covariance are means over views, as
    in the code of VICRegL (Bardes et al., NeurIPS 2022, arXiv:2210.01571). The covariance is twice
    that mean, so that two views have the loss of VICReg.
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
        invariance: float = Field(default=25.0, ge=0)
        """Weight of the squared distance between views."""
        variance: float = Field(default=25.0, ge=0)
        """Weight of the hinge loss on each dimension's standard deviation."""
        covariance: float = Field(default=1.0, ge=0)
        """Weight of the squared covariances."""

    options: Options

    def __init__(self, options: Options, backbone: Backbone) -> None:
        super().__init__(options, backbone)
        self.projector = mlp([backbone.width, *[options.width] * 3], last_bias=False)

    def forward(self, views: tuple[Tensor, ...]) -> Output:
        projected = [self.projector(self.backbone(view).pooled) for view in views]
        terms = vicreg_terms(*projected, crops=len(views) - self.options.views)
        weights = (self.options.invariance, self.options.variance, self.options.covariance)
        loss = sum(
            (weight * term for weight, term in zip(weights, terms, strict=True)),
            terms[0].new_zeros(()),
        )
        named = zip(("invariance", "variance", "covariance"), terms, strict=True)
        return Output(loss, {name: term.detach() for name, term in named})


def vicreg_terms(*projections: Tensor, crops: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """The invariance, variance and covariance terms of the views' projections (B, D).

    The last `crops` of the projections are those of local views. The terms are computed over the
    batches of all ranks, with D the width of the projections:

    - invariance: the squared difference, averaged over all pairs of a view with another global view
    - variance: the mean over views of mean_d relu(1 - sqrt(var_d + 1e-4))
    - covariance: twice the mean over views of sum_{i != j} cov_ij^2 / D

    Variances and covariances divide by N - 1.
    """
    with torch.autocast(projections[0].device.type, enabled=False):
        views = [distributed.gather(view.float()) for view in projections]
        invariance, weights = views[0].new_zeros(()), 0
        for target, view, weight in symmetric_pairs(len(views) - crops, len(views)):
            invariance = invariance + weight * F.mse_loss(views[target], views[view])
            weights += weight
        invariance = invariance / weights
        variance, covariance = invariance.new_zeros(()), invariance.new_zeros(())
        for vectors in views:
            spread = F.relu(1 - (vectors.var(dim=0) + 1e-4).sqrt()).mean()
            variance = variance + spread / len(views)
            centered = vectors - vectors.mean(dim=0)
            matrix = centered.T @ centered / (len(vectors) - 1)
            off_diagonal = matrix.square().sum() - matrix.diagonal().square().sum()
            covariance = covariance + off_diagonal / vectors.shape[1] * (2 / len(views))
        return invariance, variance, covariance
