"""TokenGT, GIN and baselines on graphs: symmetry, identifiers, padding, and what each can tell."""

import networkx as nx
import pytest
import torch

from sslrun.backbones import build_backbone, load_backbone, save_backbone
from sslrun.backbones.tokengt import draw_identifiers
from sslrun.data.graph.graphs import EIGENVECTORS, GraphRow, Graphs, build_graphs
from sslrun.data.specs import GraphSpec
from sslrun.errors import UserError
from sslrun.registry import Options

SPEC = GraphSpec((5, 2), (3,), 12)
PLAIN = GraphSpec((1,), (), 12)
SIZES = (10, 6, 12, 8)
NETWORKS = ("tokengt-tiny", "gin", "graph-mlp", "node-counts", "fingerprint")
HEXAGON = [(node, (node + 1) % 6) for node in range(6)]
TRIANGLES = [(0, 1), (1, 2), (2, 0), (3, 4), (4, 5), (5, 3)]


def collate(rows, spec=SPEC):
    examples = build_graphs(rows, None, (), spec)
    (batch,) = examples.batches([torch.arange(len(rows))], torch.device("cpu"))
    return batch.inputs


def random_rows(seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(most, *shape):
        return torch.randint(0, most, shape, generator=generator).tolist()

    rows = []
    for number, size in enumerate(SIZES):
        edges = list(nx.gnp_random_graph(size, 0.4, seed=seed * 10 + number).edges)
        nodes = [list(pair) for pair in zip(draw(5, size), draw(2, size), strict=True)]
        rows.append(GraphRow(nodes, edges, [[bond] for bond in draw(3, len(edges))]))
    return rows


def plain(*edge_lists, nodes=6):
    return collate(
        [GraphRow([[0]] * nodes, edges, [()] * len(edges)) for edges in edge_lists], PLAIN
    )


def permute(graphs, seed=1):
    """Renumber the nodes of each graph and reorder its edges, with the eigenvectors.

    Returns also the new number (B, n) of each node.
    """
    generator = torch.Generator().manual_seed(seed)
    nodes, edges = graphs.nodes.clone(), graphs.edges.clone()
    bonds, spectrum = graphs.bonds.clone(), graphs.spectrum.clone()
    places = torch.arange(nodes.shape[1]).repeat(len(nodes), 1)
    for row, (count, edge_count) in enumerate(graphs.counts.tolist()):
        new = torch.randperm(count, generator=generator)
        order = torch.randperm(edge_count, generator=generator)
        places[row, :count] = new
        nodes[row, new], spectrum[row, new] = (
            graphs.nodes[row, :count],
            graphs.spectrum[row, :count],
        )
        edges[row, :edge_count] = new[graphs.edges[row, :edge_count]][order]
        bonds[row, :edge_count] = graphs.bonds[row, :edge_count][order]
    return Graphs(nodes, edges, bonds, graphs.counts, spectrum), places


def build(name, spec=SPEC, **options):
    torch.manual_seed(0)
    return build_backbone(name, options, spec).eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_renumbering_nodes_changes_nothing(name):
    backbone, graphs = build(name), collate(random_rows())
    permuted, places = permute(graphs)
    with torch.no_grad():
        before, after = backbone(graphs), backbone(permuted)
    scale = before.pooled.abs().max()
    torch.testing.assert_close(after.pooled / scale, before.pooled / scale, atol=2e-6, rtol=0)
    if before.tokens is not None:
        count = graphs.nodes.shape[1]
        moved = after.tokens[:, :count].gather(
            1, places[..., None].expand(-1, -1, before.tokens.shape[-1])
        )
        torch.testing.assert_close(moved, before.tokens[:, :count], atol=1e-5, rtol=1e-4)


def test_tokengt_is_invariant_to_graph_and_identifiers_jointly_and_not_to_the_graph_alone():
    backbone = build("tokengt-tiny", ids="orf")
    graphs = collate(random_rows())
    permuted, places = permute(graphs)
    ids = draw_identifiers(torch.randn(len(SIZES), 64, 12), "orf")
    moved = torch.zeros_like(ids).scatter(1, places[..., None].expand(-1, -1, 64), ids)
    with torch.no_grad():
        before = backbone._encode(graphs, ids, graphs.real)[:, 0]
        jointly = backbone._encode(permuted, moved, graphs.real)[:, 0]
        alone = backbone._encode(permuted, ids, graphs.real)[:, 0]
    torch.testing.assert_close(jointly, before, atol=2e-6, rtol=0)
    assert (alone - before).abs().max() > 1e-3


def test_random_identifiers_are_orthonormal_rows_and_differ_between_graphs():
    ids = draw_identifiers(torch.randn(5, 64, 20), "orf")
    assert ids.shape == (5, 20, 64)
    eye = torch.eye(20).expand(5, -1, -1)
    torch.testing.assert_close(ids @ ids.transpose(1, 2), eye, atol=1e-6, rtol=0)
    assert (ids[0] - ids[1]).abs().max() > 0.1
    lengths = draw_identifiers(torch.randn(5, 64, 20), "random").norm(dim=2)
    assert 0.6 < lengths.min() < lengths.max() < 1.5
    # Without the signs of R, the first entry would always have one sign.
    firsts = draw_identifiers(torch.randn(400, 4, 1), "orf")[:, 0, 0]
    assert 0.4 < (firsts > 0).float().mean() < 0.6


@pytest.mark.parametrize("name", ["tokengt-tiny", "gin", "graph-mlp"])
def test_a_larger_graph_in_the_batch_changes_nothing(name):
    rows = random_rows()
    for ids in ("lap", "orf") if name.startswith("tokengt") else (None,):
        backbone = build(name, **({} if ids is None else {"ids": ids}))
        with torch.no_grad():
            alone, together = backbone(collate(rows[1:2])), backbone(collate(rows))
        torch.testing.assert_close(together.pooled[1:2], alone.pooled, atol=2e-6, rtol=1e-5)
        real = alone.mask
        torch.testing.assert_close(
            together.tokens[1][together.mask[1]], alone.tokens[real], atol=1e-5, rtol=1e-4
        )


def test_only_identifiers_tell_a_hexagon_from_two_triangles():
    graphs = plain(HEXAGON, TRIANGLES)

    def difference(name, weights=3, **options):
        backbone = build(name, PLAIN, **options)
        with torch.no_grad():
            for parameter in backbone.parameters():
                if parameter.ndim > 1:
                    parameter *= weights
            first, second = backbone(graphs).pooled
        return (first - second).abs().max().item()

    assert difference("tokengt-tiny", ids="none") == 0
    assert difference("tokengt-tiny", ids="lap") > 0.05
    assert difference("tokengt-tiny", ids="orf") > 0.05
    # GIN has no identifiers: it tells apart what the Weisfeiler-Lehman test does.
    assert difference("gin", 1) < 1e-6
    path, star = [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)], [(0, node) for node in range(1, 6)]
    graphs = plain(path, star)
    assert difference("gin", 1) > 1e-3
    assert difference("graph-mlp") == 0
    assert difference("node-counts") == 0


