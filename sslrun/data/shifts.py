"""Shifted test sets: out-of-distribution data that a task is scored on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from sslrun.data.examples import Examples
from sslrun.data.image.corruptions import CORRUPTIONS, CorruptedExamples
from sslrun.data.specs import ImageSpec
from sslrun.data.splits import Splits
from sslrun.errors import UserError
from sslrun.registry import did_you_mean

Severity = Annotated[int, Field(ge=1, le=5)]


class Shift(BaseModel):
    """One out-of-distribution test set: another set's test split, or the task's own, corrupted."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    data: Any = None
    """Another data set of the same kind; its test split is used."""
    classes: dict[str, str | tuple[str, ...]] = {}
    """Class of `data` -> class of the task, for classes that are named differently. Give a list if
    the class covers several of the task's, as in HANS: {non-entailment: [neutral, contradiction]}.
    Requires `data`."""
    corruption: str | tuple[str, ...] = ()
    """Corruption of the task's own test images, as in ImageNet-C; a list is averaged."""
    severity: Severity | Annotated[tuple[Severity, ...], Field(min_length=1)] = 3
    """Severity of the corruption, from 1 to 5; a list is averaged."""

    @model_validator(mode="after")
    def _check(self) -> Shift:
        if (self.data is None) == (not self.corruption):
            raise ValueError("give either data (another set) or corruption (of the test images)")
        if self.classes and self.data is None:
            raise ValueError("classes requires data")
        for name in _as_sequence(self.corruption):
            if name not in CORRUPTIONS:
                hint = did_you_mean(name, list(CORRUPTIONS))
                raise ValueError(f"no such corruption: '{name}'.{hint}")
        return self

    def as_dict(self) -> dict[str, Any]:
        """Return the shift as a recipe writes it."""
        options = self.model_dump(mode="json", exclude={"data"}, exclude_defaults=True)
        return {"data": self.data.as_dict(), **options} if self.data is not None else options

    def identity(self) -> dict[str, Any]:
        """Return what distinguishes the shift in the hash of a run."""
        options = self.as_dict()
        return {**options, "data": self.data.identity()} if self.data is not None else options


@dataclass(frozen=True)
class Part:
    """Examples to score a task on, labeled with the task's own classes."""

    examples: Examples
    merged: tuple[tuple[int, ...], ...] = ()
    """Groups of classes that the set does not distinguish; each counts as its group's first."""
    dropped: Mapping[str, int] = field(default_factory=dict)
    """Number of examples left out, by their class, because the task has no such class."""

    def merge_classes(self, outputs: Tensor) -> Tensor:
        """Merge the scores (N, C) of each group of `merged` classes into its first class.

        That class gets the largest score of the group, and the others get -inf.
        """
        if not self.merged:
            return outputs
        outputs = outputs.clone()
        for first, *rest in self.merged:
            outputs[:, first] = outputs[:, [first, *rest]].amax(dim=1)
            outputs[:, rest] = float("-inf")
        return outputs


def make_parts(name: str, shift: Shift, own: Splits, other: Splits | None) -> dict[str, Part]:
    """Return the test sets whose mean score is the score of a shift, by name.

    A shift by corruption has one part per corruption and severity; any other shift has one part,
    named "". `own` holds the splits of the task, `other` those of `shift.data`.

    Raises:
        UserError: The sets have no class in common, or `classes` names one that they do not have.
    """
    if other is not None:
        return {"": _relabel(name, other.test, shift.classes, own)}
    if isinstance(own.spec, ImageSpec) and own.spec.channels != 3:
        raise UserError(
            f"shift '{name}': corruptions are for color images of 3 channels, and these have "
            f"{own.spec.channels}: remove it, or name other data"
        )
    severities = shift.severity if isinstance(shift.severity, tuple) else (shift.severity,)
    return {
        f"{corruption} {severity}": Part(CorruptedExamples(own.test, corruption, severity))
        for corruption in _as_sequence(shift.corruption)
        for severity in severities
    }


ClassNames = Mapping[str, str | Sequence[str]]
"""A class of another set -> the class or classes of the task, as `Shift.classes` gives them."""


