"""MoCo v3 (Chen, Xie & He, ICCV 2021, arXiv:2104.02057)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from sslrun import distributed
from sslrun.backbones.base import Backbone
from sslrun.data.image.augment import Augmentation
from sslrun.errors import UserError
from sslrun.pretexts.base import pretexts
from sslrun.pretexts.heads import mlp
from sslrun.pretexts.views import MultiView, Teacher, ViewOptions, cross_pairs
from sslrun.training.learner import Output
from sslrun.training.optim import half_cosine


@pretexts.register("mocov3")
class MoCoV3(MultiView):
    """Recognize a view's key, by a teacher, among the keys of the whole batch, without a queue.

    Chen, Xie & He, ICCV 2021 (arXiv:2104.02057). A predictor on the queries, a symmetric loss times
    2 * temperature, keys of all devices, and a momentum that rises to 1 along half a cosine, as in
    the authors' code (github.com/facebookresearch/moco-v3). Batch norm uses the statistics of all
    devices, and each view has its own. `freeze_patches` is the paper's remedy for the instability
    of ViTs.

    With more than two views, each view is a query for the keys of each other global view; the loss
    is twice the mean over these pairs, which is the paper's sum for two views. This is our choice.
    """

    class Options(ViewOptions):
        augmentation: Augmentation = Augmentation.byol_first()
        """Augmentation of the first view; default: BYOL's. The authors' crop begins at 0.2 for
        ResNet-50 and 0.08 for ViTs."""
        second: Augmentation | None = Augmentation.byol_second()
        """Augmentation of the second view; default: BYOL's."""
        temperature: float = Field(default=0.2, gt=0)
        """Temperature of the softmax; 0.2 for ViTs and 1.0 for ResNet-50 in the authors'
        commands."""
        momentum: float = Field(default=0.99, ge=0, le=1)
        """Initial momentum of the teacher; it rises to 1 along half a cosine."""
        hidden: int = Field(default=4096, ge=2)
        """Width of the hidden layers of projector and predictor."""
        projection: int = Field(default=256, ge=2)
        """Width of the vectors that are compared."""
        depth: int = Field(default=3, ge=2)
        """Number of layers of the projector; in the authors' code 3 for ViTs and 2 for
        ResNet-50."""
        freeze_patches: bool = False
        """Keep the random initial projection of patches. It makes the training of a ViT stable."""

    most_views = None
    takes_crops = True

    options: Options

    def __init__(self, options: Options, backbone: Backbone) -> None:
        """Raises UserError if patches are to be frozen that the backbone does not project."""
        super().__init__(options, backbone)
        if options.freeze_patches:
            projection = backbone.patch_projection()
            if not projection:
                raise UserError(
                    f"pretext.freeze_patches: the backbone '{backbone.name}' has no projection of "
                    "patches to freeze: leave it out"
                )
            for parameter in projection:
                parameter.requires_grad_(False)
        hidden = [options.hidden] * (options.depth - 1)
        self.projector = mlp(
            [backbone.width, *hidden, options.projection], last_norm=True, last_affine=False
        )
        self.predictor = mlp(
            [options.projection, options.hidden, options.projection],
            last_norm=True,
            last_affine=False,
        )
        self.teacher = Teacher(backbone, self.projector)

    def forward(self, views: tuple[Tensor, ...]) -> Output:
        queries = [self.predictor(self.projector(self.backbone(view).pooled)) for view in views]
        keys = [self.teacher(view) for view in views[: self.options.views]]
        pairs = cross_pairs(len(keys), len(views))
        terms = [
            batch_info_nce(queries[view], keys[target], self.options.temperature)
            for view, target in pairs
        ]
        losses, hits = (torch.stack(values) for values in zip(*terms, strict=True))
        loss = 2 * self.options.temperature * losses.mean() * 2
        return Output(loss, {"accuracy": hits.mean()})

    def after_step(self, progress: float) -> None:
        """Move the teacher toward the student; see the option `momentum`."""
        momentum = half_cosine(self.options.momentum, 1.0, progress)
        self.teacher.follow(self.backbone, self.projector, momentum)


def batch_info_nce(queries: Tensor, keys: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """InfoNCE loss as `match`, but the keys get no gradient."""
    return match(queries, keys.detach(), temperature)


def match(queries: Tensor, keys: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """InfoNCE loss of queries (B, D) against the keys (B, D) of all ranks.

    -log exp(q_i.k_i / t) / sum over j of exp(q_i.k_j / t), with unit vectors q and k, averaged over
    the batch. Returns the loss and the share of queries whose own key is the most similar, both
    0-d.
    """
    with torch.autocast(queries.device.type, enabled=False):
        normalized = F.normalize(queries.float(), dim=1)
        every_key = distributed.gather(F.normalize(keys.float(), dim=1))
        scores = normalized @ every_key.T / temperature
        targets = torch.arange(len(queries), device=queries.device)
        targets = targets + distributed.rank() * len(queries)
        loss = F.cross_entropy(scores, targets)
        return loss, (scores.detach().argmax(dim=1) == targets).float().mean()
