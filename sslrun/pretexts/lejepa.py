"""LeJEPA (Balestriero & LeCun 2025, arXiv:2511.08544)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from sslrun import distributed
from sslrun.backbones.base import Backbone
from sslrun.data.examples import Batch
from sslrun.data.image.augment import Augmentation
from sslrun.pretexts.base import pretexts
from sslrun.pretexts.heads import mlp
from sslrun.pretexts.views import MultiView, ViewOptions, encode_by_size
from sslrun.training.learner import Output

LARGEST = 3.0
"""The Epps-Pulley statistic integrates over [-LARGEST, LARGEST]."""
COLLAPSED = 0.05
"""Standard deviation of the projections below which they are collapsed; SIGReg aims at 1. The
projector's initial weights give about 0.4."""


@pretexts.register("lejepa")
class LeJEPA(MultiView):
    """Make all views of an image similar, and the projections of a batch an isotropic Gaussian.

    Balestriero & LeCun 2025 (arXiv:2511.08544). The loss is that of the authors' minimal example
    (github.com/rbalestr-lab/lejepa, MINIMAL.md): (1 - lambda) * invariance + lambda * SIGReg. The
    invariance is the mean squared distance of all views' projections to the mean of the global
    views' projections. SIGReg tests each view's projections along random directions, see
    `epps_pulley`. No teacher, no predictor and no stopped gradient. Defaults are the example's, but
    the paper's multi-crop is `views: 2` with `crops`. Over several devices, the statistic is that
    of the whole batch.

    SIGReg grows with the number of examples in the batch by design. Libraries that add
    `lambda * SIGReg` to an invariance of weight 1, or that test all views as one sample, compute
    another loss: their lambda does not carry over.

    Our choices: batch norm in the projector covers all views, as in the example, where all views
    are global. The authors' linear probe reads the [CLS] tokens of the last two layers.
    """

    class Options(ViewOptions):
        augmentation: Augmentation = Augmentation.simclr().model_copy(update={"solarize": 0.2})
        """Augmentation of a view; default: SimCLR's with solarization, as in the minimal
        example."""
        views: int = Field(default=4, ge=2)
        """Number of global views of each image; 4 in the minimal example, 2 beside 6 local views in
        the authors' README."""
        sigreg: float = Field(default=0.02, ge=0, le=1)
        """Weight lambda of SIGReg; the invariance has the weight 1 - lambda. Without SIGReg (0) all
        projections become equal."""
        directions: int = Field(default=256, ge=1)
        """Number of random directions that SIGReg projects onto, new ones at each step; 256 in the
        minimal example, 1,024 in the authors' README."""
        knots: int = Field(default=17, ge=2)
        """Number of points on [0, 3] at which the statistic's integral is evaluated."""
        hidden: int = Field(default=2048, ge=2)
        """Width of the projector's two hidden layers."""
        projection: int = Field(default=16, ge=2)
        """Width of the projections; 16 in the minimal example's command."""

    most_views = None
    takes_crops = True

    options: Options

    def __init__(self, options: Options, backbone: Backbone) -> None:
        super().__init__(options, backbone)
        self.projector = mlp([backbone.width, options.hidden, options.hidden, options.projection])

    def views(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, ...]:
        """The global views, the local views, and random unit directions (M, K), of all devices."""
        views = super().views(batch, generator)
        directions = torch.randn(
            self.options.directions,
            self.options.projection,
            generator=generator,
            device=generator.device,
        )
        directions = directions / directions.norm(dim=1, keepdim=True)
        distributed.copy_from_main(directions)
        return (*views, directions)

    def forward(self, views: tuple[Tensor, ...]) -> Output:
        *images, directions = views
        pooled = encode_by_size(lambda group: self.backbone(group).pooled, images)
        projected = self.projector(torch.cat(pooled)).chunk(len(images))
        # Not in bf16: the statistic compares means of cosines that differ little.
        with torch.autocast(directions.device.type, enabled=False):
            projections = torch.stack([view.float() for view in projected])  # (V, B, K)
            distance = invariance(projections, self.options.views)
            gaussian = sigreg(projections, directions, self.options.knots)
            weight = self.options.sigreg
            loss = (1 - weight) * distance + weight * gaussian
        deviation = projections.detach().std(dim=1, correction=0).mean()
        return Output(
            loss,
            {
                "invariance": distance.detach(),
                "sigreg": gaussian.detach(),
                "projection_std": deviation,
            },
        )

    def diagnose(self, metrics: Mapping[str, float]) -> str | None:
        """Name the collapse to equal projections, which SIGReg should prevent."""
        deviation = metrics.get("projection_std")
        if deviation is None or deviation >= COLLAPSED:
            return None
        return (
            f"complete collapse of the projections (deviation {deviation:.2g}, healthy 1): "
            "raise pretext.sigreg"
        )


def invariance(projections: Tensor, targets: int) -> Tensor:
    """Mean squared distance of projections (V, B, K) to the mean of the first `targets` views."""
    center = projections[:targets].mean(dim=0)
    return (projections - center).square().mean()


def sigreg(projections: Tensor, directions: Tensor, knots: int) -> Tensor:
    """Mean over views and directions of the Epps-Pulley statistic, as a 0-d tensor.

    `projections` (V, B, K) are those of this rank, `directions` (M, K) are unit vectors, equal on
    all ranks.
    """
    statistics = [epps_pulley(view @ directions.T, knots) for view in projections]
    return torch.stack(statistics).mean()


def epps_pulley(samples: Tensor, knots: int) -> Tensor:
    """The Epps-Pulley statistic of samples (B, M) for the standard normal distribution: (M,).

    N * integral over [-3, 3] of |phi(t) - exp(-t^2 / 2)|^2 exp(-t^2 / 2) dt, where phi is the
    empirical characteristic function of the N samples of all ranks. The integrand is symmetric, so
    that the trapezoidal rule has `knots` points on [0, 3] and counts twice.
    """
    t = torch.linspace(0, LARGEST, knots, dtype=samples.dtype, device=samples.device)
    gaussian = torch.exp(-t.square() / 2)
    step = LARGEST / (knots - 1)
    weights = torch.full_like(t, 2 * step)
    weights[0] = weights[-1] = step
    angles = samples[:, :, None] * t  # (B, M, T)
    means = torch.stack([angles.cos().mean(dim=0), angles.sin().mean(dim=0)])
    # Every rank has as many samples: the mean over all is the mean of the ranks' means.
    cosine, sine = distributed.gather(means[None]).mean(dim=0)
    error = (cosine - gaussian).square() + sine.square()
    return error @ (weights * gaussian) * (len(samples) * distributed.world_size())
