"""Our table beside a published one: cell against cell, and what was the same behind the numbers and what was not."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Group
from rich.text import Text

import sslrun.backbones  # noqa: F401  registers them, whose defaults are read here
from sslrun.backbones.base import backbones
from sslrun.errors import UserError
from sslrun.protocols import protocols as registered
from sslrun.registry import did_you_mean
from sslrun.results.published import Number, Published
from sslrun.results.table import (
    Cell,
    Column,
    Cost,
    Row,
    Table,
    amount,
    column_of,
    columns_of,
    metric_of,
    row_of,
    write_table,
)
from sslrun.runs import read_result

MIN_ROWS = 3
"""Rows from which on their ranks are compared: two can only agree or not, which a coin does as well."""

ALWAYS = ("data", "steps", "parameters")
"""What a reader must be told of, even where nobody knows; the rest is told where one side does."""
KINDS = (*ALWAYS, "epochs", "backbone", "labels", "protocol", "metric")

OF_PRETRAINING = ("data", "steps", "parameters", "epochs")
UNKNOWN = "unknown"
"""What some of our results don't tell of themselves, beside what others do."""

ROUNDING = 0.02
"""Relative difference up to which two parameter counts are the same: papers round them."""

EXACT_TIES = 8
"""Rows up to which the p-value is exact where some are tied: all their orders are gone through."""


# ---------------------------------------------------------------- rank agreement


@dataclass(frozen=True)
class Agreement:
    """Rank agreement of rows in one column: Kendall's tau-b, and its two-sided p-value if the orders were unrelated."""

    tau: float
    """NaN where all of one side are equal."""
    p: float
    rows: int
    exact: bool


def agreement(ours: Sequence[float], published: Sequence[float]) -> Agreement | None:
    """None for fewer than three rows. Kendall, Biometrika 1938; with ties (tau-b), Biometrika 1945.

    Without ties the exact null distribution is scipy's; with ties and up to eight rows every order of one side is gone
    through; beyond that the normal approximation stands in, and says so (`exact` is False).
    """
    rows = len(ours)
    if rows < MIN_ROWS:
        return None
    from scipy.stats import kendalltau  # a second to import

    ties = len(set(ours)) < rows or len(set(published)) < rows
    if not ties:
        found = kendalltau(ours, published, method="exact")
        return Agreement(float(found.statistic), float(found.pvalue), rows, True)
    found = kendalltau(ours, published, method="asymptotic")
    if rows > EXACT_TIES or math.isnan(found.statistic):
        return Agreement(float(found.statistic), float(found.pvalue), rows, False)
    return Agreement(float(found.statistic), _permutation_p(ours, published), rows, True)


def _permutation_p(ours: Sequence[float], published: Sequence[float]) -> float:
    """The share of orders of one side that agree, or disagree, at least as much. Ties only scale tau-b: pairs suffice."""
    first, second = np.triu_indices(len(ours), 1)
    a, b = np.asarray(ours), np.asarray(published)
    orders = np.array(list(itertools.permutations(range(len(a)))))
    signs = np.sign(a[first] - a[second])
    concordance = np.sign(b[orders[:, first]] - b[orders[:, second]]) @ signs
    return float(np.mean(np.abs(concordance) >= abs(concordance[0])))


# ---------------------------------------------------------------- what was the same


@dataclass(frozen=True)
class Setting:
    """One thing behind the numbers, on both sides; an empty tuple where it isn't known."""

    kind: str
    ours: tuple[Any, ...]
    published: tuple[Any, ...]

    @property
    def verdict(self) -> str:
        """same, differs, or unknown."""
        known = [each for each in self.ours if each != UNKNOWN]
        if not known or not self.published:
            return "unknown"
        pairs = list(itertools.product(known, self.published))
        if all(_equal(self.kind, a, b) for a, b in pairs):
            return "same" if len(known) == len(self.ours) else "unknown"
        return "unknown" if any(_open(self.kind, a, b) for a, b in pairs) else "differs"

    def text(self) -> str:
        if self.verdict == "same":
            return f"{self.kind}: the same ({_listed(self.ours)})"
        return f"{self.kind}: {self.verdict} (ours: {_listed(self.ours)}; published: {_listed(self.published)})"


