"""Graphs in files: those that networkx reads, and data sets of PyTorch Geometric."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sslrun.data.graph.base import (
    ROLES,
    GraphOptions,
    GraphSource,
    GraphTable,
    draw_roles,
)
from sslrun.data.graph.graphs import GraphBuilder, GraphRow, build_graphs, check_graph
from sslrun.data.source import sources
from sslrun.data.specs import GraphSpec
from sslrun.data.stores import SPELLINGS, Split, fingerprint
from sslrun.errors import UserError

READERS = {
    ".edges": "read_edgelist",
    ".edgelist": "read_edgelist",
    ".txt": "read_edgelist",
    ".adjlist": "read_adjlist",
    ".gml": "read_gml",
    ".graphml": "read_graphml",
    ".gexf": "read_gexf",
    ".net": "read_pajek",
    ".g6": "read_graph6",
    ".s6": "read_sparse6",
}
"""Ending of a file -> the function of networkx that reads it."""


class StoredGraph(NamedTuple):
    """A graph of a file, with what its nodes and bonds are before they are numbered."""

    place: str
    nodes: list[tuple[str, ...]]
    edges: list[tuple[int, int]]
    bonds: list[tuple[str, ...]]
    label: str
    role: Split


class GraphFilesOptions(GraphOptions):
    """Options of graphs in files."""

    path: Path
    """A folder with one folder per class, or with train/, val/ and test/ of such folders."""
    node: tuple[str, ...] = ()
    """Attributes of nodes that are categories, such as element; default: all nodes are alike."""
    edge: tuple[str, ...] = ()
    """Attributes of edges that are categories; default: all edges are alike."""


@sources.register("graphs")
class GraphFiles(GraphSource):
    """Your own graphs: edge lists (.edges, .txt) and other files that networkx reads.

    Each file is a graph (.g6 and .s6: one per line), in the folder of its class as images are:
    PATH/CLASS/FILE or PATH/train/CLASS/FILE. Files that lie directly in PATH have no labels.
    Directions of edges are dropped. Also read: .adjlist, .gml, .graphml, .gexf and .net.
    """

    class Options(GraphFilesOptions):
        pass

    options: Options

    def outline(self) -> GraphSpec:
        return GraphSpec((1,) * max(1, len(self.options.node)), (1,) * len(self.options.edge), 0)

    def content(self) -> Any:
        return fingerprint([str(file) for _, file in self._files])

    @cached_property
    def _files(self) -> list[tuple[Split, Path]]:
        """All files with their splits, in the order of their names."""
        path = self.options.path
        folders = [
            (split, path / name)
            for split, names in SPELLINGS.items()
            for name in names
            if (path / name).is_dir()
        ] or [("train", path)]
        found: list[tuple[Split, Path]] = [
            (split, file)
            for split, folder in folders
            for file in sorted(folder.rglob("*"))
            if file.suffix in READERS
        ]
        if not found:
            raise UserError(
                f"{path}: holds no graphs; files should end in {', '.join(sorted(READERS))}"
            )
        return found

    def read(self) -> GraphTable:
        graphs = [graph for split, file in self._files for graph in self._read_file(split, file)]
        node_names = _number_categories([node for graph in graphs for node in graph.nodes])
        bond_names = _number_categories([bond for graph in graphs for bond in graph.bonds])
        sizes = tuple(map(len, node_names)), tuple(map(len, bond_names))
        rows = [
            GraphRow(
                [[names[part] for names, part in zip(node_names, node, strict=True)]
                 for node in graph.nodes],
                graph.edges,
                [[names[part] for names, part in zip(bond_names, bond, strict=True)]
                 for bond in graph.bonds],
            )
            for graph in graphs
        ]  # fmt: skip
        for graph, row in zip(graphs, rows, strict=True):
            check_graph(row, graph.place)
        labels, classes = self._labels(graphs)
        roles = torch.tensor([ROLES.index(graph.role) for graph in graphs])
        if self.options.split == "random":
            roles = draw_roles(len(rows))
        return GraphTable(build_graphs(rows, labels, classes, GraphSpec(*sizes, 0)), roles)

    def _labels(self, graphs: Sequence[StoredGraph]) -> tuple[Tensor | None, tuple[str, ...]]:
        labeled = [graph.label for graph in graphs if graph.role != "unlabeled"]
        names = sorted(set(labeled))
        if names == [""]:
            return None, ()
        if "" in names:
            place = next(graph.place for graph in graphs if graph.label == "")
            raise UserError(f"{place}: not in the folder of a class: move it")
        if len(names) < 2:
            raise UserError(
                f"{self.options.path}: has only one class, {names[0]!r}: two are needed"
            )
        index = {name: number for number, name in enumerate(names)}
        return torch.tensor([index.get(graph.label, -1) for graph in graphs]), tuple(names)

    def _read_file(self, role: Split, file: Path) -> Iterator[StoredGraph]:
        import networkx as nx

        try:
            read = getattr(nx, READERS[file.suffix])(file)
        except Exception as error:  # each reader of networkx raises errors of its own
            cause = " ".join(str(error).split())[:200]
            raise UserError(f"{file}: cannot be read as a graph: {cause}") from None
        base = self.options.path
        parts = file.relative_to(base).parts[:-1]
        if role != "train" or (parts and parts[0] in SPELLINGS["train"]):
            parts = parts[1:]
        several = isinstance(read, list)
        for number, graph in enumerate(read if several else [read], start=1):
            place = f"{file}:{number}" if several else str(file)
            yield self._convert(graph, place, parts[0] if parts else "", role)

    def _convert(self, graph: Any, place: str, label: str, role: Split) -> StoredGraph:
        simple = graph.to_undirected()
        index = {node: number for number, node in enumerate(simple.nodes)}
        nodes = [
            tuple(_attribute(values, name, place) for name in self.options.node) or ("",)
            for _, values in simple.nodes(data=True)
        ]
        edges = {
            (index[a], index[b]): tuple(
                _attribute(values, name, place) for name in self.options.edge
            )
            for a, b, values in simple.edges(data=True)
        }
        return StoredGraph(place, nodes, list(edges), list(edges.values()), label, role)


def _attribute(values: dict[str, Any], name: str, place: str) -> str:
    if name not in values:
        known = ", ".join(values) or "none"
        raise UserError(f"{place}: a node or edge has no attribute '{name}'; it has: {known}")
    return str(values[name])


def _number_categories(rows: Sequence[tuple[str, ...]]) -> list[dict[str, int]]:
    """Number the values of each column, in alphabetical order."""
    return [
        {value: number for number, value in enumerate(sorted(set(column)))}
        for column in zip(*rows, strict=True)
    ]


# ---------------------------------------------------------------- PyTorch Geometric


@sources.register("pyg")
class PygFiles(GraphSource):
    """A data set of PyTorch Geometric that is on disk: its file processed/*.pt.

    Reads `x` and `edge_attr` as categories if they are whole numbers (columns of zeros and ones
    that sum to 1 in each row count as one category), and `y` as classes or numbers. Floating-point
    features of nodes are left out. Needs no download: give the folder that the data set was
    processed into.
    """

    class Options(GraphOptions):
        path: Path
        """The file, or a folder with processed/*.pt."""
        regression: bool = False
        """Whether labels are numbers in place of classes."""

    options: Options

    def outline(self) -> GraphSpec:
        return GraphSpec((1,), (), 0)

    @property
    def _file(self) -> Path:
        path = self.options.path
        if path.is_file():
            return path
        found = sorted(
            file
            for folder in (path, path / "processed")
            for file in folder.glob("*.pt")
            if not file.name.startswith("pre_")
        )
        if len(found) != 1:
            names = ", ".join(file.name for file in found) or "none"
            raise UserError(f"{path}: should hold one processed file (*.pt), found: {names}")
        return found[0]

    def content(self) -> Any:
        return fingerprint([str(self._file)])

    def read(self) -> GraphTable:
        items, bounds = _load_pyg(self._file)
        nodes, node_sizes = _categories(items.get("x"), int(bounds["x"][-1]))
        bonds, bond_sizes = _categories(items.get("edge_attr"), items["edge_index"].shape[1])
        builder = GraphBuilder(GraphSpec(node_sizes, bond_sizes, 0))
        count = len(bounds["x"]) - 1
        for number in range(count):
            first, last = (int(bounds["x"][number + end]) for end in (0, 1))
            begin, stop = (int(bounds["edge_index"][number + end]) for end in (0, 1))
            pairs = items["edge_index"][:, begin:stop].T.tolist()
            kept = {
                (min(a, b), max(a, b)): place for place, (a, b) in enumerate(pairs, start=begin)
            }
            row = GraphRow(
                nodes[first:last].tolist(), list(kept), bonds[list(kept.values())].tolist()
            )
            check_graph(row, f"{self._file}: graph {number}")
            builder.add(row)
        labels, classes = self._labels(items.get("y"), count)
        is_random = self.options.split == "random"
        roles = draw_roles(count) if is_random else torch.zeros(count).long()
        return GraphTable(builder.build(labels, classes), roles)

    def _labels(self, y: Tensor | None, count: int) -> tuple[Tensor | None, tuple[str, ...]]:
        if y is None:
            return None, ()
        if len(y) != count:
            raise UserError(f"{self._file}: has {len(y)} labels for {count} graphs")
        columns = y.reshape(count, -1)
        if self.options.regression:
            return columns.float().squeeze(1), ()
        if columns.shape[1] > 1:
            return columns.float(), ("0", "1")
        values = columns[:, 0]
        if values.is_floating_point() and (values != values.round()).any():
            raise UserError(f"{self._file}: labels are not classes: set data.regression: true")
        found, labels = values.long().unique(return_inverse=True)
        if len(found) < 2:
            raise UserError(f"{self._file}: all labels are {int(found[0])}: two classes are needed")
        return labels, tuple(map(str, found.tolist()))


def _load_pyg(file: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Read the collated tensors of a processed file, and the bounds of each graph's part.

    Only tensors and plain values are loaded.
    """
    if find_spec("torch_geometric") is None:
        raise UserError(
            "data sets of PyTorch Geometric need the package torch_geometric: "
            "pip install 'sslrun[pyg]'"
        )
    import torch_geometric.data  # noqa: F401 (lets torch load its classes with weights_only)

    try:
        loaded = torch.load(file, weights_only=True, map_location="cpu")
        items, bounds = loaded[0], loaded[1]
        items = dict(items if isinstance(items, dict) else items.to_dict())
    except Exception as error:  # damaged files raise many kinds of errors
        cause = " ".join(str(error).split())[:200]
        raise UserError(
            f"{file}: cannot be read as a processed data set of tensors: {cause}"
        ) from None
    if "edge_index" not in items or "edge_index" not in bounds:
        raise UserError(f"{file}: has no edge_index: it is not a data set of several graphs")
    if "x" not in bounds:
        counts = items.get("num_nodes")
        if counts is None:
            raise UserError(f"{file}: has neither x nor num_nodes")
        sizes = torch.as_tensor(counts)
        bounds = {**bounds, "x": torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])}
    return items, bounds


def _categories(values: Tensor | None, count: int) -> tuple[Tensor, tuple[int, ...]]:
    """Categories (count, columns) int64 of a feature matrix, and the size of each column."""
    if values is None or not values.numel():
        return torch.zeros(count, 1, dtype=torch.int64), (1,)
    columns = values.reshape(count, -1)
    if columns.shape[1] > 1 and _is_one_hot(columns):
        return columns.argmax(dim=1, keepdim=True), (columns.shape[1],)
    whole = [column for column in columns.T if (column == column.round()).all()]
    if not whole or min(float(column.min()) for column in whole) < 0:
        return torch.zeros(count, 1, dtype=torch.int64), (1,)
    kept = torch.stack(whole, dim=1).long()
    return kept, tuple(int(size) + 1 for size in kept.amax(dim=0))


def _is_one_hot(columns: Tensor) -> bool:
    return bool(((columns == 0) | (columns == 1)).all() and (columns.sum(dim=1) == 1).all())
