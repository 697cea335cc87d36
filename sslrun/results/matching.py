"""Match our rows and columns by name with those of a published table."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from sslrun.errors import UserError
from sslrun.registry import did_you_mean
from sslrun.results.address import Column, Row
from sslrun.results.known_protocols import protocol_synonyms
from sslrun.results.published import Number, Published
from sslrun.results.record import RunRecord
from sslrun.results.table import Table

Key = TypeVar("Key", Row, Column)


def normal(name: str) -> str:
    """Remove case and punctuation from a name: 'MNLI-m (Acc)' -> 'mnlimacc'.

    A percent sign becomes a word, since 75 % is not 75.
    """
    text = unicodedata.normalize("NFKD", name.replace("%", "percent")).casefold()
    return "".join(letter for letter in text if letter.isalnum())


@dataclass(frozen=True)
class Match:
    """A published row or column that matches one of ours."""

    name: str
    """The published name."""
    part: str
    """The part of our name that matched: name, protocol, task, metric, shift or stand-in."""


@dataclass(frozen=True)
class Matches:
    """Our rows and columns with their published counterparts."""

    rows: dict[Row, Match]
    columns: dict[Column, Match]
    turned: bool
    """Whether our rows are the published table's columns."""

    def number(self, published: Published, row: Match, column: Match) -> Number | None:
        """Return the published number of a matched row and column; None if there is none."""
        if self.turned:
            row, column = column, row
        return published.rows[row.name].get(column.name)

    def names(self, published: Published) -> tuple[list[str], list[str]]:
        """Return the published names that correspond to our rows and to our columns."""
        rows, columns = published_names(published)
        return (columns, rows) if self.turned else (rows, columns)


def match(ours: Table, published: Published) -> Matches:
    """Match rows and columns with a published table, transposed if that matches more cells."""
    stand_ins = ours.stand_ins.get(published.name, {})
    rows, columns = _select_comparable(ours, published, stand_ins)
    row_names = {row: _names_of_row(row, ours.records) for row in rows}
    column_names = {column: _names_of_column(column, stand_ins) for column in columns}

    def match_sides(row_side: list[str], column_side: list[str], turned: bool) -> Matches:
        return Matches(
            _find_all(row_names, row_side, published.aliases),
            _find_all(column_names, column_side, published.aliases),
            turned,
        )

    published_rows, published_columns = published_names(published)
    straight = match_sides(published_rows, published_columns, False)
    turned = match_sides(published_columns, published_rows, True)
    more = len(turned.rows) * len(turned.columns) > len(straight.rows) * len(straight.columns)
    return turned if more else straight


def published_names(published: Published) -> tuple[list[str], list[str]]:
    """List the published rows and columns."""
    columns = [name for cells in published.rows.values() for name in cells]
    return list(published.rows), list(dict.fromkeys(columns))


def find(
    names: Sequence[tuple[str, str]], published: Iterable[str], aliases: Mapping[str, list[str]]
) -> Match | None:
    """Find the first of (part, name) that equals a published name or an alias of one.

    Case and punctuation do not count. A name takes precedence over an alias.
    """
    known: dict[str, str] = {}
    for candidate in published:
        known.update({normal(alias): candidate for alias in aliases.get(candidate, ())})
    known.update({normal(candidate): candidate for candidate in published})
    for part, name in names:
        if normal(name) in known:
            return Match(known[normal(name)], part)
    return None


def _find_all(
    names: Mapping[Key, Sequence[tuple[str, str]]],
    published: Sequence[str],
    aliases: Mapping[str, list[str]],
) -> dict[Key, Match]:
    """`find` a match for each key; keys without one are missing."""
    matches = {}
    for key, candidates in names.items():
        if (match := find(candidates, published, aliases)) is not None:
            matches[key] = match
    return matches


def _select_comparable(
    ours: Table, published: Published, stand_ins: Mapping[str, str]
) -> tuple[list[Row], list[Column]]:
    """Select our rows and columns with the source's protocol and labels; all if none has them.

    A task that stands in for a column may have any labels. Costs are always included.
    """
    protocol = normal(str(published.setting.get("protocol", "")))
    labels = normal(str(published.setting.get("labels", "")))
    rows = [row for row in ours.rows if normal(row.protocol) == protocol]
    same_labels = [
        column for column in ours.columns if column.labels and normal(column.labels.title) == labels
    ]
    tasks = {column.task for column in same_labels}
    columns = []
    for column in ours.columns:
        if column in same_labels or (column.task in stand_ins and column.task not in tasks):
            columns.append(column)
    return rows or ours.rows, [*columns, *ours.costs] if columns else ours.columns


def _names_of_row(row: Row, records: Sequence[RunRecord]) -> list[tuple[str, str]]:
    """List (part of the row, a possible name in a paper), the most likely first."""
    pretexts = {
        record.pretext or "" for record in records if record.row == row and not record.row_name
    }
    names, protocols = (row.name, *pretexts), (row.protocol, *protocol_synonyms(row.protocol))
    both = [f"{name} · {protocol}" for name in names for protocol in protocols]
    candidates = [("name", name) for name in (*names, *both)]
    candidates += [("protocol", protocol) for protocol in protocols]
    return candidates


def _names_of_column(column: Column, stand_ins: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return (part of the column, its name in a paper).

    A shift has its own name, since in and out of distribution are different columns.
    """
    if column.shift_title:
        return [("shift", column.shift_title)]
    if column.labels is None:
        return [("metric", column.metric.name)]
    if column.task in stand_ins:
        return [("stand-in", stand_ins[column.task])]
    return [("task", column.task)]


def with_protocols_in_rows(published: Published) -> Published:
    """Turn the columns into rows if they are protocols: one row per old row and protocol."""
    if published.task is None:
        return published
    rows, aliases = {}, {published.task: published.aliases.get(published.task, [])}
    for row, cells in published.rows.items():
        for protocol, number in cells.items():
            rows[f"{row} · {protocol}"] = {published.task: number}
            aliases[f"{row} · {protocol}"] = [
                f"{other} · {protocol}" for other in published.aliases.get(row, ())
            ]
    return replace(published, rows=rows, aliases=aliases)


def check_stand_ins(
    columns: Mapping[str, str], tasks: Sequence[str], every: Sequence[Published]
) -> None:
    """Raise UserError if a task or a published column in `columns` does not exist.

    `columns`: our task -> the published column that it stands in for; or the published row, if the
    table's rows are tasks, so that it is compared transposed.
    """
    known = [(table, [name for side in published_names(table) for name in side]) for table in every]
    for task, column in columns.items():
        if task not in tasks:
            raise UserError(f"no task '{task}' is evaluated.{did_you_mean(task, list(tasks))}")
        name = [("stand-in", column)]
        if not any(find(name, names, table.aliases) for table, names in known):
            columns_alone = [name for table in every for name in published_names(table)[1]]
            raise UserError(f"there is no column '{column}'.{did_you_mean(column, columns_alone)}")
