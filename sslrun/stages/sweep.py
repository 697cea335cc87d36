"""Plan and run the jobs of sweeps: each run once, shared among any number of workers.

There is no master: every worker walks the same plan, takes a run by locking its directory, and
skips what is finished or taken. A worker may be killed at any time, and others may be started on
any machine that sees the same folder.
"""

from __future__ import annotations

import copy
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from sslrun.data.source import explain_missing
from sslrun.errors import UserError, describe_os_error
from sslrun.launch import End, Engine, Workers
from sslrun.recipe import Named, Sweep
from sslrun.results.address import UNKNOWN_METRIC, Labels, Place, Row
from sslrun.results.compare import Comparisons, compare_all
from sslrun.results.compute import add_compute
from sslrun.results.formats import table_formats
from sslrun.results.known_protocols import counts_per_class
from sslrun.results.matching import check_stand_ins
from sslrun.results.published import published_as
from sslrun.results.record import RunRecord, drop_damaged
from sslrun.results.table import Table, columns_of, own_column
from sslrun.runs import Run, is_locked, report_unwritable
from sslrun.stages.context import Busy, Context, Interrupted, holding
from sslrun.stages.devices import check_devices
from sslrun.stages.evaluate import Cell, cells
from sslrun.stages.pretrain import Pretraining
from sslrun.stages.reporting import Reporter
from sslrun.stages.search import RowSearch, chosen_rows, row_searches


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


@dataclass(frozen=True)
class JobList:
    """Jobs that are run without a table."""

    name: str
    jobs: tuple[Job, ...]


WAIT_SECONDS = 0.5
"""Seconds between two checks of the runs that other workers hold."""
MAX_DEATHS = 3
"""Number of workers that may die while they compute a run; then no other one tries it."""


@dataclass(frozen=True)
class Plan:
    """A sweep's jobs, in the order that shares the most work, and the cells of its table."""

    sweep: Sweep
    root: Path
    jobs: tuple[Job, ...]
    """Each run once; a job comes after the jobs that it needs."""
    cells: tuple[tuple[str, Cell], ...]
    """Pairs of a row's name and a cell."""
    searches: tuple[RowSearch, ...] = ()
    """The search of each row; a row has cells once its search is done."""

    @property
    def name(self) -> str:
        return self.sweep.name

    @classmethod
    def of(cls, sweep: Sweep, root: Path, places: AbstractSet[Place] | None = None) -> Plan:
        """Plan a sweep; `places` limits the plan to the cells at these places.

        Raises UserError if the published table that the sweep names does not exist.
        """
        _check_against(sweep)
        searches = row_searches(sweep, root)
        jobs: dict[Path, Job] = {trial.run.path: trial for row in searches for trial in row.trials}
        rows = chosen_rows(sweep.rows, searches)
        planned: list[tuple[str, Cell]] = []
        for seed in sweep.seeds:
            for row, recipe in rows.items():
                of_row = [
                    cell
                    for cell in cells(recipe, seed, root)
                    if places is None or not places.isdisjoint(places_of(row, cell))
                ]
                planned += [(row, cell) for cell in of_row]
                for cell in of_row:
                    for job in (*cell.needs, cell):
                        jobs.setdefault(job.run.path, job)
        return cls(sweep, root, tuple(jobs.values()), tuple(planned), searches)

    def again(self) -> Plan:
        """Plan once more, with the rows that searches have chosen since."""
        return Plan.of(self.sweep, self.root) if self.searches else self

    def without_trials(self) -> Plan:
        """Delete the trials of its searches, and plan once more."""
        for search in self.searches:
            search.clear()
        return self.again()

    def rows_of_runs(self) -> dict[Path, list[str]]:
        """Run's path -> the rows of the table that use the run."""
        rows: dict[Path, dict[str, None]] = {job.run.path: {} for job in self.jobs}
        for search in self.searches:
            for trial in search.trials:
                rows[trial.run.path][search.row] = None
        for row, cell in self.cells:
            for job in (*cell.needs, cell):
                rows[job.run.path][row] = None
        return {path: list(names) for path, names in rows.items()}

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
        for line in self.describe_searches():
            table.note(line)
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

    def describe_searches(self) -> list[str]:
        """Describe how many trials each row had, and what was chosen."""
        return [search.describe() for search in self.searches]

    def records(self) -> list[RunRecord]:
        """Return the records of the finished cells."""
        finished = ((row, cell.run) for row, cell in self.cells if cell.run.finished)
        return drop_damaged(RunRecord(run.path, row) for row, run in finished)

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


def work_all(plans: Sequence[Jobs], context: Context, idle: float = math.inf) -> list[str]:
    """Run every job that no other worker has taken, then the rows that searches have chosen.

    Returns the reasons of the failures. See `work`.
    """
    failures = work(plans, context, idle=idle)
    chosen = [plan for plan in again(plans) if isinstance(plan, Plan) and plan.searches]
    return failures or (work(chosen, context, idle=idle) if chosen else [])


