"""What a sweep has done and has yet to do, read from the folders of its runs; nothing is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table as RichTable
from rich.text import Text

from sslrun.errors import UserError
from sslrun.runs import State, last_record, state_of
from sslrun.stages.archive import main_number
from sslrun.stages.check import PROBE_BATCH, Budget, estimate
from sslrun.stages.pretrain import Pretraining
from sslrun.stages.reporting import Pace, format_duration
from sslrun.stages.sweep import Job, Plan
from sslrun.training.device import Compute

CHECK_SECONDS = 5.0
"""Time limit for measuring pretrainings when no finished run shows how long they take."""
MARKS = {"done": "green", "running": "cyan", "failed": "red", "stopped": "yellow"}


@dataclass(frozen=True)
class Forecast:
    """How long the runs of a plan will take."""

    plan: Plan
    seconds: dict[Path, float] = field(default_factory=dict)
    """Run's path -> seconds, for unfinished runs of a known duration."""
    sources: dict[Path, str] = field(default_factory=dict)
    """Run's path -> "measured" on finished runs of its stage, or "estimated" as by `check`."""

    @classmethod
    def of(cls, plan: Plan, compute: Compute) -> Forecast:
        """Forecast from the plan's finished runs, or else measure steps of its pretrainings."""
        forecast = cls(plan)
        pace = Pace([job.run for job in plan.jobs])
        pace.update()
        measured = pace.estimates()
        unknown: list[Pretraining] = []
        for job in forecast.unfinished:
            path = job.run.path
            if path in measured:
                forecast.seconds[path], forecast.sources[path] = measured[path], "measured"
            elif isinstance(job, Pretraining):
                unknown.append(job)
        budget = Budget(len(unknown), CHECK_SECONDS)
        for job in unknown:
            if (seconds := _estimate(job, compute, budget)) is not None:
                forecast.seconds[job.run.path] = seconds
                forecast.sources[job.run.path] = "estimated"
        return forecast

    @property
    def unfinished(self) -> list[Job]:
        return [job for job in self.plan.jobs if not job.run.finished]

    def left(self, jobs: Sequence[Job]) -> tuple[float | None, bool]:
        """Sum the seconds of unfinished jobs, and return whether all of them are known.

        The seconds are None if none is known.
        """
        known = [self.seconds[job.run.path] for job in jobs if job.run.path in self.seconds]
        return (sum(known) if known or not jobs else None), len(known) == len(jobs)


def _estimate(job: Pretraining, compute: Compute, budget: Budget) -> float | None:
    """Estimate the seconds of a pretraining as `check` does; None if that is not possible here."""
    try:
        costs = estimate(job.title, job.recipe, compute, budget)
    except UserError:  # such as weights that are not on this machine
        return None
    is_measured = costs.get("measured_on", 0) >= PROBE_BATCH  # less shows how slow a start is
    return costs.get("seconds") if is_measured else costs.get("budget")


def describe_plan(forecast: Forecast, workers: int) -> dict[str, Any]:
    """Describe what a sweep would run, as JSON values."""
    plan = forecast.plan
    rows = plan.rows_of_runs()
    runs = [
        {
            "rows": rows[job.run.path],
            "stage": job.run.stage,
            "title": job.title,
            "run": str(job.run.path),
            "state": state_of(job.run.path),
            "seconds": forecast.seconds.get(job.run.path),
            "source": forecast.sources.get(job.run.path),
        }
        for job in plan.jobs
    ]
    seconds, is_whole = forecast.left(forecast.unfinished)
    return {
        "sweep": plan.name,
        "workers": workers,
        "seconds_left": None if seconds is None else seconds / workers,
        "covers_all_runs": is_whole,
        "notes": plan.describe_searches(),
        "runs": runs,
    }