def facts(run: Path) -> dict[str, Any]:
    """What an evaluation's folder tells of what is behind its number: the backbone with whatever of it is not as by
    default, and data, steps, epochs and parameters of pretraining.

    They stand in its recipe and in the result of the pretraining beside it; what isn't there is left out.
    """
    found: dict[str, Any] = {}
    recipe, identity = _read(run / "recipe.yaml"), _read(run / "identity.json")
    if "backbone" in identity:
        found["backbone"] = _described(identity["backbone"])
    origin = identity.get("origin", {})
    if "pretrain" in origin:
        found["data"] = (recipe.get("data") or {}).get("name")
        found["epochs"] = (recipe.get("pretrain") or {}).get("epochs")
        pretraining = run.parent / f"pretrain-{origin['pretrain']}"
        if (pretraining / "result.json").is_file():
            result = read_result(pretraining)
            found |= {kind: result.get(kind) for kind in ("steps", "parameters")}
    return {kind: value for kind, value in found.items() if value is not None}


def _described(backbone: dict[str, Any]) -> str:
    """Its name and, in parentheses, the options that are not the defaults."""
    name, given = backbone["name"], {key: value for key, value in backbone.items() if key not in ("name", "files")}
    # Constructed, not validated: some have options that must be given, as hf its model.
    default = backbones[name].Options.model_construct().model_dump(mode="json") if name in backbones else {}
    changed = [f"{key} {value}" for key, value in given.items() if key not in default or default[key] != value]
    return f"{name} ({', '.join(changed)})" if changed else str(name)


LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""libyaml's, where it is there: of hundreds of runs a table is ten times as soon read."""


def _read(path: Path) -> dict[str, Any]:
    """A mapping from a file of YAML, or of JSON, which is YAML too; empty where there is none."""
    return yaml.load(path.read_text(encoding="utf-8"), LOADER) or {} if path.is_file() else {}


def _settings(results: Sequence[dict[str, Any]], published: Published, protocol_named: bool) -> list[Setting]:
    """protocol_named: the rows are protocols, found by their names, so that nothing is open there."""
    told = published.setting
    settings = []
    for kind in KINDS:
        if kind == "protocol" and protocol_named:
            continue
        values = [_fact(kind, each) for each in results]
        ours = tuple(dict.fromkeys(each for each in values if each is not None))
        elsewhere = (each["pretext"] and value is None for each, value in zip(results, values, strict=True))
        if ours and kind in OF_PRETRAINING and any(elsewhere):
            ours = (*ours, UNKNOWN)
        setting = Setting(kind, ours, (told[kind],) if kind in told else ())
        if kind in ALWAYS or setting.ours or setting.published:
            settings.append(setting)
    return settings


def _fact(kind: str, result: dict[str, Any]) -> Any:
    """What an evaluation says of itself; None if it does not."""
    if kind == "labels":
        return column_of(result)[1]
    if kind == "metric" and kind in result:
        return metric_of(result)
    return {**result, **result.get("facts", {})}.get(kind)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _equal(kind: str, a: Any, b: Any) -> bool:
    if _is_number(a) and _is_number(b):
        return math.isclose(a, b, rel_tol=ROUNDING if kind == "parameters" else 1e-9)
    return normal(str(a)) == normal(str(b))


def _open(kind: str, a: Any, b: Any) -> bool:
    """Whether the two may mean the same: words against a number (20 epochs, 7800 steps), a name that one side says
    more of ('resnet18 (channels 16)', 'ResNet-18'), or what differs within the published table; of data, where it
    lists ours."""
    if re.search(r"\bby (row|column)\b", str(b)):
        return kind != "data" or ":" not in str(b) or normal(str(a)) in normal(str(b))
    if _is_number(a) or _is_number(b):
        return _is_number(a) != _is_number(b)
    return a != b and normal(str(a).split(" (")[0]) == normal(str(b).split(" (")[0])


