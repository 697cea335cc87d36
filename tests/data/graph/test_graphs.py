"""Graphs: batches, eigenvectors, splits, exact properties of small graphs, and mistakes."""

import itertools

import networkx as nx
import numpy as np
import pytest
import torch

from sslrun.data.graph.base import assign_roles, draw_roles
from sslrun.data.graph.graphs import (
    EIGENVECTORS,
    LARGEST,
    GraphBuilder,
    GraphRow,
    build_graphs,
    check_graph,
    laplacian,
    laplacian_eigenvectors,
)
from sslrun.data.graph.shapes import Shapes, ShapesOptions, count_cycles, node_connectivity
from sslrun.data.specs import GraphSpec, InputSpec
from sslrun.data.splits import Splits, pool
from sslrun.errors import UserError

CPU = torch.device("cpu")
SPEC = GraphSpec((3, 2), (4,), 0)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SSLRUN_CACHE", str(tmp_path / "cache"))


def row(nodes, edges, seed=0):
    """A graph with random categories."""
    rng = np.random.default_rng(seed)
    return GraphRow(
        [[int(rng.integers(3)), int(rng.integers(2))] for _ in range(nodes)],
        edges,
        [[int(rng.integers(4))] for _ in edges],
    )


def ring(nodes):
    return [(node, (node + 1) % nodes) for node in range(nodes)]


def read(examples, *indices):
    (batch,) = examples.batches([torch.tensor(indices)], CPU)
    return batch


def test_a_batch_holds_each_graph_and_padding():
    rows = [row(4, ring(4)), row(1, []), row(3, [(0, 2)], seed=1)]
    examples = build_graphs(rows, torch.tensor([1.0, 2.0, 3.0]), (), SPEC)
    assert examples.lengths.tolist() == [12, 1, 5]
    batch = read(examples, 2, 0, 1)
    graphs = batch.inputs
    assert batch.labels.tolist() == [3.0, 1.0, 2.0]
    assert graphs.counts.tolist() == [[3, 2], [4, 8], [1, 0]]
    assert graphs.real.sum(dim=1).tolist() == [5, 12, 1]
    assert (graphs.nodes[0, :3] - 1).tolist() == rows[2].nodes
    assert graphs.edges[0, :2].tolist() == [[0, 2], [2, 0]]
    assert graphs.bonds[0, :2, 0].tolist() == [rows[2].bonds[0][0] + 1] * 2
    for part, real in (
        (graphs.nodes, graphs.real_nodes),
        (graphs.edges, graphs.real_edges),
        (graphs.bonds, graphs.real_edges),
        (graphs.spectrum, graphs.real_nodes),
    ):
        assert not part[~real].any()
    assert graphs.nodes[graphs.real_nodes].min() == 1
    assert graphs.numel() == 3 * (4 + 8)


def test_graphs_are_packed_a_few_at_a_time_with_the_same_result(monkeypatch):
    rows = [row(4, ring(4)), row(1, []), row(3, [(0, 2)], seed=1), row(1, []), row(5, ring(5))]
    labels = torch.arange(5.0)
    whole = build_graphs(rows, labels, (), SPEC)
    alive = []
    monkeypatch.setattr("sslrun.data.graph.graphs.PART", 2)
    builder = GraphBuilder(SPEC)
    for graph in rows:
        builder.add(graph)
        alive.append(len(builder._waiting))
    parts = builder.build(labels, ())
    assert alive == [1, 0, 1, 0, 1]
    assert parts.spec == whole.spec
    for name in ("nodes", "edges", "bonds", "spectrum", "ranges"):
        assert torch.equal(getattr(parts, name), getattr(whole, name)), name
    with pytest.raises(UserError, match="no graphs to read"):
        GraphBuilder(SPEC).build(None, ())


def test_batches_of_single_nodes_have_no_edges():
    examples = build_graphs([row(1, []), row(2, [])], None, (), SPEC)
    graphs = read(examples, 0, 1).inputs
    assert graphs.edges.shape == (2, 0, 2)
    assert graphs.real.tolist() == [[True, False], [True, True]]


def test_subsets_and_joined_sets_keep_their_graphs():
    first = build_graphs(
        [row(3, ring(3)), row(2, [(0, 1)])], torch.tensor([0, 1]), ("a", "b"), SPEC
    )
    second = build_graphs([row(5, ring(5), seed=2)], torch.tensor([1]), ("a", "b"), SPEC)
    joined = pool(first, second, labeled=True)
    assert joined.labels.tolist() == [0, 1, 1]
    assert joined.spec.largest == 5
    assert joined.lengths.tolist() == [9, 4, 15]
    ours, theirs = read(joined, 2, 1).inputs, read(second, 0).inputs
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine[:1], other)
    again = read(joined.subset(torch.tensor([1, 2])), 1, 0).inputs
    assert all(torch.equal(a, b) for a, b in zip(again, ours, strict=True))
    assert pool(first, second).labels is None


