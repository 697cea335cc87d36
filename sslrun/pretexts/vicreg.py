"""VICReg (Bardes, Ponce & LeCun, ICLR 2022)."""

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
from sslrun.pretexts.views import TwoViewOptions, TwoViews
from sslrun.training.learner import Output


@pretexts.register("vicreg")
class VICReg(TwoViews):
    """Invariance between views, variance of every dimension, no covariance between them. Bardes et al., ICLR 2022."""

    class Options(TwoViewOptions):
        augmentation: Augmentation = Augmentation.byol_first()
        """How the first view is made: as BYOL's."""
        second: Augmentation | None = Augmentation.byol_second()
        """How the second view is made: as BYOL's."""
        width: int = Field(default=8192, ge=2)
        """Width of the projector's three layers."""
        invariance: float = Field(default=25.0, ge=0)
        """Weight of the views' squared distance."""
        variance: float = Field(default=25.0, ge=0)
        """Weight of the hinge on each dimension's deviation."""
        covariance: float = Field(default=1.0, ge=0)
        """Weight of the squared covariances."""

    options: Options

    def __init__(self, options: Options, backbone: Backbone) -> None:
        super().__init__(options, backbone)
        self.projector = mlp([backbone.width, *[options.width] * 3], last_bias=False)

    def forward(self, views: tuple[Tensor, Tensor]) -> Output:
        first, second = (self.projector(self.backbone(view).pooled) for view in views)
        terms = vicreg_terms(first, second)
        weights = (self.options.invariance, self.options.variance, self.options.covariance)
        loss = sum((weight * term for weight, term in zip(weights, terms, strict=True)), terms[0].new_zeros(()))
        named = zip(("invariance", "variance", "covariance"), terms, strict=True)
        return Output(loss, {name: term.detach() for name, term in named})


def vicreg_terms(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Invariance, variance and covariance of projections (B, D) of two views, over all ranks' batches.

    mean squared difference; sum over views of mean_d relu(1 - sqrt(var_d + 1e-4)) / 2; sum over views of
    sum_{i != j} cov_ij^2 / D. Variances and covariances have N - 1 below.
    """
    with torch.autocast(first.device.type, enabled=False):
        first, second = (distributed.gather(each.float()) for each in (first, second))
        invariance = F.mse_loss(first, second)
        variance, covariance = invariance.new_zeros(()), invariance.new_zeros(())
        for each in (first, second):
            variance = variance + F.relu(1 - (each.var(dim=0) + 1e-4).sqrt()).mean() / 2
            centred = each - each.mean(dim=0)
            matrix = centred.T @ centred / (len(each) - 1)
            off_diagonal = matrix.square().sum() - matrix.diagonal().square().sum()
            covariance = covariance + off_diagonal / each.shape[1]
        return invariance, variance, covariance
