"""Test claims: run what is missing as the runs of a sweep, and read the verdicts from what is finished."""

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
from sslrun.claims.report import Outcome, RunCost
from sslrun.claims.schema import Claim
from sslrun.claims.verdict import Inequality
from sslrun.recipe import Named
from sslrun.results.record import RunRecord
from sslrun.results.table import Table
from sslrun.runs import Run
from sslrun.stages.context import Context, perform
from sslrun.stages.evaluate import cells
from sslrun.stages.sweep import Job, Plan, places_of

SEEDS = (0, 1, 2)
"""The seeds of a measurement whose variant names none."""


@dataclass(frozen=True)
class Measuring:
    """A measurement with one seed: a job that makes a run."""

    measure: Named
    seed: int
    root: Path

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
        return perform(
            self.run, {"measure": self.measure.as_dict()}, context, partial(self._body, context)
        )

    def _body(self, context: Context) -> dict[str, Any]:
        context.stop.check()
        began = time.monotonic()
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
            "seconds": round(time.monotonic() - began, 3),
        }


@dataclass(frozen=True)
class Measurements:
    """A measurement with all its seeds."""

    name: str
    jobs: tuple[Measuring, ...]

    @property
    def finished(self) -> bool:
        return any(job.run.finished for job in self.jobs)

    def table(self) -> Table:
        """The table of the finished seeds, with the first one's notes."""
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
    """A claim with the variant that is run."""

    claim: Claim
    variant: str | None = None
    """None: no variant fits the budget."""
    plan: Plan | Measurements | None = None
    asked: list[Inequality] | None = None
    """The inequalities; None for a measurement, whose cells are known once it is finished."""

    @classmethod
    def within(cls, budget: float, cuda: bool, claim: Claim, root: Path) -> Trial:
        """Plan the largest variant that fits the budget in minutes. UserError: a mistake in it, or in its sweep."""
        variant = claim.choose(budget, cuda)
        return cls(claim) if variant is None else cls.of(claim, variant, root)

    @classmethod
    def of(cls, claim: Claim, variant: str, root: Path) -> Trial:
        """Plan a variant. UserError: any mistake in it that shows before it is run."""
        chosen, sweep = claim.variants[variant], claim.sweep(variant)
        if sweep is None:
            assert chosen.measure is not None
            jobs = tuple(Measuring(chosen.measure, seed, root) for seed in chosen.seeds or SEEDS)
            return cls(claim, variant, Measurements(chosen.measure.name, jobs))
        every = (
            (row, cell) for row, recipe in sweep.rows.items() for cell in cells(recipe, 0, root)
        )
        places = {place: None for row, cell in every for place in places_of(row, cell)}
        asked = claim.inequalities(variant, list(places))
        return cls(
            claim,
            variant,
            Plan.of(sweep, root, {place for each in asked for place in each.places}),
            asked,
        )

    def outcome(self) -> Outcome:
        """The verdict on what is finished."""
        if self.variant is None or self.plan is None:
            return Outcome(self.claim)
        failure = next((reason for job in self.plan.jobs if (reason := job.run.failure)), None)
        if not self.plan.finished:
            return Outcome(self.claim, self.variant, failure=failure)
        table = self.plan.table()
        asked = (
            self.asked
            if self.asked is not None
            else self.claim.inequalities(self.variant, list(table.cells))
        )
        orderings = self.claim.variants[self.variant].inequalities
        judged = [
            (inequality, inequality.judge(table), ordering.reported)
            for inequality, ordering in zip(asked, orderings, strict=True)
        ]
        return Outcome(self.claim, self.variant, judged, table, cost(self.plan.jobs), failure)


def cost(jobs: Sequence[Job]) -> RunCost:
    """What the finished jobs took."""
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


def made_by(trials: Sequence[Trial], command: Sequence[str]) -> str:
    """When, on what and by which command verdicts were computed, and what it took, counting shared runs once."""
    jobs = {
        job.run.path: job for trial in trials if trial.plan is not None for job in trial.plan.jobs
    }
    machine = f"{_processor()}, {os.cpu_count()} cores"
    if torch.cuda.is_available():
        machine += f", {torch.cuda.get_device_name()}"
    return (
        f"`{shlex.join(command)}`, {datetime.now(UTC):%Y-%m-%d}, sslrun {sslrun.__version__}, on {machine}. "
        f"Runs that claims share counted once: {cost(list(jobs.values())).text()}."
    )


def _processor() -> str:
    """The processor's name, if the system gives one."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.partition(":")[2].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
