"""Relative position prediction (Doersch, Gupta & Efros, ICCV 2015, arXiv:1505.05192)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from sslrun.backbones.base import Backbone
from sslrun.data.examples import Batch, to_device
from sslrun.data.image.augment import patches, resize, to_float
from sslrun.data.specs import ImageSpec
from sslrun.errors import UserError
from sslrun.pretexts.base import NormOptions, Pretext, pretexts
from sslrun.pretexts.heads import mlp
from sslrun.training.learner import Output

NEIGHBORS = ((0, 0), (0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1), (2, 2))
"""Row and column in the 3x3 grid of each class of neighbor: row by row, without the center."""


@pretexts.register("position")
class Position(Pretext):
    """Predict which of the eight neighbors of a patch another patch is.

    Doersch et al., ICCV 2015 (arXiv:1505.05192). The same backbone reads both patches, and a head
    with two hidden layers compares them (late fusion). Three measures prevent shortcuts: a gap
    between patches, jitter of each patch, and changed colors, which hide chromatic aberration.
    Evaluations apply the backbone to whole images.

    Deviations: a batch holds the center patch of the grid and several of its neighbors from each
    image, so that they share the features of the center; the paper draws one pair from an image.
    Patches keep their mean, because a backbone normalizes its inputs. Batch norm keeps its scale
    and shift, so that every backbone can be used unchanged.
    """

    reads = ImageSpec

    class Options(NormOptions):
        patch: int | None = Field(default=None, ge=2)
        """Side of a patch, in pixels; default: the largest for which 3 patches, 2 gaps and the
        jitter fit the image."""
        gap: int | None = Field(default=None, ge=0)
        """Gap between patches, in pixels; default: half a patch, as in the paper."""
        jitter: int | None = Field(default=None, ge=0)
        """Largest random shift of a patch along each axis, in pixels; default: 7/96 of a patch, as
        in the paper."""
        neighbors: int = Field(default=4, ge=1, le=8)
        """Number of neighbors drawn from each image."""
        color: Literal["drop", "project", "none"] = "drop"
        """How to hide chromatic aberration. drop: replace two of each patch's channels by noise.
        project: remove the green-magenta axis. none: keep colors."""
        rescale: float = Field(default=0.0, ge=0, le=1)
        """Share of patches that are scaled down, to at least 100 pixels in all, and up again. The
        paper says "some"."""
        enlarge: int = Field(default=1, ge=1, le=32)
        """Factor by which patches are enlarged for the backbone. The paper's patches are 96 pixels
        wide and are not enlarged. Images of 32 pixels give patches of 7, which a ResNet reduces to
        a single position before its last stage. There, only the centers of the kernels see more
        than padding; the rest is not trained, and disturbs features of whole images."""
        hidden: int = Field(default=512, ge=1)
        """Width of the head's two hidden layers; 4096 in the paper."""

        def complete(self, patch: int) -> tuple[int, int, int]:
            """The patch, gap and jitter for patches of a size, in pixels."""
            gap = round(patch / 2) if self.gap is None else self.gap
            jitter = round(patch * 7 / 96) if self.jitter is None else self.jitter
            return patch, gap, jitter

    options: Options

    def __init__(self, options: Options, backbone: Backbone) -> None:
        super().__init__(options, backbone)
        channels = backbone.spec.channels  # type: ignore[attr-defined]
        if options.color != "none" and channels != 3:
            raise UserError(
                f"pretext.color: {options.color} needs color images of 3 channels, and these have "
                f"{channels}: set color: none"
            )
        self.patch, self.gap, self.jitter = _layout(options, backbone)
        self.head = mlp([2 * backbone.width, options.hidden, options.hidden, len(NEIGHBORS)])

    @property
    def extent(self) -> int:
        """Side of the grid with its jitter, in pixels."""
        return 3 * self.patch + 2 * self.gap + 2 * self.jitter

    def views(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Patches ((1 + n) B, 3, p, p) of B images, and the classes (B, n) of n neighbors of each.

        The B centers come first, then the first neighbor of each image, and so on.
        """
        images = to_float(batch.inputs)
        noise = torch.rand(len(images), 8, generator=generator, device=images.device)
        targets = noise.argsort(dim=1)[:, : self.options.neighbors]
        corners = self._corners(images, targets, generator).transpose(0, 1).flatten(0, 1)
        repeated = images.repeat(1 + self.options.neighbors, 1, 1, 1)
        cut = patches(repeated, corners, self.patch)
        cut = self._hide_colors(self._rescale(cut, generator), generator)
        return resize(cut, self.patch * self.options.enlarge), targets

    def _corners(self, images: Tensor, targets: Tensor, generator: torch.Generator) -> Tensor:
        """Upper left corners (B, 1 + n, 2), as row and column, of the center and n neighbors.

        The grid lies at a random place of each image, and each patch is moved by its own jitter.
        """
        count, device = len(images), images.device
        cells = to_device(torch.tensor(NEIGHBORS), device)[targets]
        cells = torch.cat([cells.new_ones(count, 1, 2), cells], dim=1)
        height, width = images.shape[-2:]
        room = torch.tensor([height - self.extent + 1, width - self.extent + 1])
        origin = torch.rand(count, 1, 2, generator=generator, device=device)
        origin = (origin * to_device(room, device)).long()
        moves = torch.randint(
            0, 2 * self.jitter + 1, cells.shape, generator=generator, device=device
        )
        return origin + cells * (self.patch + self.gap) + moves

    def forward(self, views: tuple[Tensor, Tensor]) -> Output:
        cut, targets = views
        pooled = self.backbone(cut).pooled.unflatten(0, (-1, len(targets)))
        center, neighbors = pooled[0], pooled[1:]
        pairs = torch.cat([center.expand_as(neighbors), neighbors], dim=2)
        scores, truth = self.head(pairs.flatten(0, 1)), targets.T.flatten()
        correct = (scores.detach().argmax(dim=1) == truth).float().mean()
        return Output(F.cross_entropy(scores, truth), {"accuracy": correct})

    def _rescale(self, cut: Tensor, generator: torch.Generator) -> Tensor:
        """Scale a random share of the patches down and up again."""
        lowest = min(10, self.patch)
        if not self.options.rescale or lowest == self.patch:
            return cut
        # One size for the whole batch, so that it stays one tensor.
        side = int(torch.randint(lowest, self.patch, (), generator=generator, device=cut.device))
        noise = torch.rand(len(cut), 1, 1, 1, generator=generator, device=cut.device)
        return torch.where(noise < self.options.rescale, resize(resize(cut, side), self.patch), cut)

    def _hide_colors(self, cut: Tensor, generator: torch.Generator) -> Tensor:
        """Change the colors of patches as the option `color` says."""
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
    deviation = channel.std(dim=(2, 3), keepdim=True) / 100
    noise = noise * deviation + channel.mean(dim=(2, 3), keepdim=True)
    return torch.where(torch.arange(3, device=images.device)[:, None, None] == kept, images, noise)


def project_colors(images: Tensor) -> Tensor:
    """Remove the green-magenta axis a = (-1, 2, -1) from each pixel of images (B, 3, H, W).

    A pixel p becomes p (I - a'a / aa').
    """
    axis = to_device(torch.tensor([-1.0, 2.0, -1.0], dtype=images.dtype), images.device)
    return images - torch.einsum("c,bchw->bhw", axis, images)[:, None] * axis[:, None, None] / 6


def _layout(options: Position.Options, backbone: Backbone) -> tuple[int, int, int]:
    """The patch, gap and jitter, in pixels.

    Raises:
        UserError: they do not fit the image, or the patch is no multiple of the backbone's.
    """
    side = min(backbone.spec.shape)  # type: ignore[attr-defined]
    unit = backbone.patch
    fitting = [
        layout
        for layout in map(options.complete, range(max(2, unit), side // 3 + 1))
        if layout[0] % unit == 0 and 3 * layout[0] + 2 * (layout[1] + layout[2]) <= side
    ]
    if options.patch is None and fitting:
        return fitting[-1]
    if options.patch is not None and options.complete(options.patch) in fitting:
        return options.complete(options.patch)
    if fitting:
        raise UserError(
            f"pretext.patch: patches of {options.patch} do not fit images of {side} (3 patches, "
            f"2 gaps and the jitter, in multiples of the backbone's patch, {unit}): "
            f"take {fitting[-1][0]}"
        )
    remedy = (
        f"take a backbone with a patch smaller than {unit}"
        if unit > 1
        else "take a smaller gap and jitter"
    )
    raise UserError(
        f"pretext 'position': no 3x3 grid of patches fits images of {side}: {remedy}, "
        "or larger images"
    )
