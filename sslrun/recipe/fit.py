"""Whether data, a pretext or downstream task, and a backbone fit together: by the types of their inputs."""

from __future__ import annotations

from typing import Literal, NamedTuple

from sslrun.backbones.base import Backbone, lacking_capability
from sslrun.data.source import Source
from sslrun.data.specs import InputSpec
from sslrun.pretexts.base import Pretext
from sslrun.tasks.base import Task


class Misfit(NamedTuple):
    """Why a recipe cannot combine its components."""

    culprit: Literal["task", "backbone"]
    """The component to change."""
    reason: str


def misfit(
    source: type[Source], task: type[Pretext] | type[Task] | None, backbone: type[Backbone]
) -> Misfit | None:
    """Why a recipe cannot combine them; None if it can.

    The task, pretext or downstream, must read what the source gives, and the backbone must take
    what the task gives it: a video pretext that gives images serves every image backbone. Without a
    task the backbone must take the data as they are.
    """
    given: type[InputSpec] = source.gives
    giver = source.name
    if task is not None:
        if not issubclass(source.gives, task.reads):
            reason = f"'{task.name}' reads {task.reads.kind} data, but '{source.name}' is {source.gives.kind} data"
            return Misfit("task", reason)
        if task.gives is not None:
            given, giver = task.gives, task.name
    if not issubclass(given, backbone.takes):
        reason = f"'{backbone.name}' takes {backbone.takes.kind} data, but '{giver}' gives {given.kind} data"
        return Misfit("backbone", reason)
    for capability in getattr(task, "needs", ()):
        if capability not in backbone.offers:
            return Misfit(
                "task", lacking_capability(backbone, capability, f"'{task.name}'" if task else "")
            )
    return None
