"""Batches: all runs of all rows of sweeps, each made once, shared among any number of worker processes.

There is no master: every worker walks the same plan, takes a run by locking its directory, and skips what is done or
taken. Killing a worker, or starting another on a second machine that sees the same folder, needs no ceremony.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from sslrun.claims.verdict import Place
from sslrun.data.source import explain_missing
from sslrun.errors import UserError
from sslrun.recipe import Named, Sweep, load_sweep
from sslrun.results.compare import Comparisons, check_stand_ins, compare_all, facts
from sslrun.results.compute import add_compute, spent
from sslrun.results.published import published_as
from sslrun.results.table import Table, columns_of
from sslrun.runs import Run, read_result
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
    """What a sweep comes to: its jobs in the order that shares most, and the cells of its table."""

    sweep: Sweep
    root: Path
    jobs: tuple[Job, ...]
    """Each run once; a job stands behind those it needs."""
    cells: tuple[tuple[str, Cell], ...]
    """Row and cell."""

    @property
    def name(self) -> str:
        return self.sweep.name

    @classmethod
    def of(cls, sweep: Sweep, root: Path, places: AbstractSet[Place] | None = None) -> Plan:
        """places: the cells of the table that are wanted, where not all are. UserError: no such table to stand beside."""
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
        """Whether there is anything to make a table of."""
        return any(cell.run.finished for _, cell in self.cells)

    def table(self) -> Table:
        """The table of what is finished."""
        results = [_result(cell, row) for row, cell in self.cells if cell.run.finished]
        table = Table.from_results(results, title=self.sweep.title or self.sweep.name)
        if self.sweep.against:
            every = published_as(self.sweep.against.table)
            table.stand_ins = {each.name: self.sweep.against.columns for each in every}
        read = [text for row in self.sweep.rows if (text := self._pretrained(row))]
        if read:
            table.note(f"pretrained on: {'; '.join(read)}")
        for choice, rows in _choices(self.sweep).items():
            table.note(f"{', '.join(rows)}: {choice} (a choice: the paper leaves it open)")
        missing = len(self.cells) - len(results)
        if missing:
            table.note(f"{missing} of {len(self.cells)} cells are not computed")
        for row, cell in self.cells:
            if reason := cell.run.failure:
                for place in places_of(row, cell):
                    table.leave_empty(*place, reason)
        return table

    def _pretrained(self, row: str) -> str | None:
        """How much text a row's first pretraining read, and for how long; None: it isn't done, or there is none."""
        jobs = [
            need.run for of, cell in self.cells if of == row for need in cell.needs if isinstance(need, Pretraining)
        ]
        result = jobs[0].result if jobs and jobs[0].finished else {}
        if not result.get("tokens"):
            return None
        return f"{row}: {result['tokens'] / 1e6:,.1f} M tokens in {result['steps']:,} steps, {result['seconds']:,.0f} s"

    def comparison(self) -> Comparisons | None:
        """The table, with what it cost, beside the published ones that the sweep names."""
        if not self.sweep.against:
            return None
        table = self.table()
        add_compute(table)
        return compare_all(table, published_as(self.sweep.against.table))

    def write_tables(self) -> None:
        """The table, and its comparison, in every format, beside the runs."""
        table, comparison = self.table(), self.comparison()
        for suffix in ("md", "tex", "csv", "json"):
            table.write(self.root / self.sweep.name / f"table.{suffix}")
            if comparison is not None:
                comparison.write(self.root / self.sweep.name / f"comparison.{suffix}")


def _check_against(sweep: Sweep) -> None:
    """UserError: it names a published table, or columns of it or tasks, that are not there."""
    if sweep.against is None:
        return
    tasks = list(dict.fromkeys(task for recipe in sweep.rows.values() for task in recipe.evaluate))
    try:
        check_stand_ins(sweep.against.columns, tasks, published_as(sweep.against.table))
    except UserError as error:
        raise UserError(f"{sweep.against_at}: against: {error}") from None


def _choices(sweep: Sweep) -> dict[str, list[str]]:
    """What was chosen where a paper is open, and the rows that it holds for."""
    found: dict[str, list[str]] = {}
    for row, recipe in sweep.rows.items():
        for choice in recipe.choices:
            found.setdefault(choice, []).append(row)
    return found


def places_of(row: str, cell: Cell) -> list[Place]:
    """Where a cell's numbers stand in its sweep's table: the test's, and those of its shifts."""
    shifts = list(cell.evaluation.shifts)
    about = {"task": cell.task, "protocol": cell.protocol, "labels": cell.labels, "shifts": shifts}
    return [((row, cell.protocol), column) for column in columns_of(about)]


def _result(cell: Cell, row: str) -> dict[str, Any]:
    """What a table needs of a finished cell."""
    return {**of_run(cell.run.path), "row": row}


def of_run(path: Path) -> dict[str, Any]:
    """What a table needs of a finished evaluation's folder."""
    return {**read_result(path), "facts": facts(path), "spent": spent(path)}


