"""The type of every pretext task."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sslrun.backbones.base import Backbone
from sslrun.data.examples import Batch, Examples
from sslrun.data.specs import InputSpec
from sslrun.registry import Options, Registry
from sslrun.training.learner import Learner


class PretextOptions(Options):
    """Settings of a pretext task."""


class Pretext(Learner):
    """A self-supervised objective: makes its targets from the data, owns its heads and teachers, returns a loss.

    See `Learner` for when the loop calls `views`, `forward`, `before_step` and `after_step`.
    """

    Options: ClassVar[type[PretextOptions]] = PretextOptions
    name: ClassVar[str]
    version: ClassVar[int] = 1
    """Raised when the same options come to mean another objective."""
    reads: ClassVar[type[InputSpec]]
    """The inputs that it makes its views from."""
    gives: ClassVar[type[InputSpec] | None] = None
    """The inputs that it gives the backbone; None: the same as it reads."""
    needs: ClassVar[tuple[str, ...]] = ()
    """What it needs from a backbone in addition to pooled features: names of `Backbone.offers`."""

    def __init__(self, options: Any, backbone: Backbone) -> None:
        super().__init__()
        self.options = options
        self.backbone = backbone

    @classmethod
    def backbone_spec(cls, options: Any, spec: InputSpec) -> InputSpec:
        """The spec to build the backbone for, from the data's; an instance of `gives`."""
        return spec

    @property
    def kept(self) -> Backbone:
        """The backbone that is saved, watched and evaluated: a teacher's where the paper says so."""
        return self.backbone

    def layers(self) -> list[list[nn.Parameter]]:
        return self.backbone.layers()

    def arrange(self, examples: Examples, seed: int) -> Examples:
        """The examples as this pretext reads them, such as text in pairs of segments; by default as they are."""
        return examples

    def held_out(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Metrics on held-out examples, `held_out_loss` among them, in eval mode and without gradient.

        By default none: a loss that compares views says little about what was learned.
        """
        return {}

    def floor(self, examples: Examples) -> float | None:
        """The held-out loss of a model that uses no context, to recognize one that is stuck; None: there is none."""
        return None


pretexts: Registry[Pretext] = Registry("pretext")
