"""Molecules: categories of atoms and bonds, splits by scaffold, labels, and mistakes."""

import os
from pathlib import Path

import pytest
import torch

from sslrun.data.graph import molecules
from sslrun.data.graph.molecules import (
    SPEC,
    OwnMolecules,
    parse_smiles,
    published_files,
    split_by_scaffold,
)
from sslrun.data.source import explain_missing, sources
from sslrun.data.splits import Splits
from sslrun.errors import UserError

pytest.importorskip("rdkit")
RINGS = ["c1ccccc1", "c1ccncc1", "C1CCCCC1", "c1ccoc1", "c1ccsc1", "C1CCNCC1"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SSLRUN_CACHE", str(tmp_path / "cache"))


def write(path, *lines):
    path.write_text("\n".join(lines) + "\n")
    return path


def own(path, **options):
    return OwnMolecules(OwnMolecules.Options(path=path, **options))


def test_atoms_and_bonds_have_the_categories_of_hu_et_al():
    graph = parse_smiles("C[C@H](O)/C=C/c1ccccc1.[Na+]")
    elements = [node[0] for node in graph.nodes]
    assert elements == [6, 6, 8, 6, 6, *[6] * 6, 11]
    assert [node[1] for node in graph.nodes][:3] in ([0, 1, 0], [0, 2, 0])
    kinds = [kind for kind, _ in graph.bonds]
    assert sorted(kinds) == [0] * 4 + [1] + [3] * 6
    assert sum(direction > 0 for _, direction in graph.bonds) == 2
    assert len(graph.edges) == 11  # the sodium ion has no bond
    assert parse_smiles("C#N").bonds == [[2, 0]]
    assert parse_smiles("*C").nodes == [[0, 0], [6, 0]]


def test_a_file_becomes_labeled_graphs(tmp_path):
    file = write(tmp_path / "set.csv", "name,smiles,y", "a,CCO,1.5", "b,C,", 'c,"c1ccccc1",-2')
    examples = own(file, labels=["y"], regression=True).load("train")
    assert examples.spec == SPEC
    assert examples.spec.largest == 6
    assert torch.equal(examples.labels.nan_to_num(99), torch.tensor([1.5, 99, -2]))
    assert examples.lengths.tolist() == [3 + 4, 1, 6 + 12]
    assert examples.classes == ()
    assert own(file).load("train").labels is None


def test_classes_are_numbers_or_names_in_order(tmp_path):
    file = write(tmp_path / "set.csv", "smiles,y,z", "C,10,yes", "CC,9,no", "CCC,9,yes")
    numbers = own(file, labels=["y"]).load("train")
    assert (numbers.labels.tolist(), numbers.classes) == ([1, 0, 0], ("9", "10"))
    words = own(file, labels=["z"]).load("train")
    assert (words.labels.tolist(), words.classes) == ([1, 0, 1], ("no", "yes"))


def test_several_columns_hold_zero_one_or_nothing(tmp_path):
    file = write(tmp_path / "set.csv", "smiles,a,b", "C,1,", "CC,0,1")
    examples = own(file, labels=["a", "b"]).load("train")
    assert examples.classes == ("0", "1")
    assert examples.labels.nan_to_num(9).tolist() == [[1, 9], [0, 1]]
    file = write(tmp_path / "bad.csv", "smiles,a,b", "C,1,", "CC,0,2")
    with pytest.raises(UserError, match=r"bad\.csv:3: labels should be 0, 1 or empty"):
        own(file, labels=["a", "b"]).load("train")


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        (["smiles", "CC", "C1CC"], {}, r"set\.csv:3: cannot be parsed as SMILES: 'C1CC': repair"),
        (["smile", "CC"], {}, r"set\.csv:1: no column 'smiles'\. Did you mean 'smile'"),
        (["smiles,y", "CC"], {"labels": ["y"]}, r"set\.csv:2: has 1 columns, but the header 2"),
        (
            ["smiles,y", "CC,a"],
            {"labels": ["y"], "regression": True},
            r"set\.csv:2: its label is not a number: 'a'",
        ),
        (
            ["smiles,y", "CC,inf"],
            {"labels": ["y"], "regression": True},
            r"set\.csv:2: its label is not a finite number",
        ),
        (["smiles,y", "CC,1", "C,1"], {"labels": ["y"]}, r"set\.csv:2: all labels are '1'"),
        (["smiles,y", "CC,1", "C,"], {"labels": ["y"]}, r"set\.csv:3: has no label"),
        (["smiles"], {}, r"set\.csv: holds no molecules"),
    ],
)
def test_mistakes_in_a_file_name_the_line(tmp_path, lines, options, message):
    file = write(tmp_path / "set.csv", *lines)
    with pytest.raises(UserError, match=message) as error:
        own(file, **options).load("train")
    assert "\n" not in str(error.value)


