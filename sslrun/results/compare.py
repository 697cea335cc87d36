"""Comparison of our table with a published one: numbers, settings and rank agreement."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Group
from rich.text import Text

from sslrun.metric import Metric
from sslrun.results.address import Column, Row, join_titles
from sslrun.results.agreement import MIN_ROWS, Agreement, agreement
from sslrun.results.formats import table_formats
from sslrun.results.matching import Match, Matches, match, normal, with_protocols_in_rows
from sslrun.results.published import Number, Published
from sslrun.results.settings import ALWAYS, Setting, compare_settings
from sslrun.results.table import (
    Cell,
    Cost,
    Table,
    TextCell,
    cell_numbers,
    columns_of_record,
    format_amount,
    place_dict,
)


@dataclass(frozen=True)
class Pair:
    """One of our cells and the published number that it is compared with."""

    row: Row
    column: Column
    published_row: str
    published_column: str
    ours: Cell
    published: Number
    value: float
    """The published value in our unit."""

    @property
    def difference(self) -> float:
        """Ours minus published."""
        return self.ours.mean - self.value

    @property
    def gain(self) -> float:
        """How much better ours is, in the metric's better direction."""
        return self.column.metric.gain(self.ours.mean, self.value)

    def text(self, value: float, sign: str = "") -> str:
        """Format one of its numbers."""
        return (
            format_amount(value, sign)
            if isinstance(self.ours, Cost)
            else self.column.metric.text(value, sign)
        )


@dataclass
class Comparison(Table):
    """Three lines per row: ours, published, difference. Below: rank agreement by column."""

    pairs: list[Pair] = field(default_factory=list)
    settings: list[Setting] = field(default_factory=list)
    agreements: dict[tuple[str, Column], Agreement] = field(default_factory=dict)
    """(group of rows, column) -> agreement. There is only one group, "", unless several of our rows
    match the same published row."""
    unmatched: dict[str, list[str]] = field(default_factory=dict)
    """Kind -> names that only one side has."""
    against: str = ""
    """The published table's name."""

    second: str = "which"

    @property
    def same(self) -> bool:
        """Whether every setting is known and the same."""
        return bool(self.settings) and all(setting.verdict == "same" for setting in self.settings)

    CSV_HEAD: ClassVar[tuple[str, ...]] = (
        "table", "row", "protocol", "task", "labels", "per_class", "shift", "metric",
        "mean", "std", "seeds",
        "published_row", "published_column", "published", "published_std", "verified", "difference",
        *(f"same_{kind}" for kind in ALWAYS),
    )  # fmt: skip

    def csv_rows(self) -> list[list[Any]]:
        """One row per pair, with the verdicts on data, steps and parameters.

        Every row repeats the verdicts, since rows may be read without the rest of the file.
        """
        verdicts = {setting.kind: setting.verdict for setting in self.settings}
        rows = []
        for pair in self.pairs:
            published = (pair.published_row, pair.published_column, f"{pair.value:.6g}")
            deviation = "" if pair.published.deviation is None else pair.published.deviation
            rows.append(
                [
                    self.against,
                    *place_dict((pair.row, pair.column)).values(),
                    *cell_numbers(pair.ours),
                    *published,
                    deviation,
                    pair.published.verified,
                    f"{pair.difference:.6g}",
                    *(verdicts[kind] for kind in ALWAYS),
                ]
            )
        return rows

    def as_dict(self) -> dict[str, Any]:
        """Return the comparison as JSON values."""
        settings = {
            setting.kind: {
                "verdict": setting.verdict,
                "ours": setting.ours,
                "published": setting.published,
            }
            for setting in self.settings
        }
        agreements = [_agreement_dict(*key, value) for key, value in self.agreements.items()]
        return {
            "title": self.title,
            "against": self.against,
            "preface": self.preface,
            "same": self.same,
            "settings": settings,
            "cells": [_pair_dict(pair) for pair in self.pairs],
            "rank_agreement": agreements,
            "unmatched": self.unmatched,
            "notes": self.notes,
        }


def _pair_dict(pair: Pair) -> dict[str, Any]:
    return {
        **place_dict((pair.row, pair.column)),
        "values": pair.ours.values,
        "mean": pair.ours.mean,
        "std": pair.ours.deviation,
        "published_row": pair.published_row,
        "published_column": pair.published_column,
        "published": pair.value,
        "published_std": pair.published.deviation,
        "verified": pair.published.verified,
        "difference": pair.difference,
        "gain": pair.gain,
    }


