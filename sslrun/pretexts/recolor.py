"""Tracking by colorizing videos (Vondrick et al., ECCV 2018, arXiv:1806.09594).

Shape legend: B clips, R reference frames, N cells of a frame's grid, D the width of a cell's
vector, and K clusters of colors.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from sslrun.backbones.base import Backbone
from sslrun.data.examples import Batch, Examples
from sslrun.data.image.augment import to_float
from sslrun.data.image.clusters import find_clusters
from sslrun.data.image.lab import LightnessExamples, lab_to_rgb, lightness, rgb_to_lab
from sslrun.data.specs import ImageSpec, InputSpec, VideoSpec
from sslrun.errors import UserError
from sslrun.pretexts.base import NormOptions, Pretext, is_random_or_unsynchronized, pretexts
from sslrun.pretexts.colorize import grid_side, is_colored
from sslrun.training.learner import Output

SAMPLE = 2000
"""Largest number of clips that the clusters are computed from."""
CLUSTERED = 2**16
"""Largest number of cells that k-means sees."""
EPSILON = 1e-20
"""Added to a probability before its logarithm."""


class Cells(NamedTuple):
    """What the task reads of clips whose last frame is the target."""

    frames: Tensor
    """(B, R + 1, 3, S, S): L / 100 in three equal channels."""
    colors: Tensor
    """(B, R + 1, N) int64: the cluster of each cell's color."""


