"""Objects of an image, found by masks that nothing was trained for."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from sslrun.data.examples import Batch, Examples
from sslrun.data.image.augment import resize, to_float
from sslrun.data.image.masks import BACKGROUND, VOID
from sslrun.data.specs import ImageSpec
from sslrun.errors import UserError
from sslrun.metric import Metric
from sslrun.tasks.base import Task, TaskOptions, tasks

BOX = 0.5
"""Side of the centered box, as a share of the image's: a quarter of the area, about as much as an
object of `stamps`. Our choice."""


@tasks.register("objects")
class Objects(Task):
    """Find the objects of an image; scored by the Jaccard index, nothing is trained.

    Outputs are masks (N, M, h, w), 0 or 1: M attention heads of each image. The mask that overlaps
    most with an object counts for it (Caron et al., ICCV 2021, arXiv:2104.14294, Figure 4; issue 54
    of their code): the mean over an image's objects, then over images. Void pixels count neither as
    overlap nor as error, and images without objects are left out. More masks give a higher score,
    so compare equal numbers of heads.

    `everything` and `centered_box` are the scores of a mask of the whole image and of a box of half
    its sides; `gain` is the Jaccard index minus `everything`. All metrics are in percent.
    """

    class Options(TaskOptions):
        size: int | None = Field(default=None, ge=1)
        """Side of the backbone's input images, in pixels; default: that of the data's images. Masks
        are scored at the resolution of the data."""

        @property
        def linear(self) -> bool:
            return False

    reads = ImageSpec
    has_head = False
    metrics = (
        Metric("jaccard"),
        Metric("everything"),
        Metric("centered_box"),
        Metric("gain"),
    )
    options: Objects.Options

    def __init__(self, options: Objects.Options, spec: Any, classes: tuple[str, ...]) -> None:
        super().__init__(options, spec, classes)
        self.size = options.size or spec.size

    @property
    def backbone_spec(self) -> ImageSpec:
        return ImageSpec(self.size)

    def inputs(self, batch: Batch) -> Tensor:
        return resize(to_float(batch.inputs), self.size)

    def targets(self, examples: Examples) -> Tensor:
        """The masks of objects (N, H, W). Raises UserError if labels are something else."""
        labels = super().targets(examples)
        if labels.ndim != 3:
            raise UserError(
                f"the task '{self.name}' needs a mask of each image's objects, but the labels are "
                "classes: choose such data, as in data: stamps"
            )
        return labels

    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """Score masks (N, M, h, w) by the objects of `targets` (N, H, W)."""
        height, width = targets.shape[-2:]
        whole = torch.ones(1, height, width, dtype=torch.bool, device=targets.device)
        baselines = torch.stack([whole[0], centered_box(height, width).to(targets.device)])
        scores = []
        for masks, labels in zip(outputs, targets, strict=True):
            enlarged = F.interpolate(masks[None].float(), (height, width), mode="nearest-exact")[0]
            found = jaccard(torch.cat([baselines, enlarged > 0.5]), labels)
            if found.shape[1]:
                everything, box, *_ = found.mean(dim=1)
                scores.append(torch.stack([found[2:].amax(dim=0).mean(), everything, box]))
        if not scores:
            raise UserError(
                f"the task '{self.name}': none of the {len(targets)} images has objects"
            )
        best, everything, box = (100 * torch.stack(scores).double().mean(dim=0)).tolist()
        return {
            "jaccard": best,
            "everything": everything,
            "centered_box": box,
            "gain": best - everything,
        }


def jaccard(masks: Tensor, labels: Tensor) -> Tensor:
    """Jaccard index (M, K) of masks (M, H, W) bool with the K objects of labels (H, W) uint8.

    It is the overlap of mask and object over their union; void pixels are left out. K may be 0.
    """
    real = labels != VOID
    numbers = labels[real].unique()
    numbers = numbers[numbers != BACKGROUND]
    objects = (labels[real] == numbers[:, None]).float()  # (K, pixels)
    chosen = masks[:, real].float()  # (M, pixels)
    overlap = chosen @ objects.T
    return overlap / (chosen.sum(dim=1)[:, None] + objects.sum(dim=1) - overlap)


def centered_box(height: int, width: int) -> Tensor:
    """A mask (H, W) of a box in the center, `BOX` of the image's sides."""
    mask = torch.zeros(height, width, dtype=torch.bool)
    tall, wide = round(BOX * height), round(BOX * width)
    top, left = (height - tall) // 2, (width - wide) // 2
    mask[top : top + tall, left : left + wide] = True
    return mask
