"""Follow labels from a film's first frame to the others, with nothing trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from sslrun.backbones.base import Backbone
from sslrun.data.image.augment import to_float
from sslrun.data.video.films import Shot
from sslrun.errors import UserError
from sslrun.protocols.base import Bench, Protocol, Scores, protocols
from sslrun.registry import Options
from sslrun.tasks.base import Task, TaskOptions
from sslrun.tasks.masks import Masks, objects_of

FRAMES = 16
"""Frames encoded at a time."""
AFFINITIES = 2**24
"""Affinities computed at a time, to limit memory."""
Prepare = Callable[[Tensor], Tensor]
"""Converts frames (n, C, H, W) uint8 to what a backbone sees, as `Masks.prepare` does."""


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


class MaskProtocol(Protocol):
    """Base class of protocols that follow masks through films."""

    learns = False

    @classmethod
    def supports(cls, task: type[Task], options: TaskOptions) -> str | None:
        if issubclass(task, Masks):
            return None
        return f"follows masks, which the task '{task.name}' does not have: take task: masks"

    def refit_obstacle(self) -> str | None:
        return "learns nothing"

    def follow(
        self,
        backbone: Backbone | None,
        shot: Shot,
        device: torch.device,
        prepare: Prepare = to_float,
    ) -> Tensor:
        """Predict the masks (T, H, W) uint8 of a film; the first is given."""
        raise NotImplementedError

    @torch.inference_mode()
    def run(self, bench: Bench) -> Scores:
        """Follow the masks of every film, and score them."""
        task = bench.task
        assert isinstance(task, Masks)
        backbone = self._backbone(bench)
        metrics, films = {}, {}
        for split in bench.tests:
            scores: list[tuple[Tensor, Tensor]] = []
            for shot in task.shots(bench.examples(split)):
                truth = shot.masks(slice(None))
                if not objects_of(truth[0]):
                    raise UserError(f"{shot.name}: its first frame has no object to follow")
                try:
                    followed = self.follow(backbone, shot, bench.device, task.prepare)
                    found = task.measure_shot(followed, truth)
                except UserError as error:
                    raise UserError(f"{shot.name}: {error}") from None
                scores += found
                if split == "test":
                    films[shot.name] = round(task.summarize(found)["J&F"], 2)
            metrics[split] = task.summarize(scores)
        return Scores(metrics, {"films": films, "objects": len(scores)})

    def _backbone(self, bench: Bench) -> Backbone | None:
        return None


@protocols.register("copy")
class Copy(MaskProtocol):
    """Copy the masks of the first frame, unmoved: the baseline of `propagate`."""

    def follow(
        self,
        backbone: Backbone | None,
        shot: Shot,
        device: torch.device,
        prepare: Prepare = to_float,
    ) -> Tensor:
        return shot.masks(slice(0, 1)).expand(len(shot), -1, -1)


@protocols.register("propagate")
class Propagate(MaskProtocol):
    """Follow masks through films by the similarity of frozen features (Jabri et al. 2020).

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
        self,
        backbone: Backbone | None,
        shot: Shot,
        device: torch.device,
        prepare: Prepare = to_float,
    ) -> Tensor:
        assert backbone is not None
        given = shot.masks(slice(0, 1))[0].to(device)
        objects = objects_of(given)
        one_hot = torch.stack([given == number for number in (0, *objects)]).float()
        size = given.shape
        context: list[Labeled] = []
        predicted = [given]
        for features in self._encode(backbone, shot, device, prepare):
            if not context:
                labels = F.interpolate(one_hot[None], features.shape[-2:], mode="area")[0]
            else:
                labels = propagate(features, context, self.options)
                predicted.append(self._decide(labels, size, objects))
            context.append(Labeled(features, labels))
            if len(context) > 1 + self.options.context:
                del context[1]  # the first frame always stays
        return torch.stack(predicted).cpu()

    def _encode(
        self, backbone: Backbone, shot: Shot, device: torch.device, prepare: Prepare
    ) -> Iterator[Tensor]:
        """The unit features (D, h, w) float32 of each frame in turn."""
        for start in range(0, len(shot), FRAMES):
            frames = prepare(shot.frames(slice(start, start + FRAMES)).to(device))
            yield from F.normalize(backbone.dense(frames, self.options.layer).float(), dim=1)

    def _decide(self, labels: Tensor, size: torch.Size, objects: list[int]) -> Tensor:
        """The most likely object of each pixel (H, W) uint8, from soft labels (K + 1, h, w)."""
        if self.options.stretch:
            low, high = labels.amin(dim=(1, 2), keepdim=True), labels.amax(dim=(1, 2), keepdim=True)
            labels = torch.where(high > low, (labels - low) / (high - low).clamp(min=1e-12), labels)
        enlarged = F.interpolate(labels[None], size, mode="bilinear", align_corners=False)[0]
        numbers = torch.tensor([0, *objects], dtype=torch.uint8, device=labels.device)
        return numbers[enlarged.argmax(dim=0)]


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