def work(
    plans: Sequence[Jobs], context: Context, workers: int = 1, idle: float = math.inf
) -> list[str]:
    """Run every job that no other worker has taken, and wait until all are settled.

    Returns the reasons of the failures. If a job fails, only the jobs that need it fail too.
    `workers` is the number of processes that share the jobs, to estimate the time left. After
    `idle` minutes without a job to run, it leaves the rest to the other workers.

    Raises UserError if no job can run because all data are missing.
    """
    waiting = [job for plan in plans for job in plan.jobs]
    failed = without_data(waiting, context.reporter)
    if waiting and len(failed) == len(waiting):
        raise UserError("\n".join(dict.fromkeys(failed.values())))
    report_missing(failed, len(waiting), context.reporter)
    runs = [job.run for job in waiting]
    with context.reporter.plan(", ".join(plan.name for plan in plans), runs, workers) as settle:
        last = time.monotonic()
        while waiting and time.monotonic() - last <= 60 * idle:
            later: list[Job] = []
            # A run whose worker died may kill the next one too, so that it comes last.
            for job in sorted(waiting, key=lambda job: len(job.run.holders)):
                if _attempt(job, failed, context):
                    settle(job.run)
                    last = time.monotonic()
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
    if reason is None and len(job.run.holders) >= MAX_DEATHS and not is_locked(job.run.path):
        reason = f"{len(job.run.holders)} workers died while they computed {job.run.path}"
    if reason is None:
        try:
            with context.reporter.job(job.title, job.run.stage):
                job.execute(context)
            return True
        except Busy:
            return False
        except Interrupted:
            raise
        except (UserError, OSError) as error:
            reason = str(error) if isinstance(error, UserError) else describe_os_error(error)
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


def launch(plans: Sequence[Jobs], context: Context, engine: Engine, workers: Workers) -> list[str]:
    """Run the plans with workers of an engine, and wait until all workers have ended.

    Returns the reasons of the failures. One local worker runs in this process, and so does the
    check of runs that are all finished. If a worker dies, the others take its run. If this process
    is asked to stop, the workers save their work first.
    """
    plans = _prepare(plans, context)
    if _are_finished(plans) or (workers.count == 1 and engine.name == "local"):
        return work_all(plans, replace(context, fresh=False))
    jobs = list(_jobs_of(plans).values())
    runs = [job.run for job in jobs]
    _check_data(jobs, engine, context.reporter)
    with report_unwritable(workers.logs):
        workers.logs.mkdir(parents=True, exist_ok=True)
    crew = engine.start(workers)
    try:
        name = ", ".join(plan.name for plan in plans)
        with context.reporter.plan(name, runs, workers.count):
            while crew.is_running:
                time.sleep(WAIT_SECONDS)
                context.stop.check()
                for end in list(crew.ends()):
                    _report_death(end, runs, crew.is_running, context.reporter)
    finally:
        crew.stop()
    unfinished = [job.run for job in _jobs_of(again(plans)).values() if not job.run.finished]
    nothing = f"no worker was left to compute it; their logs are in {workers.logs}"
    return [run.failure or nothing for run in unfinished]


def _jobs_of(plans: Sequence[Jobs]) -> dict[Path, Job]:
    """Run's path -> job, each once."""
    return {job.run.path: job for plan in plans for job in plan.jobs}


def _are_finished(plans: Sequence[Jobs]) -> bool:
    return all(job.run.finished for job in _jobs_of(again(plans)).values())


def again(plans: Sequence[Jobs]) -> list[Jobs]:
    """Plan once more, with the rows that searches have chosen since."""
    return [plan.again() if isinstance(plan, Plan) else plan for plan in plans]


def submit(plans: Sequence[Jobs], context: Context, engine: Engine, workers: Workers) -> str:
    """Submit workers that run the plans without this process; return a line that describes them."""
    plans = _prepare(plans, context)
    if _are_finished(plans):
        return "All runs are finished, so that nothing is submitted"
    _check_data([job for plan in plans for job in plan.jobs], engine, context.reporter)
    return engine.submit(workers)


def _prepare(plans: Sequence[Jobs], context: Context) -> list[Jobs]:
    """Clear all runs for a fresh start, and forget which workers died earlier."""
    if context.fresh:
        plans = [plan.without_trials() if isinstance(plan, Plan) else plan for plan in plans]
        _clear([job.run for plan in plans for job in plan.jobs])
    jobs = [job for plan in plans for job in plan.jobs]
    for job in jobs:
        if job.run.holders:
            with job.run.claimed():
                pass
    return list(plans)


def _check_data(jobs: Sequence[Job], engine: Engine, reporter: Reporter) -> None:
    """Report which data are missing on this machine.

    Raises UserError if all are missing and the workers run here. Other machines may have them.
    """
    failed = without_data(jobs, reporter)
    if jobs and len(failed) == len(jobs) and engine.name == "local":
        raise UserError("\n".join(dict.fromkeys(failed.values())))
    report_missing(failed, len(jobs), reporter)


def _report_death(end: End, runs: Sequence[Run], are_others: bool, reporter: Reporter) -> None:
    """Print why a worker died, and which run it computed; nothing if it ended in order."""
    if end.reason is None:
        return
    run = next((run for run in runs if end.worker in run.holders), None)
    where = f" while it computed {run.path}" if run is not None else ""
    others = "; the others go on" if are_others else ""
    then = "; another one takes its place" if end.restarted else others
    reporter.say(f"{end.title} died{where}: {end.reason}{then}")


def _clear(runs: Sequence[Run]) -> None:
    """Delete what runs have computed.

    Raises Busy, and deletes nothing, if another process holds one of them.
    """
    existing = [run for run in runs if run.path.exists()]
    for run in runs:
        check_devices(run)
    for run in existing:
        with holding(run):
            pass
    for run in existing:
        with holding(run):
            run.clear()