def _agreement_dict(group: str, column: Column, ranks: Agreement) -> dict[str, Any]:
    return {
        "rows": group or "all",
        **column.as_dict(),
        "tau_b": None if math.isnan(ranks.tau) else ranks.tau,
        "p": None if math.isnan(ranks.p) else ranks.p,
        "n": ranks.rows,
        "exact": ranks.exact,
    }


@dataclass
class Comparisons:
    """Comparisons of our table with several published ones."""

    tables: list[Comparison]

    def render(self) -> Group:
        """Lay out all comparisons for the terminal, one below the other."""
        parts = [part for table in self.tables for part in (Text(), table.render())]
        return Group(*parts[1:])

    def to_json(self) -> str:
        """Format as a JSON list."""
        return table_formats.joined(".json", self.tables)

    def write(self, path: Path) -> None:
        """Write to a file, in the format of its ending.

        Raises UserError if there is no such format or the file cannot be written.
        """
        table_formats.write_joined(path, self.tables)


def compare_all(ours: Table, every: Sequence[Published]) -> Comparisons:
    """Compare our table with several published ones.

    Tables without any cell of ours are only named in a note, except for one if that is true of all.
    """
    comparisons = [compare(ours, published) for published in every]
    shown = [comparison for comparison in comparisons if comparison.pairs] or comparisons[:1]
    others = []
    for published, comparison in zip(every, comparisons, strict=True):
        if comparison not in shown:
            others.append(published)
    if others:
        listed = "; ".join(f"{published.where} ({published.name})" for published in others)
        shown[-1].note(f"none of our cells matches: {listed}")
    return Comparisons(shown)


def compare(ours: Table, published: Published) -> Comparison:
    """Compare our table with a published one.

    Rows and columns match by name, without regard to case and punctuation; by an alias of the
    published table; by a synonym of our protocol; or because our task stands in for a published
    column (`ours.stand_ins`). A published table whose rows are tasks is transposed. Settings are
    compared between `ours.records` and the published table.
    """
    published = with_protocols_in_rows(published)
    matches = match(ours, published)
    pairs, other_units = _pairs(ours, published, matches)
    compared = {(pair.row, pair.column) for pair in pairs}
    records = []
    for record in ours.records:
        if any((record.row, column) in compared for column in columns_of_record(record)):
            records.append(record)
    comparison = Comparison(
        f"{ours.title or 'ours'} against {published.name}: {published.paper}, {published.where}",
        marks_best=False,  # the lines of a column do not compete
        records=records,
        pairs=pairs,
        unmatched=_unmatched(ours, published, matches, other_units),
        against=published.name,
    )
    if pairs:
        by_protocol = all(match.part == "protocol" for match in matches.rows.values())
        comparison.settings = compare_settings(
            records, published, published.task is not None or by_protocol
        )
        comparison.settings += _stand_in_setting(matches)
    comparison.agreements = _agreements(pairs, matches.rows)
    _fill_cells(comparison)
    comparison.preface = _preface(comparison, published)
    comparison.notes = _notes(comparison, published, ours, matches)
    return comparison


# ---------------------------------------------------------------- pairs


def _pairs(ours: Table, published: Published, matches: Matches) -> tuple[list[Pair], list[str]]:
    """Pair the cells that both sides have, and list those whose units cannot be compared."""
    pairs, other_units = [], []
    for row, row_match in matches.rows.items():
        for column, column_match in matches.columns.items():
            cell = ours.cells.get((row, column))
            number = matches.number(published, row_match, column_match)
            if cell is None or number is None:
                continue
            unit = number.unit or published.unit
            convert = conversion(column.metric, unit)
            if convert is None:
                own = column.metric.unit or column.metric.title
                other_units.append(f"{row.name}, {column.task} (ours: {own}, published in {unit})")
                continue
            value = convert(number.value)
            pairs.append(Pair(row, column, row_match.name, column_match.name, cell, number, value))
    return pairs, other_units


