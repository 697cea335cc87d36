"""Relative position prediction (Doersch, Gupta & Efros, ICCV 2015, arXiv:1505.05192)."""

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

NEIGHBORS = ((0, 0), (0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1), (2, 2))
"""Row and column in the 3x3 grid of each class of neighbor: row by row, without the center."""


@pretexts.register("position")
class Position(Pretext):
    """Predict which of the eight neighbors of a patch another patch is.

    Doersch et al., ICCV 2015 (arXiv:1505.05192). Both patches go through one backbone; only a head
    with two hidden layers sees both (late fusion). Three measures prevent shortcuts: a gap between
    patches, jitter of each patch, and colors changed so that chromatic aberration gives nothing
    away. Stage 2 reads the backbone on whole images.

    Deviations: a batch holds the center patch of the grid and several of its neighbors from each
    image, where the paper draws one pair from an image; the backbone's work on the center is
    shared. Patches keep their mean, since a backbone normalizes its inputs. Batch norm keeps its
    scale and shift.
    """

    reads = ImageSpec

    class Options(PretextOptions):
        patch: int | None = Field(default=None, ge=2)
        """Side of a patch, in pixels; default: the largest for which 3 patches, 2 gaps and the
        jitter fit the image."""
        gap: int | None = Field(default=None, ge=0)
        """Pixels between patches; default: half a patch, as in the paper."""
        jitter: int | None = Field(default=None, ge=0)
        """Largest random shift of a patch along each axis, in pixels; default: 7/96 of a patch, as
        in the paper."""
        neighbors: int = Field(default=4, ge=1, le=8)
        """Number of neighbors drawn from each image."""
        color: Literal["drop", "project", "none"] = "drop"
        """Measure against chromatic aberration. drop: two of each patch's channels become noise.
        project: the green-magenta axis is removed. none: colors stay."""
        rescale: float = Field(default=0.0, ge=0, le=1)
        """Share of patches that are scaled down (to at least 100 pixels) and up again; the paper
        says "some"."""
        enlarge: int = Field(default=1, ge=1, le=32)
        """Factor by which patches are enlarged for the backbone. Patches of the paper are 96 pixels
        wide and need none. From images of 32 pixels they are 7 wide, which the last stage of a
        ResNet reduces to a single place: all of its kernels except their centers then see only
        padding, learn nothing, and disturb whole images."""
        hidden: int = Field(default=512, ge=1)
        """Width of the head's two hidden layers; 4096 in the paper."""

    options: Options

    def __init__(self, options: Options, backbone: Backbone) -> None:
        super().__init__(options, backbone)
        self.patch, self.gap, self.jitter = _layout(options, backbone)
        self.head = mlp([2 * backbone.width, options.hidden, options.hidden, len(NEIGHBORS)])

    @property
    def extent(self) -> int:
        """Side of the grid with its jitter, in pixels."""
        return 3 * self.patch + 2 * self.gap + 2 * self.jitter

    def views(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Patches ((1 + n) B, 3, p, p), the B centers first, and the classes (B, n) of each image's n neighbors."""
        images = to_float(batch.inputs)
        count, chosen, device = len(images), self.options.neighbors, images.device
        targets = torch.rand(count, 8, generator=generator, device=device).argsort(dim=1)[
            :, :chosen
        ]
        cells = torch.tensor(NEIGHBORS, device=device)[targets]
        cells = torch.cat([cells.new_ones(count, 1, 2), cells], dim=1)
        room = torch.tensor([side - self.extent + 1 for side in images.shape[-2:]], device=device)
        origin = (torch.rand(count, 1, 2, generator=generator, device=device) * room).long()
        moves = torch.randint(
            0, 2 * self.jitter + 1, cells.shape, generator=generator, device=device
        )
        corners = origin + cells * (self.patch + self.gap) + moves
        places = torch.arange(1 + chosen, device=device)[:, None].expand(-1, count)
        flat = corners.transpose(0, 1).flatten(0, 1)
        cut = patches(images.repeat(places.shape[0], 1, 1, 1), flat, self.patch)
        cut = self._hide_colors(self._rescale(cut, generator), generator)
        return resize(cut, self.patch * self.options.enlarge), targets

    def forward(self, views: tuple[Tensor, Tensor]) -> Output:
        cut, targets = views
        pooled = self.backbone(cut).pooled.unflatten(0, (-1, len(targets)))
        center, neighbors = pooled[0], pooled[1:]
        pairs = torch.cat([center.expand_as(neighbors), neighbors], dim=2)
        scores, truth = self.head(pairs.flatten(0, 1)), targets.T.flatten()
        correct = (scores.detach().argmax(dim=1) == truth).float().mean()
        return Output(F.cross_entropy(scores, truth), {"accuracy": correct})

    def _rescale(self, cut: Tensor, generator: torch.Generator) -> Tensor:
        lowest = min(10, self.patch)
        if not self.options.rescale or lowest == self.patch:
            return cut
        # One size for the whole batch, which could not stay one tensor otherwise.
        side = int(torch.randint(lowest, self.patch, (), generator=generator, device=cut.device))
        drawn = (
            torch.rand(len(cut), 1, 1, 1, generator=generator, device=cut.device)
            < self.options.rescale
        )
        return torch.where(drawn, resize(resize(cut, side), self.patch), cut)

    def _hide_colors(self, cut: Tensor, generator: torch.Generator) -> Tensor:
        if self.options.color == "drop":
            return drop_colors(cut, generator)
        return project_colors(cut) if self.options.color == "project" else cut


def drop_colors(images: Tensor, generator: torch.Generator) -> Tensor:
    """Keep one random channel of each image (B, 3, H, W) and replace the others by noise.

    The noise is Gaussian, around the kept channel's mean with a hundredth of its standard
    deviation.
    """
    kept = torch.randint(3, (len(images), 1, 1, 1), generator=generator, device=images.device)
    channel = images.gather(1, kept.expand(-1, 1, *images.shape[2:]))
    noise = torch.randn(images.shape, generator=generator, device=images.device)
    noise = noise * (channel.std(dim=(2, 3), keepdim=True) / 100) + channel.mean(
        dim=(2, 3), keepdim=True
    )
    return torch.where(torch.arange(3, device=images.device)[:, None, None] == kept, images, noise)


def project_colors(images: Tensor) -> Tensor:
    """Project each pixel of (B, 3, H, W) off the green-magenta axis a = (-1, 2, -1): B = I - a'a / aa'."""
    axis = images.new_tensor([-1.0, 2.0, -1.0])
    return images - torch.einsum("c,bchw->bhw", axis, images)[:, None] * axis[:, None, None] / 6


def _layout(options: Position.Options, backbone: Backbone) -> tuple[int, int, int]:
    """The patch, gap and jitter in pixels. UserError: they do not fit the image, or the backbone's own patches."""
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
            f"pretext.patch: patches of {options.patch} do not fit images of {side} (3 patches, 2 gaps and the jitter, in "
            f"multiples of the backbone's patch, {unit}): take {fitting[-1][0]}"
        )
    remedy = (
        f"take a backbone with a patch smaller than {unit}"
        if unit > 1
        else "take a smaller gap and jitter"
    )
    raise UserError(
        f"pretext 'position': no 3x3 grid of patches fits images of {side}: {remedy}, or larger images"
    )
