"""Networks on graphs: message passing (GIN) and a bag of nodes; and features without a network."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from sslrun.backbones.base import Backbone, Features, backbones
from sslrun.data.graph.graphs import Graphs
from sslrun.data.specs import GraphSpec
from sslrun.registry import Options


class GraphBackbone(Backbone):
    """A network on graphs; the first of its tokens are the nodes, in their order."""

    takes = GraphSpec
    offers: ClassVar[frozenset[str]] = frozenset({"tokens"})
    spec: GraphSpec
    spectral: bool = False
    """Whether it reads the eigenvectors, which know the whole graph."""


class CategoryEmbedding(nn.Module):
    """The sum of one embedding per column; see `Graphs` for the coding of categories."""

    def __init__(self, sizes: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.width = width
        self.columns = nn.ModuleList(nn.Embedding(size + 2, width) for size in sizes)

    def forward(self, categories: Tensor) -> Tensor:
        """Embed categories (..., columns) as (..., D); without columns the result is 0."""
        total = torch.zeros(*categories.shape[:-1], self.width, device=categories.device)
        for number, column in enumerate(self.columns):
            total = total + column(categories[..., number])
        return total


Pool = Literal["mean", "sum"]


def pool_nodes(x: Tensor, real: Tensor, pool: Pool) -> Tensor:
    """Pool nodes (B, n, D) to (B, D) without those outside `real` (B, n)."""
    total = (x * real[..., None]).sum(dim=1)
    return total / real.sum(dim=1, keepdim=True) if pool == "mean" else total


class GinLayer(nn.Module):
    """A layer of GIN with features of bonds: an MLP of the sum of neighbors, then batch norm."""

    def __init__(self, width: int, bonds: tuple[int, ...], last: bool, dropout: float) -> None:
        super().__init__()
        self.bond_embed = CategoryEmbedding(bonds, width)
        self.self_loop = nn.Parameter(torch.zeros(width))
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)
        )
        self.norm = nn.BatchNorm1d(width)
        self.last = last
        self.dropout = dropout

    def forward(self, x: Tensor, edges: Tensor, bonds: Tensor) -> Tensor:
        """Transform nodes (S, D) that `edges` (M, 2) with features `bonds` (M, G) connect."""
        messages = x[edges[:, 0]] + self.bond_embed(bonds)
        summed = (x + self.self_loop).index_add(0, edges[:, 1], messages.to(x.dtype))
        x = self.norm(self.mlp(summed))
        return F.dropout(x if self.last else F.relu(x), self.dropout, self.training)


class GinStack(nn.ModuleList):
    """Layers of GIN, the last one without a ReLU."""

    def __init__(
        self, depth: int, width: int, bonds: tuple[int, ...], dropout: float = 0.0
    ) -> None:
        super().__init__(
            GinLayer(width, bonds, layer == depth - 1, dropout) for layer in range(depth)
        )

    def forward(self, x: Tensor, graphs: Graphs) -> Tensor:
        """Transform the nodes (B, n, D) of graphs; the result is 0 at padding.

        Padding is left out, so that batch norm does not see it.
        """
        real, real_edges = graphs.real_nodes, graphs.real_edges
        counts = graphs.counts[:, 0]
        starts = (counts.cumsum(0) - counts)[:, None, None]
        edges = (graphs.edges + starts)[real_edges]
        bonds = graphs.bonds[real_edges]
        packed = x[real]
        for layer in self:
            packed = layer(packed, edges, bonds)
        padded = packed.new_zeros(*real.shape, packed.shape[-1])
        padded[real] = packed
        return padded


@backbones.register("gin")
class Gin(GraphBackbone):
    """Graph isomorphism network (Xu et al., ICLR 2019, arXiv:1810.00826) with features of bonds.

    As in Hu et al., ICLR 2020 (arXiv:1905.12265): five layers of width 300, whose messages are a
    neighbor's features plus the bond's embedding, and the mean over nodes. `tokens` are the nodes.
    """

    class Options(Options):
        depth: int = Field(5, ge=1)
        """Number of layers."""
        width: int = Field(300, ge=1)
        """Width of a node's features."""
        dropout: float = Field(0.0, ge=0, lt=1)
        """Dropout rate after each layer; 0.5 in the paper's fine-tuning."""
        pool: Pool = "mean"
        """How nodes are pooled. The mean does not know the number of nodes; the sum does."""

    options: Options

    def __init__(self, options: Options, spec: GraphSpec) -> None:
        super().__init__(options, spec)
        self.width = options.width
        self.node_embed = CategoryEmbedding(spec.nodes, options.width)
        self.stack = GinStack(options.depth, options.width, spec.bonds, options.dropout)

    def forward(self, inputs: Graphs) -> Features:
        x = self.stack(self.node_embed(inputs.nodes), inputs)
        real = inputs.real_nodes
        return Features(pool_nodes(x, real, self.options.pool), x, mask=real)

    def layers(self) -> list[list[nn.Parameter]]:
        return [
            list(self.node_embed.parameters()),
            *(list(part.parameters()) for part in self.stack),
        ]