@pretexts.register("recolor")
class Recolor(Pretext):
    """Color a gray frame by copying the colors of the cells of earlier frames.

    Vondrick et al., "Tracking Emerges by Colorizing Videos", ECCV 2018 (arXiv:1806.09594). Each
    cell of the target's grid attends to all cells of the reference frames, by a softmax over the
    products of their vectors, and takes the mean of their colors. Colors are clusters of a and b of
    CIE Lab. To find where a color comes from, the network must find the same object: label
    propagation then follows the same similarities.

    The backbone sees L / 100 in three equal channels and normalizes it by the statistics of
    lightness. Evaluate with `task: {color: lightness}`, so that the network sees the same.

    Deviations: each frame is read by itself, without the paper's five layers of convolution over
    time, because the backbone must serve single frames. The predicted mix has a small share of the
    clusters' frequencies (`smoothing`), so that a color that no reference has costs a finite loss.
    """

    reads, gives = VideoSpec, ImageSpec
    needs_color = True
    needs = ("grid",)

    class Options(NormOptions):
        references: int = Field(default=3, ge=1)
        """Number of reference frames, before the last frame of a clip, which is the target."""
        clusters: int = Field(default=16, ge=2)
        """Number of clusters of colors."""
        radius: float | None = Field(default=None, gt=0)
        """Largest distance that a color is copied over, in cells of the grid; null: any."""
        projection: int = Field(default=64, ge=2)
        """Width of the vectors that are compared, after a linear map of the backbone's grid."""
        smoothing: float = Field(default=0.01, ge=0, lt=1)
        """Share of the clusters' frequencies in the predicted mix of colors."""

    options: Options
    centers: Tensor
    """(K, 2): a and b of each cluster."""
    frequencies: Tensor
    """(K,): share of each cluster in the training frames."""
    near: Tensor | None
    """(N, N) bool: the cells from which each cell may copy; None: all."""

    @classmethod
    def backbone_spec(cls, options: Options, spec: InputSpec) -> ImageSpec:
        """Raises UserError for clips without room for the references and the target."""
        assert isinstance(spec, VideoSpec)
        if spec.frames <= options.references:
            raise UserError(
                f"pretext 'recolor': {options.references} references and a target need clips of "
                f"{options.references + 1} frames, and these have {spec.frames}: set data.frames: "
                f"{options.references + 1}, or fewer pretext.references"
            )
        return spec.frame

    @classmethod
    def depends_on_devices(
        cls, options: Options, backbone: type[Backbone], backbone_options: Any
    ) -> bool:
        """True if the network is random, or if each device has its own batch norm."""
        return is_random_or_unsynchronized(options, (), backbone, backbone_options)

    def __init__(self, options: Options, backbone: Backbone) -> None:
        super().__init__(options, backbone)
        assert isinstance(backbone.spec, ImageSpec)
        self.side = grid_side(backbone, backbone.spec.size)
        self.head = nn.Conv2d(backbone.width, options.projection, 1)
        near = None if options.radius is None else _cells_within(self.side, options.radius)
        self.register_buffer("near", near, persistent=False)
        # Until `fit`.
        self._set_clusters(torch.zeros(options.clusters, 2), torch.ones(options.clusters))

    def _set_clusters(self, centers: Tensor, counts: Tensor) -> None:
        self.register_buffer("centers", centers)
        self.register_buffer("frequencies", counts / counts.sum())

    def fit(self, examples: Examples) -> None:
        """Find the clusters of colors, and fit the normalization to lightness.

        Raises:
            UserError: all frames are gray, or have one color.
        """
        ab = self._sample_colors(examples)
        if not is_colored(ab.T[None, :, :, None]).any():
            raise UserError(
                "pretext 'recolor': all of the frames that were looked at are gray: choose films "
                "in color, or another pretext task"
            )
        distinct, counts = ab.unique(dim=0, return_counts=True)
        if len(distinct) < 2:
            raise UserError(
                "pretext 'recolor': all frames have one and the same color, so that there is "
                "nothing to predict: choose other films, or another pretext task"
            )
        centers = find_clusters(distinct, self.options.clusters, counts)
        labels = nearest(ab, centers)
        self._set_clusters(centers, labels.bincount(minlength=len(centers)).float())
        self.backbone.fit_inputs(LightnessExamples(examples))

    def _sample_colors(self, examples: Examples) -> Tensor:
        """a and b (M, 2) of at most `CLUSTERED` cells of at most `SAMPLE` evenly spaced clips."""
        stride = -(-len(examples) // SAMPLE)
        indices = torch.arange(0, len(examples), stride).split(64)
        batches = examples.batches(indices, torch.device("cpu"))
        ab = torch.cat([self._cell_colors(batch.inputs).flatten(0, 2) for batch in batches])
        order = torch.randperm(len(ab), generator=torch.Generator().manual_seed(0))
        return ab[order[:CLUSTERED]]

    def _cell_colors(self, clips: Tensor) -> Tensor:
        """a and b (B, R + 1, N, 2) of the mean colors of the cells of clips (B, R + 1, 3, S, S)."""
        means = F.adaptive_avg_pool2d(to_float(clips.flatten(0, 1)), self.side)
        ab = rgb_to_lab(means)[:, 1:].flatten(2).transpose(1, 2)
        return ab.unflatten(0, clips.shape[:2])

    def watched_inputs(self, inputs: Tensor) -> Tensor:
        return lightness(inputs)

    def views(self, batch: Batch, generator: torch.Generator) -> Cells:
        """The lightness of references and target, and the clusters of their colors."""
        clips = batch.inputs[:, -(self.options.references + 1) :]
        frames = lightness(to_float(clips.flatten(0, 1))).unflatten(0, clips.shape[:2])
        return Cells(frames, nearest(self._cell_colors(clips), self.centers))

    def forward(self, views: Cells) -> Output:
        cells = Cells(*views)
        truth = cells.colors[:, -1]
        mixed = self.predict(cells)
        copied = self._copy(cells.colors[:, -2], truth)
        return Output(
            color_loss(mixed, truth),
            {
                "accuracy": (mixed.detach().argmax(dim=2) == truth).float().mean(),
                "copy_loss": color_loss(copied, truth),
                "copy_accuracy": (cells.colors[:, -2] == truth).float().mean(),
            },
        )

    def predict(self, cells: Cells) -> Tensor:
        """The mix of colors (B, N, K) of the target's cells; sums to 1 over K."""
        grid = self.backbone(cells.frames.flatten(0, 1)).grid
        assert grid is not None
        vectors = self.head(grid).float().flatten(2).transpose(1, 2)
        vectors = vectors.unflatten(0, cells.frames.shape[:2])
        with torch.autocast(vectors.device.type, enabled=False):
            return self.mix(vectors, F.one_hot(cells.colors[:, :-1], len(self.centers)).float())

    def mix(self, vectors: Tensor, colors: Tensor) -> Tensor:
        """Mix the colors (B, R, N, K) of references, by vectors (B, R + 1, N, D) of all frames."""
        references, target = vectors[:, :-1].flatten(1, 2), vectors[:, -1]
        scores = target @ references.transpose(1, 2)
        if self.near is not None:
            allowed = self.near.repeat(1, colors.shape[1])
            scores = scores.masked_fill(~allowed, float("-inf"))
        mixed = scores.softmax(dim=2) @ colors.flatten(1, 2)
        return torch.lerp(mixed, self.frequencies.expand_as(mixed), self.options.smoothing)

    def _copy(self, earlier: Tensor, truth: Tensor) -> Tensor:
        """The prediction (B, N, K) that a cell keeps the color (B, N) of the frame before.

        Its doubt is its true share of errors, which makes its loss as low as a copy can have.
        """
        doubt = (earlier != truth).float().mean()
        kept = F.one_hot(earlier, len(self.centers)).float()
        return torch.lerp(kept, self.frequencies.expand_as(kept), doubt)

    def held_out(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """The loss, and that of copying the color at the same place of the frame before."""
        output = self(self.views(batch, generator))
        return {"held_out_loss": output.loss, "held_out_copy_loss": output.metrics["copy_loss"]}

    def floor(self, examples: Examples) -> float:
        """The entropy of the clusters' frequencies: the loss of always predicting them."""
        return float(torch.special.entr(self.frequencies).sum())

    def pictures(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """The target in gray, with the predicted colors, with the colors before, and as it is."""
        cells = self.views(batch, generator)
        gray = cells.frames[:, -1]

        def color(ab: Tensor) -> Tensor:
            places = ab.transpose(1, 2).unflatten(2, (self.side, self.side))
            enlarged = F.interpolate(places, gray.shape[-2:], mode="bilinear")
            return lab_to_rgb(torch.cat([100 * gray[:, :1], enlarged], dim=1))

        return {
            "gray": gray,
            "predicted colors": color(self.predict(cells) @ self.centers),
            "colors of the frame before": color(self.centers[cells.colors[:, -2]]),
            "true colors": to_float(batch.inputs[:, -1]),
        }


def nearest(ab: Tensor, centers: Tensor) -> Tensor:
    """The nearest of the centers (K, 2) to each color (..., 2); ties go to the first."""
    # A sum over the two axes, not a matrix product, which autocast would round to other clusters.
    return (ab[..., None, :] - centers).square().sum(dim=-1).argmin(dim=-1)


def color_loss(mixed: Tensor, truth: Tensor) -> Tensor:
    """Cross-entropy of mixes (B, N, K), which sum to 1, with the true clusters (B, N)."""
    return -(mixed.gather(2, truth[:, :, None]) + EPSILON).log().mean()


def _cells_within(side: int, radius: float) -> Tensor:
    """Whether each cell of a square grid is within the radius of each other one, (N, N) bool."""
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).float()
    return (places[:, None] - places).square().sum(dim=2) <= radius**2
