"""Count what happened in the trials of each part, and print it as a table."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable


class Tally:
    """Outcomes of trials, and the findings among them: what must not happen."""

    def __init__(self) -> None:
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.findings: dict[tuple[str, str], list[str]] = {}

    def add(self, part: str, outcome: str) -> None:
        self.outcomes[part, outcome] += 1

    def find(self, part: str, finding: str, case: str) -> None:
        """Count a trial that ended as it must not; `case` says how to see it again."""
        self.add(part, "FINDING")
        self.findings.setdefault((part, finding), []).append(case)
        print(f"{part}: {finding}: {case}", file=sys.stderr, flush=True)

    def render(self) -> str:
        """All counts as a Markdown table, and each finding with its first cases."""
        lines = ["| part | outcome | trials |", "|---|---|---|"]
        lines += [f"| {part} | {what} | {n} |" for (part, what), n in sorted(self.outcomes.items())]
        lines.append(f"| all | FINDING | {self.outcomes_of('FINDING')} |")
        for (part, finding), cases in sorted(self.findings.items()):
            lines += ["", f"{part}: {finding} ({len(cases)}):", *_first(cases)]
        return "\n".join(lines)

    def outcomes_of(self, outcome: str) -> int:
        return sum(count for (_, what), count in self.outcomes.items() if what == outcome)


def _first(cases: Iterable[str]) -> list[str]:
    return [f"  {case}" for case in list(cases)[:5]]