@backbones.register("graph-mlp")
class GraphMlp(GraphBackbone):
    """A bag of nodes: an MLP on each node, and one on their sum, without edges.

    The network with the fewest inductive biases for graphs; `tokens` are the nodes.
    """

    class Options(Options):
        width: int = Field(64, ge=1)
        """Width of the hidden layers and of the features."""
        pool: Pool = "sum"
        """How nodes are pooled. The mean does not know the number of nodes; the sum does."""

    options: Options

    def __init__(self, options: Options, spec: GraphSpec) -> None:
        super().__init__(options, spec)
        self.width = width = options.width
        self.node_embed = CategoryEmbedding(spec.nodes, width)
        self.node_mlp = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        self.graph_mlp = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, inputs: Graphs) -> Features:
        x = self.node_mlp(self.node_embed(inputs.nodes))
        real = inputs.real_nodes
        pooled = self.graph_mlp(pool_nodes(x, real, self.options.pool))
        return Features(pooled, x, mask=real)

    def layers(self) -> list[list[nn.Parameter]]:
        parts = (self.node_embed, self.node_mlp, self.graph_mlp)
        return [list(part.parameters()) for part in parts]


@backbones.register("node-counts")
class NodeCounts(GraphBackbone):
    """Count the nodes of each category and the edges of each category, without any parameters.

    With `probe` it is the baseline "counts of atoms with ridge regression".
    """

    offers: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, options: Any, spec: GraphSpec) -> None:
        super().__init__(options, spec)
        self.width = 1 + sum(spec.nodes) + sum(spec.bonds)

    def forward(self, inputs: Graphs) -> Features:
        """Pooled features (B, 1 + categories): number of edges, then counts of each column."""
        counts = [inputs.counts[:, 1:].float() / 2]
        for categories, sizes, share in (
            (inputs.nodes, self.spec.nodes, 1.0),
            (inputs.bonds, self.spec.bonds, 0.5),
        ):
            for number, size in enumerate(sizes):
                # 0 is padding, and size + 1 is the mask, which data do not have.
                one_hot = F.one_hot(categories[..., number], size + 2)[..., 1:-1]
                counts.append(share * one_hot.sum(dim=1).float())
        return Features(torch.cat(counts, dim=1))


@backbones.register("fingerprint")
class Fingerprint(GraphBackbone):
    """Hash the neighborhoods of all nodes into bits: Morgan's fingerprint, without parameters.

    The algorithm is that of ECFP (Rogers and Hahn 2010, J. Chem. Inf. Model.). Each node begins
    with a hash of its categories and its degree, which is then hashed with those of its neighbors,
    `radius` times; each hash sets one bit, or counts in it. With `random-forest` it is the usual
    baseline for molecules. Difference from rdkit: nodes begin with the categories of the data, and
    a neighborhood that occurs twice is not removed.
    """

    offers: ClassVar[frozenset[str]] = frozenset()

    class Options(Options):
        radius: int = Field(2, ge=0)
        """Largest distance of a neighbor that a hash covers; 2 is ECFP4's."""
        bits: int = Field(1024, ge=2)
        """Number of features."""
        counts: bool = False
        """Count how often a bit is set."""

    options: Options

    def __init__(self, options: Options, spec: GraphSpec) -> None:
        super().__init__(options, spec)
        self.width = options.bits

    def forward(self, inputs: Graphs) -> Features:
        real = inputs.real_nodes
        codes = mix(_combine(inputs.nodes) + _degrees(inputs) * DEGREE)
        bits = self._set_bits(codes, real)
        for _ in range(self.options.radius):
            codes = mix(codes + _sum_neighbors(codes, inputs))
            bits = bits + self._set_bits(codes, real)
        return Features((bits if self.options.counts else bits.clamp(max=1)).float())

    def _set_bits(self, codes: Tensor, real: Tensor) -> Tensor:
        """Count how many nodes' codes (B, n) fall on each bit (B, bits)."""
        bits = torch.zeros(len(codes), self.width, dtype=torch.int64, device=codes.device)
        return bits.scatter_add(1, (codes >> 16) % self.width, real.long())


DEGREE = 0x9E3779B1
"""Weight of a node's degree in its first hash."""


def mix(codes: Tensor) -> Tensor:
    """Hash int64 numbers (the finalizer of splitmix64, Steele et al. 2014)."""
    codes = (codes ^ (codes >> 30)) * -4658895280553007687
    codes = (codes ^ (codes >> 27)) * -7723592293110705685
    return codes ^ (codes >> 31)


def _combine(categories: Tensor) -> Tensor:
    """One number (...) for categories (..., columns)."""
    code = torch.zeros(categories.shape[:-1], dtype=torch.int64, device=categories.device)
    for column in categories.unbind(dim=-1):
        code = mix(code * 31 + column + 1)
    return code


def _degrees(graphs: Graphs) -> Tensor:
    """Number of neighbors (B, n) int64 of each node."""
    degrees = torch.zeros_like(graphs.nodes[..., 0])
    return degrees.scatter_add(1, graphs.edges[..., 1], graphs.real_edges.long())


def _sum_neighbors(codes: Tensor, graphs: Graphs) -> Tensor:
    """The sum (B, n) of hashes of each node's neighbors with their bonds, in any order."""
    messages = mix(codes.gather(1, graphs.edges[..., 0]) * 31 + _combine(graphs.bonds))
    messages = torch.where(graphs.real_edges, messages, 0)
    return torch.zeros_like(codes).scatter_add(1, graphs.edges[..., 1], messages)
