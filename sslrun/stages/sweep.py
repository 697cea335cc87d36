"""Batches: all runs of all rows of sweeps, each made once, shared among any number of worker processes.

There is no master: every worker walks the same plan, takes a run by locking its directory, and
skips what is done or taken. Killing a worker, or starting another on a second machine that sees the
same folder, needs no ceremony.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from sslrun.data.source import explain_missing
from sslrun.errors import UserError
from sslrun.launch import local
from sslrun.recipe import Named, Sweep, load_sweep
from sslrun.results.address import UNKNOWN_METRIC, Labels, Place, Row
from sslrun.results.compare import Comparisons, compare_all
from sslrun.results.compute import add_compute
from sslrun.results.formats import table_formats
from sslrun.results.known_protocols import counts_per_class
from sslrun.results.matching import check_stand_ins
from sslrun.results.published import published_as
from sslrun.results.record import RunRecord, find_records
from sslrun.results.table import Table, columns_of
from sslrun.runs import Run
from sslrun.stages.context import Busy, Context, Interrupted
from sslrun.stages.evaluate import Cell, cells
from sslrun.stages.pretrain import Pretraining
from sslrun.stages.reporting import Reporter


class Job(Protocol):
    """A piece of work that makes a run: pretraining, a cell of a table, a measurement."""

    @property
    def title(self) -> str: ...
    @property
    def run(self) -> Run: ...
    @property
    def needs(self) -> tuple[Job, ...]: ...
    @property
    def reads(self) -> tuple[Named, ...]: ...
    def execute(self, context: Context) -> dict[str, Any]: ...


class Jobs(Protocol):
    """What is planned, under a name."""

    @property
    def name(self) -> str: ...
    @property
    def jobs(self) -> tuple[Job, ...]: ...


WAIT_SECONDS = 0.5
"""Between two looks at runs that other workers hold."""


@dataclass(frozen=True)
class Plan:
    """A sweep's jobs, in the order that shares most, and the cells of its table."""

    sweep: Sweep
    root: Path
    jobs: tuple[Job, ...]
    """Each run once; a job stands after those that it needs."""
    cells: tuple[tuple[str, Cell], ...]
    """Row and cell."""

    @property
    def name(self) -> str:
        return self.sweep.name

    @classmethod
    def of(cls, sweep: Sweep, root: Path, places: AbstractSet[Place] | None = None) -> Plan:
        """Plan a sweep; only the cells at some `places`, if given. UserError: no such table to stand beside."""
        _check_against(sweep)
        jobs: dict[Path, Job] = {}
        found: list[tuple[str, Cell]] = []
        for seed in sweep.seeds:
            for row, recipe in sweep.rows.items():
                of_row = [
                    cell
                    for cell in cells(recipe, seed, root)
                    if places is None or not places.isdisjoint(places_of(row, cell))
                ]
                found += [(row, cell) for cell in of_row]
                for cell in of_row:
                    for job in (*cell.needs, cell):
                        jobs.setdefault(job.run.path, job)
        return cls(sweep, root, tuple(jobs.values()), tuple(found))

    @property
    def finished(self) -> bool:
        """Whether any cell is finished, so that there is a table."""
        return any(cell.run.finished for _, cell in self.cells)

    def table(self) -> Table:
        """The table of the finished cells."""
        records = self.records()
        table = Table.from_records(records, title=self.sweep.title or self.sweep.name)
        if self.sweep.against:
            every = published_as(self.sweep.against.table)
            table.stand_ins = {each.name: self.sweep.against.columns for each in every}
        read = [text for row in self.sweep.rows if (text := self._pretrained(row))]
        if read:
            table.note(f"pretrained on: {'; '.join(read)}")
        for choice, rows in _choices(self.sweep).items():
            table.note(f"{', '.join(rows)}: {choice} (a choice: the paper leaves it open)")
        missing = len(self.cells) - len(records)
        if missing:
            table.note(f"{missing} of {len(self.cells)} cells are not computed")
        for row, cell in self.cells:
            if reason := cell.run.failure:
                for place in places_of(row, cell):
                    table.leave_empty(*place, reason)
        return table

    def records(self) -> list[RunRecord]:
        """The finished cells."""
        return [RunRecord(cell.run.path, row) for row, cell in self.cells if cell.run.finished]

    def _pretrained(self, row: str) -> str | None:
        """How much text a row's first pretraining read, and for how long; None: it is not finished, or reads no text."""
        of_row = [cell for name, cell in self.cells if name == row]
        runs = [need.run for cell in of_row for need in cell.needs if isinstance(need, Pretraining)]
        if not runs or not runs[0].finished:
            return None
        record = RunRecord(runs[0].path)
        if not record.tokens:
            return None
        return f"{row}: {record.tokens / 1e6:,.1f} M tokens in {record.steps:,} steps, {record.seconds:,.0f} s"

    def comparison(self) -> Comparisons | None:
        """The table with its cost, beside the published ones that the sweep names; None: it names none."""
        if not self.sweep.against:
            return None
        table = self.table()
        add_compute(table)
        return compare_all(table, published_as(self.sweep.against.table))

    def write_tables(self) -> None:
        """Write the table and its comparison in every format, beside the runs."""
        table, comparison = self.table(), self.comparison()
        folder = self.root / self.sweep.name
        for ending in table_formats:
            table.write(folder / f"table{ending}")
            if comparison is not None:
                comparison.write(folder / f"comparison{ending}")


def _check_against(sweep: Sweep) -> None:
    """Raise UserError if the sweep names a published table, a column or a task that does not exist."""
    if sweep.against is None:
        return
    tasks = list(dict.fromkeys(task for recipe in sweep.rows.values() for task in recipe.evaluate))
    try:
        check_stand_ins(sweep.against.columns, tasks, published_as(sweep.against.table))
    except UserError as error:
        raise UserError(f"{sweep.against_at}: against: {error}") from None