def test_eigenvectors_are_those_of_the_normalized_laplacian():
    rows = [row(nodes, ring(nodes)) for nodes in (3, 20, 6)] + [row(4, [(0, 1)])]
    for graph, vectors in zip(rows, laplacian_eigenvectors(rows), strict=True):
        count = min(len(graph.nodes), EIGENVECTORS)
        matrix = torch.from_numpy(laplacian(graph))
        kept = vectors[:, :count].double()
        values = (kept * (matrix @ kept)).sum(dim=0)
        torch.testing.assert_close(matrix @ kept, kept * values, atol=1e-6, rtol=0)
        torch.testing.assert_close(kept.T @ kept, torch.eye(count).double(), atol=1e-6, rtol=0)
        assert (values.diff() > -1e-6).all()
        assert not vectors[:, count:].any()


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (GraphRow([], [], []), "the graph is empty"),
        (row(2, [(0, 1), (1, 1)]), "node 1 has an edge to itself"),
        (row(2, [(0, 1), (1, 0)]), "more than one edge"),
        (row(LARGEST + 1, []), f"{LARGEST} is the most"),
    ],
)
def test_mistakes_in_a_graph_are_one_line(graph, message):
    with pytest.raises(UserError, match=message) as error:
        check_graph(graph, "file.csv:3")
    assert str(error.value).startswith("file.csv:3: ")
    assert "\n" not in str(error.value)


def test_a_spec_is_saved_with_the_weights(tmp_path):
    spec = GraphSpec((119, 4), (4, 3), 30)
    spec.save(tmp_path)
    loaded = InputSpec.load(tmp_path)
    assert loaded == spec
    assert loaded.largest == 30


# ---------------------------------------------------------------- splits


def test_random_splits_are_disjoint_and_always_the_same():
    roles = draw_roles(1000)
    assert roles.bincount().tolist() == [800, 100, 100]
    assert torch.equal(roles, draw_roles(1000))


def test_groups_are_assigned_whole_and_in_order():
    groups = [[0, 1, 2, 3], [4, 5, 6], [7], [8], [9]]
    roles = assign_roles(groups, 10)
    assert roles.tolist() == [0, 0, 0, 0, 0, 0, 0, 0, 1, 2]
    assert assign_roles([list(range(9)), [9]], 10).tolist() == [2] * 9 + [0]


# ---------------------------------------------------------------- shapes


def shapes(**options):
    return Shapes(ShapesOptions(**options))


def test_shapes_are_all_small_graphs_and_their_properties_are_exact():
    connected = shapes().load("train")
    assert len(connected) == 996
    assert connected.spec == GraphSpec((1,), (), 7)
    assert connected.ranges[:, 1].sub(connected.ranges[:, 0]).bincount().tolist() == [
        0, 1, 1, 2, 6, 21, 112, 853,
    ]  # the numbers of connected graphs of 1 to 7 nodes, OEIS A001349  # fmt: skip
    everything = shapes(connected=False, label="connected").load("train")
    assert everything.labels.bincount().tolist() == [1252 - 996, 996]
    complete = connected.labels.argmax()
    assert connected.labels[complete] == 35  # 7 over 3
    graphs = read(connected, *range(0, 996, 97)).inputs
    adjacency = torch.zeros(len(graphs.counts), 7, 7)
    index = torch.arange(len(graphs.counts))[:, None].expand(-1, graphs.edges.shape[1])
    real = graphs.real_edges
    adjacency[index[real], graphs.edges[real][:, 0], graphs.edges[real][:, 1]] = 1
    cubes = adjacency.matrix_power(3).diagonal(dim1=1, dim2=2).sum(dim=1) / 6
    assert torch.equal(cubes, connected.labels[torch.arange(0, 996, 97)])


def test_properties_of_known_graphs():
    assert count_cycles(nx.complete_graph(4)) == 7
    assert count_cycles(nx.path_graph(5)) == 0
    assert [node_connectivity(nx.complete_graph(n)) for n in (1, 2, 5)] == [0, 1, 4]
    assert node_connectivity(nx.cycle_graph(6)) == 2
    planar = shapes(label="planar").load("train")
    assert planar.labels.sum() == 1 + 1 + 2 + 6 + 20 + 99 + 646  # OEIS A003094
    bipartite = shapes(label="bipartite").load("train")
    assert bipartite.labels.sum() == 1 + 1 + 1 + 3 + 5 + 17 + 44  # OEIS A005142


def test_degrees_are_categories_of_nodes():
    examples = shapes(degrees=True).load("train")
    graphs = read(examples, *range(50)).inputs
    degrees = torch.zeros_like(graphs.nodes[..., 0])
    degrees.scatter_add_(1, graphs.edges[..., 0], graphs.real_edges.long())
    assert torch.equal(graphs.nodes[..., 0], (degrees + 1) * graphs.real_nodes)


def test_splits_of_shapes_are_carved_or_drawn():
    drawn = Splits(shapes(split="random"))
    assert [len(part) for part in (drawn.train, drawn.val, drawn.test)] == [797, 100, 99]
    assert len(drawn.train_and_val) == 897
    assert drawn.train_and_val.labels is not None
    carved = Splits(shapes())
    assert len(carved.train) + len(carved.val) + len(carved.test) == 996
    keys = [
        {tuple(range_) for range_ in part.ranges.tolist()}
        for part in (carved.train, carved.val, carved.test)
    ]
    assert all(a.isdisjoint(b) for a, b in itertools.combinations(keys, 2))


def test_a_sketch_has_the_spec_of_the_data():
    spec, batch = shapes(degrees=True).sketch(5)
    assert spec == GraphSpec((7,), (), 7)
    assert len(batch.inputs.counts) == 5
    assert batch.inputs.nodes.max() <= 7
