"""Measurements of graphs: the 15 basis maps, and the symmetry of random networks."""

from pathlib import Path

import torch

from sslrun.claims.measurements.base import measurements
from sslrun.claims.measurements.graphs import basis_map, list_partitions
from sslrun.training.device import compute


def measure(name, **options):
    cls = measurements[name]
    table = cls(cls.Options(**options)).table(0, compute("cpu"), Path(), lambda: None)
    return {
        (*filter(None, (row.name, row.protocol)), column.metric.name): cell.values["0"]
        for (row, column), cell in table.cells.items()
    }


def test_there_are_fifteen_maps_and_each_pair_of_pairs_is_in_one():
    parts = list_partitions()
    assert len(set(parts)) == 15  # the Bell number of 4
    maps = torch.stack([basis_map(part, 5) for part in parts])
    assert maps.shape == (15, 25, 26)
    torch.testing.assert_close(maps.sum(dim=2), torch.ones(15, 25))
    assert ((maps[:, :, 1:] > 0).sum(dim=0) == 1).all()
    # Renumbering the nodes changes no map: they are equivariant.
    new = torch.tensor([3, 0, 4, 1, 2])
    pairs = (new[:, None] * 5 + new).flatten()
    columns = torch.cat([torch.zeros(1).long(), pairs + 1])
    assert torch.equal(maps[:, pairs][:, :, columns], maps)


def test_known_maps():
    identity = basis_map((0, 1, 0, 1), 3)
    assert identity[0 * 3 + 1, 1 + 0 * 3 + 1] == 1  # the pair (0, 1) attends to itself
    assert identity[0, 0] == 1  # the node (0, 0) has no partner: the null token takes it
    transposed = basis_map((0, 1, 1, 0), 3)
    assert transposed[0 * 3 + 1, 1 + 1 * 3 + 0] == 1


def test_networks_are_invariant_and_identifiers_tell_graphs_apart():
    cells = measure("graph-invariance", graphs=2, nodes=7)
    for network in ("GIN", "TokenGT, none", "TokenGT, lap"):
        assert cells[network, "renumbered"] < 1e-12
    assert cells["TokenGT, orf", "renumbered"] > 0.01
    assert cells["TokenGT, orf", "with identifiers"] < 1e-12
    assert cells["GIN", "hexagon"] < 1e-12
    assert cells["TokenGT, none", "hexagon"] < 1e-12
    assert cells["TokenGT, lap", "hexagon"] > 0.01


def test_attention_learns_maps_from_eigenvectors_better_than_without():
    cells = measure("equivariant-maps", nodes=(3, 4), steps=60, width=64, head=16, batch=8)
    assert len(cells) == 8
    assert cells["lap", "with types", "error"] < cells["none", "with types", "error"]
    assert cells["orf", "with types", "error"] < cells["orf", "without types", "error"]
