"""Plan the runs that test claims, and compute verdicts from those that are finished."""

from __future__ import annotations

import os
import platform
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

import sslrun
from sslrun.claims.measurements.base import measurements
from sslrun.claims.report import Judgment, Outcome, RunCost
from sslrun.claims.schema import Claim
from sslrun.claims.verdict import Inequality
from sslrun.recipe import Named
from sslrun.results.address import Place
from sslrun.results.record import RunRecord
from sslrun.results.table import Table
from sslrun.runs import Run
from sslrun.stages.context import Context, perform
from sslrun.stages.evaluate import cells
from sslrun.stages.sweep import Job, Plan, places_of

SEEDS = (0, 1, 2)
"""Seeds of a measurement whose variant does not set any."""


@dataclass(frozen=True)
class Measuring:
    """A job that runs a measurement with one seed."""

    measure: Named
    seed: int
    root: Path
    """The folder of runs."""

    needs: tuple[Job, ...] = ()
    reads: tuple[Named, ...] = ()

    @property
    def title(self) -> str:
        return f"measure {self.measure.name} · seed {self.seed}"

    @property
    def run(self) -> Run:
        identity = {"measure": self.measure.identity(), "seed": self.seed}
        return Run(self.root, self.measure.name, "measure", identity)

    def execute(self, context: Context) -> dict[str, Any]:
        """Measure unless the run is finished, and return its result."""
        recipe = {"measure": self.measure.as_dict()}
        return perform(self.run, recipe, context, partial(self._measure, context))

    def _measure(self, context: Context) -> dict[str, Any]:
        context.stop.check()
        start = time.monotonic()
        measurement = measurements[self.measure.name](self.measure.options)
        table = measurement.table(self.seed, context.compute, self.run.path, context.stop.check)
        return {
            "stage": "measure",
            "measure": self.measure.name,
            "seed": self.seed,
            "table": table.as_dict(),
            "format_spec": table.format_spec,
            "marks_best": table.marks_best,
            "second": table.second,
            "seconds": round(time.monotonic() - start, 3),
        }


@dataclass(frozen=True)
class Measurements:
    """The jobs of a measurement, one per seed."""

    name: str
    jobs: tuple[Measuring, ...]

    @property
    def finished(self) -> bool:
        """Whether at least one seed is finished."""
        return any(job.run.finished for job in self.jobs)

    def table(self) -> Table:
        """Combine the tables of the finished seeds; the notes are those of the first one."""
        results = [RunRecord(job.run.path).result for job in self.jobs if job.run.finished]
        first = results[0]
        table = Table(
            first["table"]["title"],
            format_spec=first["format_spec"],
            marks_best=first["marks_best"],
        )
        table.second = first["second"]
        table.notes = list(first["table"]["notes"])
        for result in results:
            table.add_cells(result["table"])
        return table


@dataclass(frozen=True)
class Trial:
    """A claim with the variant that tests it, and the runs of that variant."""

    claim: Claim
    variant: str | None = None
    """None: no variant fits the budget."""
    plan: Plan | Measurements | None = None
    inequalities: list[Inequality] | None = None
    """The inequalities; None for a measurement, whose cells are unknown until it is finished."""

    @classmethod
    def within_budget(cls, budget: float, cuda: bool, claim: Claim, root: Path) -> Trial:
        """Plan the largest variant that fits a budget in minutes.

        Raises UserError for a mistake in the variant or its sweep.
        """
        variant = claim.choose(budget, cuda)
        return cls(claim) if variant is None else cls.of_variant(claim, variant, root)

    @classmethod
    def of_variant(cls, claim: Claim, variant: str, root: Path) -> Trial:
        """Plan a variant.

        Raises UserError for any mistake that can be found before the variant is run.
        """
        chosen, sweep = claim.variants[variant], claim.sweep(variant)
        if sweep is None:
            assert chosen.measure is not None
            jobs = tuple(Measuring(chosen.measure, seed, root) for seed in chosen.seeds or SEEDS)
            return cls(claim, variant, Measurements(chosen.measure.name, jobs))
        # Every seed has the same places, so those of one seed are enough to resolve names.
        places: dict[Place, None] = {}
        for row, recipe in sweep.rows.items():
            for cell in cells(recipe, 0, root):
                places.update(dict.fromkeys(places_of(row, cell)))
        inequalities = claim.inequalities(variant, list(places))
        needed = {place for inequality in inequalities for place in inequality.places}
        return cls(claim, variant, Plan.of(sweep, root, needed), inequalities)

    def judge(self) -> Outcome:
        """Compute the verdict from the runs that are finished."""
        if self.variant is None or self.plan is None:
            return Outcome(self.claim)
        failure = next((reason for job in self.plan.jobs if (reason := job.run.failure)), None)
        if not self.plan.finished:
            return Outcome(self.claim, self.variant, failure=failure)
        table = self.plan.table()
        inequalities = self.inequalities
        if inequalities is None:
            inequalities = self.claim.inequalities(self.variant, list(table.cells))
        orderings = self.claim.variants[self.variant].inequalities
        judged = [
            Judgment(inequality, inequality.judge(table), ordering.reported)
            for inequality, ordering in zip(inequalities, orderings, strict=True)
        ]
        return Outcome(self.claim, self.variant, judged, table, sum_cost(self.plan.jobs), failure)


def sum_cost(jobs: Sequence[Job]) -> RunCost:
    """Sum the time of all finished jobs."""
    seconds = cores = gpus = 0.0
    for record in (RunRecord(job.run.path) for job in jobs):
        if not record.finished:
            continue
        seconds += record.seconds
        if record.threads is not None:
            cores += record.seconds * record.threads / 3600
        else:
            gpus += record.seconds / 3600
    return RunCost(seconds, cores, gpus)


def describe_origin(trials: Sequence[Trial], command: Sequence[str]) -> str:
    """Describe when, where and by which command verdicts were computed, and their total cost.

    Runs that several claims share are counted once.
    """
    plans = [trial.plan for trial in trials if trial.plan is not None]
    jobs = {job.run.path: job for plan in plans for job in plan.jobs}
    machine = f"{_processor_name()}, {os.cpu_count()} cores"
    if torch.cuda.is_available():
        machine += f", {torch.cuda.get_device_name()}"
    return (
        f"`{shlex.join(command)}`, {datetime.now(UTC):%Y-%m-%d}, sslrun {sslrun.__version__}, "
        f"on {machine}. Total, with runs that claims share counted once: "
        f"{sum_cost(list(jobs.values())).text()}."
    )


def _processor_name() -> str:
    """Return the processor's model name, or its architecture if the system has no model name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.partition(":")[2].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
