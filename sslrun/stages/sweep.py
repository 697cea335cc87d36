"""Plan and run the jobs of sweeps: each run once, shared among any number of workers.

There is no master: every worker walks the same plan, takes a run by locking its directory, and
skips what is finished or taken. A worker may be killed at any time, and others may be started on
any machine that sees the same folder.
"""

from __future__ import annotations

import copy
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
from sslrun.results.table import Table, columns_of, own_column
from sslrun.runs import Run
from sslrun.stages.context import Busy, Context, Interrupted
from sslrun.stages.devices import check_devices
from sslrun.stages.evaluate import Cell, cells
from sslrun.stages.pretrain import Pretraining
from sslrun.stages.reporting import Reporter


class Job(Protocol):
    """A unit of work that produces a run: pretraining, a cell of a table, or a measurement."""

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
    """A named list of planned jobs."""

    @property
    def name(self) -> str: ...
    @property
    def jobs(self) -> tuple[Job, ...]: ...


WAIT_SECONDS = 0.5
"""Seconds between two checks of the runs that other workers hold."""


@dataclass(frozen=True)
class Plan:
    """A sweep's jobs, in the order that shares the most work, and the cells of its table."""

    sweep: Sweep
    root: Path
    jobs: tuple[Job, ...]
    """Each run once; a job comes after the jobs that it needs."""
    cells: tuple[tuple[str, Cell], ...]
    """Pairs of a row's name and a cell."""

    @property
    def name(self) -> str:
        return self.sweep.name

    @classmethod
    def of(cls, sweep: Sweep, root: Path, places: AbstractSet[Place] | None = None) -> Plan:
        """Plan a sweep; `places` limits the plan to the cells at these places.

        Raises UserError if the published table that the sweep names does not exist.
        """
        _check_against(sweep)
        jobs: dict[Path, Job] = {}
        planned: list[tuple[str, Cell]] = []
        for seed in sweep.seeds:
            for row, recipe in sweep.rows.items():
                of_row = [
                    cell
                    for cell in cells(recipe, seed, root)
                    if places is None or not places.isdisjoint(places_of(row, cell))
                ]
                planned += [(row, cell) for cell in of_row]
                for cell in of_row:
                    for job in (*cell.needs, cell):
                        jobs.setdefault(job.run.path, job)
        return cls(sweep, root, tuple(jobs.values()), tuple(planned))

    @property
    def finished(self) -> bool:
        """Whether at least one cell is finished, so that there is a table."""
        return any(cell.run.finished for _, cell in self.cells)

    def table(self) -> Table:
        """Build the table of the finished cells."""
        records = self.records()
        table = Table.from_records(records, title=self.sweep.title or self.sweep.name)
        if self.sweep.against:
            columns = self.sweep.against.columns
            every = published_as(self.sweep.against.table)
            table.stand_ins = {published.name: columns for published in every}
        pretrained = [text for row in self.sweep.rows if (text := self._describe_pretraining(row))]
        if pretrained:
            table.note(f"pretrained on: {'; '.join(pretrained)}")
        for choice, rows in _choices(self.sweep).items():
            table.note(f"{', '.join(rows)}: {choice} (a choice: the paper leaves it open)")
        missing = len(self.cells) - len(records)
        if missing:
            table.note(f"{missing} of {len(self.cells)} cells are not computed")
        self._mark_failures(table)
        return table

    def _mark_failures(self, table: Table) -> None:
        """Leave the cells empty whose runs failed, each with the reason."""
        for row, cell in self.cells:
            if reason := cell.run.failure:
                for place in places_of(row, cell):
                    table.leave_empty(*place, reason)

    def records(self) -> list[RunRecord]:
        """Return the records of the finished cells."""
        return [RunRecord(cell.run.path, row) for row, cell in self.cells if cell.run.finished]

    def _describe_pretraining(self, row: str) -> str | None:
        """Describe how much text a row's first pretraining read, and how long it took.

        None if it is not finished or reads no text.
        """
        of_row = [cell for name, cell in self.cells if name == row]
        runs = [need.run for cell in of_row for need in cell.needs if isinstance(need, Pretraining)]
        if not runs or not runs[0].finished:
            return None
        record = RunRecord(runs[0].path)
        if not record.tokens:
            return None
        tokens = f"{record.tokens / 1e6:,.1f} M tokens"
        return f"{row}: {tokens} in {record.steps:,} steps, {record.seconds:,.0f} s"

    def compare(self, table: Table) -> Comparisons | None:
        """Compare `table` and its cost with the sweep's published tables; None without any."""
        if not self.sweep.against:
            return None
        table = copy.deepcopy(table)
        add_compute(table)
        return compare_all(table, published_as(self.sweep.against.table))

    def write_tables(self) -> tuple[Table, Comparisons | None]:
        """Write the table and its comparison in every format, into the sweep's folder.

        Returns both.
        """
        table = self.table()
        comparison = self.compare(table)
        folder = self.root / self.sweep.name
        for ending in table_formats:
            table.write(folder / f"table{ending}")
            if comparison is not None:
                comparison.write(folder / f"comparison{ending}")
        return table, comparison


