"""Reports of claims: verdicts with their intervals, as text, Markdown and JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Group
from rich.text import Text

from sslrun.claims.schema import Claim
from sslrun.claims.verdict import Inequality, combine
from sslrun.results.formats import Formats, table_formats
from sslrun.results.paired import BOOTSTRAP_FROM, Verdict, Word
from sslrun.results.table import Table


@dataclass(frozen=True)
class RunCost:
    """Total cost of the runs behind a verdict, including runs that other claims share."""

    seconds: float = 0.0
    """Sum over all runs, as if they ran one after the other."""
    core_hours: float = 0.0
    gpu_hours: float = 0.0

    def text(self) -> str:
        """Format for display: "54 s, 0.03 core-hours"."""
        parts = [f"{self.seconds:.0f} s"]
        if self.core_hours or not self.gpu_hours:
            parts.append(f"{self.core_hours:.2g} core-hours")
        if self.gpu_hours:
            parts.append(f"{self.gpu_hours:.2g} GPU-hours")
        return ", ".join(parts)


class Judgment(NamedTuple):
    """An inequality with its verdict."""

    inequality: Inequality
    verdict: Verdict
    reported: bool
    """Whether it is only printed and does not affect the claim's verdict."""


@dataclass(frozen=True)
class Outcome:
    """The verdict on a claim, computed from the table of its variant."""

    claim: Claim
    variant: str | None = None
    """None: no variant fits the budget."""
    judged: list[Judgment] = field(default_factory=list)
    table: Table | None = None
    """None: no run is finished."""
    cost: RunCost = RunCost()
    failure: str | None = None
    """Error message of a run that failed; None: none failed."""

    @property
    def word(self) -> Word:
        """The verdict in one word."""
        return combine([verdict for _, verdict, reported in self.judged if not reported])

    @property
    def command(self) -> str | None:
        """The command that runs the next larger variant; None: there is none."""
        return self.claim.larger(self.variant)

    def describe_inequalities(self) -> Iterator[str]:
        """Describe each inequality with its interval, and what is missing, one line each."""
        for inequality, verdict, reported in self.judged:
            means = inequality.means(self.table) if self.table else None
            spec = self._format_spec(inequality) if means else ".2f"
            values = f" ({means[0]:{spec}} against {means[1]:{spec}})" if means else ""
            prefix = "reported only, " if reported else ""
            yield f"{prefix}{inequality.text()}{values}: {verdict.text(spec)}"
        if self.variant is None:
            yield "no variant fits this budget and this machine"
        elif self.table is None:
            yield f"no cell is computed: {self.failure or 'not run yet'}"
        elif self.failure:
            yield f"runs are missing: {self.failure}"

    def _format_spec(self, inequality: Inequality) -> str:
        """Format of the inequality's numbers: the table's, or one digit more than the metric's."""
        assert self.table is not None
        metric = self.table.metric_of(inequality.places[0][1])
        return self.table.format_spec or f".{max(2, metric.digits + 1)}f"

    def describe_cost(self) -> str:
        """Describe the variant's expected minutes and the actual cost of its runs."""
        if self.variant is None:
            return "no runs"
        chosen = self.claim.variants[self.variant]
        where = f"measured on {chosen.measured}" if chosen.measured else "a guess"
        return (
            f"variant '{self.variant}', {chosen.minutes:g} minutes ({where}); "
            f"its runs took {self.cost.text()}"
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the outcome as JSON values."""
        claim = self.claim
        return {
            "number": claim.number,
            "name": claim.name,
            "title": claim.title,
            "says": list(claim.says),
            "source": claim.source,
            "verdict": self.word,
            "variant": self.variant,
            "inequalities": [
                {
                    "text": inequality.text(),
                    "reported": reported,
                    "verdict": verdict.word,
                    "difference": verdict.difference,
                    "interval": verdict.interval,
                    "margin": verdict.margin,
                    "seeds": verdict.seeds,
                    "restarts": verdict.restarts,
                    "method": verdict.method,
                    "reason": verdict.reason,
                }
                for inequality, verdict, reported in self.judged
            ],
            "seconds": round(self.cost.seconds, 1),
            "core_hours": self.cost.core_hours,
            "gpu_hours": self.cost.gpu_hours,
            "otherwise": claim.otherwise if self.word == "contradicted" else None,
            "failure": self.failure,
            "larger": self.command,
        }


STYLES: dict[Word, str] = {"supported": "green", "contradicted": "red", "inconclusive": "yellow"}
"""Color of each verdict in the terminal."""


def render(outcomes: Sequence[Outcome], tables: bool) -> Group:
    """Lay verdicts out for the terminal; `tables` adds the tables behind them."""
    blocks: list[Any] = []
    for outcome in outcomes:
        claim = outcome.claim
        heading = Text(f"{claim.number}. {claim.title}: ", style="bold")
        blocks.append(heading.append(outcome.word, style=STYLES[outcome.word]))
        blocks += [Text(f"   “{_plain(sentence)}”", style="italic") for sentence in claim.says]
        blocks.append(Text(f"   {_plain(claim.source)}", style="dim"))
        blocks += [Text(f"   · {line}") for line in outcome.describe_inequalities()]
        if outcome.word == "contradicted":
            blocks.append(Text(f"   Possible explanation: {claim.otherwise}"))
        blocks.append(Text(f"   {outcome.describe_cost()}", style="dim"))
        if outcome.command:
            blocks.append(Text(f"   For a larger budget: {outcome.command}", style="dim"))
        blocks.append(Text())
        if tables and outcome.table is not None:
            blocks += [outcome.table.render(), Text()]
    return Group(*blocks)


LEGEND = (
    "Supported: for every inequality, the 95 % interval of the mean difference, paired over seeds, "
    "lies above the margin. Contradicted: for at least one inequality it lies below. Otherwise "
    f"inconclusive. The interval is Student's t with fewer than {BOOTSTRAP_FROM} seeds, for which "
    "a bootstrap would be too narrow, and a bootstrap with more. Restarts of one pretraining are "
    "averaged; where there is only one pretraining, the interval is over its restarts and the "
    "verdict inconclusive."
)
"""Explanation of verdicts, for the report."""


def format_markdown(outcomes: Sequence[Outcome], origin: str) -> str:
    """Format verdicts as Markdown: a summary table, then one section per claim.

    `origin` says when, where and by which command the verdicts were computed.
    """
    lines = [
        "# The lecture's claims, tested",
        "",
        origin,
        "",
        "| | claim | verdict | seconds | core-hours |",
        "|---:|---|---|---:|---:|",
    ]
    for outcome in outcomes:
        claim, cost = outcome.claim, outcome.cost
        gpu = f" + {cost.gpu_hours:.2g} GPU" if cost.gpu_hours else ""
        lines.append(
            f"| {claim.number} | [{_escape_cell(claim.title)}](#{claim.name}) | {outcome.word} "
            f"| {cost.seconds:.0f} | {cost.core_hours:.2g}{gpu} |"
        )
    lines += ["", LEGEND]
    for outcome in outcomes:
        lines += _format_claim(outcome)
    return "\n".join(lines).rstrip() + "\n"


def _format_claim(outcome: Outcome) -> list[str]:
    """Format one claim with its inequalities and its table, as lines of Markdown."""
    claim = outcome.claim
    lines = [
        "",
        f'<a id="{claim.name}"></a>',
        f"## {claim.number}. {claim.title}: {outcome.word}",
        "",
    ]
    lines += [f"> {sentence}  " for sentence in claim.says]
    lines += [f"> — {claim.source}", ""]
    lines += [f"- {line}" for line in outcome.describe_inequalities()]
    lines.append("")
    if outcome.word == "contradicted":
        lines += [f"Possible explanation: {claim.otherwise}", ""]
    larger = f". For a larger budget: `{outcome.command}`" if outcome.command else ""
    lines.append(outcome.describe_cost() + larger)
    if outcome.table is not None:
        lines += ["", table_formats.text(".md", outcome.table)]
    return lines


def _plain(text: str) -> str:
    """Remove asterisks and backslashes, the marks of Markdown."""
    return re.sub(r"\*+|\\", "", text)


def _escape_cell(text: str) -> str:
    """Escape text for a cell of a Markdown table."""
    return text.replace("|", "\\|")


@dataclass(frozen=True)
class Report:
    """Verdicts with their origin."""

    outcomes: Sequence[Outcome]
    origin: str
    """When, where and by which command the verdicts were computed."""


report_formats: Formats[Report] = Formats("verdicts")
"""Formats of reports: file ending -> function of a `Report`."""


@report_formats.register(".md")
def to_markdown(report: Report) -> str:
    """Format as Markdown."""
    return format_markdown(report.outcomes, report.origin)


@report_formats.register(".json")
def to_json(report: Report) -> str:
    """Format as a JSON list."""
    return json.dumps([outcome.as_dict() for outcome in report.outcomes], indent=2)


def check_place(path: Path) -> None:
    """Raise UserError if no format of verdicts has the ending of `path`, or it can't be written."""
    report_formats.check(path)


def write(outcomes: Sequence[Outcome], path: Path, origin: str) -> None:
    """Write verdicts to a file in the format of its ending.

    Raises UserError if no format has that ending, or if the file cannot be written.
    """
    report_formats.write(path, Report(outcomes, origin))
