"""The contrastive random walk (Jabri, Owens & Efros, NeurIPS 2020, arXiv:2006.14613).

Shape legend: B clips of T frames, N nodes of a frame, D the width of a node's vector, and p the
side of a patch in pixels.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from sslrun.backbones.base import Backbone
from sslrun.data.examples import Batch
from sslrun.data.image.augment import Augmentation, to_float
from sslrun.data.specs import ImageSpec, InputSpec, VideoSpec
from sslrun.errors import UserError
from sslrun.pretexts.base import NormOptions, Pretext, pretexts
from sslrun.training.learner import Output

DROPPED = -1e20
"""Similarity of an edge that is dropped, as in the authors' code."""
EPSILON = 1e-20
"""Added to the probability of a return before its logarithm, as in the authors' code."""
SHORTEST = 3
"""Fewest frames of a clip: a walk goes at least two steps forth."""
BY_CHANCE = 1.5
"""A share of returns below this multiple of chance means that all nodes are alike."""
BY_PLACE = 0.7
"""A share of returns above this, of walks through frames of another clip, means that nodes are
distinguished by their place."""


class Steps(NamedTuple):
    """Transition probabilities between successive frames; rows sum to 1."""

    forth: Tensor
    """(B, T - 1, N, N): from the nodes of a frame to those of the next."""
    back: Tensor
    """(B, T - 1, N, N): from the nodes of the next frame to those of the frame."""


