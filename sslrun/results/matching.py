"""Which published row and column one of our rows and columns stands beside: they find each other by name."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from sslrun.errors import UserError
from sslrun.registry import did_you_mean
from sslrun.results.address import Column, Row
from sslrun.results.known_protocols import protocol_synonyms
from sslrun.results.published import Number, Published
from sslrun.results.record import RunRecord
from sslrun.results.table import Table


def normal(name: str) -> str:
    """A name without case and punctuation: 'MNLI-m (Acc)' -> 'mnlimacc'. A percent sign counts: 75 % is not 75."""
    text = unicodedata.normalize("NFKD", name.replace("%", "percent")).casefold()
    return "".join(letter for letter in text if letter.isalnum())


@dataclass(frozen=True)
class Match:
    """A published row or column, and which part of our name it was found by: name, protocol, task, shift or stand-in."""

    name: str
    part: str


@dataclass(frozen=True)
class Matches:
    """Our rows and columns with their published counterparts."""

    rows: dict[Row, Match]
    columns: dict[Column, Match]
    turned: bool
    """Whether our rows are the published table's columns."""

    def number(self, published: Published, row: Match, column: Match) -> Number | None:
        """The published number of a matched row and column; None if there is none."""
        down, across = (column, row) if self.turned else (row, column)
        return published.rows[down.name].get(across.name)

    def names(self, published: Published) -> tuple[list[str], list[str]]:
        """The published names on our rows' side and on our columns' side."""
        downs, acrosses = published_names(published)
        return (acrosses, downs) if self.turned else (downs, acrosses)


def match(ours: Table, published: Published) -> Matches:
    """Match rows and columns to the published table as it stands, or turned, whichever gives more cells."""
    downs, acrosses = published_names(published)
    stand_ins = ours.stand_ins.get(published.name, {})
    rows, columns = _measured_alike(ours, published, stand_ins)
    row_names = {row: _names_of_row(row, ours.records) for row in rows}
    column_names = {column: _names_of_column(column, stand_ins) for column in columns}

    def matches(row_side: list[str], column_side: list[str], turned: bool) -> Matches:
        found_rows = {
            row: find(names, row_side, published.aliases) for row, names in row_names.items()
        }
        found_columns = {
            column: find(names, column_side, published.aliases)
            for column, names in column_names.items()
        }
        return Matches(
            {row: found for row, found in found_rows.items() if found},
            {column: found for column, found in found_columns.items() if found},
            turned,
        )

    straight, turned = matches(downs, acrosses, False), matches(acrosses, downs, True)
    more = len(turned.rows) * len(turned.columns) > len(straight.rows) * len(straight.columns)
    return turned if more else straight


def published_names(published: Published) -> tuple[list[str], list[str]]:
    """The published rows and columns."""
    columns = [name for cells in published.rows.values() for name in cells]
    return list(published.rows), list(dict.fromkeys(columns))


def find(
    names: Sequence[tuple[str, str]], theirs: Iterable[str], aliases: Mapping[str, list[str]]
) -> Match | None:
    """The first of (part, name) that is a published name or an alias of one, whatever its case and punctuation."""
    known: dict[str, str] = {}
    for published in theirs:
        known.update({normal(alias): published for alias in aliases.get(published, ())})
    known.update({normal(published): published for published in theirs})
    for part, name in names:
        if normal(name) in known:
            return Match(known[normal(name)], part)
    return None


def _measured_alike(
    ours: Table, published: Published, stand_ins: Mapping[str, str]
) -> tuple[list[Row], list[Column]]:
    """Our rows and columns with the protocol and the labels that the source states; all, if none has them.

    A task that stands in for a column does so with whatever labels it has. Costs always count.
    """
    protocol, labels = (
        normal(str(published.setting.get(kind, ""))) for kind in ("protocol", "labels")
    )
    rows = [row for row in ours.rows if normal(row.protocol) == protocol]
    alike = [
        column for column in ours.columns if column.labels and normal(column.labels.title) == labels
    ]
    tasks = {column.task for column in alike}
    columns = [
        each
        for each in ours.columns
        if each in alike or (each.task in stand_ins and each.task not in tasks)
    ]
    return rows or ours.rows, [*columns, *ours.costs] if columns else ours.columns


def _names_of_row(row: Row, records: Sequence[RunRecord]) -> list[tuple[str, str]]:
    """(part of the row, a name that it may have in a paper), the likeliest first."""
    pretexts = {
        record.pretext or "" for record in records if record.row == row and not record.row_name
    }
    names, protocols = (row.name, *pretexts), (row.protocol, *protocol_synonyms(row.protocol))
    both = [f"{name} · {protocol}" for name in names for protocol in protocols]
    return [
        *(("name", name) for name in (*names, *both)),
        *(("protocol", protocol) for protocol in protocols),
    ]


def _names_of_column(column: Column, stand_ins: Mapping[str, str]) -> list[tuple[str, str]]:
    """(part of the column, its name in a paper).

    A shift goes by its own name: in and out of distribution are different columns.
    """
    if column.shift_title:
        return [("shift", column.shift_title)]
    if column.labels is None:
        return [("metric", column.metric.name)]
    if column.task in stand_ins:
        return [("stand-in", stand_ins[column.task])]
    return [("task", column.task)]


def with_protocols_in_rows(published: Published) -> Published:
    """A published table whose columns are protocols, with a row for each of its rows and protocols."""
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
    """Check `columns` (our task -> the published column). Raises UserError if one of them does not exist."""
    for task, column in columns.items():
        if task not in tasks:
            raise UserError(f"no task '{task}' is evaluated.{did_you_mean(task, list(tasks))}")
        if not any(
            find([("stand-in", column)], published_names(each)[1], each.aliases) for each in every
        ):
            known = [name for each in every for name in published_names(each)[1]]
            raise UserError(f"there is no column '{column}'.{did_you_mean(column, known)}")