def _listed(values: Sequence[Any]) -> str:
    return ", ".join(_shown(each) for each in values) or "unknown"


def _shown(value: Any) -> str:
    if not _is_number(value):
        return str(value)
    return f"{int(value):,}" if value == int(value) else f"{value:g}"


# ---------------------------------------------------------------- names


def normal(name: str) -> str:
    """A name without case and punctuation: 'MNLI-m (Acc)' -> 'mnlimacc'. A percent sign counts: 75 % is not 75."""
    text = unicodedata.normalize("NFKD", name.replace("%", "percent")).casefold()
    return "".join(each for each in text if each.isalnum())


def _of_row(row: Row, results: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """(part of the row, a name it may stand under in a paper), the likeliest first."""
    pretexts = {each["pretext"] or "" for each in results if row_of(each) == row and not each.get("row")}
    names, protocols = (row[0], *pretexts), (row[1], *(registered[row[1]].synonyms if row[1] in registered else ()))
    both = [f"{name} · {protocol}" for name in names for protocol in protocols]
    return [*(("name", each) for each in (*names, *both)), *(("protocol", each) for each in protocols)]


def _of_column(column: Column, stand_ins: Mapping[str, str]) -> list[tuple[str, str]]:
    """The task's name, or what its test stands in for; for a split other than the test the split's alone: ID and OOD are
    different columns."""
    words = [word.strip() for word in re.split(r"[·,:]", column[1])]
    splits = [word for word in words if word and not re.fullmatch(r"[\d.]+ (%|a class)", word)]
    if not splits and column[0] in stand_ins:
        return [("stand-in", stand_ins[column[0]])]
    return [("task", each) for each in splits or [column[0]]]


def _matched(names: Sequence[tuple[str, str]], theirs: Iterable[str], aliases: dict[str, list[str]]) -> Match | None:
    known = {normal(alias): name for name in theirs for alias in aliases.get(name, ())}
    known |= {normal(name): name for name in theirs}
    for part, name in names:
        if normal(name) in known:
            return Match(known[normal(name)], part)
    return None


@dataclass(frozen=True)
class Match:
    """A published row or column, and which part of our name it was found by."""

    name: str
    part: str


# ---------------------------------------------------------------- the comparison


@dataclass
class TextCell(Cell):
    """A cell whose text stands."""

    words: str = ""

    def text(self, number: str = ".1f", plus_minus: str = " ± ") -> str:
        return self.words.replace(" ± ", plus_minus)


@dataclass(frozen=True)
class Pair:
    """One of our cells and the published one it stands beside."""

    row: Row
    column: Column
    published_row: str
    published_column: str
    ours: Cell
    published: Number
    value: float
    """The published value, in our unit."""

    @property
    def difference(self) -> float:
        """Ours minus published."""
        return self.ours.mean - self.value

    def shown(self, value: float, sign: str = "") -> str:
        """One of its numbers, to print."""
        return amount(value, sign) if isinstance(self.ours, Cost) else f"{value:{sign}.1f}"


@dataclass
class Comparison(Table):
    """Three lines a row: ours, published, difference; below, the rank agreement of the rows in each column."""

    pairs: list[Pair] = field(default_factory=list)
    settings: list[Setting] = field(default_factory=list)
    agreements: dict[tuple[str, Column], Agreement] = field(default_factory=dict)
    """(the group of rows, column) -> agreement; one group, '', unless several of our rows share a published one."""
    unmatched: dict[str, list[str]] = field(default_factory=dict)
    """What stands on one side alone, by what it is."""
    against: str = ""
    """The published table's name."""

    second = "which"

    @property
    def same(self) -> bool:
        """Whether all that is told of is known and the same."""
        return bool(self.settings) and all(each.verdict == "same" for each in self.settings)

    def to_csv(self) -> str:
        """One line a cell, each with whether data, steps and parameters were the same: lines get separated from heads."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        verdicts = {each.kind: each.verdict for each in self.settings}
        writer.writerow(
            ["table", "row", "protocol", "task", "column", "mean", "std", "seeds", "published_row", "published_column", "published",
             "published_std", "verified", "difference", *(f"same_{kind}" for kind in ALWAYS)]
        )  # fmt: skip
        for pair in self.pairs:
            ours, number = pair.ours, pair.published
            writer.writerow(
                [self.against, *pair.row, *pair.column, f"{ours.mean:.6g}", "" if ours.deviation is None else f"{ours.deviation:.6g}",
                 len(ours.values), pair.published_row, pair.published_column, f"{pair.value:.6g}",
                 "" if number.deviation is None else number.deviation, number.verified, f"{pair.difference:.6g}",
                 *(verdicts[kind] for kind in ALWAYS)]
            )  # fmt: skip
        return text.getvalue()

    def to_json(self) -> str:
        cells = [
            {"row": pair.row[0], "protocol": pair.row[1], "task": pair.column[0], "column": pair.column[1],
             "values": pair.ours.values, "mean": pair.ours.mean, "std": pair.ours.deviation,
             "published_row": pair.published_row, "published_column": pair.published_column, "published": pair.value,
             "published_std": pair.published.deviation, "verified": pair.published.verified,
             "difference": pair.difference}
            for pair in self.pairs
        ]  # fmt: skip
        settings = {
            each.kind: {"verdict": each.verdict, "ours": each.ours, "published": each.published}
            for each in self.settings
        }
        agreements = [
            {"rows": group or "all", "task": column[0], "column": column[1],
             "tau_b": None if math.isnan(each.tau) else each.tau, "p": None if math.isnan(each.p) else each.p,
             "n": each.rows, "exact": each.exact}
            for (group, column), each in self.agreements.items()
        ]  # fmt: skip
        return json.dumps(
            {"title": self.title, "against": self.against, "preface": self.preface, "same": self.same, "settings": settings, "cells": cells,
             "rank_agreement": agreements, "unmatched": self.unmatched, "notes": self.notes},
            indent=2,
        )  # fmt: skip


@dataclass
class Comparisons:
    """Our table beside the published ones of one short name: those that share a cell with it, or else the first."""

    made: list[Comparison]

    def render(self) -> Group:
        """For the terminal, one below the other."""
        between = [part for each in self.made for part in (Text(), each.render())]
        return Group(*between[1:])

    def to_json(self) -> str:
        return json.dumps([json.loads(each.to_json()) for each in self.made], indent=2)

    def write(self, path: Path) -> None:
        """To a file, in the format of its ending. UserError: another ending, or the file can't be written."""
        rows = [each.to_csv().partition("\n") for each in self.made]
        write_table(
            path,
            lambda: "\n".join(each.to_markdown() for each in self.made),
            lambda: "\n".join(each.to_latex() for each in self.made),
            lambda: rows[0][0] + "\n" + "".join(body for _, _, body in rows),
            self.to_json,
        )


def compare_all(ours: Table, every: Sequence[Published]) -> Comparisons:
    """Our table beside each of several; those without a cell of ours are only named, but for the first where all are."""
    made = [compare(ours, each) for each in every]
    shown = [each for each in made if each.pairs] or made[:1]
    alone = [f"{table.where} ({table.name})" for table, each in zip(every, made, strict=True) if each not in shown]
    if alone:
        shown[-1].note(f"no cell of ours stands in: {'; '.join(alone)}")
    return Comparisons(shown)


def check_stand_ins(columns: Mapping[str, str], tasks: Sequence[str], every: Sequence[Published]) -> None:
    """UserError: one of `columns` (our task -> the published column) is not there, on its side."""
    for task, column in columns.items():
        if task not in tasks:
            raise UserError(f"no task '{task}' is evaluated.{did_you_mean(task, list(tasks))}")
        if not any(_matched([("stand-in", column)], _names(each)[1], each.aliases) for each in every):
            theirs = [name for each in every for name in _names(each)[1]]
            raise UserError(f"there is no column '{column}'.{did_you_mean(column, theirs)}")


def compare(ours: Table, published: Published) -> Comparison:
    """Our table beside a published one.

    Rows and columns find each other by name, whatever the case and punctuation, by the published table's aliases, or by
    what papers call our protocols, or because ours say for which column they stand in (`ours.stand_ins`); a published
    table of which rows are tasks is turned. What behind the numbers is the
    same is read from `ours.results` (each with what `facts` tells of its run under 'facts', where the caller put it there)
    and from the published table's setting.
    """
    published = _by_task(published)
    rows, columns, turned = _axes(ours, published)
    pairs, unlike = _pairs(ours, published, rows, columns, turned)
    kept = {(pair.row, pair.column) for pair in pairs}
    results = [each for each in ours.results if any((row_of(each), column) in kept for column in columns_of(each))]
    made = Comparison(
        f"{ours.title or 'ours'} against {published.name}: {published.paper}, {published.where}",
        ours.metric,
        rank=None,  # the lines of a column are not rivals
        results=results,
        pairs=pairs,
        settings=_settings(
            results,
            published,
            published.task is not None or all(match.part == "protocol" for match in rows.values()),
        )
        if pairs
        else [],
        unmatched=_unmatched(ours, published, rows, columns, turned, unlike),
        against=published.name,
    )
    stood_in = {key[0]: match.name for key, match in columns.items() if match.part == "stand-in"}
    if pairs and stood_in:
        made.settings.append(Setting("test data", tuple(stood_in), tuple(stood_in.values())))
    made.agreements = _agreements(pairs, rows)
    _lay_out(made)
    made.preface = _preface(made, published)
    made.notes = _notes(made, published, ours, rows, columns)
    return made


# ---------------------------------------------------------------- its parts

Axis = dict[Any, Match]
"""Our row or column -> the published one."""


def _by_task(published: Published) -> Published:
    """A table of which the columns are protocols as ours are: a row is one thing pretrained and one protocol."""
    if published.task is None:
        return published
    rows, aliases = {}, {published.task: published.aliases.get(published.task, [])}
    for row, cells in published.rows.items():
        for protocol, number in cells.items():
            rows[f"{row} · {protocol}"] = {published.task: number}
            aliases[f"{row} · {protocol}"] = [f"{other} · {protocol}" for other in published.aliases.get(row, ())]
    return replace(published, rows=rows, aliases=aliases)


def _axes(ours: Table, published: Published) -> tuple[Axis, Axis, bool]:
    """Our rows and columns matched to the published table as it stands, or turned, whichever gives more cells."""
    downs, acrosses = _names(published)
    stand_ins = ours.stand_ins.get(published.name, {})
    ours_rows, ours_columns = _as_measured(ours, published, stand_ins)

    def axes(theirs: tuple[list[str], list[str]]) -> tuple[Axis, Axis]:
        rows = {row: _matched(_of_row(row, ours.results), theirs[0], published.aliases) for row in ours_rows}
        columns = {
            column: _matched(_of_column(column, stand_ins), theirs[1], published.aliases) for column in ours_columns
        }
        return (
            {row: match for row, match in rows.items() if match},
            {column: match for column, match in columns.items() if match},
        )

    straight, turned = axes((downs, acrosses)), axes((acrosses, downs))
    turn = len(turned[0]) * len(turned[1]) > len(straight[0]) * len(straight[1])
    return (*(turned if turn else straight), turn)


def _names(published: Published) -> tuple[list[str], list[str]]:
    """The published rows and columns."""
    return list(published.rows), list(dict.fromkeys(name for cells in published.rows.values() for name in cells))


def _as_measured(ours: Table, published: Published, stand_ins: Mapping[str, str]) -> tuple[list[Row], list[Column]]:
    """Our rows and columns of the protocol and the share of labels that the source names; all, where none is of it.
    A task that stands in for a column does so from whatever labels it has."""
    told = {kind: normal(str(published.setting.get(kind, ""))) for kind in ("protocol", "labels")}
    rows = [row for row in ours.rows if normal(row[1]) == told["protocol"]]
    columns = [column for column in ours.columns if normal(column[1]).startswith(told["labels"] or "no share")]
    named = {task for task, _ in columns}
    columns = [each for each in ours.columns if each in columns or (each[0] in stand_ins and each[0] not in named)]
    return rows or ours.rows, [*columns, *ours.units] if columns else ours.columns


def _number(published: Published, row: str, column: str, turned: bool) -> Number | None:
    down, across = (column, row) if turned else (row, column)
    return published.rows[down].get(across)


def _pairs(ours: Table, published: Published, rows: Axis, columns: Axis, turned: bool) -> tuple[list[Pair], list[str]]:
    """The cells that both sides have, and those that are in units that don't compare."""
    pairs, unlike = [], []
    for row, row_match in rows.items():
        for column, column_match in columns.items():
            cell = ours.cells.get((row, column))
            number = _number(published, row_match.name, column_match.name, turned)
            if cell is None or number is None:
                continue
            unit, theirs = _unit(ours, column), number.unit or published.unit
            convert = _conversion(unit, theirs)
            if convert is None:
                unlike.append(f"{row[0]}, {column[0]} (ours: {unit}, published in {theirs})")
                continue
            value = convert(number.value)
            pairs.append(Pair(row, column, row_match.name, column_match.name, cell, number, value))
    return pairs, unlike


def _unit(ours: Table, column: Column) -> str:
    """Tasks' metrics are in percent, all of them."""
    return ours.units.get(column, "%")


def _conversion(ours: str, published: str) -> Callable[[float], float] | None:
    """What brings a published number to our unit; None: nothing does."""
    if ours != "%":
        return float if ours.casefold() == published.casefold() else None
    known: dict[str, Callable[[float], float]] = {
        "%": float,
        "F1": float,
        "fraction": lambda value: 100 * value,
        "% error": lambda value: 100 - value,
    }
    return known.get(published)


def _unmatched(
    ours: Table, published: Published, rows: Axis, columns: Axis, turned: bool, unlike: list[str]
) -> dict[str, list[str]]:
    downs, acrosses = _names(published)
    if turned:
        downs, acrosses = acrosses, downs
    found_rows, found_columns = ({match.name for match in axis.values()} for axis in (rows, columns))
    alone = {
        "rows of ours": [" · ".join(row) for row in ours.rows if row not in rows],
        "columns of ours": [" ".join(each) for each in ours.columns if each not in columns and each not in ours.units],
        "published rows": [name for name in downs if name not in found_rows],
        "published columns": [name for name in acrosses if name not in found_columns],
        "cells in other units": unlike,
        "cells that only one side has": [
            f"{' · '.join(row)}, {' '.join(column)}"
            for row, down in rows.items()
            for column, across in columns.items()
            if ((row, column) in ours.cells) != (_number(published, down.name, across.name, turned) is not None)
        ],
    }
    return {kind: names for kind, names in alone.items() if names}


def _agreements(pairs: Sequence[Pair], rows: Axis) -> dict[tuple[str, Column], Agreement]:
    """For each column over its rows; where several of our rows share a published one, over each group that doesn't.

    Rows found by their name are grouped by protocol, those found by their protocol by their name.
    """
    shared = len({match.name for match in rows.values()}) < len(rows)
    groups: dict[tuple[str, Column], list[Pair]] = {}
    for pair in pairs:
        group = "" if not shared else pair.row[1] if rows[pair.row].part == "name" else pair.row[0]
        groups.setdefault((group, pair.column), []).append(pair)
    found = {key: agreement([each.ours.mean for each in of], [each.value for each in of]) for key, of in groups.items()}
    return {key: each for key, each in found.items() if each is not None}


def _lay_out(made: Comparison) -> None:
    """The cells as they are printed."""
    several = len({pair.row[1] for pair in made.pairs}) > 1
    for pair in made.pairs:
        name = " · ".join(pair.row) if several else pair.row[0]
        number = pair.published
        deviation = "" if number.deviation is None else f" ± {number.deviation:g}"
        mark = "" if number.verified else " †"
        for which, words in (
            ("ours", pair.ours.text()),
            ("published", f"{pair.shown(pair.value)}{deviation}{mark}"),
            ("difference", pair.shown(pair.difference, "+")),
        ):
            made.cells[(name, which), pair.column] = TextCell(words=words)
    for (group, column), each in made.agreements.items():
        name = "rank agreement" + (f" · {group}" if group else "")
        for which, words in (
            ("tau-b", "undefined" if math.isnan(each.tau) else f"{each.tau:+.2f}"),
            ("p", "–" if math.isnan(each.p) else f"{each.p:.3f}" + ("" if each.exact else " (approx.)")),
            ("rows", str(each.rows)),
        ):
            made.cells[(name, which), column] = TextCell(words=words)


def _preface(made: Comparison, published: Published) -> list[str]:
    """What the numbers may and may not be read as."""
    source = f"{published.paper}, {published.where}"
    if not made.pairs:
        return [f"No cell of ours stands in {source}."]
    differing = [each.kind for each in made.settings if each.verdict == "differs"]
    unknown = [each.kind for each in made.settings if each.verdict == "unknown"]
    if differing:
        head = f"NOT a replication of {source}. Not the same: {', '.join(differing)}."
        head += f" Unknown: {', '.join(unknown)}." if unknown else ""
    elif unknown:
        head = f"Not known to be a replication of {source}. Unknown: {', '.join(unknown)}."
    else:
        head = f"The same as in {source} in all that is told of here."
    told = (
        [f"what is told of the published side: {published.setting['source']}"] if "source" in published.setting else []
    )
    return [head, *(each.text() for each in made.settings), *told]


def _notes(made: Comparison, published: Published, ours: Table, rows: Axis, columns: Axis) -> list[str]:
    notes = []
    if made.pairs:
        spread = published.spread or "as the source gives it"
        notes.append(f"ours: mean ± standard deviation over seeds; published: ± {spread}; difference: ours - published")
        renamed = [
            f"{ours_part} = {match.name}"
            for axis in (rows, columns)
            for key, match in axis.items()
            if match.part != "stand-in"
            and key not in ours.units
            and normal(ours_part := key[1] if match.part == "protocol" else key[0]) != normal(match.name)
        ]
        if renamed:
            notes.append(f"names: {'; '.join(dict.fromkeys(renamed))}")
        stood_in = [f"{key[0]} for {match.name}" for key, match in columns.items() if match.part == "stand-in"]
        if stood_in:
            notes.append(
                f"stand-ins: {'; '.join(dict.fromkeys(stood_in))}: tasks of the same kind on other data, so that the order of the rows and "
                "the gaps between them may be compared, not the values"
            )
        if not all(pair.published.verified for pair in made.pairs):
            notes.append("† recalled from the paper, not seen in it")
        if any(pair.value != pair.published.value for pair in made.pairs):
            notes.append(f"published in {published.unit}, brought to ours")
        measured = [pair for pair in made.pairs if pair.column not in ours.units]
        if len(measured) < len(made.pairs):
            costs = tuple(f"{pair.column[1]}:" for pair in made.pairs if pair.column in ours.units)
            notes += [note for note in ours.notes if note.startswith(costs)]
        if made.agreements:
            fewest = min(each.rows for each in made.agreements.values())
            floor = f"; with {fewest} rows it can't be under {2 / math.factorial(fewest):.2g}" if fewest < 5 else ""
            notes.append(
                f"rank agreement of the rows' means: Kendall's tau-b, two-sided p-value, exact where not marked{floor}"
            )
        else:
            notes.append(f"no rank agreement: it takes {MIN_ROWS} rows in a column")
    notes += [f"not matched, {kind}: {'; '.join(names)}" for kind, names in made.unmatched.items()]
    return notes
