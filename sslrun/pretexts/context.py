"""Context prediction on graphs (Hu et al., ICLR 2020, arXiv:1905.12265)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from sslrun.backbones.graph import CategoryEmbedding, GinStack, GraphBackbone
from sslrun.data.examples import Batch
from sslrun.data.graph.graphs import Graphs
from sslrun.data.specs import GraphSpec
from sslrun.errors import UserError
from sslrun.pretexts.base import NormOptions, Pretext, pretexts
from sslrun.training.learner import Output


class ContextViews(NamedTuple):
    """A neighborhood and its context for each graph."""

    neighborhoods: Graphs
    centers: Tensor
    """(B,): number of the center in the neighborhood."""
    contexts: Graphs
    anchors: Tensor
    """(B, n) bool: nodes of the context that are in the neighborhood, too."""
    real: Tensor
    """(B,) bool: False for a graph that is too small to have a context."""


@pretexts.register("context")
class Context(Pretext):
    """Tell whether a neighborhood and a context are of the same graph.

    Hu et al., ICLR 2020 (arXiv:1905.12265). The backbone reads the nodes within `radius` of a
    random center, and gives the center's features. A smaller GIN reads the ring of nodes at
    distances from `inner + 1` to `outer`, and gives the mean over the anchors, which both have. The
    product of the two is a logit: 1 for the graph's own context, 0 for that of the next graph of
    the batch. Graphs without anchors do not count.
    """

    reads = GraphSpec
    needs = ("tokens",)

    class Options(NormOptions):
        radius: int = Field(5, ge=1)
        """Largest distance of a node of the neighborhood from the center (K in the paper)."""
        inner: int = Field(4, ge=0)
        """Distance up to which nodes are left out of the context; below `radius`."""
        outer: int = Field(7, ge=2)
        """Largest distance of a node of the context; above `radius`, so that it sees more."""
        depth: int = Field(3, ge=1)
        """Number of layers of the GIN that reads contexts; outer - inner in the authors' code."""

        @model_validator(mode="after")
        def _overlapping(self) -> Context.Options:
            if not self.inner < self.radius < self.outer:
                raise ValueError("inner, radius and outer should rise, as in 4, 5 and 7")
            return self

    options: Options
    backbone: GraphBackbone

    def __init__(self, options: Options, backbone: GraphBackbone) -> None:
        super().__init__(options, backbone)
        backbone.require("tokens", f"pretext '{self.name}'")
        if backbone.spectral:
            raise UserError(
                f"pretext '{self.name}': the eigenvectors of '{backbone.name}' are those of the "
                "whole graph and reveal the context: set backbone.ids to orf, or take gin"
            )
        spec, width = backbone.spec, backbone.width
        self.context_embed = CategoryEmbedding(spec.nodes, width)
        self.context = GinStack(options.depth, width, spec.bonds)

    def views(self, batch: Batch, generator: torch.Generator) -> ContextViews:
        graphs: Graphs = batch.inputs
        counts = graphs.counts[:, 0]
        noise = torch.rand(len(counts), generator=generator, device=counts.device)
        centers = (noise * counts).long().minimum(counts - 1)
        distances = distances_from(graphs, centers, self.options.outer)
        ring = (distances > self.options.inner) & (distances <= self.options.outer)
        near = distances <= self.options.radius
        real = (ring & near).any(dim=1)
        # A graph without a context keeps its center, so that no graph is empty.
        kept = ring | (~real[:, None] & (distances == 0))
        neighborhoods, places = graphs.induced(near)
        contexts, context_places = graphs.induced(kept)
        anchors = torch.zeros_like(near).scatter(1, context_places, near & ring)
        return ContextViews(
            neighborhoods, places.gather(1, centers[:, None])[:, 0], contexts, anchors, real
        )

    def forward(self, views: ContextViews) -> Output:
        tokens = self.backbone(views.neighborhoods).tokens
        assert tokens is not None
        index = torch.arange(len(tokens), device=tokens.device)
        centers = tokens[index, views.centers].float()
        nodes = self.context(self.context_embed(views.contexts.nodes), views.contexts).float()
        anchors = views.anchors[..., None]
        means = (nodes * anchors).sum(dim=1) / anchors.sum(dim=1).clamp_min(1)
        own = (centers * means).sum(dim=1)
        others = (centers * means.roll(1, dims=0)).sum(dim=1)
        real, real_others = views.real, views.real & views.real.roll(1, dims=0)
        losses = [
            _mean(F.binary_cross_entropy_with_logits(logits, target, reduction="none"), mask)
            for logits, target, mask in (
                (own, torch.ones_like(own), real),
                (others, torch.zeros_like(others), real_others),
            )
        ]
        right = (_mean((own > 0).float(), real) + _mean((others <= 0).float(), real_others)) / 2
        share = real.float().mean()
        return Output(losses[0] + losses[1], {"accuracy": right.detach(), "with_context": share})

    def held_out(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        output = self(self.views(batch, generator))
        return {"held_out_loss": output.loss, "held_out_accuracy": output.metrics["accuracy"]}


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of values (B,) inside the mask (B,); 0 if it is empty."""
    return torch.where(mask, values, 0).sum() / mask.sum().clamp_min(1)


def distances_from(graphs: Graphs, centers: Tensor, most: int) -> Tensor:
    """Distances (B, n) int64 of the nodes from a center (B,); `most` + 1 if they are farther."""
    reached = torch.zeros_like(graphs.real_nodes).scatter(1, centers[:, None], True)
    distances = torch.where(reached, 0, most + 1)
    for step in range(1, most + 1):
        arrives = reached.gather(1, graphs.edges[..., 0]) & graphs.real_edges
        hits = torch.zeros_like(distances).scatter_add(1, graphs.edges[..., 1], arrives.long())
        reached = reached | (hits > 0)
        distances = torch.where(reached, distances.clamp_max(step), distances)
    return distances
