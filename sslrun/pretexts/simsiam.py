"""SimSiam (Chen & He, CVPR 2021, arXiv:2011.10566)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from sslrun.backbones.base import Backbone
from sslrun.pretexts.base import pretexts
from sslrun.pretexts.heads import mlp
from sslrun.pretexts.views import MultiView, ViewOptions
from sslrun.training.learner import Output


@pretexts.register("simsiam")
class SimSiam(MultiView):
    """Predict the projection of the other view, with a stopped gradient.

    Chen & He, CVPR 2021 (arXiv:2011.10566). The views go through the network one after the other,
    and batch norm uses the statistics of all devices, as in the authors' code. Deviation: the
    predictor's learning rate follows the schedule, because all parameters share one. The authors
    keep it constant, which gained 0.4 points.

    With more than two views, each view predicts the mean projection of the other global views. With
    four views, this is FastSiam (Pototzky, Sultan & Schmidt-Thieme, GCPR 2022). Local views predict
    the mean of all global views and are never targets, which is our choice.
    """

    most_views = None
    takes_crops = True

    class Options(ViewOptions):
        hidden: int = Field(default=2048, ge=2)
        """Width of the projector's hidden and output layers."""
        depth: int = Field(default=3, ge=2)
        """Number of layers of the projector; 2 for CIFAR-10 in the paper."""
        bottleneck: int = Field(default=512, ge=2)
        """Width of the predictor's hidden layer."""

    options: Options

    def __init__(self, options: Options, backbone: Backbone) -> None:
        super().__init__(options, backbone)
        widths = [backbone.width, *[options.hidden] * options.depth]
        self.projector = mlp(widths, last_norm=True, last_affine=False)
        self.predictor = mlp([options.hidden, options.bottleneck, options.hidden])

    def forward(self, views: tuple[Tensor, ...]) -> Output:
        projected = [self.projector(self.backbone(view).pooled) for view in views]
        predicted = [self.predictor(vectors) for vectors in projected]
        loss = predicted[0].new_zeros((), dtype=torch.float32)
        for index, prediction in enumerate(predicted):
            others = [
                target
                for other, target in enumerate(projected[: self.options.views])
                if other != index
            ]
            target = torch.stack(others).mean(dim=0)
            loss = loss + simsiam_loss(prediction, target) / len(predicted)
        return Output(loss)


def simsiam_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean over the batch of -cos(p, z) for p and z (B, D); z gets no gradient."""
    return -F.cosine_similarity(predicted.float(), target.detach().float(), dim=1).mean()