def work(plans: Sequence[Jobs], context: Context) -> list[str]:
    """Do every job that is not done and nobody else does; wait for those that others do. Returns the failures' reasons.

    A job that fails takes down those that need it, and no others. UserError: none can be done, for want of data.
    """
    waiting = [job for plan in plans for job in plan.jobs]
    failed = without_data(waiting, context.reporter)
    if waiting and len(failed) == len(waiting):
        raise UserError("\n".join(dict.fromkeys(failed.values())))
    say_failed(failed, len(waiting), context.reporter)
    with context.reporter.plan(", ".join(plan.name for plan in plans), len(waiting)) as advance:
        while waiting:
            later: list[Job] = []
            for job in waiting:
                blocked = [need.run.path for need in job.needs if not need.run.finished]
                reason = next((failed[path] for path in (job.run.path, *blocked) if path in failed), None)
                if reason is not None:
                    job.run.fail(reason)
                    failed[job.run.path] = reason
                elif blocked:
                    later.append(job)
                    continue
                else:
                    try:
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
                advance()
            if len(later) == len(waiting):
                time.sleep(WAIT_SECONDS)
                context.stop.check()
            waiting = later
    return list(failed.values())


def without_data(jobs: Sequence[Job], reporter: Reporter) -> dict[Path, str]:
    """Of the jobs that aren't done those that can't be, as their data, or that of a job they need, can't be had; and the
    reason."""
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


def say_failed(failed: Mapping[Path, str], total: int, reporter: Reporter) -> None:
    """How many of the runs can't be made on this machine, and why: a line a reason."""
    for reason, count in Counter(failed.values()).items():
        reporter.say(f"{count} of {total} runs can't be made here: {reason}")


def told_failures(failures: Sequence[str], plans: Sequence[Jobs]) -> str:
    """How many runs failed, and for which reasons."""
    total = sum(len(plan.jobs) for plan in plans)
    reasons = Counter(failures)
    told = f"{len(failures)} of {total} runs failed" + (", the others are done" if len(failures) < total else "")
    if len(reasons) == 1:
        return f"{told}: {failures[0]}"
    return "\n".join([f"{told}:", *(f"  {count}: {reason}" for reason, count in reasons.items())])


def launch(plans: Sequence[Jobs], context: Context, workers: int, arguments: Sequence[str]) -> list[str]:
    """`work`, in this process or shared with `workers - 1` others, each with its share of the cores.

    `arguments`: the command of sslrun by which the other workers read the same plan.
    """
    if context.fresh:
        for plan in plans:
            for job in plan.jobs:
                job.run.clear()
        context = replace(context, fresh=False)
    if workers == 1:
        return work(plans, context)
    threads = max(1, (os.cpu_count() or 1) // workers)
    context.compute.use_threads(threads)
    command = [sys.executable, "-m", "sslrun", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    others = [
        subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(workers - 1)
    ]
    try:
        failures = work(plans, context)
        for other in others:
            other.wait()
        return failures
    finally:
        for other in others:
            other.terminate()
        for other in others:  # they save what they have, before it is said that all is saved
            other.wait()


def submit(arguments: Sequence[str], workers: int, options: str) -> str:
    """Submit `workers` workers as one Slurm array, requeued when preempted; returns what sbatch says.

    Two minutes before its time is up a worker saves: `B:` sends the signal to it, as it has the batch shell's place.
    """
    if shutil.which("sbatch") is None:
        raise UserError("--slurm: no sbatch on this machine; run the sweep on a login node of the cluster")
    try:
        given = shlex.split(options)
    except ValueError as error:
        raise UserError(f"--slurm {options}: not options of sbatch: {error}") from None
    command = shlex.join([sys.executable, "-m", "sslrun", *arguments])
    sbatch = [
        "sbatch", f"--array=1-{workers}", "--requeue", "--signal=B:TERM@120", "--job-name=sslrun",
        *given, "--wrap", f"exec {command}",
    ]  # fmt: skip
    done = subprocess.run(sbatch, capture_output=True, text=True)
    if done.returncode:
        said = [line.removeprefix("sbatch: error: ") for line in done.stderr.splitlines() if line.strip()]
        raise UserError(f"sbatch refused: {'; '.join(said) or f'it ended with {done.returncode}'}")
    return done.stdout.strip()


def table_of(targets: Sequence[Path], root: Path) -> Table:
    """The table of sweep files and of folders that hold finished runs."""
    results = []
    for target in targets:
        if target.suffix in (".yaml", ".yml"):
            plan = Plan.of(load_sweep(target), root)
            if len(targets) == 1:
                return plan.table()
            results += [_result(cell, row) for row, cell in plan.cells if cell.run.finished]
        else:
            found = sorted(target.rglob("result.json"), key=lambda path: path.stat().st_mtime)
            results += [of_run(path.parent) for path in found if read_result(path.parent).get("protocol")]
    if not results:
        named = ", ".join(map(str, targets))
        raise UserError(f"{named}: no finished evaluation there; run `sslrun sweep` or `sslrun probe` first")
    return Table.from_results(results)
