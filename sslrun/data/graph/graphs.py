"""Graphs of unequal sizes as flat tensors, and padded batches of them.

Shape legend: B graphs in a batch, n nodes and e edges in its largest graph, N examples, S nodes
and M edges of all graphs, F columns of a node, G columns of a bond, k eigenvectors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sslrun.data.examples import Batch, Examples, to_device
from sslrun.data.specs import GraphSpec
from sslrun.errors import UserError

EIGENVECTORS = 16
"""Number k of eigenvectors of a graph's Laplacian that a batch holds, as in TokenGT's Lap row."""
LARGEST = 512
"""Largest number of nodes: the eigenvectors are those of a dense matrix."""
PART = 1024
"""Graphs that are packed together."""


class Graphs(NamedTuple):
    """A batch of graphs, padded to the largest one."""

    nodes: Tensor
    """(B, n, F) int64: category + 1 in each column. 0 is padding; the number of categories + 1
    stands for a masked node."""
    edges: Tensor
    """(B, e, 2) int64: the nodes that each edge leads from and to; each bond is two edges."""
    bonds: Tensor
    """(B, e, G) int64: category + 1 in each column, coded as `nodes` are."""
    counts: Tensor
    """(B, 2) int64: numbers of nodes and edges of each graph."""
    spectrum: Tensor
    """(B, n, k) float32: the first eigenvectors of each graph's Laplacian, one row per node."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Graphs:
        """Apply `change` to each tensor."""
        return Graphs(*map(change, self))

    def subset(self, rows: Tensor) -> Graphs:
        """Select graphs by index (M,) or by a mask (B,) bool."""
        return self.map(lambda tensor: tensor[rows])

    def induced(self, keep: Tensor) -> tuple[Graphs, Tensor]:
        """Keep the nodes `keep` (B, n) and the edges between them; return also the new numbers.

        The new number (B, n) of a node that is not kept has no meaning. The width of the batch
        stays. Eigenvectors stay those of the whole graphs.
        """
        keep = keep & self.real_nodes
        order, places = _to_front(keep)
        ends = [keep.gather(1, self.edges[..., end]) for end in (0, 1)]
        kept_edges = ends[0] & ends[1] & self.real_edges
        edge_order, _ = _to_front(kept_edges)
        counts = torch.stack([keep.sum(dim=1), kept_edges.sum(dim=1)], dim=1)
        edges = places.gather(1, self.edges.flatten(1)).view_as(self.edges)
        graphs = Graphs(
            _reorder(self.nodes, order),
            _reorder(edges, edge_order),
            _reorder(self.bonds, edge_order),
            counts,
            _reorder(self.spectrum, order),
        )
        nodes, edges = graphs.real_nodes[..., None], graphs.real_edges[..., None]
        return graphs._replace(
            nodes=graphs.nodes * nodes,
            edges=graphs.edges * edges,
            bonds=graphs.bonds * edges,
            spectrum=graphs.spectrum * nodes,
        ), places

    def to(self, device: torch.device) -> Graphs:
        return self.map(lambda tensor: to_device(tensor, device))

    def numel(self) -> int:
        """Return the number of nodes and edges, padding included."""
        return len(self.nodes) * (self.nodes.shape[1] + self.edges.shape[1])

    @property
    def real_nodes(self) -> Tensor:
        """(B, n) bool: False at padding."""
        return _before(self.counts[:, 0], self.nodes.shape[1])

    @property
    def real_edges(self) -> Tensor:
        """(B, e) bool: False at padding."""
        return _before(self.counts[:, 1], self.edges.shape[1])

    @property
    def real(self) -> Tensor:
        """(B, n + e) bool: False at padding; nodes, then edges."""
        return torch.cat([self.real_nodes, self.real_edges], dim=1)


def _before(counts: Tensor, length: int) -> Tensor:
    """Whether each position (B, length) is before its row's count (B,)."""
    return torch.arange(length, device=counts.device) < counts[:, None]


def _to_front(keep: Tensor) -> tuple[Tensor, Tensor]:
    """The order (B, N) that moves what is kept to the front, and each one's new place (B, N)."""
    order = (~keep).long().argsort(dim=1, stable=True)
    return order, order.argsort(dim=1)


def _reorder(values: Tensor, order: Tensor) -> Tensor:
    """Reorder the rows of values (B, N, D) by indices (B, N)."""
    return values.gather(1, order[..., None].expand(-1, -1, values.shape[2]))


class GraphRow(NamedTuple):
    """One graph as it is read."""

    nodes: Sequence[Sequence[int]]
    """Categories of each node, one number per column."""
    edges: Sequence[tuple[int, int]]
    """The two nodes of each bond, once per bond."""
    bonds: Sequence[Sequence[int]]
    """Categories of each bond, one number per column."""


