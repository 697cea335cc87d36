"""Rotation prediction (Gidaris, Singh & Komodakis, ICLR 2018, arXiv:1803.07728)."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslrun.backbones.base import Backbone
from sslrun.data.examples import Batch
from sslrun.data.image.augment import Augmentation, quarter_turns, side_of
from sslrun.data.specs import ImageSpec
from sslrun.pretexts.base import NormOptions, Pretext, is_random_or_unsynchronized, pretexts
from sslrun.training.learner import Output


@pretexts.register("rotation")
class Rotation(Pretext):
    """Predict by which quarter turn an image was rotated.

    Gidaris et al., ICLR 2018 (arXiv:1803.07728). A batch holds all turns of each image, which the
    paper found clearly better than one turn of each; B images then cost as much as 4B. Only
    multiples of 90 degrees are used, because interpolation would reveal other angles.
    """

    reads = ImageSpec
    needs_square = True

    class Options(NormOptions):
        turns: Literal[2, 4] = 4
        """Number of classes. 4: rotations by 0, 90, 180 and 270 degrees; 2: by 0 and 180 (Table 2
        of the paper)."""
        augmentation: Augmentation = Augmentation(flip=0.5)
        """Augmentation before the rotation. The paper flips, and crops if images are large
        enough."""

    options: Options

    @classmethod
    def depends_on_devices(
        cls, options: Options, backbone: type[Backbone], backbone_options: Any
    ) -> bool:
        """True if views or the network are random, or if each device has its own batch norm."""
        return is_random_or_unsynchronized(
            options, [options.augmentation], backbone, backbone_options
        )

    def __init__(self, options: Options, backbone: Backbone) -> None:
        super().__init__(options, backbone)
        self.head = nn.Linear(backbone.width, options.turns)

    def views(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Rotated images (turns * B, 3, H, W), ordered by turn, and their classes (turns * B,)."""
        images = self.options.augmentation(batch.inputs, side_of(batch.inputs), generator)
        targets = torch.arange(self.options.turns, device=images.device).repeat_interleave(
            len(images)
        )
        turned = quarter_turns(
            images.repeat(self.options.turns, 1, 1, 1), targets * (4 // self.options.turns)
        )
        return turned, targets

    def forward(self, views: tuple[Tensor, Tensor]) -> Output:
        images, targets = views
        scores = self.head(self.backbone(images).pooled)
        correct = (scores.detach().argmax(dim=1) == targets).float().mean()
        return Output(F.cross_entropy(scores, targets), {"accuracy": correct})
