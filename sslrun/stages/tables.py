"""Tables of any finished runs.

Only a sweep needs its plan, which imports torch: a table of folders takes a second without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sslrun.errors import UserError
from sslrun.results.record import RunRecord, find_records
from sslrun.results.table import Table


def table_of(targets: Sequence[Path], root: Path) -> Table:
    """Build the table of sweep files and of folders with finished runs.

    Raises UserError if there is no finished evaluation.
    """
    records: list[RunRecord] = []
    for target in targets:
        if target.suffix in (".yaml", ".yml"):
            from sslrun.recipe import load_sweep
            from sslrun.stages.sweep import Plan

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
