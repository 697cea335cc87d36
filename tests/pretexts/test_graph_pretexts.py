"""Masked graphs and context prediction: masks, losses, gradients, distances, mistakes."""

import math

import networkx as nx
import pytest
import torch
import torch.nn.functional as F

from sslrun.backbones import build_backbone
from sslrun.data.examples import Batch
from sslrun.data.graph.graphs import GraphRow, build_graphs
from sslrun.data.specs import GraphSpec
from sslrun.errors import UserError
from sslrun.pretexts.base import pretexts
from sslrun.pretexts.context import distances_from
from sslrun.pretexts.mask_graph import IGNORED, choose_nodes, classify, cosine_error

SPEC = GraphSpec((5, 2), (3,), 14)
SIZES = (9, 14, 1, 6, 12)
BACKBONES = {
    "gin": {"width": 32},
    "tokengt-tiny": {"ids": "orf", "dropout": 0.0, "width": 32},
    "graph-mlp": {"width": 32},
}


def examples(seed=0):
    """Graphs in which an element follows from the neighbors: its number is that of its degree."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number, size in enumerate(SIZES):
        graph = nx.gnp_random_graph(size, 0.3, seed=seed + number)
        coins = torch.randint(0, 2, (size,), generator=generator).tolist()
        nodes = [[min(4, graph.degree[node]), coins[node]] for node in graph]
        kinds = torch.randint(0, 3, (graph.number_of_edges(),), generator=generator).tolist()
        rows.append(GraphRow(nodes, list(graph.edges), [[kind] for kind in kinds]))
    return build_graphs(rows, None, (), SPEC)


def batch(seed=0):
    (drawn,) = examples(seed).batches([torch.arange(len(SIZES))], torch.device("cpu"))
    return Batch(drawn.inputs, None)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def build(name, backbone="gin", spec=SPEC, **options):
    torch.manual_seed(0)
    network = build_backbone(backbone, BACKBONES[backbone], spec)
    return pretexts[name](pretexts[name].Options(**options), network)


CASES = [
    ("mask-graph", {}),
    ("mask-graph", {"edges": True}),
    ("mask-graph", {"target": "cosine", "rate": 0.25, "replace": 0.15, "gamma": 2.0}),
    ("context", {"radius": 2, "inner": 1, "outer": 3}),
]


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize("backbone", ["gin", "tokengt-tiny", "graph-mlp"])
def test_every_pretext_learns_on_every_backbone(name, options, backbone):
    pretext = build(name, backbone, **options)
    optimizer = torch.optim.AdamW(pretext.parameters(), lr=0.005)
    losses = []
    for _ in range(12):
        torch.manual_seed(0)
        output = pretext(pretext.views(batch(), generator()))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
        assert all(not metric.requires_grad for metric in output.metrics.values())
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("rate", [0.01, 0.15, 0.25, 0.5, 0.99])
def test_exactly_the_given_share_of_each_graph_is_masked(rate):
    counts = torch.arange(1, 60)
    noise = torch.rand(len(counts), 64, generator=generator())
    chosen = choose_nodes(noise, counts, rate)
    expected = [min(n, int(rate * n + 1)) for n in counts.tolist()]
    assert chosen.sum(dim=1).tolist() == expected
    assert not chosen[torch.arange(64) >= counts[:, None]].any()


def test_masked_nodes_lose_their_categories_and_keep_everything_else():
    pretext, original = build("mask-graph"), batch().inputs
    views = pretext.views(batch(), generator())
    masked = views.targets != IGNORED
    assert masked.sum(dim=1).tolist() == [int(0.15 * n + 1) for n in SIZES]
    assert (views.graphs.nodes[masked] == torch.tensor([6, 3])).all()
    assert torch.equal(views.graphs.nodes[~masked], original.nodes[~masked])
    assert torch.equal(views.targets[masked], original.nodes[..., 0][masked] - 1)
    for part in ("edges", "bonds", "counts", "spectrum"):
        assert torch.equal(getattr(views.graphs, part), getattr(original, part))


def test_replaced_nodes_have_the_categories_of_another_node_of_the_graph():
    pretext = build("mask-graph", replace=1.0, rate=0.5)
    original, views = batch().inputs, pretext.views(batch(), generator())
    masked = views.targets != IGNORED
    assert (views.graphs.nodes[masked] > 0).all()
    assert (views.graphs.nodes[masked] <= torch.tensor([5, 2])).all()
    for row in range(len(SIZES)):
        own = {tuple(node) for node in original.nodes[row, : SIZES[row]].tolist()}
        assert {tuple(node) for node in views.graphs.nodes[row, : SIZES[row]].tolist()} <= own


def test_bonds_at_masked_nodes_are_masked_and_no_others():
    pretext, original = build("mask-graph", edges=True), batch().inputs
    views = pretext.views(batch(), generator())
    masked = views.targets != IGNORED
    for row in range(len(SIZES)):
        for place in range(int(original.counts[row, 1])):
            a, b = original.edges[row, place].tolist()
            hidden = bool(masked[row, a] or masked[row, b])
            assert (views.bond_targets[row, place] != IGNORED) == hidden
            shown = 4 if hidden else int(original.bonds[row, place, 0])
            assert views.graphs.bonds[row, place, 0] == shown
    assert (views.bond_targets[~original.real_edges] == IGNORED).all()


def test_nodes_that_are_not_masked_have_no_gradient():
    for target in ("class", "cosine"):
        pretext = build("mask-graph", target=target)
        views = pretext.views(batch(), generator())
        scores = torch.randn(*views.targets.shape, 5, requires_grad=True)
        loss = (
            classify(scores, views.targets)[0]
            if target == "class"
            else cosine_error(scores, views.targets, 1.0)
        )
        loss.backward()
        masked = views.targets != IGNORED
        assert not scores.grad[~masked].any()
        assert (scores.grad[masked].abs().sum(dim=-1) > 0).all()


def test_class_loss_and_accuracies_equal_their_formulas():
    scores = torch.randn(2, 6, 4, generator=generator())
    targets = torch.tensor([[0, IGNORED, 1, 1, 3, IGNORED], [0, 0, 0, IGNORED, 1, 0]])
    loss, metrics = classify(scores, targets)
    real = targets != IGNORED
    torch.testing.assert_close(loss, F.cross_entropy(scores[real], targets[real]))
    right = scores.argmax(dim=-1) == targets
    assert metrics["accuracy"] == right[real].float().mean()
    recalls = [right[targets == kind].float().mean() for kind in (0, 1, 3)]
    torch.testing.assert_close(metrics["balanced_accuracy"], torch.stack(recalls).mean())


def test_the_cosine_error_is_zero_for_equal_directions_and_one_minus_cosine():
    targets = torch.tensor([[2, IGNORED, 0]])
    exact = 7 * F.one_hot(targets.clamp_min(0), 4).float()
    assert cosine_error(exact, targets, 3.0) == 0
    predicted = torch.randn(1, 3, 4, generator=generator())
    cosines = F.cosine_similarity(predicted, exact, dim=-1)[0, [0, 2]]
    for gamma in (1.0, 2.0):
        expected = ((1 - cosines) ** gamma).mean()
        torch.testing.assert_close(cosine_error(predicted, targets, gamma), expected)


def test_the_decoder_gets_zeros_at_masked_nodes_only_with_remask():
    for remask in (True, False):
        pretext = build("mask-graph", target="cosine", remask=remask)
        views = pretext.views(batch(), generator())
        nodes = torch.randn(*views.targets.shape, 32)
        codes, masked = pretext.codes(nodes, views.targets), views.targets != IGNORED
        assert bool((codes[masked] == 0).all()) == remask
        assert (codes[~masked] != 0).any(dim=-1).all()
    assert pretext.head.bias is None


def test_the_floor_is_the_entropy_of_masked_categories():
    pretext, drawn = build("mask-graph"), examples()
    counts = torch.zeros(5)
    for seed in range(400):
        targets = pretext.views(batch(), generator(seed)).targets
        counts += targets[targets != IGNORED].bincount(minlength=5)
    shares = counts / counts.sum()
    entropy = -torch.special.xlogy(shares, shares).sum().item()
    assert pretext.floor(drawn) == pytest.approx(entropy, abs=0.02)
    assert build("mask-graph", target="cosine").floor(drawn) is None
    held_out = pretext.eval().held_out(batch(), generator())
    assert set(held_out) == {
        "held_out_loss", "held_out_accuracy", "held_out_balanced_accuracy",
    }  # fmt: skip


# ---------------------------------------------------------------- context


def test_distances_are_those_of_breadth_first_search():
    graphs = batch().inputs
    centers = torch.tensor([3, 0, 0, 5, 11])
    found = distances_from(graphs, centers, 4)
    for row, center in enumerate(centers.tolist()):
        graph = nx.Graph()
        graph.add_nodes_from(range(SIZES[row]))
        graph.add_edges_from(graphs.edges[row, : graphs.counts[row, 1]].tolist())
        expected = nx.single_source_shortest_path_length(graph, center)
        for node in range(14):
            assert found[row, node] == min(5, expected.get(node, 5))


def test_neighborhood_context_and_anchors_are_rings_around_the_center():
    rows = [GraphRow([[0, 0]] * 9, [(node, node + 1) for node in range(8)], [[0]] * 8)] * 2
    rows += [GraphRow([[1, 1]], [], [])]
    paths = build_graphs(rows, None, (), SPEC)
    (drawn,) = paths.batches([torch.arange(3)], torch.device("cpu"))
    pretext = build("context", radius=3, inner=2, outer=5)
    for seed in range(10):
        views = pretext.views(drawn, generator(seed))
        for row in range(2):
            near, context = views.neighborhoods, views.contexts
            center, size = int(views.centers[row]), int(near.counts[row, 0])
            assert near.counts[row, 1] == 2 * (size - 1)
            assert 0 <= center <= 3  # on a path, nodes keep their order
            assert 0 <= size - 1 - center <= 3
            assert views.real[row]
            count = int(context.counts[row, 0])
            assert 1 <= views.anchors[row].sum() <= 2
            assert not views.anchors[row, count:].any()
            assert context.nodes[row, :count].min() == 1
        assert not views.real[2]
        assert views.contexts.counts[2].tolist() == [1, 0]
        assert not views.anchors[2].any()


def test_an_induced_graph_has_the_kept_nodes_and_their_edges():
    graphs = batch().inputs
    keep = torch.rand(len(SIZES), 14, generator=generator()) < 0.6
    induced, places = graphs.induced(keep)
    for row, size in enumerate(SIZES):
        kept = [node for node in range(size) if keep[row, node]]
        assert induced.counts[row, 0] == len(kept)
        assert torch.equal(induced.nodes[row, : len(kept)], graphs.nodes[row, kept])
        assert not induced.nodes[row, len(kept) :].any()
        assert places[row, kept].tolist() == list(range(len(kept)))
        expected = [
            ([kept.index(a), kept.index(b)], bond)
            for (a, b), (bond,) in zip(
                graphs.edges[row].tolist()[: graphs.counts[row, 1]],
                graphs.bonds[row].tolist(),
                strict=False,
            )
            if a in kept and b in kept
        ]
        count = int(induced.counts[row, 1])
        assert induced.edges[row, :count].tolist() == [pair for pair, _ in expected]
        assert induced.bonds[row, :count, 0].tolist() == [bond for _, bond in expected]
        assert not induced.edges[row, count:].any()


def test_graphs_without_a_context_do_not_count():
    pretext = build("context", radius=2, inner=1, outer=3).eval()
    views = pretext.views(batch(), generator())
    assert not views.real[2]
    empty = views._replace(real=torch.zeros_like(views.real))
    assert pretext(empty).loss == 0
    assert pretext(views).metrics["with_context"] == views.real.float().mean()


# ---------------------------------------------------------------- mistakes


def test_mistakes_are_one_line():
    plain = GraphSpec((3,), (), 9)
    with pytest.raises(UserError, match=r"pretext\.edges: true .* do not have: leave it out"):
        build("mask-graph", spec=plain, edges=True)
    counts = build_backbone("node-counts", {}, SPEC)
    with pytest.raises(UserError, match="needs a backbone with 'tokens'"):
        pretexts["mask-graph"](pretexts["mask-graph"].Options(), counts)
    spectral = build_backbone("tokengt-tiny", {}, SPEC)
    with pytest.raises(UserError, match=r"reveal the context: set backbone\.ids to orf, or take"):
        pretexts["context"](pretexts["context"].Options(), spectral)
    with pytest.raises(ValueError, match="inner, radius and outer should rise"):
        pretexts["context"].Options(inner=5)
    with pytest.raises(ValueError, match="edges: true is for target: class"):
        pretexts["mask-graph"].Options(edges=True, target="cosine")
