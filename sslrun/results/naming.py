"""Names that distinguish runs of one recipe with different options."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sslrun.results.record import RunRecord

SHARED = ("seed", "origin", "head", "labels", "stage", "shifts", "devices")
"""Keys of identities that may differ within a row of a table."""


def distinguish(groups: Sequence[Hashable], runs: Sequence[RunRecord]) -> list[str]:
    """Describe the options in which a run differs from others of its group; blank if in none.

    `groups` holds the group of each run: "pretext.condition: none, data.top: 0.1".
    """
    settings = [dict(settings_of(run)) for run in runs]
    varying = {}
    for group in dict.fromkeys(groups):
        members = [own for own, other in zip(settings, groups, strict=True) if other == group]
        varying[group] = _varying(members)
    return [
        ", ".join(f"{key}: {own.get(key, 'default')}" for key in varying[group])
        for own, group in zip(settings, groups, strict=True)
    ]


def with_distinct_rows(records: Sequence[RunRecord]) -> list[RunRecord]:
    """Give evaluations of different options different rows, if no sweep has named their rows."""
    unnamed = [record for record in records if record.row_name is None]
    groups = [(record.row, record.task) for record in unnamed]
    names = dict(zip(map(id, unnamed), distinguish(groups, unnamed), strict=True))
    return [
        replace(record, row_name=f"{record.row.name} ({name})")
        if (name := names.get(id(record)))
        else record
        for record in records
    ]


def settings_of(run: RunRecord) -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and value of each option that determines a run's row.

    An evaluation has the options of its pretraining, too.
    """
    if run.pretraining is not None:
        yield from _flat(run.pretraining.identity)
    yield from _flat(run.identity)


def _varying(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """List the keys whose values differ, in the order of first appearance."""
    keys = dict.fromkeys(key for own in settings for key in own)
    return without_options(key for key in keys if len({repr(own.get(key)) for own in settings}) > 1)


def without_options(keys: Iterable[str]) -> list[str]:
    """Leave out the options of a component whose name is among the keys, too."""
    keys = list(keys)
    named = tuple(key.removesuffix("name") for key in keys if key.endswith(".name"))
    return [key for key in keys if key.endswith(".name") or not key.startswith(named)]


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and value of each leaf of an identity, without what is shared."""
    for key, value in values.items():
        if not prefix and key in SHARED:
            continue
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