def _choices(sweep: Sweep) -> dict[str, list[str]]:
    """What was chosen where a paper is silent, and the rows that it holds for."""
    found: dict[str, list[str]] = {}
    for row, recipe in sweep.rows.items():
        for choice in recipe.choices:
            found.setdefault(choice, []).append(row)
    return found


def places_of(row: str, cell: Cell) -> list[Place]:
    """The places of a cell's numbers in its sweep's table: the test's, and those of its shifts."""
    labels = Labels.of(cell.labels, counts_per_class(cell.protocol))
    columns = columns_of(cell.task, labels, cell.evaluation.shifts, UNKNOWN_METRIC)
    return [(Row(row, cell.protocol), column) for column in columns]


def work(plans: Sequence[Jobs], context: Context, workers: int = 1) -> list[str]:
    """Do every job that is neither finished nor in the hands of another worker; wait for those that are.

    Returns the failures' reasons. A job that fails takes down those that need it, and no others.
    `workers`: how many share the jobs, to estimate the time left. UserError: no job can be done, as
    its data are missing.
    """
    waiting = [job for plan in plans for job in plan.jobs]
    failed = without_data(waiting, context.reporter)
    if waiting and len(failed) == len(waiting):
        raise UserError("\n".join(dict.fromkeys(failed.values())))
    report_missing(failed, len(waiting), context.reporter)
    runs = [job.run for job in waiting]
    with context.reporter.plan(", ".join(plan.name for plan in plans), runs, workers) as settle:
        while waiting:
            later: list[Job] = []
            for job in waiting:
                blocked = [need.run.path for need in job.needs if not need.run.finished]
                reason = next(
                    (failed[path] for path in (job.run.path, *blocked) if path in failed), None
                )
                if reason is not None:
                    job.run.fail(reason)
                    failed[job.run.path] = reason
                elif blocked:
                    later.append(job)
                    continue
                else:
                    try:
                        with context.reporter.job(job.title, job.run.stage):
                            job.execute(context)
                    except Busy:
                        later.append(job)
                        continue
                    except Interrupted:
                        raise
                    except UserError as error:
                        if str(error) not in failed.values():
                            context.reporter.say(f"{job.title}: failed: {error}")
                        failed[job.run.path] = str(error)
                        job.run.fail(str(error))
                settle(job.run)
            if len(later) == len(waiting):
                time.sleep(WAIT_SECONDS)
                context.stop.check()
            waiting = later
    return list(failed.values())


def without_data(jobs: Sequence[Job], reporter: Reporter) -> dict[Path, str]:
    """Find the unfinished jobs whose data, or the data of a job that they need, are missing; and the reasons."""
    found: dict[str, str | None] = {}
    failed: dict[Path, str] = {}
    with reporter.reading() as progress:
        for job in jobs:
            if job.run.finished:
                continue
            for data in job.reads:
                if repr(data) not in found:
                    found[repr(data)] = explain_missing(data.name, data.options, progress)
            reasons = [found[repr(data)] for data in job.reads]
            reasons += [failed.get(need.run.path) for need in job.needs]
            if reason := next(filter(None, reasons), None):
                failed[job.run.path] = reason
    return failed


def report_missing(failed: Mapping[Path, str], total: int, reporter: Reporter) -> None:
    """Print how many of the runs cannot be made on this machine, one line for each reason."""
    for reason, count in Counter(failed.values()).items():
        reporter.say(f"{count} of {total} runs can't be made here: {reason}")


def describe_failures(failures: Sequence[str], plans: Sequence[Jobs]) -> str:
    """Describe how many runs failed, and for which reasons."""
    total = sum(len(plan.jobs) for plan in plans)
    reasons = Counter(failures)
    summary = f"{len(failures)} of {total} runs failed" + (
        ", the others are done" if len(failures) < total else ""
    )
    if len(reasons) == 1:
        return f"{summary}: {failures[0]}"
    return "\n".join(
        [f"{summary}:", *(f"  {count}: {reason}" for reason, count in reasons.items())]
    )


def launch(
    plans: Sequence[Jobs], context: Context, workers: int, arguments: Sequence[str]
) -> list[str]:
    """Do the `work` in this process, or share it with `workers - 1` others; returns the failures' reasons.

    Each worker has its share of the cores and, unless the device is named, a GPU of its own in
    turn. `arguments`: sslrun's, by which the other workers read the same plan.
    """
    if context.fresh:
        for plan in plans:
            for job in plan.jobs:
                job.run.clear()
        context = replace(context, fresh=False)
    if workers == 1:
        return work(plans, context)
    threads = local.threads_of(workers)
    context.compute.use_threads(threads)
    _, *devices = local.spread(context.compute.device, workers)  # the first is this process's own
    commands = [local.command_on(arguments, device) for device in devices]
    return local.beside(partial(work, plans, context, workers), commands, threads)


def table_of(targets: Sequence[Path], root: Path) -> Table:
    """The table of sweep files and of folders with finished runs. UserError: there is no finished evaluation."""
    records: list[RunRecord] = []
    for target in targets:
        if target.suffix in (".yaml", ".yml"):
            plan = Plan.of(load_sweep(target), root)
            if len(targets) == 1:
                return plan.table()
            records += plan.records()
        else:
            records += [record for record in find_records(target) if record.is_evaluation]
    if not records:
        named = ", ".join(map(str, targets))
        raise UserError(
            f"{named}: no finished evaluation there; run `sslrun sweep` or `sslrun probe` first"
        )
    return Table.from_records(records)