def test_random_identifiers_vary_in_training_and_are_fixed_in_evaluation():
    graphs = collate(random_rows())
    for ids in ("orf", "random", "lap"):
        backbone = build("tokengt-tiny", ids=ids, dropout=0.0)
        with torch.no_grad():
            assert torch.equal(backbone(graphs).pooled, backbone(graphs).pooled)
            backbone.train()
            torch.manual_seed(1)
            first, second = backbone(graphs).pooled, backbone(graphs).pooled
            torch.manual_seed(1)
            assert torch.equal(backbone(graphs).pooled, first)
        assert not torch.equal(first, second), ids
        assert type(backbone).draws(backbone.options)
    still = build("tokengt-tiny", ids="none", dropout=0.0)
    assert not type(still).draws(still.options)


def test_features_are_means_over_draws():
    graphs = collate(random_rows())
    backbone = build("tokengt-tiny", ids="orf", draws=3)
    with torch.no_grad():
        each = [
            backbone._encode(graphs, ids[: graphs.nodes.shape[1]].expand(4, -1, -1), graphs.real)
            for ids in backbone.fixed
        ]
        torch.testing.assert_close(backbone(graphs).pooled, torch.stack(each).mean(dim=0)[:, 0])
    assert not torch.equal(each[0], each[1])
    with pytest.raises(ValueError, match="draws: 2 needs ids: orf or random"):
        type(backbone).Options(draws=2)


def test_eigenvectors_have_random_signs_and_dropout_in_training_only():
    backbone = build("tokengt-tiny")
    spectrum = torch.rand(200, 5, EIGENVECTORS) + 0.5
    assert torch.equal(backbone._eigenvectors(spectrum)[..., :EIGENVECTORS], spectrum)
    changed = backbone.train()._eigenvectors(spectrum)[..., :EIGENVECTORS]
    signs = (changed / spectrum * 0.8).round(decimals=4)
    assert set(signs.unique().tolist()) == {-1.0, 0.0, 1.0}
    assert 0.17 < (signs == 0).float().mean() < 0.23
    per_column = signs.amax(dim=1), signs.amin(dim=1)  # one sign for a graph's whole column
    assert ((per_column[0] <= 0) | (per_column[1] >= 0)).all()
    positive = (per_column[0] > 0).float().mean()
    assert 0.45 < positive < 0.55


