"""The base class of sources of graphs: splits, and a cache of what was read."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sslrun.data.cache import cache_root, digest_key, locked
from sslrun.data.examples import Batch
from sslrun.data.graph.graphs import GraphExamples, GraphRow, build_graphs
from sslrun.data.source import Source, SourceOptions
from sslrun.data.specs import GraphSpec
from sslrun.data.stores import Split
from sslrun.errors import UserError
from sslrun.files import replacing

CACHE_VERSION = 1
"""Raise it when the same files would give other tensors."""
ROLES: tuple[Split, ...] = ("train", "val", "test", "unlabeled")
"""The splits, in the order of their numbers."""
SHARES = (0.8, 0.1, 0.1)
"""Shares of train, val and test in splits that are drawn, as in Hu et al. 2020."""


class GraphOptions(SourceOptions):
    """Options of all sources of graphs."""

    split: Literal["own", "random"] = "own"
    """Splits. own: those of the files; what is missing is carved from train. random: all labeled
    graphs, 80 % to train on, 10 % to validate and 10 % to test, always the same."""


class GraphTable(NamedTuple):
    """All graphs of a set, labeled or not."""

    examples: GraphExamples
    roles: Tensor
    """(N,) int64: number of each graph's split in `ROLES`."""


class GraphSource(Source):
    """A set of graphs, which is read once and cached with its eigenvectors."""

    Options = GraphOptions
    gives = GraphSpec
    task = "graphs"
    typical = 12
    """Number of nodes of an average graph, to estimate costs."""

    @abstractmethod
    def read(self) -> GraphTable:
        """Read all graphs, with their splits.

        Raises:
            UserError: A file is missing or cannot be read; the message names the line.
        """

    @abstractmethod
    def content(self) -> Any:
        """Return JSON values that identify the content of the files.

        Raises:
            UserError: A file is missing.
        """

    @abstractmethod
    def outline(self) -> GraphSpec:
        """Return the spec as far as it is known without reading."""

    @cached_property
    def _all(self) -> GraphTable:
        """All graphs, from the cache if they are there."""
        options = self.options.model_dump(mode="json", exclude={*SourceOptions.model_fields})
        key = [CACHE_VERSION, self.name, self.version, options, self.content()]
        path = cache_root() / "graphs" / f"{digest_key(key)}.safetensors"
        with locked(path):
            if not path.exists():
                _write(path, self.read())
        return _read(path)

    @property
    def splits(self) -> tuple[Split, ...]:
        self.content()  # raises if a file is missing
        present = self._all.roles.unique().tolist()
        return tuple(role for number, role in enumerate(ROLES) if number in present)

    def load(self, split: Split) -> GraphExamples:
        examples, roles = self._all
        chosen = (roles == ROLES.index(split)).nonzero()[:, 0]
        if not len(chosen):
            raise UserError(f"{self.name}: has no split '{split}'")
        subset = examples.subset(chosen)
        return replace(subset, labels=None) if split == "unlabeled" else subset

    def check_available(self) -> None:
        self.content()

    def sketch(self, count: int) -> tuple[GraphSpec, Batch]:
        spec = self.outline()
        with torch.device("cpu"):  # graphs are laid out by their sizes, which meta tensors lack
            examples = build_graphs([self._tree(spec) for _ in range(count)], None, (), spec)
            (batch,) = examples.batches([torch.arange(count)], torch.device("cpu"))
        return spec, batch

    def _tree(self, spec: GraphSpec) -> GraphRow:
        """Draw a random tree of the typical size."""

        def draw(sizes: tuple[int, ...], rows: int) -> list[list[int]]:
            return [[int(torch.randint(0, most, ())) for most in sizes] for _ in range(rows)]

        size = self.typical
        edges = [(node, int(torch.randint(0, node, ()))) for node in range(1, size)]
        return GraphRow(draw(spec.nodes, size), edges, draw(spec.bonds, size - 1))


def draw_roles(count: int) -> Tensor:
    """Draw the splits (N,) of `count` graphs at random; always the same draw."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return assign_roles([[index] for index in order.tolist()], count)


def assign_roles(groups: Sequence[Sequence[int]], count: int) -> Tensor:
    """Assign groups of graphs to splits (N,) by `SHARES`, in the order of the groups.

    A group goes to train if it fits there, else to validation if it fits, else to test.
    """
    roles = torch.empty(count, dtype=torch.int64)
    train, val = (round(share * count) for share in SHARES[:2])
    filled = [0, 0, 0]
    for group in groups:
        role = 0 if filled[0] + len(group) <= train else 1
        if role == 1 and filled[1] + len(group) > val:
            role = 2
        filled[role] += len(group)
        roles[list(group)] = role
    return roles


def _write(path: Any, table: GraphTable) -> None:
    examples, roles = table
    tensors = {name: getattr(examples, name) for name in TENSORS} | {"roles": roles}
    if examples.labels is not None:
        tensors["labels"] = examples.labels
    about = {"classes": examples.classes, "spec": asdict(examples.spec)}
    with replacing(path) as temporary:
        save_file(tensors, temporary, {"sslrun": json.dumps(about)})


TENSORS = ("nodes", "edges", "bonds", "spectrum", "ranges")
"""Names of the tensors of examples in a cached file."""


def _read(path: Any) -> GraphTable:
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["sslrun"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    roles = tensors.pop("roles")
    labels = tensors.pop("labels", None)
    spec = GraphSpec.restore(about["spec"], path)
    examples = GraphExamples(**tensors, labels=labels, classes=tuple(about["classes"]), spec=spec)
    return GraphTable(examples, roles)
