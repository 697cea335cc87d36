"""BYOL (Grill et al., NeurIPS 2020, arXiv:2006.07733)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from sslrun.backbones.base import Backbone
from sslrun.data.image.augment import Augmentation
from sslrun.pretexts.base import pretexts
from sslrun.pretexts.heads import mlp
from sslrun.pretexts.views import MultiView, Teacher, ViewOptions, cross_pairs
from sslrun.training.learner import Output


@pretexts.register("byol")
class BYOL(MultiView):
    """Predict the projection of the other view by a teacher, a moving average of the student.

    Grill et al., NeurIPS 2020 (arXiv:2006.07733). The views go through the networks one after the
    other, so that each has its own batch statistics, over all devices, as in the authors' code. The
    teacher stays in training mode, as in that code. With more than two views, each view predicts
    the teacher's projections of the other global views, as in DINO (Caron et al., ICCV 2021,
    arXiv:2104.14294); the loss is twice the mean over these pairs, which is the paper's sum for two
    views.
    """

    most_views = None
    takes_crops = True

    class Options(ViewOptions):
        augmentation: Augmentation = Augmentation.byol_first()
        """Augmentation of the first view; default: always blurred, never solarized."""
        second: Augmentation | None = Augmentation.byol_second()
        """Augmentation of the second view; default: rarely blurred, sometimes solarized."""
        hidden: int = Field(default=4096, ge=2)
        """Width of the hidden layers of projector and predictor."""
        projection: int = Field(default=256, ge=2)
        """Width of the vectors that are compared."""
        momentum: float = Field(default=0.996, ge=0, le=1)
        """Initial momentum of the teacher; it rises to 1 along half a cosine."""

    options: Options

    def __init__(self, options: Options, backbone: Backbone) -> None:
        super().__init__(options, backbone)
        self.projector = mlp([backbone.width, options.hidden, options.projection])
        self.predictor = mlp([options.projection, options.hidden, options.projection])
        self.teacher = Teacher(backbone, self.projector)

    def forward(self, views: tuple[Tensor, ...]) -> Output:
        predicted = [self.predictor(self.projector(self.backbone(view).pooled)) for view in views]
        targets = [self.teacher(view) for view in views[: self.options.views]]
        pairs = cross_pairs(len(targets), len(views))
        total = sum(
            (byol_loss(predicted[view], targets[target]) for view, target in pairs),
            predicted[0].new_zeros((), dtype=torch.float32),
        )
        return Output(total * (2 / len(pairs)))

    def after_step(self, progress: float) -> None:
        """Move the teacher toward the student.

        The momentum is 1 - (1 - m0) (cos(pi progress) + 1) / 2, where m0 is the option `momentum`.
        """
        momentum = 1 - (1 - self.options.momentum) * (math.cos(math.pi * progress) + 1) / 2
        self.teacher.follow(self.backbone, self.projector, momentum)


def byol_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean over the batch of 2 - 2 cos(p, z), for p and z (B, D), as a 0-d tensor.

    It equals || p / |p| - z / |z| ||^2; z gets no gradient.
    """
    return (2 - 2 * F.cosine_similarity(predicted.float(), target.detach().float(), dim=1)).mean()