def conversion(metric: Metric, published: str) -> Callable[[float], float] | None:
    """Return the conversion from a published unit to a metric's; None if there is none.

    A published unit may name the metric too: "eV MAE".
    """
    if normal(published) == normal(f"{metric.unit} {metric.name}"):
        return float
    if metric.unit != "%":
        return float if normal(published) == normal(metric.unit) else None
    if metric.better == "lower":  # a published "%" is of a metric for which higher is better
        return float if published == "% error" else None
    known: dict[str, Callable[[float], float]] = {
        "%": float,
        "F1": float,
        "fraction": lambda value: 100 * value,
        "% error": lambda value: 100 - value,
    }
    return known.get(published)


def _unmatched(
    ours: Table, published: Published, matches: Matches, other_units: list[str]
) -> dict[str, list[str]]:
    """List the names that only one side has, by kind. Our costs are left out."""
    row_names, column_names = matches.names(published)
    rows = [row.title for row in ours.rows if row not in matches.rows]
    ignored = {*matches.columns, *ours.costs}
    columns = [column.title for column in ours.columns if column not in ignored]
    kinds = {
        "rows of ours": rows,
        "columns of ours": columns,
        "published rows": _unmatched_names(row_names, matches.rows.values()),
        "published columns": _unmatched_names(column_names, matches.columns.values()),
        "cells in other units": other_units,
        "cells that only one side has": _one_sided_cells(ours, published, matches),
    }
    return {kind: names for kind, names in kinds.items() if names}


def _unmatched_names(names: Sequence[str], matches: Iterable[Match]) -> list[str]:
    """Return the published names without a match."""
    matched = {match.name for match in matches}
    return [name for name in names if name not in matched]


def _one_sided_cells(ours: Table, published: Published, matches: Matches) -> list[str]:
    """List the cells of matched rows and columns that only one side has."""
    cells = []
    for row, row_match in matches.rows.items():
        for column, column_match in matches.columns.items():
            number = matches.number(published, row_match, column_match)
            if ((row, column) in ours.cells) != (number is not None):
                cells.append(f"{row.title}, {column.title}")
    return cells


def _stand_in_setting(matches: Matches) -> list[Setting]:
    """Return the test data as a setting, if tasks stand in for published columns."""
    stand_ins = {
        column.task: match.name
        for column, match in matches.columns.items()
        if match.part == "stand-in"
    }
    return [Setting("test data", tuple(stand_ins), tuple(stand_ins.values()))] if stand_ins else []


def _agreements(
    pairs: Sequence[Pair], rows: dict[Row, Match]
) -> dict[tuple[str, Column], Agreement]:
    """Compute the rank agreement of each column, by group of rows.

    There is one group unless several of our rows match the same published row. Then rows that match
    by name are grouped by protocol, and rows that match by protocol are grouped by name. Better
    values rank higher.
    """
    shared = len({match.name for match in rows.values()}) < len(rows)
    groups: dict[tuple[str, Column], list[Pair]] = {}
    for pair in pairs:
        group = pair.row.protocol if rows[pair.row].part == "name" else pair.row.name
        groups.setdefault((group if shared else "", pair.column), []).append(pair)
    agreements = {}
    for (group, column), members in groups.items():
        ours = [column.metric.gain(pair.ours.mean, 0.0) for pair in members]
        published = [column.metric.gain(pair.value, 0.0) for pair in members]
        if (ranks := agreement(ours, published)) is not None:
            agreements[group, column] = ranks
    return agreements


# ---------------------------------------------------------------- text


def _fill_cells(comparison: Comparison) -> None:
    """Fill in the cells as text."""
    several = len({pair.row.protocol for pair in comparison.pairs}) > 1
    for pair in comparison.pairs:
        name = pair.row.title if several else pair.row.name
        number = pair.published
        deviation = "" if number.deviation is None else f" ± {number.deviation:g}"
        mark = "" if number.verified else " †"
        for which, words in (
            ("ours", pair.ours.text(f".{pair.column.metric.digits}f")),
            ("published", f"{pair.text(pair.value)}{deviation}{mark}"),
            ("difference", pair.text(pair.difference, "+")),
        ):
            comparison.cells[Row(name, which), pair.column] = TextCell(words=words)
    for (group, column), ranks in comparison.agreements.items():
        name = join_titles("rank agreement", group)
        p = f"{ranks.p:.3f}" + ("" if ranks.exact else " (approx.)")
        for which, words in (
            ("tau-b", "undefined" if math.isnan(ranks.tau) else f"{ranks.tau:+.2f}"),
            ("p", "–" if math.isnan(ranks.p) else p),
            ("rows", str(ranks.rows)),
        ):
            comparison.cells[Row(name, which), column] = TextCell(words=words)


