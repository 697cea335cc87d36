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
    """(B, T, D): one vector a patch, without special tokens; one a token of text, special ones
    included."""
    grid: Tensor | None = None
    """(B, D, H, W): the same for images, in place."""
    read: Tensor | None = None
    """(B,) the token at which a whole sequence is read: [CLS], or the last one where none sees a
    later one."""
    mask: Tensor | None = None
    """(B, T) bool: which tokens are no padding; None where all are."""
    layers: tuple[Tensor, ...] = ()
    """Tokens (B, T, D) as embedded and after each layer, where a backbone gives them; the last may
    be `tokens`."""

    def float(self) -> Features:
        """Convert to float32 what autocast computed in bf16."""
        return self._replace(
            pooled=self.pooled.float(),
            tokens=None if self.tokens is None else self.tokens.float(),
            grid=None if self.grid is None else self.grid.float(),
            layers=tuple(layer.float() for layer in self.layers),
        )


class Backbone(nn.Module):
    """A network whose features are the point. Knows nothing of pretexts.

    `forward(inputs) -> Features`. Whatever depends on the data (an image backbone's normalization)
    is a buffer, so that it travels with the weights.
    """

    Options: ClassVar[type[Options]] = Options
    name: ClassVar[str]
    version: ClassVar[int] = 1
    """Raised when the same options come to mean another network."""
    takes: ClassVar[type[InputSpec]]
    """The inputs that it can be built for."""
    offers: ClassVar[frozenset[str]] = frozenset()
    """What it can do in addition to pooled features: "tokens" and "grid" (in its features),
    "encode" (a subset of the patches), "attention" (weights), "export" (to transformers),
    "segments" (it reads a pair's segments)."""
    shorthand: ClassVar[str | None] = None
    """The option that a recipe may give behind a colon, as in `hf:NAME`."""
    width: int
    """Width D of its features."""
    depth: int = 0
    """Number of `layers` in its features."""
    patch: int = 1
    """Sides of images must be multiples of it, in pixels."""

    def __init__(self, options: Any, spec: InputSpec) -> None:
        super().__init__()
        self.options = options
        self.spec = spec

    def fit_inputs(self, examples: Examples) -> None:
        """Take from the training examples what normalizes the inputs. Called once, before pretraining."""

    @classmethod
    def limits(cls, options: Any) -> dict[str, int]:
        """Options of the data that must not be larger: {"length": positions}."""
        return {}

    def encode(self, patches: Tensor) -> Tensor:
        """Tokens (B, special + N, D) of embedded patches (B, N, D), all of them or a subset. Capability "encode"."""
        raise NotImplementedError

    def embed(self, inputs: Any) -> Tensor:
        """Embedded patches with their positions (B, N, D). Capability "encode"."""
        raise NotImplementedError

    def attention(self, inputs: Any) -> Tensor:
        """Attention weights (B, heads, T, T) of the last block. Capability "attention"."""
        raise NotImplementedError

    def to_transformers(self) -> dict[str, Tensor]:
        """The weights under transformers' names. Capability "export"."""
        raise NotImplementedError

    def transformers_config(self) -> dict[str, Any]:
        """The configuration of transformers' model. Capability "export"."""
        raise NotImplementedError

    def own_names(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Another library's weights (timm's, torchvision's, transformers') under the names of this network."""
        return tensors

    def fit_weights(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Own weights that were trained for other inputs, fitted to these: positions of another image size."""
        return tensors

    def layers(self) -> list[list[nn.Parameter]]:
        """Its parameters from the input to the output, grouped by depth, for layer-wise learning-rate decay."""
        return [list(self.parameters())]

    def forward(self, inputs: Any) -> Features:
        raise NotImplementedError


backbones: Registry[Backbone] = Registry("backbone")


def lacking_capability(backbone: type[Backbone], capability: str, user: str) -> str:
    """The message for a backbone that does not offer what `user` asks for."""
    able = [
        name
        for name in backbones
        if capability in backbones[name].offers and backbones[name].takes is backbone.takes
    ]
    choice = (
        f"take one that has it: {', '.join(able)}" if able else "no backbone for such inputs has it"
    )
    return f"{user} needs a backbone with '{capability}', which '{backbone.name}' does not offer: {choice}"
