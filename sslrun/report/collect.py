"""Gather what a report shows: tables, finished evaluations, pretrainings, and what is missing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sslrun.errors import UserError
from sslrun.recipe import load_sweep
from sslrun.results.record import RunRecord, list_records, split_damaged
from sslrun.results.table import Table
from sslrun.stages.pretrain import Pretraining
from sslrun.stages.sweep import Plan

IDENTITY = "identity.json"


@dataclass
class Material:
    """The runs of a report and the tables made of them."""

    title: str
    tables: list[Table] = field(default_factory=list)
    """The tables of sweeps, or one of all runs; each followed by its published comparisons."""
    evaluations: list[RunRecord] = field(default_factory=list)
    pretrainings: list[RunRecord] = field(default_factory=list)
    """Finished and unfinished ones."""
    problems: list[tuple[str, str]] = field(default_factory=list)
    """Pairs of a run's name and why its numbers are missing."""

    @property
    def runs(self) -> list[RunRecord]:
        """All runs that were read."""
        return [*self.pretrainings, *self.evaluations]

    @property
    def versions(self) -> list[str]:
        """The versions of sslrun that made the runs."""
        found = {str(run.environment.get("sslrun", "unknown")) for run in self.runs}
        return sorted(found)


def collect(targets: Sequence[Path], root: Path) -> Material:
    """Read the runs of sweeps (YAML files) and of folders of runs.

    Raises UserError if a target does not exist, or if there is no run at all.
    """
    material = Material(", ".join(target.stem for target in targets))
    folders: list[Path] = []
    for target in targets:
        if target.suffix in (".yaml", ".yml"):
            _add_sweep(target, root, material)
        elif target.is_dir():
            folders.append(target)
        else:
            raise UserError(f"{target}: no such folder of runs; name a sweep, a run or a folder")
    loose: list[RunRecord] = []
    for folder in folders if not material.tables else ():
        records, damaged = split_damaged(list_records(folder))
        loose += [record for record in records if record.is_evaluation]
        material.problems += damaged.items()
    if loose:
        material.tables.append(Table.from_records(loose, material.title))
    material.evaluations = [record for table in material.tables for record in table.records]
    for folder in folders:
        _add_loose(folder, material)
    if not material.runs and not material.problems:
        raise UserError(
            f"{', '.join(map(str, targets))}: no run there; run `sslrun sweep` or "
            "`sslrun pretrain` first"
        )
    return material


def _add_sweep(path: Path, root: Path, material: Material) -> None:
    """Add the tables and the pretrainings of a sweep, named after its rows."""
    plan = Plan.of(load_sweep(path), root)
    if plan.finished:
        table = plan.table()
        material.tables.append(table)
        comparison = plan.compare(table)
        if comparison is not None:
            material.tables += comparison.tables
    pretrainings: dict[Path, str] = {}
    for row, cell in plan.cells:
        for need in cell.needs:
            if isinstance(need, Pretraining) and need.run.path.is_dir():
                pretrainings.setdefault(need.run.path, row)
        if reason := cell.run.failure:
            material.problems.append((cell.title, reason))
    for run, row in pretrainings.items():
        _add_pretraining(RunRecord(run, row), material)


def _add_loose(folder: Path, material: Material) -> None:
    """Add the pretrainings in a folder, and note what else is unfinished or failed."""
    for path in _run_folders(folder):
        record = RunRecord(path)
        if path.name.startswith("pretrain-"):
            _add_pretraining(record, material)
        elif not record.finished:
            material.problems.append((record.name, record.failure or "is not finished"))


def _add_pretraining(record: RunRecord, material: Material) -> None:
    """Add a pretraining, or note that it is damaged, and note that it is not finished."""
    _, damaged = split_damaged([record] if record.finished else [])
    if damaged:
        material.problems += damaged.items()
        return
    material.pretrainings.append(record)
    if not record.finished:
        material.problems.append((record.name, record.failure or "is not finished"))


def _run_folders(folder: Path) -> Iterator[Path]:
    """Yield the folders of runs in a folder, itself included, in alphabetical order."""
    yield from sorted(path.parent for path in folder.rglob(IDENTITY))
