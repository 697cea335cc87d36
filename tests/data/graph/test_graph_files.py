"""Graphs in files: edge lists, attributes, PyTorch Geometric's data sets, and mistakes."""

import networkx as nx
import pytest
import torch

from sslrun.data.graph import files
from sslrun.data.graph.files import GraphFiles, PygFiles
from sslrun.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SSLRUN_CACHE", str(tmp_path / "cache"))


def graphs(path, **options):
    return GraphFiles(GraphFiles.Options(path=path, **options))


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def read(examples, *indices):
    (batch,) = examples.batches([torch.tensor(indices)], torch.device("cpu"))
    return batch.inputs


def test_edge_lists_in_folders_are_classes(tmp_path):
    data = tmp_path / "data"
    write(data / "ring/a.edges", "x y\ny z\nz x\n")
    write(data / "ring/b.edges", "1 2\n2 3\n3 4\n4 1\n")
    write(data / "path/c.txt", "a b\nb c\n")
    source = graphs(data)
    assert source.splits == ("train",)
    examples = source.load("train")
    assert examples.classes == ("path", "ring")
    assert examples.labels.tolist() == [0, 1, 1]
    assert examples.lengths.tolist() == [3 + 4, 3 + 6, 4 + 8]
    assert read(examples, 1).edges[0].sort(dim=1).values.unique(dim=0).tolist() == [
        [0, 1], [0, 2], [1, 2],
    ]  # fmt: skip


def test_splits_are_folders_and_graphs_without_a_class_have_no_label(tmp_path):
    data = tmp_path / "data"
    for number in range(3):
        write(data / f"train/{number}.edges", "a b\n")
    write(data / "test/x.edges", "a b\nb c\n")
    source = graphs(data)
    assert source.splits == ("train", "test")
    assert source.load("train").labels is None
    assert source.load("test").lengths.tolist() == [7]


def test_attributes_are_categories(tmp_path):
    graph = nx.Graph()
    graph.add_node(0, element="C")
    graph.add_node(1, element="O")
    graph.add_node(2, element="C")
    graph.add_edge(0, 1, order=1)
    graph.add_edge(1, 2, order=2)
    (tmp_path / "data").mkdir()
    nx.write_gml(graph, tmp_path / "data/molecule.gml")
    examples = graphs(tmp_path / "data", node=["element"], edge=["order"]).load("train")
    assert examples.spec.nodes == (2,)
    assert examples.spec.bonds == (2,)
    batch = read(examples, 0)
    assert batch.nodes[0, :, 0].tolist() == [1, 2, 1]
    assert batch.bonds[0, :, 0].tolist() == [1, 1, 2, 2]
    with pytest.raises(UserError, match=r"no attribute 'mass'; it has: element"):
        graphs(tmp_path / "data", node=["mass"]).load("train")


def test_one_file_may_hold_many_graphs(tmp_path):
    (tmp_path / "data").mkdir()
    lines = [nx.to_graph6_bytes(nx.cycle_graph(n), header=False) for n in (3, 5)]
    (tmp_path / "data/rings.g6").write_bytes(b"".join(lines))
    assert graphs(tmp_path / "data").load("train").lengths.tolist() == [9, 15]


def test_mistakes_are_one_line(tmp_path):
    data = tmp_path / "data"
    write(data / "loop.edges", "a b\nb b\n")
    with pytest.raises(UserError, match=r"loop\.edges: node 1 has an edge to itself"):
        graphs(data).load("train")
    write(data / "loop.edges", "a\n")
    with pytest.raises(UserError, match=r"loop\.edges: the graph is empty"):
        graphs(data).load("train")
    (data / "loop.edges").unlink()
    with pytest.raises(UserError, match="holds no graphs; files should end in"):
        graphs(data).load("train")
    write(data / "bad.gml", "graph [ nonsense")
    with pytest.raises(UserError, match=r"bad\.gml: cannot be read as a graph") as error:
        graphs(data).load("train")
    assert "\n" not in str(error.value)
    (data / "bad.gml").unlink()
    write(data / "one/a.edges", "a b\n")
    with pytest.raises(UserError, match="has only one class, 'one'"):
        graphs(data).load("train")
    write(data / "b.edges", "a b\n")
    with pytest.raises(UserError, match=r"b\.edges: not in the folder of a class"):
        graphs(data).load("train")


# ---------------------------------------------------------------- PyTorch Geometric


def collated(count=6, **changes):
    """What PyTorch Geometric writes for paths of three nodes."""
    items = {
        "x": torch.eye(3).repeat(count, 1),
        "edge_index": torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]]).repeat(1, count),
        "edge_attr": torch.tensor([[1], [1], [0], [0]]).repeat(count, 1),
        "y": torch.arange(count) % 2,
        **changes,
    }
    steps = {"x": 3, "edge_index": 4, "edge_attr": 4, "y": 1}
    bounds = {name: torch.arange(count + 1) * step for name, step in steps.items()}
    kept = {name: value for name, value in items.items() if value is not None}
    return kept, {name: bounds[name] for name in kept if name in bounds}


def pyg(path, **options):
    return PygFiles(PygFiles.Options(path=path, **options))


def test_a_processed_data_set_is_read(tmp_path):
    pytest.importorskip("torch_geometric")
    (tmp_path / "set/processed").mkdir(parents=True)
    torch.save(collated(), tmp_path / "set/processed/data.pt")
    torch.save({}, tmp_path / "set/processed/pre_filter.pt")
    examples = pyg(tmp_path / "set").load("train")
    assert (examples.spec.nodes, examples.spec.bonds) == ((3,), (2,))
    assert examples.labels.tolist() == [0, 1, 0, 1, 0, 1]
    batch = read(examples, 4)
    assert batch.nodes[0, :, 0].tolist() == [1, 2, 3]
    assert batch.edges[0].tolist() == [[0, 1], [1, 0], [1, 2], [2, 1]]
    assert batch.bonds[0, :, 0].tolist() == [2, 2, 1, 1]
    numbers = collated(y=torch.arange(6) / 2, x=None, edge_attr=None, num_nodes=torch.full((6,), 3))
    torch.save(numbers, tmp_path / "numbers.pt")
    examples = pyg(tmp_path / "numbers.pt", regression=True).load("train")
    assert examples.labels.tolist() == [0, 0.5, 1, 1.5, 2, 2.5]
    with pytest.raises(UserError, match=r"labels are not classes: set data\.regression: true"):
        pyg(tmp_path / "numbers.pt").load("train")


def test_other_files_of_pytorch_geometric_are_one_line(tmp_path, monkeypatch):
    pytest.importorskip("torch_geometric")
    with pytest.raises(UserError, match=r"should hold one processed file .*found: none"):
        pyg(tmp_path).load("train")
    (tmp_path / "broken.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match=r"broken\.pt: cannot be read") as error:
        pyg(tmp_path / "broken.pt").load("train")
    assert "\n" not in str(error.value)
    monkeypatch.setattr(files, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"torch_geometric: pip install 'sslrun\[pyg\]'"):
        pyg(tmp_path / "broken.pt").load("train")
