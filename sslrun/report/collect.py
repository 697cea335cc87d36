"""Gather what a report shows: tables, finished evaluations, pretrainings, and what is missing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sslrun.errors import UserError
from sslrun.recipe import load_sweep
from sslrun.results.record import RunRecord, find_records
from sslrun.results.table import Table
from sslrun.runs import FAILURE
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
            folders += _add_sweep(target, root, material)
        elif target.is_dir():
            folders.append(target)
        else:
            raise UserError(f"{target}: no such folder of runs; name a sweep, a run or a folder")
    loose = [] if material.tables else _evaluations(folders, material)
    if loose:
        material.tables.append(Table.from_records(loose, material.title))
    material.evaluations = [record for table in material.tables for record in table.records]
    _add_pretrainings(folders, material)
    if not material.runs and not material.problems:
        raise UserError(
            f"{', '.join(map(str, targets))}: no run there; run `sslrun sweep` or "
            "`sslrun pretrain` first"
        )
    return material


def _add_sweep(path: Path, root: Path, material: Material) -> list[Path]:
    """Add the tables of a sweep; return the folders of its recipes' runs."""
    plan = Plan.of(load_sweep(path), root)
    if plan.finished:
        material.tables.append(plan.table())
        comparison = plan.comparison()
        if comparison is not None:
            material.tables += comparison.tables
    for _, cell in plan.cells:
        if reason := cell.run.failure:
            material.problems.append((cell.title, reason))
    return sorted({job.run.path.parent for job in plan.jobs})


def _evaluations(folders: Sequence[Path], material: Material) -> list[RunRecord]:
    """Read the finished evaluations in folders, and note the damaged ones."""
    found = []
    for folder in folders:
        for record in find_records(folder):
            try:
                if record.is_evaluation:
                    _ = record.row, record.metric, record.test, record.labels
                    found.append(record)
            except UserError as error:
                material.problems.append((record.name, str(error)))
            except (KeyError, TypeError, ValueError) as error:
                material.problems.append((record.name, f"result.json is damaged: {error!r}"))
    return found


def _add_pretrainings(folders: Sequence[Path], material: Material) -> None:
    """Add the pretrainings in folders, and note what is unfinished or failed."""
    for folder in folders:
        for path in _run_folders(folder):
            record = RunRecord(path)
            is_pretraining = path.name.startswith("pretrain-")
            if is_pretraining:
                material.pretrainings.append(record)
            if (path / FAILURE).is_file() and not record.finished:
                material.problems.append((record.name, record.failure or "failed"))
            elif not record.finished:
                material.problems.append((record.name, "is not finished"))


def _run_folders(folder: Path) -> Iterator[Path]:
    """Yield the folders of runs in a folder, itself included, in alphabetical order."""
    yield from sorted(path.parent for path in folder.rglob(IDENTITY))
