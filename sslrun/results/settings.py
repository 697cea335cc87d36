"""Compare the settings behind our numbers with those behind published ones."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sslrun.results.matching import normal
from sslrun.results.published import Published
from sslrun.results.record import RunRecord

ALWAYS = ("data", "steps", "parameters")
"""Settings that are always listed; others are listed if at least one side states them."""
KINDS = (*ALWAYS, "epochs", "backbone", "labels", "protocol", "metric")

OF_PRETRAINING = ("data", "steps", "parameters", "epochs")
UNKNOWN = "unknown"
"""Represents results that do not state a setting, next to others that do."""

ROUNDING = 0.02
"""Relative difference up to which two parameter counts are equal, since papers round them."""


@dataclass(frozen=True)
class Setting:
    """The values of one setting on both sides; an empty tuple if unknown."""

    kind: str
    ours: tuple[Any, ...]
    published: tuple[Any, ...]

    @property
    def verdict(self) -> str:
        """Either "same", "differs" or "unknown"."""
        known = [value for value in self.ours if value != UNKNOWN]
        if not known or not self.published:
            return "unknown"
        pairs = list(itertools.product(known, self.published))
        if all(_equal(self.kind, a, b) for a, b in pairs):
            return "same" if len(known) == len(self.ours) else "unknown"
        return "unknown" if any(_may_be_equal(self.kind, a, b) for a, b in pairs) else "differs"

    def text(self) -> str:
        """Format the verdict with the values of both sides."""
        if self.verdict == "same":
            return f"{self.kind}: the same ({_list_values(self.ours)})"
        ours, published = _list_values(self.ours), _list_values(self.published)
        return f"{self.kind}: {self.verdict} (ours: {ours}; published: {published})"


def facts(record: RunRecord) -> dict[str, Any]:
    """Read the settings that an evaluation's folder states; missing ones are left out.

    These are the backbone (with the options that differ from the defaults), and data, epochs, steps
    and parameters of its pretraining. The sources are the evaluation's recipe and identity, and the
    pretraining in the folder beside it.
    """
    settings: dict[str, Any] = {}
    if "backbone" in record.identity:
        settings["backbone"] = _describe_backbone(record.identity["backbone"])
    if "pretrain" in record.identity.get("origin", {}):
        settings["data"] = (record.recipe.get("data") or {}).get("name")
        settings["epochs"] = (record.recipe.get("pretrain") or {}).get("epochs")
        if record.pretraining is not None:
            settings["steps"] = record.pretraining.steps
            settings["parameters"] = record.pretraining.parameters
    return {kind: value for kind, value in settings.items() if value is not None}


def _describe_backbone(backbone: Mapping[str, Any]) -> str:
    """Format the backbone's name and, in parentheses, its options that are not at their default.

    Keys with a dot are not options: see `Named.identity`.
    """
    options = [
        f"{key} {value}" for key, value in backbone.items() if key != "name" and "." not in key
    ]
    return f"{backbone['name']} ({', '.join(options)})" if options else str(backbone["name"])


def compare_settings(
    records: Sequence[RunRecord], published: Published, protocol_matched: bool
) -> list[Setting]:
    """Compare the settings behind some evaluations with those that a published table states.

    `protocol_matched`: rows were matched by protocol, so that the protocol needs no comparison.
    """
    stated = [(record, _stated(record)) for record in records]
    settings = []
    for kind in KINDS:
        if kind == "protocol" and protocol_matched:
            continue
        values = [own[kind] for _, own in stated if own.get(kind) is not None]
        ours = tuple(dict.fromkeys(values))
        unstated = any(record.pretext and own.get(kind) is None for record, own in stated)
        if ours and kind in OF_PRETRAINING and unstated:
            ours = (*ours, UNKNOWN)
        other = (published.setting[kind],) if kind in published.setting else ()
        if kind in ALWAYS or ours or other:
            settings.append(Setting(kind, ours, other))
    return settings


def _stated(record: RunRecord) -> dict[str, Any]:
    """Return all settings that an evaluation states."""
    own = {"labels": record.labels.title, "protocol": record.protocol, "metric": record.metric.name}
    return {"backbone": record.backbone, **own, **facts(record)}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _equal(kind: str, a: Any, b: Any) -> bool:
    if _is_number(a) and _is_number(b):
        return math.isclose(a, b, rel_tol=ROUNDING if kind == "parameters" else 1e-9)
    return normal(str(a)) == normal(str(b))


def _may_be_equal(kind: str, ours: Any, published: Any) -> bool:
    """Return whether two different values may mean the same.

    That is possible if one is a number and the other words ("20 epochs", 7800), if one side gives
    more detail ("resnet18 (channels 16)", "ResNet-18"), and if the value varies within the
    published table ("by row"). If such a table lists its data after a colon, ours must be listed.
    """
    if re.search(r"\bby (row|column)\b", str(published)):
        lists_data = kind == "data" and ":" in str(published)
        return not lists_data or normal(str(ours)) in normal(str(published))
    if _is_number(ours) or _is_number(published):
        return _is_number(ours) != _is_number(published)
    return ours != published and normal(_without_detail(ours)) == normal(_without_detail(published))


def _without_detail(name: Any) -> str:
    """Remove the parenthesis from a name."""
    return re.sub(r" \(.*", "", str(name))


def _list_values(values: Sequence[Any]) -> str:
    return ", ".join(_format_value(value) for value in values) or UNKNOWN


def _format_value(value: Any) -> str:
    if not _is_number(value):
        return str(value)
    return f"{int(value):,}" if value == int(value) else f"{value:g}"
