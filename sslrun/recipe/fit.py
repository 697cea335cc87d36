"""Check whether data, a task and a backbone fit together, by the types of their inputs."""

from __future__ import annotations

from typing import Literal, NamedTuple

from sslrun.backbones.base import Backbone, lacking_capability
from sslrun.data.source import Source
from sslrun.data.specs import InputSpec
from sslrun.pretexts.base import Pretext
from sslrun.protocols.base import protocols
from sslrun.tasks.base import Task


class Misfit(NamedTuple):
    """The reason why a recipe cannot combine its components."""

    culprit: Literal["task", "backbone"]
    """The component to change."""
    reason: str


def misfit(
    source: type[Source], task: type[Pretext] | type[Task] | None, backbone: type[Backbone]
) -> Misfit | None:
    """Explain why a recipe cannot combine the components; None if it can.

    The task (pretext or downstream) must read the kind of data that the source gives, and the
    backbone must take the kind that the task gives. For example, a video pretext that gives images
    works with every image backbone. Without a task, the backbone must take the data directly.
    """
    spec: type[InputSpec] = source.gives
    giver = source.name
    if task is not None:
        if not issubclass(source.gives, task.reads):
            reads, gives = task.reads.kind, source.gives.kind
            reason = f"'{task.name}' reads {reads} data, but '{source.name}' is {gives} data"
            return Misfit("task", reason)
        if task.gives is not None:
            spec, giver = task.gives, task.name
    if not issubclass(spec, backbone.takes):
        takes = backbone.takes.kind
        reason = f"'{backbone.name}' takes {takes} data, but '{giver}' gives {spec.kind} data"
        return Misfit("backbone", reason)
    for capability in getattr(task, "needs", ()):
        if capability not in backbone.offers:
            user = f"'{task.name}'" if task else ""
            return Misfit("task", lacking_capability(backbone, capability, user))
    return None


def lacking_of_protocol(protocol: str, backbone: type[Backbone]) -> str | None:
    """Explain which capability of the backbone a protocol lacks; None if it lacks none."""
    for capability in sorted(protocols[protocol].needs - backbone.offers):
        return lacking_capability(backbone, capability, protocol)
    return None
