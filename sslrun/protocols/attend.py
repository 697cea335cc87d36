"""Find objects by the attention of [CLS], with nothing trained."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from sslrun.backbones.image import patch_attention
from sslrun.data.examples import Batch
from sslrun.protocols.base import Bench, Protocol, Scores, protocols
from sslrun.registry import Options
from sslrun.tasks.base import Task, TaskOptions
from sslrun.tasks.objects import Objects
from sslrun.training.device import Precision

TIE = 1e-6
"""Mass by which a sum may fall short of the wanted mass because of rounding."""


class AttendOptions(Options):
    """Masks from the attention of [CLS] (Caron et al., ICCV 2021, arXiv:2104.14294)."""

    mass: float = Field(default=0.6, gt=0, le=1)
    """Share of a head's attention that its mask holds, in the fewest patches."""
    head: Literal["best", "mean"] = "best"
    """Score of several heads. best: for each object that of the head that overlaps most, as in the
    paper; more heads then give a higher score. mean: the mean over heads."""


@protocols.register("attend")
class Attend(Protocol):
    """Find objects by the last layer's [CLS] attention, with nothing trained (DINO, Fig. 4).

    The mask of a head holds 60 % of its attention to patches, without [CLS] and registers. It runs
    from a recipe or a sweep: `evaluate: {stamps: {protocols: [attend]}}`. The command `sslrun
    attend` draws the same masks. Deviation: the authors' code compares rounded sums exactly, while
    sums within 1e-6 of the wanted mass suffice here.
    """

    Options = AttendOptions
    options: AttendOptions
    learns = False

    @classmethod
    def supports(cls, task: type[Task], options: TaskOptions) -> str | None:
        if issubclass(task, Objects):
            return None
        return f"finds objects, which the task '{task.name}' does not ask for: take task: objects"

    def needs(self) -> tuple[str, ...]:
        return ("attention",)

    def refit_obstacle(self) -> str | None:
        return "learns nothing"

    @property
    def precision(self) -> Precision:
        """Full precision, so that the order of patches does not depend on the device."""
        return "fp32"

    @torch.inference_mode()
    def run(self, bench: Bench) -> Scores:
        backbone, task = bench.backbone().eval(), bench.task
        backbone.require("attention", self.name)

        def attend(batch: Batch) -> tuple[Tensor, ...]:
            return (patch_attention(backbone, task.inputs(batch)),)

        metrics = {}
        for split in bench.tests:
            (maps,) = bench.outputs(split, attend)
            masks = heaviest(maps, self.options.mass)
            metrics[split] = bench.score(split, masks)
            by_head = [bench.score(split, masks[:, [head]]) for head in range(masks.shape[1])]
            if self.options.head == "mean":
                metrics[split] = _average(by_head)
            if split == "test":
                heads = [scores["jaccard"] for scores in by_head]
        return Scores(metrics, {"jaccard_by_head": heads, "patches": list(maps.shape[2:])})


def _average(scores: list[dict[str, float]]) -> dict[str, float]:
    """Average each metric over heads."""
    return {name: sum(each[name] for each in scores) / len(scores) for name in scores[0]}


def heaviest(maps: Tensor, mass: float) -> Tensor:
    """The fewest patches that hold a share `mass` of each map (..., rows, columns), as bool.

    Example: the weights 0.1 0.5 0.15 0.25 hold 0.6 in the second and the fourth. Of equal weights,
    the first are taken.
    """
    weights = maps.flatten(-2).double()
    ordered = weights.sort(dim=-1, descending=True, stable=True)
    shares = ordered.values / ordered.values.sum(dim=-1, keepdim=True)
    before = shares.cumsum(dim=-1) - shares  # mass of the heavier patches
    kept = before < mass - TIE
    mask = torch.zeros_like(kept).scatter(-1, ordered.indices, kept)
    return mask.unflatten(-1, maps.shape[-2:])
