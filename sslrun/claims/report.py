"""Reports of claims: verdicts with their intervals, as text, Markdown and JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.text import Text

from sslrun.claims.schema import Claim
from sslrun.claims.verdict import BOOTSTRAP_FROM, Inequality, Verdict, Word, combine
from sslrun.results.formats import Formats, table_formats
from sslrun.results.table import Table


@dataclass(frozen=True)
class RunCost:
    """What the runs behind a verdict took, including runs that other claims share."""

    seconds: float = 0.0
    """Total of all runs, as if run one after the other."""
    core_hours: float = 0.0
    gpu_hours: float = 0.0

    def text(self) -> str:
        hours = (
            [f"{self.core_hours:.2g} core-hours"] if self.core_hours or not self.gpu_hours else []
        )
        hours += [f"{self.gpu_hours:.2g} GPU-hours"] if self.gpu_hours else []
        return f"{self.seconds:.0f} s, {', '.join(hours)}"


@dataclass(frozen=True)
class Outcome:
    """A claim's verdict, computed from its variant's table."""

    claim: Claim
    variant: str | None = None
    """None: no variant fits the budget."""
    judged: list[tuple[Inequality, Verdict, bool]] = field(default_factory=list)
    """Each inequality, its verdict, and whether it is only reported."""
    table: Table | None = None
    cost: RunCost = RunCost()
    failure: str | None = None
    """Why runs are missing, if one failed."""

    @property
    def word(self) -> Word:
        return combine([verdict for _, verdict, reported in self.judged if not reported])

    @property
    def command(self) -> str | None:
        """The command for a larger budget."""
        return self.claim.larger(self.variant)

    def lines(self) -> Iterator[str]:
        """One line for each inequality with its interval, and for what is missing."""
        for inequality, verdict, reported in self.judged:
            means = inequality.means(self.table) if self.table else None
            spec = self._format_spec(inequality) if means else ".2f"
            values = f" ({means[0]:{spec}} against {means[1]:{spec}})" if means else ""
            yield f"{'reported only, ' if reported else ''}{inequality.text()}{values}: {verdict.text(spec)}"
        if self.variant is None:
            yield "no variant fits this budget and this machine"
        elif self.table is None or self.failure:
            yield f"{'runs are missing' if self.table else 'nothing of it is computed'}: {self.failure or 'not run yet'}"

    def _format_spec(self, inequality: Inequality) -> str:
        """How the inequality's numbers are printed: as in the table, or with one digit more than the metric's."""
        assert self.table is not None
        metric = self.table.metric_of(inequality.places[0][1])
        return self.table.format_spec or f".{max(2, metric.digits + 1)}f"

    def expense(self) -> str:
        """What the variant takes, and what its runs took."""
        if self.variant is None:
            return "nothing was run"
        chosen = self.claim.variants[self.variant]
        where = f"measured on {chosen.measured}" if chosen.measured else "a guess"
        return f"variant '{self.variant}', {chosen.minutes:g} minutes ({where}); its runs took {self.cost.text()}"

    def as_dict(self) -> dict[str, Any]:
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
                    "text": inequality.text(), "reported": reported, "verdict": verdict.word,
                    "difference": verdict.difference, "interval": verdict.interval, "margin": verdict.margin,
                    "seeds": verdict.seeds, "restarts": verdict.restarts, "method": verdict.method, "reason": verdict.reason,
                }
                for inequality, verdict, reported in self.judged
            ],
            "seconds": round(self.cost.seconds, 1),
            "core_hours": self.cost.core_hours,
            "gpu_hours": self.cost.gpu_hours,
            "otherwise": claim.otherwise if self.word == "contradicted" else None,
            "failure": self.failure,
            "larger": self.command,
        }  # fmt: skip


STYLES: dict[Word, str] = {"supported": "green", "contradicted": "red", "inconclusive": "yellow"}


def render(outcomes: Sequence[Outcome], tables: bool) -> Group:
    """Lay verdicts out for the terminal, with the tables that they were read from if `tables`."""
    blocks: list[Any] = []
    for each in outcomes:
        claim = each.claim
        head = Text(f"{claim.number}. {claim.title}: ", style="bold")
        blocks += [head.append(each.word, style=STYLES[each.word])]
        blocks += [Text(f"   “{_plain(sentence)}”", style="italic") for sentence in claim.says]
        blocks += [
            Text(f"   {_plain(claim.source)}", style="dim"),
            *(Text(f"   · {line}") for line in each.lines()),
        ]
        if each.word == "contradicted":
            blocks.append(Text(f"   What might explain it: {claim.otherwise}"))
        blocks.append(Text(f"   {each.expense()}", style="dim"))
        if each.command:
            blocks.append(Text(f"   For a larger budget: {each.command}", style="dim"))
        blocks.append(Text())
        if tables and each.table is not None:
            blocks += [each.table.render(), Text()]
    return Group(*blocks)


LEGEND = (
    "Supported: for every inequality, the 95 % interval of the mean difference, paired over seeds, lies above the margin. "
    "Contradicted: for one inequality it lies below. Otherwise inconclusive. The interval is Student's t with fewer than "
    f"{BOOTSTRAP_FROM} seeds, for which a bootstrap would be too narrow, and a bootstrap with more."
)
"""How to read verdicts."""


def markdown(outcomes: Sequence[Outcome], made: str) -> str:
    """The table of verdicts, then each claim with its inequalities and its table.

    made: when, on what and by which command they were computed.
    """
    lines = [
        "# The lecture's claims, tested",
        "",
        made,
        "",
        "| | claim | verdict | seconds | core-hours |",
        "|---:|---|---|---:|---:|",
    ]
    for each in outcomes:
        gpu = f" + {each.cost.gpu_hours:.2g} GPU" if each.cost.gpu_hours else ""
        lines.append(
            f"| {each.claim.number} | [{_cell_text(each.claim.title)}](#{each.claim.name}) | {each.word} "
            f"| {each.cost.seconds:.0f} | {each.cost.core_hours:.2g}{gpu} |"
        )
    lines += ["", LEGEND]
    for each in outcomes:
        claim = each.claim
        lines += [
            "",
            f'<a id="{claim.name}"></a>',
            f"## {claim.number}. {claim.title}: {each.word}",
            "",
        ]
        lines += [f"> {sentence}  " for sentence in claim.says]
        lines += [f"> — {claim.source}", "", *(f"- {line}" for line in each.lines()), ""]
        if each.word == "contradicted":
            lines += [f"What might explain it: {claim.otherwise}", ""]
        lines.append(
            each.expense() + (f". For a larger budget: `{each.command}`" if each.command else "")
        )
        if each.table is not None:
            lines += ["", table_formats.text(".md", each.table)]
    return "\n".join(lines).rstrip() + "\n"


def _plain(text: str) -> str:
    """Markdown text without its marks."""
    return re.sub(r"\*+|\\", "", text)


def _cell_text(text: str) -> str:
    return text.replace("|", "\\|")


@dataclass(frozen=True)
class Report:
    """Verdicts, and when, on what and by which command they were computed."""

    outcomes: Sequence[Outcome]
    made: str


report_formats: Formats[Report] = Formats("verdicts")
"""The formats of reports: file ending -> function of a `Report`."""


@report_formats.register(".md")
def to_markdown(report: Report) -> str:
    """Format as Markdown."""
    return markdown(report.outcomes, report.made)


@report_formats.register(".json")
def to_json(report: Report) -> str:
    """Format as a JSON list."""
    return json.dumps([outcome.as_dict() for outcome in report.outcomes], indent=2)


def check_ending(path: Path) -> None:
    """Raise UserError if verdicts cannot be written to files with that ending."""
    report_formats.check(path)


def write(outcomes: Sequence[Outcome], path: Path, made: str) -> None:
    """Write verdicts to a file. UserError: no such format, or the file cannot be written."""
    report_formats.write(path, Report(outcomes, made))