@dataclass(frozen=True)
class GraphExamples(Examples):
    """Graphs in flat tensors, one after the other; on the CPU or on a device."""

    nodes: Tensor
    """(S, F) integers, coded as in `Graphs`."""
    edges: Tensor
    """(M, 2) integers: numbers of nodes within their graph."""
    bonds: Tensor
    """(M, G) integers."""
    spectrum: Tensor
    """(S, k) float32."""
    ranges: Tensor
    """(N, 4) int64 on the CPU: start and end of each graph's nodes, start and end of its edges."""
    labels: Tensor | None
    """(N,) int64 classes, or (N,) or (N, t) float32 numbers, NaN where unknown."""
    classes: tuple[str, ...]
    spec: GraphSpec

    def __len__(self) -> int:
        return len(self.ranges)

    @property
    def lengths(self) -> Tensor:
        """(N,) number of nodes and edges."""
        return _count(self.ranges).sum(dim=1)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.nodes, self.edges, self.bonds, self.spectrum))

    def to(self, device: torch.device) -> GraphExamples:
        return replace(
            self,
            nodes=self.nodes.to(device),
            edges=self.edges.to(device),
            bonds=self.bonds.to(device),
            spectrum=self.spectrum.to(device),
        )

    def subset(self, indices: Tensor) -> GraphExamples:
        labels = None if self.labels is None else self.labels[indices]
        return replace(self, ranges=self.ranges[indices], labels=labels)

    def batches(self, indices: Iterable[Tensor], device: torch.device) -> Iterator[Batch]:
        for chosen in indices:
            labels = None if self.labels is None else self.labels[chosen]
            yield Batch(self._collate(self.ranges[chosen]), labels).to(device)

    def concatenate(self, other: GraphExamples, labels: Tensor | None) -> GraphExamples:
        """Join two sets with the same categories; the result has the given labels."""
        device = self.nodes.device
        shift = torch.tensor([len(self.nodes)] * 2 + [len(self.edges)] * 2)
        ranges = torch.cat([self.ranges, other.ranges + shift])
        largest = max(self.spec.largest, other.spec.largest)
        spec = replace(self.spec, largest=largest)
        return replace(
            self,
            nodes=torch.cat([self.nodes, other.nodes.to(device)]),
            edges=torch.cat([self.edges, other.edges.to(device)]),
            bonds=torch.cat([self.bonds, other.bonds.to(device)]),
            spectrum=torch.cat([self.spectrum, other.spectrum.to(device)]),
            ranges=ranges,
            labels=labels,
            spec=spec,
        )

    def _collate(self, ranges: Tensor) -> Graphs:
        """Copy graphs with `ranges` (B, 4) into a padded batch, on the device of the tensors."""
        device = self.nodes.device
        counts = _count(ranges)
        most_nodes, most_edges = counts.amax(dim=0).tolist()
        counts, starts = to_device(counts, device), to_device(ranges[:, ::2].contiguous(), device)

        def pad(flat: Tensor, kind: int, most: int) -> Tensor:
            real = _before(counts[:, kind], most)
            places = starts[:, kind, None] + torch.arange(most, device=device)
            return torch.where(real[..., None], flat[torch.where(real, places, 0)], 0)

        return Graphs(
            pad(self.nodes, 0, most_nodes).long(),
            pad(self.edges, 1, most_edges).long(),
            pad(self.bonds, 1, most_edges).long(),
            counts,
            pad(self.spectrum, 0, most_nodes),
        )


def _count(ranges: Tensor) -> Tensor:
    """Numbers (N, 2) of nodes and edges."""
    return ranges[:, 1::2] - ranges[:, ::2]


# ---------------------------------------------------------------- building


def check_graph(row: GraphRow, where: str) -> None:
    """Check one graph; the message begins with `where`.

    Raises:
        UserError: The graph is empty or too large, has a self-loop, or has an edge twice.
    """
    if not row.nodes:
        raise UserError(f"{where}: the graph is empty: remove it")
    if len(row.nodes) > LARGEST:
        raise UserError(
            f"{where}: the graph has {len(row.nodes)} nodes, but {LARGEST} is the most: remove it"
        )
    pairs = {(min(pair), max(pair)) for pair in row.edges}
    loop = next((a for a, b in pairs if a == b), None)
    if loop is not None:
        raise UserError(
            f"{where}: node {loop} has an edge to itself, which would be taken for the node: "
            "remove it"
        )
    if len(pairs) < len(row.edges):
        raise UserError(f"{where}: two nodes have more than one edge between them: keep one")


