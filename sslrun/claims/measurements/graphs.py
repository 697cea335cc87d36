"""Symmetry of networks on graphs, and what their identifiers can express."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from sslrun.backbones import build_backbone
from sslrun.backbones.base import Backbone
from sslrun.backbones.tokengt import TokenGT, draw_identifiers
from sslrun.claims.measurements.base import Measurement, measurements
from sslrun.data.graph.graphs import GraphRow, Graphs, build_graphs
from sslrun.data.specs import GraphSpec
from sslrun.metric import Metric
from sslrun.registry import Options
from sslrun.results.address import Column, Row
from sslrun.results.table import Table
from sslrun.training.device import Compute

RING = [(node, (node + 1) % 6) for node in range(6)]
TWO_RINGS = [(0, 1), (1, 2), (2, 0), (3, 4), (4, 5), (5, 3)]
"""A hexagon, and two triangles: graphs with equal degrees, nodes and edges."""
SPREAD = 3.0
"""Factor on the initial weights, so that differences between outputs are far above rounding."""


@measurements.register("graph-invariance")
class GraphInvariance(Measurement):
    """Differences between a network's outputs for one graph, renumbered, and for two graphs.

    Weights are random, in float64 and in evaluation mode. "renumbered": the nodes of random graphs
    are renumbered, and eigenvectors go with them; random identifiers stay with the numbers.
    "with identifiers": random identifiers go with their nodes, too. "hexagon": the outputs for a
    hexagon and for two triangles, which differ only in what each edge connects.
    """

    class Options(Options):
        graphs: int = Field(8, ge=1)
        """Number of random graphs."""
        nodes: int = Field(10, ge=2, le=64)
        """Nodes of a random graph."""
        density: float = Field(0.4, ge=0, le=1)
        """Share of the pairs of nodes that have an edge."""

    options: Options

    def table(self, seed: int, compute: Compute, folder: Path, check: Callable[[], None]) -> Table:
        table = Table(
            "outputs of networks on renumbered graphs", format_spec=".1e", marks_best=False
        )
        rows: dict[str, tuple[str, dict[str, Any]]] = {
            "GIN": ("gin", {"width": 64}),
            **{f"TokenGT, {ids}": ("tokengt-tiny", {"ids": ids}) for ids in IDS},
        }
        generator = torch.Generator().manual_seed(seed)
        random = self._draw_graphs(generator)
        pair = _collate([_plain(6, RING), _plain(6, TWO_RINGS)])
        for title, (name, options) in rows.items():
            check()
            torch.manual_seed(seed)
            network = _spread(build_backbone(name, options, PLAIN))
            first, second = network(pair).pooled
            values = {**_renumber(network, random, seed), "hexagon": _relative(first, second)}
            for quantity, value in values.items():
                column = Column(metric=Metric(quantity, unit="", better="lower"))
                table.add(Row(title), column, value, str(seed))
        table.note(
            "largest difference of the outputs, relative to the largest output, in float64, at "
            f"random weights that are {SPREAD:g} times the usual ones; renumbered: the nodes have "
            "other numbers; with identifiers: random identifiers moved with them; hexagon: against "
            "two triangles"
        )
        return table

    def _draw_graphs(self, generator: torch.Generator) -> Graphs:
        count, share = self.options.nodes, self.options.density
        rows = []
        for _ in range(self.options.graphs):
            coins = torch.rand(count, count, generator=generator) < share
            rows.append(_plain(count, [tuple(pair) for pair in coins.triu(1).nonzero().tolist()]))
        return _collate(rows)


IDS = ("none", "lap", "orf")
"""The identifiers that the measurement compares."""
PLAIN = GraphSpec((1,), (), 64)


def _plain(nodes: int, edges: list[tuple[int, ...]] | list[tuple[int, int]]) -> GraphRow:
    """A graph whose nodes are all alike."""
    return GraphRow([[0]] * nodes, [(a, b) for a, b in edges], [()] * len(edges))


def _collate(rows: list[GraphRow]) -> Graphs:
    """A batch of graphs, with eigenvectors in float64."""
    examples = build_graphs(rows, None, (), PLAIN)
    (batch,) = examples.batches([torch.arange(len(rows))], torch.device("cpu"))
    graphs: Graphs = batch.inputs
    return graphs._replace(spectrum=graphs.spectrum.double())


@torch.no_grad()
def _spread(network: Backbone) -> Backbone:
    """Enlarge the weights of a network, in float64 and evaluation mode."""
    for parameter in network.parameters():
        if parameter.ndim > 1:
            parameter.mul_(SPREAD)
    return network.double().eval().requires_grad_(False)


def _relative(outputs: Tensor, others: Tensor) -> float:
    """Largest difference of outputs, relative to the largest output."""
    return ((outputs - others).abs().max() / outputs.abs().max()).item()


def _renumber(network: Backbone, graphs: Graphs, seed: int) -> dict[str, float]:
    """Largest change of the outputs when all nodes are renumbered, without and with identifiers."""
    count = graphs.nodes.shape[1]
    new = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    spectrum = torch.empty_like(graphs.spectrum)
    spectrum[:, new] = graphs.spectrum
    renumbered = graphs._replace(edges=new[graphs.edges], spectrum=spectrum)
    before = network(graphs).pooled
    change = _relative(before, network(renumbered).pooled)
    if not isinstance(network, TokenGT) or network.options.ids != "orf":
        return {"renumbered": change, "with identifiers": change}
    fixed = network.fixed.clone()
    network.fixed[:, new] = fixed[:, :count]
    moved = _relative(before, network(renumbered).pooled)
    return {"renumbered": change, "with identifiers": moved}


# ---------------------------------------------------------------- equivariant maps


Partition = tuple[int, ...]
"""An equality pattern of four indices, as the block of each: (0, 1, 0, 2) means i = k."""


def list_partitions() -> list[Partition]:
    """The 15 partitions of four indices: one for each basis map from pairs to pairs."""
    found: list[Partition] = []
    for blocks in product(range(4), repeat=4):
        firsts = [blocks.index(block) for block in sorted(set(blocks))]
        if sorted(set(blocks)) == list(range(len(firsts))) and firsts == sorted(firsts):
            found.append(blocks)
    return found


def basis_map(partition: Partition, nodes: int) -> Tensor:
    """The map (n^2, 1 + n^2) from pairs (k, l) to pairs (i, j), as rows of attention.

    Entry ((i, j), (k, l)) is 1 if exactly those of the four indices are equal that the partition
    puts into one block, and rows are divided by their sum. The first column is a null token, which
    takes the rows without such a pair.
    """
    index = torch.arange(nodes)
    grids = torch.meshgrid(index, index, index, index, indexing="ij")
    matches = torch.ones(nodes, nodes, nodes, nodes, dtype=torch.bool)
    for a in range(4):
        for b in range(a):
            same = partition[a] == partition[b]
            matches &= (grids[a] == grids[b]) == same
    rows = matches.flatten(2).flatten(0, 1).float()
    total = rows.sum(dim=1, keepdim=True)
    return torch.cat([(total == 0).float(), rows / total.clamp_min(1)], dim=1)


@measurements.register("equivariant-maps")
class EquivariantMaps(Measurement):
    """How well one layer of attention learns the 15 equivariant maps between pairs of nodes.

    The synthetic experiment of TokenGT (Kim et al., NeurIPS 2022, section 5.1): tokens are all
    pairs of nodes of a graph, with identifiers and types, and the attention of each of 15 heads is
    trained to equal one basis map. The error is the squared error summed over a map, as a mean over
    maps and new graphs. Only identifiers say which pairs share a node. Difference: small graphs,
    narrow heads and few steps; the paper has 10 to 20 nodes, a width of 1,024 and 3,000 steps.
    """

    class Options(Options):
        nodes: tuple[int, int] = (4, 6)
        """Smallest and largest number of nodes."""
        width: int = Field(128, ge=1)
        """Width of a token."""
        head: int = Field(32, ge=1)
        """Width of a head."""
        dimension: int = Field(16, ge=1)
        """Dimension of the identifiers."""
        steps: int = Field(200, ge=1)
        """Training steps."""
        batch: int = Field(16, ge=1)
        """Graphs of a step, all of one size."""
        lr: float = Field(0.003, gt=0)
        """Learning rate of Adam, which falls to 0 as a cosine."""

        @model_validator(mode="after")
        def _ordered(self) -> EquivariantMaps.Options:
            low, high = self.nodes
            if not 2 <= low <= high <= self.dimension:
                raise ValueError("nodes should rise from at least 2 to at most dimension")
            return self

    options: Options

    def table(self, seed: int, compute: Compute, folder: Path, check: Callable[[], None]) -> Table:
        table = Table("errors of attention trained on the 15 equivariant maps", format_spec=".3g")
        for ids, types in product(("none", "random", "orf", "lap"), (False, True)):
            row = Row(ids, "with types" if types else "without types")
            column = Column(metric=Metric("error", unit="", better="lower"))
            table.add(row, column, self._train(ids, types, seed, check), str(seed))
        table.second = "tokens"
        low, high = self.options.nodes
        table.note(
            "squared error summed over a map, mean over 15 maps and new random graphs of "
            f"{low} to {high} nodes; {self.options.steps} steps"
        )
        return table

    def _train(self, ids: str, types: bool, seed: int, check: Callable[[], None]) -> float:
        options = self.options
        torch.manual_seed(seed)
        layer = PairAttention(options, types)
        optimizer = torch.optim.Adam(layer.parameters(), lr=options.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
        maps = {
            nodes: torch.stack([basis_map(part, nodes) for part in list_partitions()])
            for nodes in range(options.nodes[0], options.nodes[1] + 1)
        }
        generator = torch.Generator().manual_seed(seed)
        for _ in range(options.steps):
            check()
            loss = self._error(layer, ids, maps, generator)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            errors = [self._error(layer, ids, maps, generator).item() for _ in range(20)]
        return sum(errors) / len(errors)

    def _error(
        self, layer: PairAttention, ids: str, maps: dict[int, Tensor], generator: torch.Generator
    ) -> Tensor:
        """The error on one random batch of graphs of a random size."""
        low, high = self.options.nodes
        nodes = int(torch.randint(low, high + 1, (), generator=generator))
        attention = layer(self._identifiers(ids, nodes, generator))
        return (attention - maps[nodes]).square().sum(dim=(2, 3)).mean()

    def _identifiers(self, ids: str, nodes: int, generator: torch.Generator) -> Tensor:
        """Identifiers (B, n, d) of the nodes of random graphs; half of the pairs are edges."""
        batch, dimension = self.options.batch, self.options.dimension
        if ids == "none":
            return torch.zeros(batch, nodes, dimension)
        if ids != "lap":
            noise = torch.randn(batch, dimension, nodes, generator=generator)
            return draw_identifiers(noise, ids)
        coins = (torch.rand(batch, nodes, nodes, generator=generator) < 0.5).double().triu(1)
        adjacency = coins + coins.transpose(1, 2)
        scale = adjacency.sum(dim=1).clamp(min=1).rsqrt()
        laplacian = torch.eye(nodes).double() - scale[:, :, None] * adjacency * scale[:, None]
        vectors = torch.linalg.eigh(laplacian)[1].float()
        signs = torch.randint(0, 2, (batch, 1, nodes), generator=generator) * 2 - 1
        return nn.functional.pad(vectors * signs, (0, dimension - nodes))


class PairAttention(nn.Module):
    """The attention of 15 heads between all pairs of nodes and a null token."""

    def __init__(self, options: EquivariantMaps.Options, types: bool) -> None:
        super().__init__()
        self.head = options.head
        self.identify = nn.Linear(2 * options.dimension, options.width, bias=False)
        self.type_embed = nn.Embedding(2, options.width) if types else None
        self.null = nn.Parameter(torch.randn(options.width))
        self.query = nn.Linear(options.width, 15 * options.head)
        self.key = nn.Linear(options.width, 15 * options.head)

    def forward(self, ids: Tensor) -> Tensor:
        """Attention (B, 15, n^2, 1 + n^2) from pairs to the null token and pairs."""
        batch, nodes = ids.shape[:2]
        first = ids[:, :, None].expand(-1, -1, nodes, -1)
        second = ids[:, None].expand(-1, nodes, -1, -1)
        tokens = self.identify(torch.cat([first, second], dim=-1).flatten(1, 2))
        if self.type_embed is not None:
            tokens = tokens + self.type_embed(1 - torch.eye(nodes).long().flatten())
        sources = torch.cat([self.null.expand(batch, 1, -1), tokens], dim=1)
        q, k = (
            part.unflatten(2, (15, self.head)).transpose(1, 2)
            for part in (self.query(tokens), self.key(sources))
        )
        return (q @ k.transpose(2, 3) * self.head**-0.5).softmax(dim=-1)
