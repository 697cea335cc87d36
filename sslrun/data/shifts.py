"""Shifted test sets: what else a task is scored on, out of the distribution that it was learned from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from sslrun.data.corruptions import CORRUPTIONS, corrupted
from sslrun.data.examples import Examples, TensorExamples
from sslrun.data.splits import Splits
from sslrun.errors import UserError
from sslrun.registry import did_you_mean

Severity = Annotated[int, Field(ge=1, le=5)]


class Shift(BaseModel):
    """One test set out of distribution: the test split of another set, or the task's own, corrupted."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    data: Any = None
    """Another set of the same kind of data: its test split, or all of it where it has none."""
    classes: dict[str, str | tuple[str, ...]] = {}
    """With `data`: which of the task's classes a class of that set is, where they are not called the same; several,
    where it knows no difference between them (HANS: {non-entailment: [neutral, contradiction]})."""
    corruption: str | tuple[str, ...] = ()
    """Of the task's own test images, label-preserving, in the style of ImageNet-C; of several the mean is told."""
    severity: Severity | tuple[Severity, ...] = 3
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


@dataclass(frozen=True)
class Part:
    """Examples to score a task on, labelled by the task's own classes."""

    examples: Examples
    same: tuple[tuple[int, ...], ...] = ()
    """Classes that the set knows no difference between: any of them counts as the first."""
    dropped: int = 0
    """Examples left out, since their class is none of the task's."""

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

    `other`: the splits of `shift.data`. UserError: the two sets have no class in common, an image set too large to be
    corrupted in memory, or what is not images.
    """
    if other is not None:
        test = other.test if "test" in other.source.splits else other.source.load("train")
        return {"": _relabelled(name, test, shift.classes, own.classes)}
    if not isinstance(own.test, TensorExamples) or own.spec.modality != "image":
        raise UserError(f"shift '{name}': only images that lie in memory can be corrupted")
    severities = shift.severity if isinstance(shift.severity, tuple) else (shift.severity,)
    return {
        f"{each} {severity}": Part(replace(own.test, inputs=corrupted(own.test.inputs, each, severity)))
        for each in _several(shift.corruption)
        for severity in severities
    }


def _relabelled(
    name: str, examples: Examples, given: Mapping[str, str | Sequence[str]], classes: Sequence[str]
) -> Part:
    """Another set's examples under the task's own labels; those of a class that the task has not are dropped."""
    if examples.labels is None:
        raise UserError(f"shift '{name}': the set has no labels to score by")
    if not classes or not examples.classes:
        return Part(examples)  # numbers or spans: nothing is named
    own = {_plain(each): at for at, each in enumerate(classes)}
    for theirs, ours in given.items():
        if theirs not in examples.classes:
            raise UserError(f"shift '{name}': that set has no class '{theirs}': {', '.join(examples.classes)}")
        for each in _several(ours):
            if each not in classes:
                raise UserError(f"shift '{name}': the task has no class '{each}': {', '.join(classes)}")
    places = torch.full((len(examples.classes),), -1)
    same = []
    for at, theirs in enumerate(examples.classes):
        mine = [classes.index(each) for each in _several(given[theirs])] if theirs in given else []
        if not mine and _plain(theirs) in own:
            mine = [own[_plain(theirs)]]
        if mine:
            places[at] = mine[0]
        if len(mine) > 1:
            same.append(tuple(mine))
    labels = places[examples.labels]
    kept = (labels >= 0).nonzero()[:, 0]
    if len(kept) == 0:
        raise UserError(
            f"shift '{name}': none of its classes ({', '.join(examples.classes[:5])}, ...) is called as one of the "
            f"task's ({', '.join(classes[:5])}, ...): name them, as classes: {{theirs: ours}}"
        )
    found: Any = examples.subset(kept)
    return Part(replace(found, labels=labels[kept], classes=tuple(classes)), tuple(same), len(labels) - len(kept))


def _several(names: str | Sequence[str]) -> Sequence[str]:
    return (names,) if isinstance(names, str) else names


def _plain(name: str) -> str:
    """A class's name without case, spaces and dashes."""
    return "".join(each for each in name.casefold() if each.isalnum())
