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
from sslrun.pretexts.views import MultiView, ViewOptions
from sslrun.training.learner import Output


@pretexts.register("vicreg")
class VICReg(MultiView):
    """Make two views similar, keep the variance of each dimension high and covariances low.

    Bardes, Ponce & LeCun, ICLR 2022 (arXiv:2105.04906). Batch norm uses the statistics of all
    devices, as in the authors' code.
    """

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

    def forward(self, views: tuple[Tensor, Tensor]) -> Output:
        first, second = (self.projector(self.backbone(view).pooled) for view in views)
        terms = vicreg_terms(first, second)
        weights = (self.options.invariance, self.options.variance, self.options.covariance)
        loss = sum(
            (weight * term for weight, term in zip(weights, terms, strict=True)),
            terms[0].new_zeros(()),
        )
        named = zip(("invariance", "variance", "covariance"), terms, strict=True)
        return Output(loss, {name: term.detach() for name, term in named})


def vicreg_terms(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The invariance, variance and covariance terms of two views' projections (B, D).

    They are computed over the batches of all ranks, with D the width of the projections:

    - invariance: the mean squared difference of the views
    - variance: the sum over views of mean_d relu(1 - sqrt(var_d + 1e-4)) / 2
    - covariance: the sum over views of sum_{i != j} cov_ij^2 / D

    Variances and covariances divide by N - 1.
    """
    with torch.autocast(first.device.type, enabled=False):
        first, second = (distributed.gather(view.float()) for view in (first, second))
        invariance = F.mse_loss(first, second)
        variance, covariance = invariance.new_zeros(()), invariance.new_zeros(())
        for view in (first, second):
            variance = variance + F.relu(1 - (view.var(dim=0) + 1e-4).sqrt()).mean() / 2
            centered = view - view.mean(dim=0)
            matrix = centered.T @ centered / (len(view) - 1)
            off_diagonal = matrix.square().sum() - matrix.diagonal().square().sum()
            covariance = covariance + off_diagonal / view.shape[1]
        return invariance, variance, covariance
