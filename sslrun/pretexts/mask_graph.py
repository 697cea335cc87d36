"""Masked graphs: attribute masking (Hu et al., ICLR 2020) and GraphMAE (Hou et al., KDD 2022)."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from sslrun.backbones.graph import GinStack, GraphBackbone
from sslrun.data.examples import Batch, Examples, to_device
from sslrun.data.graph.graphs import Graphs
from sslrun.data.specs import GraphSpec
from sslrun.errors import UserError
from sslrun.pretexts.base import NormOptions, Pretext, pretexts
from sslrun.training.learner import Output

IGNORED = -100
"""Target of a node or bond that is not masked; `cross_entropy` skips it."""


class MaskedGraphs(NamedTuple):
    """Graphs with some nodes masked."""

    graphs: Graphs
    """Inputs of the backbone."""
    targets: Tensor
    """(B, n): category in the first column of each masked node; `IGNORED` elsewhere."""
    bond_targets: Tensor
    """(B, e): category in the first column of each bond at a masked node, if bonds are masked;
    `IGNORED` elsewhere."""


@pretexts.register("mask-graph")
class MaskGraph(Pretext):
    """Predict the category of masked nodes, such as the elements of masked atoms.

    `target: class` is attribute masking (Hu et al., ICLR 2020, arXiv:1905.12265): cross-entropy of
    a linear map of the node's features. `target: cosine` is GraphMAE (Hou et al., KDD 2022,
    arXiv:2205.10803): features are mapped linearly, those of masked nodes are set to 0 again
    (`remask`), a layer of GIN decodes them, and the loss is (1 - cosine)^gamma of the result and
    the one-hot category. In each graph int(rate * nodes + 1) nodes are masked, as in Hu et al.'s
    code. A masked node keeps its identifiers and its edges, and loses all its categories.
    """

    reads = GraphSpec
    needs = ("tokens",)

    class Options(NormOptions):
        target: Literal["class", "cosine"] = "class"
        """What is compared: the class of a node (Hu et al.), or its reconstruction by cosine
        similarity (GraphMAE)."""
        rate: float = Field(0.15, gt=0, lt=1)
        """Share of masked nodes: 0.15 in Hu et al.; 0.25 for molecules in GraphMAE."""
        replace: float = Field(0.0, ge=0, le=1)
        """Share of the masked nodes that get the categories of another node of the graph in place
        of the mask; up to 0.15 in GraphMAE."""
        remask: bool = True
        """Set the features of masked nodes to 0 before they are decoded; for cosine."""
        gamma: float = Field(1.0, ge=1)
        """Exponent of the cosine error: 1 for molecules, up to 3 in GraphMAE."""
        edges: bool = False
        """Also mask the bonds at masked nodes, and predict the category of each from the sum of the
        features of its two nodes; for class."""

        @model_validator(mode="after")
        def _consistent(self) -> MaskGraph.Options:
            if self.edges and self.target == "cosine":
                raise ValueError("edges: true is for target: class")
            return self

    options: Options
    backbone: GraphBackbone

    def __init__(self, options: Options, backbone: GraphBackbone) -> None:
        super().__init__(options, backbone)
        backbone.require("tokens", f"pretext '{self.name}'")
        self.spec = backbone.spec
        width, self.classes = backbone.width, self.spec.nodes[0]
        if options.edges and not self.spec.bonds:
            raise UserError(
                "pretext.edges: true masks the categories of bonds, which these graphs do not "
                "have: leave it out"
            )
        self.head: nn.Module
        self.bond_head = nn.Linear(width, self.spec.bonds[0]) if options.edges else None
        if options.target == "class":
            self.head = nn.Linear(width, self.classes)
        else:
            self.head = nn.Linear(width, width, bias=False)
            self.decoder = GinStack(1, width, self.spec.bonds)
            self.output = nn.Linear(width, self.classes)

    def views(self, batch: Batch, generator: torch.Generator) -> MaskedGraphs:
        graphs: Graphs = batch.inputs
        noise = torch.rand(
            3, *graphs.nodes.shape[:2], generator=generator, device=batch_device(batch)
        )
        masked = choose_nodes(noise[0], graphs.counts[:, 0], self.options.rate)
        first = graphs.nodes[..., 0] - 1
        targets = torch.where(masked, first, IGNORED)
        hidden = to_device(torch.tensor(self.spec.nodes) + 1, first.device)
        # The chance of a replacement is drawn for each node, and so is the node that replaces it.
        counts = graphs.counts[:, :1]
        other = (noise[2] * counts).long().minimum(counts - 1)
        replaced = noise[1] < self.options.replace
        others = graphs.nodes.gather(1, other[..., None].expand_as(graphs.nodes))
        shown = torch.where(replaced[..., None], others, hidden)
        nodes = torch.where(masked[..., None], shown, graphs.nodes)
        bonds, bond_targets = self._mask_bonds(graphs, masked)
        return MaskedGraphs(graphs._replace(nodes=nodes, bonds=bonds), targets, bond_targets)

    def _mask_bonds(self, graphs: Graphs, masked: Tensor) -> tuple[Tensor, Tensor]:
        """The bonds with those at masked nodes hidden, and their targets (B, e)."""
        if not self.options.edges:
            nothing = torch.full_like(graphs.edges[..., 0], IGNORED)
            return graphs.bonds, nothing
        ends = [masked.gather(1, graphs.edges[..., end]) for end in (0, 1)]
        at_masked = (ends[0] | ends[1]) & graphs.real_edges
        hidden = to_device(torch.tensor(self.spec.bonds) + 1, masked.device)
        bonds = torch.where(at_masked[..., None], hidden, graphs.bonds)
        return bonds, torch.where(at_masked, graphs.bonds[..., 0] - 1, IGNORED)

    def forward(self, views: MaskedGraphs) -> Output:
        features = self.backbone(views.graphs)
        assert features.tokens is not None
        nodes = features.tokens[:, : views.targets.shape[1]]
        if self.options.target == "cosine":
            return self._reconstruct(nodes, views)
        loss, metrics = classify(self.head(nodes), views.targets)
        if self.bond_head is not None:
            pairs = [
                nodes.gather(1, views.graphs.edges[..., end, None].expand(-1, -1, nodes.shape[2]))
                for end in (0, 1)
            ]
            bond_loss, found = classify(self.bond_head(pairs[0] + pairs[1]), views.bond_targets)
            metrics |= {"bond_loss": bond_loss.detach(), "bond_accuracy": found["accuracy"]}
            loss = loss + bond_loss
        return Output(loss, metrics)

    def codes(self, nodes: Tensor, targets: Tensor) -> Tensor:
        """Map nodes (B, n, D) for the decoder; the masked ones are 0 with `remask`."""
        codes = self.head(nodes)
        if not self.options.remask:
            return codes
        return codes * (targets == IGNORED)[..., None]

    def _reconstruct(self, nodes: Tensor, views: MaskedGraphs) -> Output:
        decoded = self.decoder(self.codes(nodes, views.targets), views.graphs)
        loss = cosine_error(self.output(decoded), views.targets, self.options.gamma)
        return Output(loss, {})

    def held_out(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """The loss of nodes, and for classes the accuracy and the balanced accuracy.

        Most masked atoms are carbon, so that accuracy alone says little (Mole-BERT, Xia et al.,
        ICLR 2023).
        """
        output = self(self.views(batch, generator))
        loss = output.metrics.get("node_loss", output.loss)
        names = ("accuracy", "balanced_accuracy")
        return {
            "held_out_loss": loss,
            **{
                f"held_out_{name}": output.metrics[name] for name in names if name in output.metrics
            },
        }

    def floor(self, examples: Examples) -> float | None:
        """Entropy of the categories of masked nodes; None for cosine."""
        if self.options.target == "cosine":
            return None
        shares = torch.zeros(self.classes, dtype=torch.float64)
        device = torch.device("cpu")
        for batch in examples.batches(torch.arange(len(examples)).split(1024), device):
            graphs: Graphs = batch.inputs
            counts = graphs.counts[:, 0].double()
            masked = (counts * self.options.rate + 1).floor().minimum(counts)
            weights = (masked / counts)[:, None].expand(graphs.nodes.shape[:2])
            real = graphs.real_nodes
            shares.index_add_(0, graphs.nodes[..., 0][real] - 1, weights[real])
        shares = shares / shares.sum()
        return -torch.special.xlogy(shares, shares).sum().item()


def batch_device(batch: Batch) -> torch.device:
    """The device of a batch of graphs."""
    device: torch.device = batch.inputs.nodes.device
    return device


def choose_nodes(noise: Tensor, counts: Tensor, rate: float) -> Tensor:
    """Choose int(rate * n + 1) of the n nodes of each graph: (B, N) bool.

    `noise` (B, N) is uniform and decides which; `counts` (B,) are the n.
    """
    wanted = (counts.double() * rate + 1).floor().long().minimum(counts)
    places = torch.arange(noise.shape[1], device=noise.device)
    hidden = noise.masked_fill(places >= counts[:, None], 2.0)
    return hidden.argsort(dim=1).argsort(dim=1) < wanted[:, None]


def classify(scores: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of scores (B, N, C) for targets (B, N), and metrics of those not ignored.

    The balanced accuracy is the mean over the classes that occur.
    """
    real = targets != IGNORED
    count = real.sum().clamp_min(1)
    losses = F.cross_entropy(
        scores.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    loss = losses / count
    with torch.no_grad():
        right = (scores.argmax(dim=-1) == targets) & real
        totals = torch.zeros(2, scores.shape[-1], device=scores.device)
        places = targets.clamp_min(0).flatten()
        totals[0].index_add_(0, places, real.flatten().float())
        totals[1].index_add_(0, places, right.flatten().float())
        present = totals[0] > 0
        recalls = totals[1] / totals[0].clamp_min(1)
        balanced = recalls.sum() / present.sum().clamp_min(1)
    return loss, {
        "node_loss": loss.detach(),
        "accuracy": right.sum() / count,
        "balanced_accuracy": balanced,
    }


def cosine_error(predicted: Tensor, targets: Tensor, gamma: float) -> Tensor:
    """Mean of (1 - cosine)^gamma of predictions (B, N, C) and the one-hot targets (B, N).

    The cosine with a one-hot vector is the entry of the prediction at the class, over its length.
    """
    real = targets != IGNORED
    unit = F.normalize(predicted.float(), dim=-1)
    cosine = unit.gather(2, targets.clamp_min(0)[..., None])[..., 0]
    errors = (1 - cosine).clamp_min(0) ** gamma
    return torch.where(real, errors, 0).sum() / real.sum().clamp_min(1)