def test_missing_files_are_one_line(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"none\.csv: no such file"):
        own(tmp_path / "none.csv").load("train")
    with pytest.raises(UserError, match=r"should hold train\.csv"):
        own(tmp_path).load("train")
    monkeypatch.setenv("SSLRUN_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert "Put nci.csv at data/molecules" in explain_missing("nci", sources["nci"].Options())
    with pytest.raises(UserError, match=r"no such set of molecules: 'ncy'\. Did you mean 'nci'"):
        published_files("ncy")


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(molecules, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"need the package rdkit: pip install 'sslrun\[graphs\]'"):
        parse_smiles("C")


def test_corrupt_lines_are_skipped_and_named_if_the_recipe_says_so(tmp_path, caplog):
    file = write(tmp_path / "set.csv", "smiles,y", "CC,1", "xx,2", "C,3", "C1,4")
    examples = own(file, labels=["y"], regression=True, skip_corrupt=True).load("train")
    assert examples.labels.tolist() == [1, 3]
    assert "in lines 3, 5" in caplog.text


def test_scaffolds_are_in_one_split_each_and_the_order_of_files_is_all_that_matters():
    smiles = [f"{ring}{'C' * tail}" for ring in RINGS for tail in range(1, 11)]
    smiles += ["C" * length for length in range(1, 41)]
    roles = split_by_scaffold(smiles)
    assert torch.equal(roles, split_by_scaffold(smiles))
    assert roles.bincount().tolist() == [80, 10, 10]
    assert (roles[60:] == 0).all()  # the largest group: molecules without a ring
    assert all(len(set(roles[start : start + 10].tolist())) == 1 for start in range(0, 60, 10))


def test_splits_are_the_files_or_drawn_over_all_of_them(tmp_path):
    for name, count in (("train", 30), ("test", 10)):
        write(tmp_path / f"{name}.csv", "smiles,y", *(f"{'C' * (i + 1)},{i}" for i in range(count)))
    options = {"labels": ["y"], "regression": True}
    by_file = own(tmp_path, **options)
    assert by_file.splits == ("train", "test")
    assert [len(by_file.load(split)) for split in by_file.splits] == [30, 10]
    drawn = own(tmp_path, split="random", **options)
    assert [len(drawn.load(split)) for split in ("train", "val", "test")] == [32, 4, 4]


def test_other_sets_are_added_for_pretraining_without_their_labels(tmp_path, monkeypatch):
    (tmp_path / "molecules").mkdir()
    write(tmp_path / "molecules/freesolv.csv", "smiles,hydration_kcal_mol", "CCCCCC,1", "C,2")
    monkeypatch.setenv("SSLRUN_DATA", str(tmp_path))
    file = write(tmp_path / "set.csv", "smiles,y", *(f"{'C' * (i + 1)},{i % 2}" for i in range(20)))
    splits = Splits(own(file, labels=["y"], also=["freesolv"]))
    assert (len(splits.train), len(splits.val), len(splits.test)) == (12, 2, 6)
    assert len(splits.pretrain) == 14
    assert splits.pretrain.labels is None
    assert splits.pretrain.lengths[-2:].tolist() == [16, 1]


def test_the_cache_follows_the_file(tmp_path):
    file = write(tmp_path / "set.csv", "smiles", "C", "CC")
    assert len(own(file).load("train")) == 2
    write(file, "smiles", "C", "CC", "CCC")
    os.utime(file, ns=(1, 1))
    assert len(own(file).load("train")) == 3
    assert len(list((tmp_path / "cache/graphs").glob("*.safetensors"))) == 2


@pytest.mark.parametrize(
    ("name", "counts"),
    [("solubility", [1025, 257]), ("freesolv", [642])],
)
def test_published_sets_have_their_molecules(name, counts):
    data = os.environ.get("SSLRUN_DATA")
    if data is None or not Path(data, "molecules").is_dir():
        pytest.skip("SSLRUN_DATA has no molecules")
    source = sources[name](sources[name].Options())
    assert [len(source.load(split)) for split in source.splits] == counts
    assert source.load("train").labels.is_floating_point()
