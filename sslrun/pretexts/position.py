"""Relative position prediction (Doersch, Gupta & Efros, ICCV 2015)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from sslrun.backbones.base import Backbone
from sslrun.data.examples import Batch
from sslrun.data.image.augment import patches, resize, to_float
from sslrun.data.specs import ImageSpec
from sslrun.errors import UserError
from sslrun.pretexts.base import Pretext, PretextOptions, pretexts
from sslrun.pretexts.heads import mlp
from sslrun.training.learner import Output

NEIGHBOURS = ((0, 0), (0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1), (2, 2))
"""Row and column, in the 3x3 grid, of the neighbour of each class: row by row, without the centre."""


@pretexts.register("position")
class Position(Pretext):
    """Predict which of eight neighbours of a patch another patch is. Doersch et al., ICCV 2015.

    Both patches go through one backbone; a head of two hidden layers is the only part to see both (late fusion).
    Against shortcuts: a gap between patches, jitter of each, and colours changed so that chromatic aberration tells
    nothing. Stage 2 reads the backbone on whole images.

    Deviations: the grid's centre patch and several of its neighbours come from one image in one batch, where the paper
    draws one pair an image: the backbone's work on the centre is shared. Patches keep their mean, since a backbone
    normalises its inputs. Batch norm keeps scale and shift.
    """

    reads = ImageSpec

    class Options(PretextOptions):
        patch: int | None = Field(default=None, ge=2)
        """Side of a patch, in pixels; default: the largest that fits 3 patches, 2 gaps and the jitter."""
        gap: int | None = Field(default=None, ge=0)
        """Pixels between patches; default: half a patch, as in the paper."""
        jitter: int | None = Field(default=None, ge=0)
        """Pixels that each patch is moved at most, along each axis; default: 7/96 of a patch, as in the paper."""
        neighbours: int = Field(default=4, ge=1, le=8)
        """Neighbours drawn an image."""
        color: Literal["drop", "project", "none"] = "drop"
        """Against chromatic aberration. drop: two of each patch's channels become noise; project: the green-magenta
        axis is removed; none."""
        rescale: float = Field(default=0.0, ge=0, le=1)
        """Share of patches scaled down, to 100 pixels in all at least, and up again; the paper's: "some"."""
        enlarge: int = Field(default=1, ge=1, le=32)
        """Factor by which patches are enlarged before the backbone sees them. In the paper, which has no need of it, a
        patch is 96 wide; from 32 pixels it is 7, of which the last stage of a ResNet makes a single place: all of its
        kernels but their centres see padding alone, learn nothing, and get in the way on whole images."""
        hidden: int = Field(default=512, ge=1)
        """Width of the head's two hidden layers; 4096 in the paper."""

    options: Options

    def __init__(self, options: Options, backbone: Backbone) -> None:
        super().__init__(options, backbone)
        self.patch, self.gap, self.jitter = _layout(options, backbone)
        self.head = mlp([2 * backbone.width, options.hidden, options.hidden, len(NEIGHBOURS)])

    @property
    def extent(self) -> int:
        """Pixels that the grid with its jitter takes along each axis."""
        return 3 * self.patch + 2 * self.gap + 2 * self.jitter

    def views(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Patches ((1 + n) B, 3, p, p), the B centres first, and the class (B, n) of each image's n neighbours."""
        images = to_float(batch.inputs)
        count, chosen, device = len(images), self.options.neighbours, images.device
        targets = torch.rand(count, 8, generator=generator, device=device).argsort(dim=1)[:, :chosen]
        cells = torch.tensor(NEIGHBOURS, device=device)[targets]
        cells = torch.cat([cells.new_ones(count, 1, 2), cells], dim=1)
        room = torch.tensor([each - self.extent + 1 for each in images.shape[-2:]], device=device)
        origin = (torch.rand(count, 1, 2, generator=generator, device=device) * room).long()
        moves = torch.randint(0, 2 * self.jitter + 1, cells.shape, generator=generator, device=device)
        corners = origin + cells * (self.patch + self.gap) + moves
        places = torch.arange(1 + chosen, device=device)[:, None].expand(-1, count)
        flat = corners.transpose(0, 1).flatten(0, 1)
        found = patches(images.repeat(places.shape[0], 1, 1, 1), flat, self.patch)
        found = self._hidden_colors(self._rescaled(found, generator), generator)
        return resize(found, self.patch * self.options.enlarge), targets

    def forward(self, views: tuple[Tensor, Tensor]) -> Output:
        found, targets = views
        pooled = self.backbone(found).pooled.unflatten(0, (-1, len(targets)))
        centre, neighbours = pooled[0], pooled[1:]
        pairs = torch.cat([centre.expand_as(neighbours), neighbours], dim=2)
        scores, truth = self.head(pairs.flatten(0, 1)), targets.T.flatten()
        correct = (scores.detach().argmax(dim=1) == truth).float().mean()
        return Output(F.cross_entropy(scores, truth), {"accuracy": correct})

    def _rescaled(self, found: Tensor, generator: torch.Generator) -> Tensor:
        lowest = min(10, self.patch)
        if not self.options.rescale or lowest == self.patch:
            return found
        # One size a batch: sizes of their own would part the batch.
        side = int(torch.randint(lowest, self.patch, (), generator=generator, device=found.device))
        drawn = torch.rand(len(found), 1, 1, 1, generator=generator, device=found.device) < self.options.rescale
        return torch.where(drawn, resize(resize(found, side), self.patch), found)

    def _hidden_colors(self, found: Tensor, generator: torch.Generator) -> Tensor:
        if self.options.color == "drop":
            return drop_colors(found, generator)
        return project_colors(found) if self.options.color == "project" else found


def drop_colors(images: Tensor, generator: torch.Generator) -> Tensor:
    """Keep one channel of each image (B, 3, H, W); the others become Gaussian noise around the kept one's mean, with a
    hundredth of its deviation."""
    kept = torch.randint(3, (len(images), 1, 1, 1), generator=generator, device=images.device)
    channel = images.gather(1, kept.expand(-1, 1, *images.shape[2:]))
    noise = torch.randn(images.shape, generator=generator, device=images.device)
    noise = noise * (channel.std(dim=(2, 3), keepdim=True) / 100) + channel.mean(dim=(2, 3), keepdim=True)
    return torch.where(torch.arange(3, device=images.device)[:, None, None] == kept, images, noise)


def project_colors(images: Tensor) -> Tensor:
    """Remove from each pixel of (B, 3, H, W) what lies on the green-magenta axis a = (-1, 2, -1): B = I - a'a / aa'."""
    axis = images.new_tensor([-1.0, 2.0, -1.0])
    return images - torch.einsum("c,bchw->bhw", axis, images)[:, None] * axis[:, None, None] / 6


def _layout(options: Position.Options, backbone: Backbone) -> tuple[int, int, int]:
    """Patch, gap and jitter. UserError where they don't fit the image, or a ViT's patches."""
    side = backbone.spec.size  # type: ignore[attr-defined]
    unit = backbone.patch

    def around(patch: int) -> tuple[int, int, int]:
        gap = round(patch / 2) if options.gap is None else options.gap
        jitter = round(patch * 7 / 96) if options.jitter is None else options.jitter
        return patch, gap, jitter

    fitting = [
        layout
        for patch in range(max(2, unit), side // 3 + 1)
        if patch % unit == 0 and 3 * patch + 2 * sum((layout := around(patch))[1:]) <= side
    ]
    if options.patch is None and fitting:
        return fitting[-1]
    if options.patch is not None and around(options.patch) in fitting:
        return around(options.patch)
    if fitting:
        raise UserError(
            f"pretext.patch: patches of {options.patch} don't fit images of {side} (3 patches, 2 gaps and the jitter, in "
            f"multiples of the backbone's patch, {unit}): take {fitting[-1][0]}"
        )
    remedy = f"take a backbone with a patch smaller than {unit}" if unit > 1 else "take a smaller gap and jitter"
    raise UserError(f"pretext 'position': no 3x3 grid of patches fits images of {side}: {remedy}, or larger images")