def render_plan(forecast: Forecast, workers: int) -> Group:
    """Render what a sweep would run: one line per stage, and the time that is left."""
    plan = forecast.plan
    rows = plan.rows_of_runs()
    table = _grid("stage", "runs", "done", "left", "shared by rows", "time of one worker")
    for stage in dict.fromkeys(job.run.stage for job in plan.jobs):
        jobs = [job for job in plan.jobs if job.run.stage == stage]
        left = [job for job in jobs if not job.run.finished]
        shared = sum(len(rows[job.run.path]) > 1 for job in jobs)
        sources = {forecast.sources.get(job.run.path, "") for job in left}
        how = " (estimated)" if "estimated" in sources else ""
        counts = (len(jobs), len(jobs) - len(left), len(left), shared)
        table.add_row(stage, *map(str, counts), _time(*forecast.left(left)) + how)
    seconds, is_whole = forecast.left(forecast.unfinished)
    total = None if seconds is None else seconds / workers
    counted = f"{workers} worker{'s' * (workers > 1)}"
    last = f"{len(forecast.unfinished)} of {len(plan.jobs)} runs left"
    time = f"{_time(total, is_whole)} with {counted}"
    lines = [f"{plan.name}: {last}: {time}", *plan.describe_searches()]
    return Group(table, Text(), *map(Text, lines))


def _time(seconds: float | None, is_whole: bool) -> str:
    if seconds is None:
        return "unknown"
    return f"{'' if is_whole else 'over '}{format_duration(seconds)}"


# ---------------------------------------------------------------- status


def describe_status(plan: Plan) -> dict[str, Any]:
    """Describe every run of a sweep as JSON values: its state, progress, number or failure."""
    rows = plan.rows_of_runs()
    runs = [{"rows": rows[job.run.path], **_describe_job(job)} for job in plan.jobs]
    return {"sweep": plan.name, "notes": plan.describe_searches(), "runs": runs}


def _describe_job(job: Job) -> dict[str, Any]:
    run, state = job.run, state_of(job.run.path)
    described: dict[str, Any] = {
        "stage": run.stage,
        "title": job.title,
        "run": str(run.path),
        "state": state,
    }
    if state in ("running", "stopped"):
        environment = run.environment
        record = last_record(run.path)
        if "run" in record:  # the log of a trial names the run that it makes
            record = last_record(run.path.parent / record["run"])
        described |= {key: environment.get(key) for key in ("host", "pid")}
        described |= {key: record.get(key) for key in ("step", "epoch", "loss")}
        if isinstance(job, Pretraining):
            described |= job.schedule.model_dump(include={"epochs", "steps"}, exclude_none=True)
    elif state == "failed":
        described["failure"] = ((run.failure or "").strip().splitlines() or [""])[-1]
    elif state == "done":
        described |= main_number(_result(job))
    return described


def _result(job: Job) -> dict[str, Any]:
    """Return a run's result; empty if the file is damaged, which the sweep itself reports."""
    try:
        return job.run.result
    except UserError:
        return {}


def render_status(status: dict[str, Any]) -> Group:
    """Render `describe_status` as a table with one line per run, or per run in "shown"."""
    table = _grid("row", "run", "state", "")
    for run in status.get("shown", status["runs"]):
        state: State = run["state"]
        table.add_row(
            Text(", ".join(run["rows"])),
            Text(run["title"]),
            Text(state, style=MARKS.get(state, "")),
            Text(_detail(run)),
        )
    counts = dict.fromkeys(("done", "running", "waiting", "stopped", "failed"), 0)
    for run in status["runs"]:
        counts[run["state"]] += 1
    summary = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    lines = [f"{status['sweep']}: {summary}", *status["notes"]]
    return Group(table, Text(), *map(Text, lines))


def _detail(run: dict[str, Any]) -> str:
    """Describe the progress, the number or the failure of a run in one line."""
    if "failure" in run:
        return str(run["failure"])
    if run["state"] not in ("running", "stopped"):
        return str(run.get("text", ""))
    parts = []
    if run["step"] is not None:
        parts.append(f"step {run['step']:,}" + (f" of {run['steps']:,}" if "steps" in run else ""))
    if run["epoch"] is not None:
        of = f" of {run['epochs']:g}" if "epochs" in run else ""
        parts.append(f"epoch {run['epoch']:.1f}{of}")
    if run["loss"] is not None:
        parts.append(f"loss {run['loss']:.3f}")
    if run["state"] == "running" and run["host"]:
        parts.append(f"by process {run['pid']} on {run['host']}")
    return " · ".join(parts)


def _grid(*heads: str) -> RichTable:
    table = RichTable(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for head in heads:
        is_number = head in ("runs", "done", "left", "shared by rows", "time of one worker")
        table.add_column(head, justify="right" if is_number else "left")
    return table