def _preface(comparison: Comparison, published: Published) -> list[str]:
    """Write the lines above the table: what was the same and what was not."""
    source = f"{published.paper}, {published.where}"
    if not comparison.pairs:
        return [f"None of our cells matches {source}."]
    differing = [setting.kind for setting in comparison.settings if setting.verdict == "differs"]
    unknown = [setting.kind for setting in comparison.settings if setting.verdict == "unknown"]
    if differing:
        head = f"NOT a replication of {source}. Not the same: {', '.join(differing)}."
        head += f" Unknown: {', '.join(unknown)}." if unknown else ""
    elif unknown:
        head = f"Not known to be a replication of {source}. Unknown: {', '.join(unknown)}."
    else:
        head = f"The same as in {source} in every setting listed here."
    lines = [head, *(setting.text() for setting in comparison.settings)]
    if "source" in published.setting:
        lines.append(f"where the published settings are from: {published.setting['source']}")
    return lines


def _notes(
    comparison: Comparison, published: Published, ours: Table, matches: Matches
) -> list[str]:
    """Write the lines below the table."""
    notes = []
    if comparison.pairs:
        notes += _value_notes(comparison, published)
        notes[1:1] = _name_notes(ours, matches)
        costs = [pair.column for pair in comparison.pairs if pair.column in ours.costs]
        notes += dict.fromkeys(ours.costs[column] for column in costs if ours.costs[column])
        notes.append(_agreement_note(comparison))
    return notes + [
        f"not matched, {kind}: {'; '.join(names)}" for kind, names in comparison.unmatched.items()
    ]


def _value_notes(comparison: Comparison, published: Published) -> list[str]:
    """Explain the numbers."""
    pairs = comparison.pairs
    spread = published.spread or "as the source gives it"
    notes = [
        f"ours: mean ± standard deviation over seeds; published: ± {spread}; "
        "difference: ours - published"
    ]
    lower = dict.fromkeys(
        pair.column.metric.title for pair in pairs if pair.column.metric.better == "lower"
    )
    if lower:
        notes.append(
            f"lower is better, and a negative difference an improvement: {', '.join(lower)}"
        )
    if not all(pair.published.verified for pair in pairs):
        notes.append("† recalled from the paper, not seen in it")
    if any(pair.value != pair.published.value for pair in pairs):
        notes.append(f"published in {published.unit}, converted to our unit")
    return notes


def _name_notes(ours: Table, matches: Matches) -> list[str]:
    """List the names that differ, and the tasks that stand in for others."""
    named = [
        (row.protocol if match.part == "protocol" else row.name, match.name)
        for row, match in matches.rows.items()
    ]
    named += [
        (column.shift_title or column.task, match.name)
        for column, match in matches.columns.items()
        if match.part != "stand-in" and column not in ours.costs
    ]
    renamed = [f"{own} = {other}" for own, other in named if normal(own) != normal(other)]
    notes = [f"names: {'; '.join(dict.fromkeys(renamed))}"] if renamed else []
    stand_ins = [
        f"{column.task} for {match.name}"
        for column, match in matches.columns.items()
        if match.part == "stand-in"
    ]
    if stand_ins:
        notes.append(
            f"stand-ins: {'; '.join(dict.fromkeys(stand_ins))}: tasks of the same kind on other "
            "data, so that the order of the rows and the gaps between them may be compared, "
            "not the values"
        )
    return notes


def _agreement_note(comparison: Comparison) -> str:
    """Explain how the rank agreement was computed, or why there is none."""
    if not comparison.agreements:
        return f"no rank agreement: it takes {MIN_ROWS} rows in a column"
    fewest = min(ranks.rows for ranks in comparison.agreements.values())
    note = "rank agreement of the rows' means: Kendall's tau-b, two-sided p-value, "
    note += "exact where not marked"
    if fewest < 5:
        note += f"; with {fewest} rows it can't be under {2 / math.factorial(fewest):.2g}"
    return note