def _relabel(name: str, examples: Examples, renamed: ClassNames, task: Splits) -> Part:
    """Label another set's examples with the task's classes, and drop those of other classes."""
    if examples.strata is None:
        raise UserError(f"shift '{name}': the set has no labels to score with")
    if _has_classes(examples) != _has_classes(task.test):
        raise UserError(
            f"shift '{name}': its labels are of another kind (classes, spans or tags) than the "
            "task's; choose a data set of the same kind"
        )
    if not _has_classes(examples):
        if renamed:
            raise UserError(
                f"shift '{name}': classes is only for tasks with one class per example: remove it"
            )
        return Part(examples)  # numbers, spans and tags mean the same in every set
    matches = _match_classes(name, examples.classes, renamed, task.classes)
    assert examples.labels is not None
    own_classes = torch.tensor([match[0] if match else -1 for match in matches])
    labels = own_classes[examples.labels]
    kept = (labels >= 0).nonzero()[:, 0]
    if len(kept) == 0:
        raise UserError(
            f"shift '{name}': none of its classes ({_abbreviate(examples.classes)}) has the name "
            f"of a class of the task ({_abbreviate(task.classes)}): match them, as in "
            "classes: {theirs: ours}"
        )
    dropped = examples.labels[labels < 0].bincount(minlength=len(examples.classes)).tolist()
    counts = zip(examples.classes, dropped, strict=True)
    subset: Any = examples.subset(kept)
    relabeled = replace(subset, labels=labels[kept], classes=tuple(task.classes))
    merged = tuple(match for match in matches if len(match) > 1)
    return Part(relabeled, merged, {label: count for label, count in counts if count})


def _match_classes(
    name: str, classes: Sequence[str], renamed: ClassNames, own_classes: Sequence[str]
) -> list[tuple[int, ...]]:
    """Return the indices of the task's classes that each of another set's `classes` covers.

    Classes are matched as `renamed` says, otherwise by name without case, spaces and punctuation.

    Example: own classes (bird, frog, car) and classes (Bird, animal, kite) with {animal: [frog]}
    give [(0,), (1,), ()].

    Raises:
        UserError: `renamed` names an unknown class, or one of several is matched twice.
    """
    _check_names(name, classes, renamed, own_classes)
    by_name = {_normalize(own): index for index, own in enumerate(own_classes)}
    matches: list[tuple[int, ...]] = []
    matched_by: dict[int, str] = {}  # own class -> the first of `classes` that covers it
    in_group: set[int] = set()  # own classes that one of `classes` covers together with others
    for label in classes:
        match = tuple(own_classes.index(own) for own in _as_sequence(renamed.get(label, ())))
        if not match and (same_name := by_name.get(_normalize(label))) is not None:
            match = (same_name,)
        for index in match:
            if index in in_group or (len(match) > 1 and index in matched_by):
                raise UserError(
                    f"shift '{name}': class '{own_classes[index]}' is matched to "
                    f"'{matched_by[index]}' and to '{label}': only a class that is matched alone "
                    "may be matched twice"
                )
        for index in match:
            matched_by.setdefault(index, label)
        if len(match) > 1:
            in_group.update(match)
        matches.append(match)
    return matches


def _check_names(
    name: str, classes: Sequence[str], renamed: ClassNames, own_classes: Sequence[str]
) -> None:
    """Raise UserError if `renamed` names a class that the set, or the task, does not have."""
    for label, own_labels in renamed.items():
        if label not in classes:
            hint = did_you_mean(label, list(classes))
            raise UserError(f"shift '{name}': that set has no class '{label}'.{hint}")
        for own in _as_sequence(own_labels):
            if own not in own_classes:
                hint = did_you_mean(own, list(own_classes))
                raise UserError(f"shift '{name}': the task has no class '{own}'.{hint}")


def _as_sequence(names: str | Sequence[str]) -> Sequence[str]:
    return (names,) if isinstance(names, str) else names


def _has_classes(examples: Examples) -> bool:
    """Return whether an example has one class, instead of a number, a span or tags."""
    return bool(examples.classes) and examples.strata is examples.labels


def _abbreviate(names: Sequence[str]) -> str:
    """List the first five names, then "..." if there are more."""
    return ", ".join([*names[:5], *(["..."] if len(names) > 5 else [])])


def _normalize(name: str) -> str:
    """Return the name of a class without case, spaces and punctuation."""
    return "".join(character for character in name.casefold() if character.isalnum())