@pretexts.register("walk")
class Walk(Pretext):
    """Walk from a frame's patches along similar ones to a later frame and back to the start.

    Jabri et al., "Space-Time Correspondence as a Contrastive Random Walk", NeurIPS 2020
    (arXiv:2006.14613). Nodes are the patches of each frame; a step goes to a node of the next frame
    with a probability that grows with the similarity. The loss is the cross-entropy of returning to
    the node of the start, over walks of 2, 3, ..., T - 1 steps forth and as many back. The patches
    need no labels: that a walk returns is known.

    As in the authors' code (github.com/ajabri/videowalk), each frame is cropped and each patch is
    cropped once more, so that nodes cannot be matched by their edges; and edges are dropped at
    random, forth and back separately. Label propagation then reads stage 3 of a ResNet, without the
    head, which is `propagate: {layer: 3}`. The authors' ResNet-18 has `strides: [1, 2, 1, 1]` and
    `padding: reflect`.

    `nodes: map` takes the cells of the backbone's grid of whole frames as nodes, which costs less.
    The backbone must then not know a cell's place, or the walk returns by it: a ResNet needs
    `padding: reflect`, and a ViT's position embeddings are such a shortcut. Feature checks name it:
    walks through frames of another clip return as well.
    """

    reads, gives = VideoSpec, ImageSpec

    class Options(NormOptions):
        nodes: Literal["grid", "map"] = "grid"
        """Nodes of a frame. grid: patches, and the backbone reads each by itself, as in the
        paper. map: the cells of the backbone's grid of the whole frame."""
        patch: int | None = Field(default=None, ge=2)
        """Side of a patch, in pixels; default: a quarter of the frame's side, as in the paper.
        Only with `nodes: grid`."""
        stride: int | None = Field(default=None, ge=1)
        """Distance of neighboring patches, in pixels; default: half a patch, as in the paper.
        Pixels beyond the last patch are left out. Only with `nodes: grid`."""
        temperature: float = Field(default=0.05, gt=0)
        """Temperature of the softmax over the similarities of nodes."""
        dropout: float = Field(default=0.1, ge=0, lt=1)
        """Probability that an edge is dropped in training."""
        projection: int = Field(default=128, ge=2)
        """Width of the vectors that are compared, after a linear map of the backbone's features."""
        augmentation: Augmentation = Augmentation(crop=(0.8, 0.95), ratio=(0.7, 1.3))
        """Augmentation of each frame by itself; default: the authors'."""
        patch_augmentation: Augmentation = Augmentation(crop=(0.7, 0.9))
        """Augmentation of each patch by itself; default: the authors'. Only with `nodes: grid`."""

    options: Options

    @classmethod
    def backbone_spec(cls, options: Options, spec: InputSpec) -> ImageSpec:
        """Raises UserError for clips that are too short for a walk."""
        assert isinstance(spec, VideoSpec)
        if spec.frames < SHORTEST:
            raise UserError(
                f"pretext 'walk': clips of {spec.frames} frames hold no walk of two steps: set "
                f"data.frames: {SHORTEST} or more"
            )
        return spec.frame

    def __init__(self, options: Options, backbone: Backbone) -> None:
        """Raises UserError for patches that do not fit, or a backbone without a grid for `map`."""
        super().__init__(options, backbone)
        if options.nodes == "map":
            backbone.require("dense", "pretext 'walk' with nodes: map")
        self.patch, self.stride = _layout(options, backbone)
        self.head = nn.Linear(backbone.width, options.projection)

    def views(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Nodes to encode, and the share of clips whose frames are all equal.

        The nodes are patches (B, T, N, 3, p, p); with `nodes: map` whole frames (B, T, 3, S, S).
        """
        clips = batch.inputs
        still = (clips[:, 1:] == clips[:, :1]).flatten(1).all(dim=1).float().mean()
        size = clips.shape[-1]
        frames = self.options.augmentation(clips.flatten(0, 1), size, generator)
        if self.options.nodes == "map":
            return frames.unflatten(0, clips.shape[:2]), still
        patches = cut_patches(frames, self.patch, self.stride)
        nodes = self.options.patch_augmentation(patches.flatten(0, 1), self.patch, generator)
        return nodes.unflatten(0, (*clips.shape[:2], -1)), still

    def forward(self, views: tuple[Tensor, Tensor]) -> Output:
        nodes, still = views
        states = self.embed(nodes)
        with torch.autocast(states.device.type, enabled=False):
            steps = transitions(states, self.options.temperature, self._dropout)
            loss, returned = returns(palindromes(steps))
        lengths = {f"accuracy_{steps}": share for steps, share in enumerate(returned, start=2)}
        return Output(loss, {"accuracy": returned.mean(), **lengths, "still": still})

    def embed(self, nodes: Tensor) -> Tensor:
        """Unit vectors (B, T, N, D) float32 of nodes as `views` returns them."""
        leading = nodes.shape[:2]
        if self.options.nodes == "map":
            vectors = self.backbone.dense(nodes.flatten(0, 1)).flatten(2).transpose(1, 2)
        else:
            vectors = self.backbone(nodes.flatten(0, 2)).pooled
        return F.normalize(self.head(vectors).float(), dim=-1).view(
            *leading, -1, self.options.projection
        )

    @property
    def _dropout(self) -> float:
        return self.options.dropout if self.training else 0.0

    def held_out(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """The loss and the share of returns on frames that are not augmented.

        `accuracy_unrelated` is the share of returns of walks whose later frames are those of
        another clip, and `chance` that of nodes without any difference.
        """
        states = self.embed(self._whole(batch))
        others = torch.cat([states[:, :1], states[:, 1:].roll(1, dims=0)], dim=1)
        with torch.autocast(states.device.type, enabled=False):
            loss, returned = self._returns(states)
            _, unrelated = self._returns(others)
        return {
            "held_out_loss": loss,
            "held_out_accuracy": returned.mean(),
            "accuracy_unrelated": unrelated.mean(),
            "chance": torch.tensor(1 / states.shape[2]),
        }

    def _whole(self, batch: Batch) -> Tensor:
        """The nodes of clips, not augmented."""
        frames = to_float(batch.inputs)
        if self.options.nodes == "map":
            return frames
        patches = cut_patches(frames.flatten(0, 1), self.patch, self.stride)
        return patches.unflatten(0, frames.shape[:2])

    def _returns(self, states: Tensor) -> tuple[Tensor, Tensor]:
        return returns(palindromes(transitions(states, self.options.temperature)))

    def diagnose(self, metrics: Mapping[str, float]) -> str | None:
        """Name films that are still, nodes that are all alike, or nodes known by their place."""
        if metrics.get("still") == 1:
            return (
                "the clips of the last batch are still: a walk on them learns no motion. Choose "
                "films that move, or a larger data.skip"
            )
        returned, chance = metrics.get("held_out_accuracy"), metrics.get("chance")
        if returned is None or chance is None:
            return None
        if returned < BY_CHANCE * chance:
            return (
                f"collapse: walks return by chance ({returned:.2g} of them, chance {chance:.2g}), "
                "because all nodes are alike. Give more steps or another lr, or choose films whose "
                "patches differ"
            )
        if metrics["accuracy_unrelated"] > BY_PLACE:
            return (
                f"collapse to places: walks through frames of another clip return, too "
                f"({metrics['accuracy_unrelated']:.2g} of them), because nodes are known by "
                "their place. Set pretext.nodes: grid, or a ResNet with backbone.padding: reflect"
            )
        return None

    def pictures(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """The first frame, its nodes in colors, and the colors that reach the last frame."""
        states = self.embed(self._whole(batch))
        steps = transitions(states, self.options.temperature)
        side = round(states.shape[2] ** 0.5)
        colors = _place_colors(side, states.device).expand(len(states), -1, -1)
        reached = colors
        for step in steps.back.unbind(dim=1):
            reached = step @ reached
        first, last = to_float(batch.inputs[:, 0]), to_float(batch.inputs[:, -1])

        def draw(values: Tensor) -> Tensor:
            cells = values.transpose(1, 2).unflatten(2, (side, side))
            return F.interpolate(cells, first.shape[-2:])

        return {
            "first frame": first,
            "its nodes": draw(colors),
            "last frame": last,
            "nodes it came from": draw(reached),
        }


def _layout(options: Walk.Options, backbone: Backbone) -> tuple[int, int]:
    """The side of a patch and the distance of neighbors, in pixels.

    Raises:
        UserError: fewer than two patches fit, or they do not divide into those of the backbone.
    """
    side = min(backbone.spec.shape)  # type: ignore[attr-defined]
    patch = max(backbone.patch, side // 4) if options.patch is None else options.patch
    stride = max(1, patch // 2) if options.stride is None else options.stride
    if options.nodes == "grid" and patch + stride > side:
        raise UserError(
            f"pretext.patch: fewer than two patches of {patch} pixels, {stride} apart, fit a side "
            f"of {side}: set patch: {max(2, side // 4)} and stride: {max(1, side // 8)}"
        )
    if options.nodes == "grid" and patch % backbone.patch:
        near = max(1, round(patch / backbone.patch)) * backbone.patch
        raise UserError(
            f"pretext.patch: patches of {patch} pixels do not divide into the backbone's patches "
            f"of {backbone.patch}: set patch: {near}"
        )
    return patch, stride


def cut_patches(frames: Tensor, patch: int, stride: int) -> Tensor:
    """Cut frames (F, C, H, W) into overlapping patches (F, N, C, p, p), row by row."""
    windows = frames.unfold(2, patch, stride).unfold(
        3, patch, stride
    )  # (F, C, rows, columns, p, p)
    return windows.permute(0, 2, 3, 1, 4, 5).flatten(1, 2)


def transitions(states: Tensor, temperature: float, dropout: float = 0.0) -> Steps:
    """Probabilities of steps between successive frames, from unit vectors (B, T, N, D).

    They are a softmax over the nodes that a step can go to. Each edge is dropped with probability
    `dropout`, forth and back separately.
    """
    similarity = states[:, :-1] @ states[:, 1:].transpose(2, 3) / temperature
    return Steps(
        _drop_edges(similarity, dropout).softmax(dim=-1),
        _drop_edges(similarity.transpose(2, 3), dropout).softmax(dim=-1),
    )


def _drop_edges(similarity: Tensor, dropout: float) -> Tensor:
    if not dropout:
        return similarity
    return similarity.masked_fill(torch.rand_like(similarity) < dropout, DROPPED)


def palindromes(steps: Steps) -> Tensor:
    """Probabilities (B, T - 2, N, N) of walks of 2, 3, ..., T - 1 steps forth and as many back.

    Row n of the k-th matrix is where the walk of k + 2 steps from node n of the first frame ends,
    among the nodes of that frame.
    """
    forth, back = steps.forth.unbind(dim=1), steps.back.unbind(dim=1)
    there = list(itertools.accumulate(forth, torch.matmul))
    again = list(itertools.accumulate(back, lambda earlier, step: step @ earlier))
    return torch.stack([out @ home for out, home in zip(there[1:], again[1:], strict=True)], dim=1)


def returns(walks: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of walks (B, L, N, N), and the share (L,) of nodes that most walks return to."""
    probability = walks.diagonal(dim1=2, dim2=3)
    nodes = torch.arange(walks.shape[2], device=walks.device)
    returned = (walks.detach().argmax(dim=3) == nodes).float()
    return -(probability + EPSILON).log().mean(), returned.mean(dim=(0, 2))


def _place_colors(side: int, device: torch.device) -> Tensor:
    """A color (N, 3) in [0, 1] for each node of a square grid: red by row, green by column."""
    ramp = torch.linspace(0, 1, side, device=device)
    rows, columns = torch.meshgrid(ramp, ramp, indexing="ij")
    return torch.stack([rows, columns, 1 - rows], dim=-1).flatten(0, 1)
