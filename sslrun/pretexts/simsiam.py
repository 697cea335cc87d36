"""SimSiam (Chen & He, CVPR 2021, arXiv:2011.10566)."""

from __future__ import annotations

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

    Chen & He, CVPR 2021 (arXiv:2011.10566). The two views go through the network one after the
    other, and batch norm uses the statistics of all devices, as in the authors' code. Deviation:
    the predictor's learning rate follows the schedule, because all parameters share one. The
    authors keep it constant, which gained 0.4 points.
    """

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

    def forward(self, views: tuple[Tensor, Tensor]) -> Output:
        projected = [self.projector(self.backbone(view).pooled) for view in views]
        predicted = [self.predictor(vectors) for vectors in projected]
        return Output(
            simsiam_loss(predicted[0], projected[1]) / 2
            + simsiam_loss(predicted[1], projected[0]) / 2
        )


def simsiam_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean over the batch of -cos(p, z) for p and z (B, D); z gets no gradient."""
    return -F.cosine_similarity(predicted.float(), target.detach().float(), dim=1).mean()
