"""What was the same behind our numbers and published ones, and what was not."""

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
"""Settings that are listed even if neither side states them; the others are listed if one side
does."""
KINDS = (*ALWAYS, "epochs", "backbone", "labels", "protocol", "metric")

OF_PRETRAINING = ("data", "steps", "parameters", "epochs")
UNKNOWN = "unknown"
"""Stands for results that do not state a setting, beside others that do."""

ROUNDING = 0.02
"""Relative difference up to which two parameter counts are the same: papers round them."""


@dataclass(frozen=True)
class Setting:
    """One setting behind the numbers, on both sides; an empty tuple if unknown."""

    kind: str
    ours: tuple[Any, ...]
    published: tuple[Any, ...]

    @property
    def verdict(self) -> str:
        """same, differs, or unknown."""
        known = [value for value in self.ours if value != UNKNOWN]
        if not known or not self.published:
            return "unknown"
        pairs = list(itertools.product(known, self.published))
        if all(_equal(self.kind, a, b) for a, b in pairs):
            return "same" if len(known) == len(self.ours) else "unknown"
        return "unknown" if any(_may_be_equal(self.kind, a, b) for a, b in pairs) else "differs"

    def text(self) -> str:
        """For display: the verdict with both sides' values."""
        if self.verdict == "same":
            return f"{self.kind}: the same ({_list_values(self.ours)})"
        ours, published = _list_values(self.ours), _list_values(self.published)
        return f"{self.kind}: {self.verdict} (ours: {ours}; published: {published})"


def facts(record: RunRecord) -> dict[str, Any]:
    """What an evaluation's folder states about its settings.

    The backbone (with the options that differ from the defaults), and data, epochs, steps and
    parameters of its pretraining. They are read from its recipe and identity and from the
    pretraining beside it; missing ones are left out.
    """
    found: dict[str, Any] = {}
    if "backbone" in record.identity:
        found["backbone"] = _describe_backbone(record.identity["backbone"])
    if "pretrain" in record.identity.get("origin", {}):
        found["data"] = (record.recipe.get("data") or {}).get("name")
        found["epochs"] = (record.recipe.get("pretrain") or {}).get("epochs")
        if record.pretraining is not None:
            found["steps"] = record.pretraining.steps
            found["parameters"] = record.pretraining.parameters
    return {kind: value for kind, value in found.items() if value is not None}


def _describe_backbone(backbone: Mapping[str, Any]) -> str:
    """The name and, in parentheses, the options: an identity holds those that differ from the defaults.

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

    protocol_matched: the rows found each other by their protocols, which is then no open question.
    """
    stated = [(record, _stated(record)) for record in records]
    settings = []
    for kind in KINDS:
        if kind == "protocol" and protocol_matched:
            continue
        ours = tuple(dict.fromkeys(of[kind] for _, of in stated if of.get(kind) is not None))
        unstated = any(record.pretext and of.get(kind) is None for record, of in stated)
        if ours and kind in OF_PRETRAINING and unstated:
            ours = (*ours, UNKNOWN)
        theirs = (published.setting[kind],) if kind in published.setting else ()
        if kind in ALWAYS or ours or theirs:
            settings.append(Setting(kind, ours, theirs))
    return settings


def _stated(record: RunRecord) -> dict[str, Any]:
    """Every setting that an evaluation states."""
    own = {"labels": record.labels.title, "protocol": record.protocol, "metric": record.metric.name}
    return {"backbone": record.backbone, **own, **facts(record)}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _equal(kind: str, a: Any, b: Any) -> bool:
    if _is_number(a) and _is_number(b):
        return math.isclose(a, b, rel_tol=ROUNDING if kind == "parameters" else 1e-9)
    return normal(str(a)) == normal(str(b))


def _may_be_equal(kind: str, ours: Any, published: Any) -> bool:
    """Whether two values that differ may mean the same.

    That is so for words against a number ("20 epochs", 7800 steps), for a name with more detail on
    one side ("resnet18 (channels 16)", "ResNet-18"), and for what varies within the published
    table; there, data must be listed.
    """
    if re.search(r"\bby (row|column)\b", str(published)):
        return (
            kind != "data"
            or ":" not in str(published)
            or normal(str(ours)) in normal(str(published))
        )
    if _is_number(ours) or _is_number(published):
        return _is_number(ours) != _is_number(published)
    return ours != published and normal(_without_detail(ours)) == normal(_without_detail(published))


def _without_detail(name: Any) -> str:
    """A name without what follows in parentheses."""
    return re.sub(r" \(.*", "", str(name))


def _list_values(values: Sequence[Any]) -> str:
    return ", ".join(_format_value(value) for value in values) or UNKNOWN


def _format_value(value: Any) -> str:
    if not _is_number(value):
        return str(value)
    return f"{int(value):,}" if value == int(value) else f"{value:g}"
