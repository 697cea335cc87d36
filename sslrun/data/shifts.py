"""Shifted test sets: what else a task is scored on, out of the distribution that it was learned from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from sslrun.data.examples import Examples
from sslrun.data.image.corruptions import CORRUPTIONS, Corrupted
from sslrun.data.splits import Splits
from sslrun.errors import UserError
from sslrun.registry import did_you_mean

ID, MEAN_SHIFT = "ID", "mean OOD"
"""What stands beside the shifts: the task's own test, and the mean over them where they are several."""

Severity = Annotated[int, Field(ge=1, le=5)]


class Shift(BaseModel):
    """One test set out of distribution: the test split of another set, or the task's own, corrupted."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    data: Any = None
    """Another set of the same kind of data: its test split (of a folder of images for each domain, one of them)."""
    classes: dict[str, str | tuple[str, ...]] = {}
    """With `data`: which of the task's classes a class of that set is, where they are not called the same; several,
    where it knows no difference between them (HANS: {non-entailment: [neutral, contradiction]})."""
    corruption: str | tuple[str, ...] = ()
    """Of the task's own test images, label-preserving, in the style of ImageNet-C; of several the mean is told."""
    severity: Severity | Annotated[tuple[Severity, ...], Field(min_length=1)] = 3
    """Of the corruption: 1 to 5; of several the mean is told."""

    @model_validator(mode="after")
    def _consistent(self) -> Shift:
        if (self.data is None) == (not self.corruption):
            raise ValueError("give either data, another set, or corruption, of the test images")
        if self.classes and self.data is None:
            raise ValueError("classes goes with data")
        for each in _several(self.corruption):
            if each not in CORRUPTIONS:
                raise ValueError(f"no such corruption: '{each}'.{did_you_mean(each, list(CORRUPTIONS))}")
        return self

    def as_dict(self) -> dict[str, Any]:
        """As a recipe gives it."""
        given = self.model_dump(mode="json", exclude={"data"}, exclude_defaults=True)
        return {"data": self.data.as_dict(), **given} if self.data is not None else given

    def identity(self) -> dict[str, Any]:
        """What tells it from another in a run's hash."""
        given = self.as_dict()
        return {**given, "data": self.data.identity()} if self.data is not None else given


@dataclass(frozen=True)
class Part:
    """Examples to score a task on, labelled by the task's own classes."""

    examples: Examples
    same: tuple[tuple[int, ...], ...] = ()
    """Classes that the set knows no difference between: any of them counts as the first."""
    dropped: Mapping[str, int] = field(default_factory=dict)
    """Examples left out, by their class, which is none of the task's."""

    def told(self, outputs: Tensor) -> Tensor:
        """Scores (N, C) in which the classes of `same` are one, the first."""
        if not self.same:
            return outputs
        outputs = outputs.clone()
        for first, *rest in self.same:
            outputs[:, first] = outputs[:, [first, *rest]].amax(dim=1)
            outputs[:, rest] = float("-inf")
        return outputs


def parts_of(name: str, shift: Shift, own: Splits, other: Splits | None) -> dict[str, Part]:
    """What a shift's score is the mean over: of several corruptions or severities one part each.

    `other`: the splits of `shift.data`. UserError: the two sets have no class in common, or one that `classes` names is
    none of theirs.
    """
    if other is not None:
        return {"": _relabelled(name, other.test, shift.classes, own)}
    severities = shift.severity if isinstance(shift.severity, tuple) else (shift.severity,)
    return {
        f"{each} {severity}": Part(Corrupted(own.test, each, severity))
        for each in _several(shift.corruption)
        for severity in severities
    }


def _relabelled(name: str, examples: Examples, given: Mapping[str, str | Sequence[str]], task: Splits) -> Part:
    """Another set's examples under the task's own labels; those of a class that the task has not are dropped."""
    if examples.strata is None:
        raise UserError(f"shift '{name}': the set has no labels to score by")
    if _has_classes(examples) != _has_classes(task.test):
        raise UserError(
            f"shift '{name}': what that set's labels are is not what the task's are: name a set of its kind"
        )
    if not _has_classes(examples):
        if given:
            raise UserError(f"shift '{name}': classes is for tasks of which an example has one class")
        return Part(examples)  # numbers, spans and tags mean the same everywhere
    assert examples.labels is not None
    classes = task.classes
    own = {_plain(each): at for at, each in enumerate(classes)}
    for theirs, ours in given.items():
        if theirs not in examples.classes:
            hint = did_you_mean(theirs, list(examples.classes))
            raise UserError(f"shift '{name}': that set has no class '{theirs}'.{hint}")
        for each in _several(ours):
            if each not in classes:
                raise UserError(f"shift '{name}': the task has no class '{each}'.{did_you_mean(each, list(classes))}")
    places = torch.full((len(examples.classes),), -1)
    same: list[tuple[int, ...]] = []
    of: dict[int, str] = {}  # classes of which several are one there, and what they are called there
    for at, theirs in enumerate(examples.classes):
        mine = [classes.index(each) for each in _several(given[theirs])] if theirs in given else []
        if not mine and _plain(theirs) in own:
            mine = [own[_plain(theirs)]]
        for own_class in mine:
            if own_class in of or (len(mine) > 1 and own_class in places):
                first = of.get(own_class) or examples.classes[int((places == torch.tensor(own_class)).nonzero()[0, 0])]
                raise UserError(f"shift '{name}': '{classes[own_class]}' is said to be of '{first}' and of '{theirs}'")
        if mine:
            places[at] = mine[0]
        if len(mine) > 1:
            same.append(tuple(mine))
            of |= dict.fromkeys(mine, theirs)
    labels = places[examples.labels]
    kept = (labels >= 0).nonzero()[:, 0]
    if len(kept) == 0:
        raise UserError(
            f"shift '{name}': none of its classes ({_some(examples.classes)}) is called as one of the task's "
            f"({_some(classes)}): name them, as classes: {{theirs: ours}}"
        )
    counts = examples.labels[labels < 0].bincount(minlength=len(examples.classes)).tolist()
    dropped = {theirs: count for theirs, count in zip(examples.classes, counts, strict=True) if count}
    found: Any = examples.subset(kept)
    return Part(replace(found, labels=labels[kept], classes=tuple(classes)), tuple(same), dropped)


def _several(names: str | Sequence[str]) -> Sequence[str]:
    return (names,) if isinstance(names, str) else names


def _has_classes(examples: Examples) -> bool:
    """Whether an example has one class, and not a number, a span or tags."""
    return bool(examples.classes) and examples.strata is examples.labels


def _some(names: Sequence[str]) -> str:
    return ", ".join([*names[:5], *(["..."] if len(names) > 5 else [])])


def _plain(name: str) -> str:
    """A class's name without case, spaces and dashes."""
    return "".join(each for each in name.casefold() if each.isalnum())