def _check_against(sweep: Sweep) -> None:
    """Raise UserError if `against` names a table, a column or a task that does not exist."""
    if sweep.against is None:
        return
    tasks = list(dict.fromkeys(task for recipe in sweep.rows.values() for task in recipe.evaluate))
    try:
        check_stand_ins(sweep.against.columns, tasks, published_as(sweep.against.table))
    except UserError as error:
        raise UserError(f"{sweep.against_at}: against: {error}") from None


def _choices(sweep: Sweep) -> dict[str, list[str]]:
    """Choice that a paper leaves open -> the rows that make it."""
    rows: dict[str, list[str]] = {}
    for row, recipe in sweep.rows.items():
        for choice in recipe.choices:
            rows.setdefault(choice, []).append(row)
    return rows


def places_of(row: str, cell: Cell) -> list[Place]:
    """List the places of a cell's numbers in the sweep's table.

    They are those of the test, of each shift, and of the protocol's own metrics.
    """
    labels = Labels.of(cell.labels, counts_per_class(cell.protocol))
    columns = columns_of(cell.task, labels, cell.evaluation.shifts, UNKNOWN_METRIC)
    for metric in cell.evaluation.protocol(cell.protocol).own_metrics():
        column = own_column(cell.task, labels, metric)
        columns += [] if column is None else [column]
    return [(Row(row, cell.protocol), column) for column in columns]


def work(plans: Sequence[Jobs], context: Context, workers: int = 1) -> list[str]:
    """Run every job that no other worker has taken, and wait until all are settled.

    Returns the reasons of the failures. If a job fails, only the jobs that need it fail too.
    `workers` is the number of processes that share the jobs, to estimate the time left.

    Raises UserError if no job can run because all data are missing.
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
                if _attempt(job, failed, context):
                    settle(job.run)
                else:
                    later.append(job)
            if len(later) == len(waiting):
                time.sleep(WAIT_SECONDS)
                context.stop.check()
            waiting = later
    return list(failed.values())


def _attempt(job: Job, failed: dict[Path, str], context: Context) -> bool:
    """Run one job, and add it to `failed` (run's path -> reason) if it fails.

    Returns False if the job must wait for a job that it needs, or for another worker.
    """
    blocked = [need.run.path for need in job.needs if not need.run.finished]
    reason = next((failed[path] for path in (job.run.path, *blocked) if path in failed), None)
    if reason is None and blocked:
        return False
    if reason is None:
        try:
            with context.reporter.job(job.title, job.run.stage):
                job.execute(context)
            return True
        except Busy:
            return False
        except Interrupted:
            raise
        except UserError as error:
            reason = str(error)
            if reason not in failed.values():
                context.reporter.say(f"{job.title}: failed: {reason}")
    failed[job.run.path] = reason
    job.run.fail(reason)
    return True


def without_data(jobs: Sequence[Job], reporter: Reporter) -> dict[Path, str]:
    """Find the unfinished jobs that cannot run because data are missing: run's path -> reason.

    The missing data may be the job's own or those of a job that it needs.
    """
    missing: dict[str, str | None] = {}
    failed: dict[Path, str] = {}
    with reporter.reading() as progress:
        for job in jobs:
            if job.run.finished:
                continue
            for data in job.reads:
                if repr(data) not in missing:
                    missing[repr(data)] = explain_missing(data.name, data.options, progress)
            reasons = [missing[repr(data)] for data in job.reads]
            reasons += [failed.get(need.run.path) for need in job.needs]
            if reason := next(filter(None, reasons), None):
                failed[job.run.path] = reason
    return failed


def report_missing(failed: Mapping[Path, str], total: int, reporter: Reporter) -> None:
    """Print how many of the runs cannot be made on this machine, one line per reason."""
    for reason, count in Counter(failed.values()).items():
        reporter.say(f"{count} of {total} runs can't be made here: {reason}")


def describe_failures(failures: Sequence[str], plans: Sequence[Jobs]) -> str:
    """Describe how many runs failed and why."""
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
    """Run the plans in this process, or share them with `workers - 1` other processes.

    Returns the reasons of the failures. Each worker gets its share of the cores and, if no device
    is named, the next GPU in turn. `arguments` is the command line of sslrun from which the other
    workers read the same plan.
    """
    if context.fresh:
        for plan in plans:
            for job in plan.jobs:
                check_devices(job.run)
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
    """Build the table of sweep files and of folders with finished runs.

    Raises UserError if there is no finished evaluation.
    """
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
        names = ", ".join(map(str, targets))
        raise UserError(
            f"{names}: no finished evaluation there; run `sslrun sweep` or `sslrun probe` first"
        )
    return Table.from_records(records)