def test_too_few_identifiers_are_refused():
    spec = GraphSpec((1,), (), 65)
    for ids in ("orf", "random"):
        with pytest.raises(UserError, match=r"65 nodes, more than the 64 .*backbone\.dimension"):
            build("tokengt-tiny", spec, ids=ids)
    assert build("tokengt-tiny", spec, ids="lap").width == 64
    with pytest.raises(UserError, match="width 64 is not a multiple of heads 5"):
        build("tokengt-tiny", heads=5)


def test_shapes_of_the_named_models():
    with torch.device("meta"):
        base = build("tokengt-base")
    block = base.blocks[0]
    assert (len(base.blocks), base.width, block.attn.heads) == (12, 768, 32)
    assert block.mlp.fc1.weight.shape == (768, 768)
    assert build("gin").width == 300
    for name in ("tokengt-small", "gin", "graph-mlp"):
        backbone = build(name)
        grouped = [id(parameter) for group in backbone.layers() for parameter in group]
        assert sorted(grouped) == sorted(id(parameter) for parameter in backbone.parameters())


@pytest.mark.parametrize("name", ["tokengt-tiny", "gin", "graph-mlp"])
def test_a_saved_backbone_gives_the_same_features(name, tmp_path):
    backbone, graphs = build(name, **({"ids": "orf"} if "tokengt" in name else {})), None
    graphs = collate(random_rows())
    save_backbone(tmp_path / "backbone.safetensors", backbone)
    loaded = load_backbone(tmp_path).eval()
    assert loaded.spec == SPEC
    assert torch.equal(loaded(graphs).pooled, backbone(graphs).pooled)


def test_batch_norm_does_not_see_padding():
    rows = random_rows()
    backbone = build("gin").train()
    alone = [build("gin").train() for _ in range(2)]
    with torch.no_grad():
        backbone(collate(rows))
        alone[0](collate(rows[::-1]))
    for name, buffer in backbone.named_buffers():
        torch.testing.assert_close(buffer, alone[0].get_buffer(name), msg=name)


def test_a_gin_layer_equals_its_formula():
    backbone = build("gin", depth=1, width=8, pool="sum").double()
    graphs = collate(random_rows()[1:2])
    layer = backbone.stack[0]
    x = backbone.node_embed(graphs.nodes)[0].double()
    bonds = layer.bond_embed(graphs.bonds)[0].double()
    rows = []
    for node in range(6):
        total = x[node] + layer.self_loop
        for (source, target), bond in zip(graphs.edges[0].tolist(), bonds, strict=True):
            if target == node:
                total = total + x[source] + bond
        rows.append(total)
    expected = layer.norm(layer.mlp(torch.stack(rows)))
    torch.testing.assert_close(backbone(graphs).tokens[0], expected)
    torch.testing.assert_close(backbone(graphs).pooled[0], expected.sum(dim=0))


def test_counts_and_fingerprints_of_known_graphs():
    rows = random_rows()
    counts = build("node-counts")(collate(rows)).pooled
    for row, vector in zip(rows, counts.tolist(), strict=True):
        first = [sum(node[0] == kind for node in row.nodes) for kind in range(5)]
        second = [sum(node[1] == kind for node in row.nodes) for kind in range(2)]
        bonds = [sum(bond[0] == kind for bond in row.bonds) for kind in range(3)]
        assert vector == [len(row.edges), *first, *second, *bonds]
    # Radius 0 sees degrees, radius 1 those of the neighbors: two trees of 6 nodes with the
    # degrees 3 2 2 1 1 1 differ by them.
    trees = plain(
        [(0, 1), (1, 2), (2, 3), (3, 4), (2, 5)], [(0, 1), (1, 2), (2, 3), (3, 4), (1, 5)]
    )
    for radius, differ in ((0, False), (1, True)):
        first, second = build("fingerprint", PLAIN, radius=radius, counts=True)(trees).pooled
        assert bool((first != second).any()) == differ
    bits = build("fingerprint", PLAIN)(trees).pooled
    assert set(bits.unique().tolist()) == {0.0, 1.0}
    assert isinstance(build("node-counts").options, Options)
