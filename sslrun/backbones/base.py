"""The type of every backbone, and of what it returns."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from sslrun.data.examples import Examples
from sslrun.data.specs import InputSpec
from sslrun.registry import Options, Registry


class Features(NamedTuple):
    """What a backbone makes of a batch."""

    pooled: Tensor
    """(B, D): one vector an example, what probes read."""
    tokens: Tensor | None = None
    """(B, T, D): one vector a patch, without special tokens; one a token of text, special ones included."""
    grid: Tensor | None = None
    """(B, D, H, W): the same for images, in place."""
    read: Tensor | None = None
    """(B,) the token at which a whole sequence is read: [CLS], or the last one where none sees a later one."""
    mask: Tensor | None = None
    """(B, T) bool: which tokens are no padding; None where all are."""
    layers: tuple[Tensor, ...] = ()
    """Tokens (B, T, D) as embedded and after each layer, where a backbone gives them; the last may be `tokens`."""


class Backbone(nn.Module):
    """A network whose features are the point. Knows nothing of pretexts.

    `forward(inputs) -> Features`. `width` is D of its features. Whatever depends on the data (an image backbone's
    normalisation) is a buffer, so that it travels with the weights.
    """

    Options: ClassVar[type[Options]] = Options
    name: ClassVar[str]
    modality: ClassVar[str]
    width: int
    depth: int = 0
    """How many `layers` its features have."""

    def __init__(self, options: Any, spec: InputSpec) -> None:
        super().__init__()
        self.options = options
        self.spec = spec

    def fit_inputs(self, examples: Examples) -> None:
        """Take from the training examples what normalises the inputs. Called once, before pretraining."""

    def layers(self) -> list[list[nn.Parameter]]:
        """Its parameters from the input to the output, grouped by depth, for layer-wise learning-rate decay."""
        return [list(self.parameters())]

    def forward(self, inputs: Any) -> Features:
        raise NotImplementedError


backbones: Registry[Backbone] = Registry("backbone")
