"""All small graphs, with exact properties as labels: no download."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any, Literal

import torch

from sslrun.data.graph.base import GraphOptions, GraphSource, GraphTable, draw_roles
from sslrun.data.graph.graphs import GraphRow, build_graphs
from sslrun.data.source import sources
from sslrun.data.specs import GraphSpec

MOST_NODES = 7
"""Number of nodes of the largest graphs in networkx's atlas."""


def count_triangles(graph: Any) -> int:
    """Number of triangles of a graph."""
    import networkx as nx

    return sum(nx.triangles(graph).values()) // 3


def count_cycles(graph: Any) -> int:
    """Number of simple cycles of any length."""
    import networkx as nx

    return sum(1 for _ in nx.simple_cycles(graph))


def node_connectivity(graph: Any) -> int:
    """Smallest number of nodes whose removal leaves several parts or one node."""
    import networkx as nx

    return int(nx.node_connectivity(graph)) if len(graph) > 1 else 0


COUNTS: dict[str, Callable[[Any], int]] = {
    "triangles": count_triangles,
    "cycles": count_cycles,
    "connectivity": node_connectivity,
}
"""Label -> the function that computes it, for labels that are numbers."""
PROPERTIES = {
    "connected": ("in parts", "connected"),
    "bipartite": ("odd cycle", "bipartite"),
    "planar": ("not planar", "planar"),
}
"""Label -> the names of its classes, for labels that networkx decides by `is_<label>`."""


class ShapesOptions(GraphOptions):
    """Options of all small graphs."""

    label: Literal["triangles", "cycles", "connectivity", "connected", "bipartite", "planar"] = (
        "triangles"
    )
    """What is predicted. Numbers: triangles, cycles of any length, or connectivity, the number of
    nodes whose removal leaves several parts. Two classes: connected, bipartite or planar."""
    connected: bool = True
    """Keep connected graphs only: 996 in place of 1,252."""
    degrees: bool = False
    """Give each node its degree as its category. Otherwise all nodes are alike."""


@sources.register("shapes")
class Shapes(GraphSource):
    """All graphs of 1 to 7 nodes, each once, with an exact property as its label: no download.

    The graphs are networkx's atlas (Read and Wilson, An Atlas of Graphs, 1998). No two are
    isomorphic, so that a test graph is never one of the training graphs.
    """

    Options = ShapesOptions
    options: ShapesOptions
    typical = MOST_NODES

    def outline(self) -> GraphSpec:
        return GraphSpec((MOST_NODES if self.options.degrees else 1,), (), MOST_NODES)

    def content(self) -> Any:
        return version("networkx")

    def read(self) -> GraphTable:
        import networkx as nx

        graphs = [
            graph
            for graph in nx.graph_atlas_g()
            if len(graph) and (nx.is_connected(graph) or not self.options.connected)
        ]
        label = self.options.label
        if label in COUNTS:
            labels = torch.tensor([COUNTS[label](graph) for graph in graphs]).float()
            classes: tuple[str, ...] = ()
        else:
            holds, classes = getattr(nx, f"is_{label}"), PROPERTIES[label]
            labels = torch.tensor([holds(graph) for graph in graphs]).long()
        is_random = self.options.split == "random"
        roles = draw_roles(len(graphs)) if is_random else torch.zeros(len(graphs)).long()
        rows = [self._row(graph) for graph in graphs]
        return GraphTable(build_graphs(rows, labels, classes, self.outline()), roles)

    def _row(self, graph: Any) -> GraphRow:
        """The atlas numbers nodes from 0."""
        nodes = [[graph.degree[node] if self.options.degrees else 0] for node in range(len(graph))]
        return GraphRow(nodes, list(graph.edges), [()] * graph.number_of_edges())

    @classmethod
    def count(cls) -> int | None:
        return 996

    @classmethod
    def describe(cls) -> dict[str, str]:
        return {
            "splits": "996 connected graphs (1,252 with the others): a quarter is carved for the "
            "test, then a tenth of the rest for validation",
            "labels": "triangles, cycles or connectivity (numbers); connected, bipartite or planar",
            "searched": "networkx",
        }
