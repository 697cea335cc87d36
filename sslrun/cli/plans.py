"""Printing what sweeps would run and what they have done; nothing is run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from sslrun.cli.output import console, print_json_or

if TYPE_CHECKING:
    from sslrun.stages.sweep import Plan

Status = dict[str, Any]
"""What `stages.status.describe_status` returns."""
ACTIVE = ("running", "failed")
REFRESH_SECONDS = 2.0
"""Seconds between two looks at the runs."""


def show_plans(plans: Sequence[Plan], workers: int, device: str | None, as_json: bool) -> None:
    """Print what sweeps would run on a device; without a device, the state of their runs."""
    from rich.console import Group

    from sslrun.stages.status import (
        Forecast,
        describe_plan,
        describe_status,
        render_plan,
        render_status,
    )
    from sslrun.training.device import compute

    if device is not None:
        placement = compute(device)
        forecasts = [Forecast.of(plan, placement) for plan in plans]
        described = [describe_plan(forecast, workers) for forecast in forecasts]
        rendered = Group(*(render_plan(forecast, workers) for forecast in forecasts))
        print_json_or(described if as_json else None, rendered)
        return

    def look() -> list[Status]:
        return [describe_status(plan) for plan in plans]

    def render(statuses: Sequence[Status]) -> Group:
        return Group(*map(render_status, statuses))

    statuses = look()
    if not as_json and console().is_terminal and _any_runs(statuses):
        _follow(look, render)
        statuses = look()
    print_json_or(statuses if as_json else None, render(statuses))


def _follow(look: Callable[[], list[Status]], render: Callable[[list[Status]], Any]) -> None:
    """Show the runs that work or failed on the terminal until two looks find no worker."""
    from rich.live import Live

    idle = 0
    with Live(console=console(), auto_refresh=False, transient=True) as live:
        while idle < 2:
            statuses = look()
            idle = 0 if _any_runs(statuses) else idle + 1
            live.update(render([_active(status) for status in statuses]), refresh=True)
            time.sleep(REFRESH_SECONDS)


def _active(status: Status) -> Status:
    """Return a status with the lines of its running and failed runs only, to fit the terminal."""
    return {**status, "shown": [run for run in status["runs"] if run["state"] in ACTIVE]}


def _any_runs(statuses: Sequence[Status]) -> bool:
    """Return whether a process works on any of the runs."""
    return any(run["state"] == "running" for status in statuses for run in status["runs"])
