"""Follow labels from a film's first frame to the others, with nothing trained."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from sslrun.backbones.base import Backbone
from sslrun.data.video.films import Shot
from sslrun.errors import UserError
from sslrun.protocols.base import Bench, Protocol, Scores, protocols
from sslrun.registry import Options
from sslrun.tasks.base import Task, TaskOptions
from sslrun.tasks.following import FollowingTask

FRAMES = 16
"""Frames encoded at a time."""
AFFINITIES = 2**24
"""Affinities computed at a time, to limit memory."""


class PropagateOptions(Options):
    """Label propagation; the defaults are those of the contrastive random walk.

    Jabri et al., NeurIPS 2020 (arXiv:2006.14613). DINO has context 7, radius 12, window square,
    first within, k 5, temperature 0.1 and stretch true.
    """

    layer: int | None = Field(default=None, ge=1)
    """Layer of the backbone to read features of; default: its last. The random walk reads stage 3
    of a ResNet."""
    context: int = Field(default=20, ge=0)
    """Number of frames before the current one that labels come from, in addition to the first."""
    radius: int | None = Field(default=12, ge=0)
    """Largest distance that a label moves from frame to frame, in cells of the grid; null: any."""
    window: Literal["disk", "square"] = "disk"
    """Shape of the neighborhood of that radius. disk: closer than it in Euclidean distance."""
    first: Literal["free", "within"] = "free"
    """Whether labels of the first frame come from any place, or from within the radius."""
    k: int = Field(default=10, ge=1)
    """Number of cells, of all these frames together, whose labels are averaged."""
    temperature: float = Field(default=0.05, gt=0)
    """Temperature of the softmax over the similarities of these cells."""
    stretch: bool = False
    """Scale the map of each object to [0, 1] before the most likely object is taken, as DINO's
    code does."""


class FollowingProtocol(Protocol):
    """Base class of protocols that follow masks or points through films."""

    learns = False

    @classmethod
    def supports(cls, task: type[Task], options: TaskOptions) -> str | None:
        if issubclass(task, FollowingTask):
            return None
        return (
            f"follows masks or points, which the task '{task.name}' does not have: take task: "
            "masks or task: keypoints"
        )

    def refit_obstacle(self) -> str | None:
        return "learns nothing"

    @abstractmethod
    def follow(
        self, backbone: Backbone | None, shot: Shot, device: torch.device, task: FollowingTask
    ) -> Tensor:
        """Predict the places (T, ...) of a film; the first is given. See `FollowingTask`."""

    @torch.inference_mode()
    def run(self, bench: Bench) -> Scores:
        """Follow the first places of every film, and score what comes."""
        task = bench.task
        assert isinstance(task, FollowingTask)
        backbone = self._backbone(bench)
        metrics, films = {}, {}
        for split in bench.tests:
            scores: list[Any] = []
            for shot in task.shots(bench.examples(split)):
                predicted = self.follow(backbone, shot, bench.device, task)
                try:
                    results = task.measure_shot(predicted, task.places(shot, slice(None)))
                except UserError as error:
                    raise UserError(f"{shot.name}: {error}") from None
                scores += results
                if split == "test":
                    films[shot.name] = round(task.summarize(results)[task.primary.name], 2)
            metrics[split] = task.summarize(scores)
        return Scores(metrics, {"films": films, "scored": len(scores)})

    def _backbone(self, bench: Bench) -> Backbone | None:
        return None


@protocols.register("copy")
class Copy(FollowingProtocol):
    """Copy the labels of the first frame, unmoved: the baseline of `propagate`."""

    def follow(
        self, backbone: Backbone | None, shot: Shot, device: torch.device, task: FollowingTask
    ) -> Tensor:
        first = task.places(shot, slice(0, 1))
        return first.expand(len(shot), *first.shape[1:])


@protocols.register("propagate")
class Propagate(FollowingProtocol):
    """Follow masks or points through films by the similarity of frozen features (Jabri 2020).

    Each cell of a frame takes the mean label of its `k` most similar cells in the first frame and
    the frames just before. Labels stay soft until they are enlarged to the frame. Deviation from
    the code of the random walk: near the start of a film it fills the missing frames with copies of
    the first, here each frame counts once. Masks are brought to the grid by area, so that thin
    objects do not vanish.
    """

    Options = PropagateOptions
    options: PropagateOptions

    def needs(self) -> tuple[str, ...]:
        return ("dense",)

    def _backbone(self, bench: Bench) -> Backbone:
        backbone = bench.backbone().eval()
        backbone.require("dense", self.name)
        return backbone

    def follow(
        self, backbone: Backbone | None, shot: Shot, device: torch.device, task: FollowingTask
    ) -> Tensor:
        assert backbone is not None
        starts = range(0, len(shot), FRAMES)
        parts = (shot.frames(slice(start, start + FRAMES)) for start in starts)
        height, width = shot.frames(slice(0, 1)).shape[2:]
        first = task.places(shot, slice(0, 1))[0].to(device)
        return torch.stack(list(self.stream(backbone, parts, first, (height, width), task))).cpu()

    def stream(
        self,
        backbone: Backbone,
        parts: Iterable[Tensor],
        first: Tensor,
        size: tuple[int, int],
        task: FollowingTask,
    ) -> Iterator[Tensor]:
        """Yield the place in each frame of a film, on the device of `first`, its given place.

        Places are in frames of `size`. The film comes in `parts` (n, C, H, W) uint8, which may have
        another size. Only the features of the context are kept.
        """
        context: list[Labeled] = []
        for part in parts:
            for features in self._encode(backbone, task.prepare(part.to(first.device))):
                if not context:
                    labels = task.to_soft(first, size, (features.shape[1], features.shape[2]))
                    yield first
                else:
                    labels = propagate(features, context, self.options)
                    yield task.to_place(self._stretch(labels), first, size)
                context.append(Labeled(features, labels))
                if len(context) > 1 + self.options.context:
                    del context[1]  # the first frame always stays

    def _encode(self, backbone: Backbone, frames: Tensor) -> Tensor:
        """The unit features (n, D, h, w) float32 of frames."""
        return F.normalize(backbone.dense(frames, self.options.layer).float(), dim=1)

    def _stretch(self, labels: Tensor) -> Tensor:
        """Scale each map of soft labels (K + 1, h, w) to [0, 1], if `stretch` says so."""
        if not self.options.stretch:
            return labels
        low, high = labels.amin(dim=(1, 2), keepdim=True), labels.amax(dim=(1, 2), keepdim=True)
        return torch.where(high > low, (labels - low) / (high - low).clamp(min=1e-12), labels)


class Labeled(NamedTuple):
    """A frame whose labels are known."""

    features: Tensor
    """(D, h, w), of unit length."""
    labels: Tensor
    """(K, h, w)."""


def propagate(features: Tensor, context: list[Labeled], options: PropagateOptions) -> Tensor:
    """Soft labels (K, h, w) of a frame with unit features (D, h, w).

    The first frame of `context` is the film's first. Rows are computed in parts that keep to
    `AFFINITIES`; of the other frames only the rows within the radius are read.
    """
    _, height, width = features.shape
    reach = height if options.radius is None else options.radius
    rows = max(1, AFFINITIES // max(1, len(context) * width * width * min(height, 2 * reach + 1)))
    parts = []
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        low, high = max(0, top - reach), min(height, bottom + reach)
        similarity, labels = [], []
        for number, frame in enumerate(context):
            free = options.radius is None or (number == 0 and options.first == "free")
            start, end = (0, height) if free else (low, high)
            keys = frame.features[:, start:end].flatten(1)
            scores = features[:, top:bottom].flatten(1).T @ keys
            if not free:
                near = _near(options, (top, bottom), (start, end), width, features.device)
                scores = scores.masked_fill(~near, -torch.inf)
            similarity.append(scores)
            labels.append(frame.labels[:, start:end].flatten(1))
        parts.append(_vote(torch.cat(similarity, dim=1), torch.cat(labels, dim=1), options))
    return torch.cat(parts, dim=1).unflatten(1, (height, width))


def _vote(similarity: Tensor, labels: Tensor, options: PropagateOptions) -> Tensor:
    """Labels (K, Q) of queries, from similarities (Q, M) to cells with labels (K, M)."""
    nearest = similarity.topk(min(options.k, similarity.shape[1]), dim=1)
    weights = (nearest.values / options.temperature).softmax(dim=1)
    return (labels[:, nearest.indices] * weights).sum(dim=2)


def _near(
    options: PropagateOptions,
    queries: tuple[int, int],
    keys: tuple[int, int],
    width: int,
    device: torch.device,
) -> Tensor:
    """Whether each key (M cells of its rows) is near each query (Q cells of its rows): (Q, M)."""
    assert options.radius is not None
    columns = torch.arange(width, device=device)
    down = torch.arange(*queries, device=device)[:, None] - torch.arange(*keys, device=device)
    across = columns[:, None] - columns
    down, across = down[:, None, :, None], across[None, :, None, :]
    if options.window == "square":
        near = (down.abs() <= options.radius) & (across.abs() <= options.radius)
    else:
        # A radius of 0 leaves the cell itself.
        near = down**2 + across**2 < max(1, options.radius**2)
    return near.flatten(2).flatten(0, 1)