class GraphBuilder:
    """Packs graphs into flat tensors while they are read.

    As Python objects a molecule takes nine times the memory, so that few are kept at a time.
    """

    def __init__(self, spec: GraphSpec) -> None:
        self._spec = spec
        self._waiting: list[GraphRow] = []
        self._parts: list[PackedGraphs] = []

    def add(self, row: GraphRow) -> None:
        """Append a graph that was checked."""
        self._waiting.append(row)
        if len(self._waiting) == PART:
            self._pack()

    def build(self, labels: Tensor | None, classes: tuple[str, ...]) -> GraphExamples:
        """Join all graphs; `spec.largest` becomes the number of nodes of the largest one.

        Raises UserError if there are none.
        """
        if self._waiting:
            self._pack()
        if not self._parts:
            raise UserError("there are no graphs to read: the data are empty")
        packed = PackedGraphs(*map(torch.cat, zip(*self._parts, strict=True)))
        ends = packed.counts.cumsum(dim=0)
        return GraphExamples(
            packed.nodes,
            packed.edges,
            packed.bonds,
            packed.spectrum,
            torch.stack([ends - packed.counts, ends], dim=2).flatten(1),
            labels,
            classes,
            replace(self._spec, largest=int(packed.counts[:, 0].max())),
        )

    def _pack(self) -> None:
        rows, self._waiting = self._waiting, []
        nodes = [node for row in rows for node in row.nodes]
        edges = [edge for row in rows for a, b in row.edges for edge in ((a, b), (b, a))]
        bonds = [bond for row in rows for bond in row.bonds for _ in range(2)]
        counts = [(len(row.nodes), 2 * len(row.edges)) for row in rows]
        self._parts.append(
            PackedGraphs(
                torch.tensor(nodes, dtype=torch.int16).view(-1, len(self._spec.nodes)) + 1,
                torch.tensor(edges, dtype=torch.int16).view(-1, 2),
                _bonds_tensor(bonds, len(edges), len(self._spec.bonds)),
                torch.cat(laplacian_eigenvectors(rows)),
                torch.tensor(counts),
            )
        )


class PackedGraphs(NamedTuple):
    """Graphs one after the other; the first four as in `GraphExamples`."""

    nodes: Tensor
    edges: Tensor
    bonds: Tensor
    spectrum: Tensor
    counts: Tensor
    """(N, 2) int64: numbers of nodes and edges."""


def build_graphs(
    rows: Iterable[GraphRow], labels: Tensor | None, classes: tuple[str, ...], spec: GraphSpec
) -> GraphExamples:
    """Build examples from graphs that were checked; see `GraphBuilder`."""
    builder = GraphBuilder(spec)
    for row in rows:
        builder.add(row)
    return builder.build(labels, classes)


def _bonds_tensor(bonds: list[Any], count: int, columns: int) -> Tensor:
    if columns == 0:
        return torch.zeros(count, 0, dtype=torch.int16)
    return torch.tensor(bonds, dtype=torch.int16).view(-1, columns) + 1


def laplacian_eigenvectors(rows: Sequence[GraphRow]) -> list[Tensor]:
    """The first eigenvectors (n, k) float32 of each graph's normalized Laplacian, by eigenvalue.

    The Laplacian is I - D^-1/2 A D^-1/2 with degrees of at least 1, in float64. Graphs with fewer
    than k nodes have zeros in the other columns. Graphs of equal size are solved together. The
    signs are arbitrary, and so are the eigenvectors of an eigenvalue that occurs several times.
    """
    by_size: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        by_size.setdefault(len(row.nodes), []).append(index)
    vectors: dict[int, Tensor] = {}
    for indices in by_size.values():
        solved = np.linalg.eigh(np.stack([laplacian(rows[index]) for index in indices]))[1]
        first = torch.from_numpy(solved[..., :EIGENVECTORS]).float()
        padded = F.pad(first, (0, EIGENVECTORS - first.shape[-1]))
        vectors |= dict(zip(indices, padded, strict=True))
    return [vectors[index] for index in range(len(rows))]


def laplacian(row: GraphRow) -> np.ndarray:
    """The normalized Laplacian (n, n) float64 of a graph."""
    count = len(row.nodes)
    adjacency = np.zeros((count, count))
    if row.edges:
        a, b = np.array(row.edges).T
        adjacency[a, b] = adjacency[b, a] = 1
    scale = adjacency.sum(axis=0).clip(min=1) ** -0.5
    laplacian: np.ndarray = np.eye(count) - scale[:, None] * adjacency * scale
    return laplacian
