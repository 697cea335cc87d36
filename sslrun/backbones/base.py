"""The base class of backbones, and the features that they return."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from sslrun.data.examples import Examples
from sslrun.data.specs import InputSpec
from sslrun.errors import UserError
from sslrun.registry import Options, Registry


class Features(NamedTuple):
    """The features of a batch of B examples."""

    pooled: Tensor
    """(B, D): one vector per example, which probes read."""
    tokens: Tensor | None = None
    """(B, T, D): one vector per patch, without special tokens; or one per token of text, with
    special tokens."""
    grid: Tensor | None = None
    """(B, D, H, W): the vectors of an image's patches in their places."""
    read: Tensor | None = None
    """(B,): index of the token that stands for the whole sequence: [CLS], or the last token in
    causal backbones."""
    mask: Tensor | None = None
    """(B, T) bool: False at padding; None if there is no padding."""
    layers: tuple[Tensor, ...] = ()
    """Embedded tokens (B, T, D) and those after each layer, if the backbone returns them; the last
    may be `tokens`."""

    def float(self) -> Features:
        """Convert to float32 what autocast computed in bf16."""
        return self._replace(
            pooled=self.pooled.float(),
            tokens=None if self.tokens is None else self.tokens.float(),
            grid=None if self.grid is None else self.grid.float(),
            layers=tuple(layer.float() for layer in self.layers),
        )


class Exported(NamedTuple):
    """A backbone in the form of another library."""

    tensors: dict[str, Tensor]
    """Weights under the library's names."""
    files: dict[str, dict[str, Any]]
    """Name of a JSON file of the library's folder -> its content."""


class Backbone(nn.Module):
    """A network that computes features. It does not depend on any pretext task.

    `forward(inputs)` returns `Features`. What is computed from the data, such as an image
    backbone's normalization, is a buffer, so that it is saved with the weights.
    """

    Options: ClassVar[type[Options]] = Options
    name: ClassVar[str]
    version: ClassVar[int] = 1
    """Increase it when the same options lead to another network."""
    takes: ClassVar[type[InputSpec]]
    """Type of the inputs that the backbone takes."""
    offers: ClassVar[frozenset[str]] = frozenset()
    """Capabilities in addition to pooled features.

    - "tokens", "grid": its features have them
    - "dense": it returns features of the places of images of any size
    - "encode": it encodes a subset of the patches
    - "attention": it returns attention weights
    - "layers": it returns one pooled vector for each layer
    - "palette": it reads images as ids of the colors of a palette
    - "actions": it decides on actions; see `sslrun.backbones.control`
    - "segments": it tells the two segments of a pair apart
    - "causal": it reads from both sides, or from the left alone where `Tokens.causal` asks for it
    - "embed": its blocks of one `style` read what `embed` returns for tokens of text
    - "directions": the first half of a token's features depends on the tokens up to it alone, and
      the second half on the tokens from it on
    """
    exports: ClassVar[tuple[str, ...]] = ()
    """Libraries that have a class for the network: transformers, timm, torchvision."""
    shorthand: ClassVar[str | None] = None
    """Option that a recipe may write after a colon, as in `hf:NAME`."""
    counterpart: ClassVar[str | None] = None
    """Name of the backbone for other inputs that recipes may write by this one's name: `hf:NAME`
    on images."""
    width: int
    """Width D of the features."""
    depth: int = 0
    """Number of `layers` in the features."""
    layer_widths: tuple[int, ...] = ()
    """Widths of the vectors that `pooled_layers` returns."""
    patch: int = 1
    """The sides of images must be multiples of this number of pixels."""

    def __init__(self, options: Any, spec: InputSpec) -> None:
        super().__init__()
        self.options = options
        self.spec = spec

    def fit_inputs(self, examples: Examples) -> None:
        """Fit the normalization of inputs to the training examples, once before pretraining."""

    @classmethod
    def limits(cls, options: Any) -> dict[str, int]:
        """Upper bounds on options of the data, such as {"length": positions}."""
        return {}

    def disabled(self) -> dict[str, str]:
        """Capabilities in `offers` that the options turn off, with the setting that enables each.

        For example {"directions": "bidirectional: true"}.
        """
        return {}

    @classmethod
    def draws(cls, options: Any) -> bool:
        """Whether the network draws random numbers in training: dropout, or dropped paths.

        By default, if an option of such a name is not zero.
        """
        values = options.model_dump(include={"dropout", "drop_path"})
        return any(values.values())

    def require(self, capability: str, user: str) -> None:
        """Check that the backbone, as configured, has a capability that `user` needs.

        Raises:
            UserError: the backbone does not offer it, or its options turn it off.
        """
        setting = self.disabled().get(capability)
        if setting is not None:
            raise UserError(
                f"{user} needs a backbone with '{capability}', "
                f"which '{self.name}' offers only with {setting}: set it under backbone"
            )
        if capability not in self.offers:
            raise UserError(lacking_capability(type(self), capability, user))

    def encode(self, patches: Tensor, mask: Tensor | None = None) -> Tensor:
        """Encode embedded patches (B, N, D), all or a subset, to tokens (B, special + N, D).

        [CLS] is the first special token. No token attends to a patch where `mask` (B, N) bool is
        false. Capability "encode".
        """
        raise NotImplementedError

    def embed(self, inputs: Any) -> Tensor:
        """Embed patches with their positions: (B, N, D). Capability "encode"."""
        raise NotImplementedError

    def positions(self, rows: int, columns: int) -> Tensor:
        """Position embeddings (1, rows * columns, D) that `embed` adds. Capability "encode"."""
        raise NotImplementedError

    def dense(self, inputs: Any, layer: int | None = None) -> Tensor:
        """Features (B, D, H, W) of an image's places, at a layer; None: the last.

        Images may have any size that the patch divides. Capability "dense".

        Raises:
            UserError: the backbone has no such layer.
        """
        if layer is not None:
            raise UserError(f"'{self.name}' gives the features of its last layer only: set none")
        grid = self(inputs).grid
        assert isinstance(grid, Tensor)
        return grid

    def attention(self, inputs: Any) -> Tensor:
        """Attention weights (B, heads, T, T) of the last block. Capability "attention"."""
        raise NotImplementedError

    def pooled_layers(self, inputs: Any) -> tuple[Tensor, ...]:
        """One vector (B, D) for each layer, from input to output; D may differ between layers.

        Capability "layers".
        """
        raise NotImplementedError

    def export(self, library: str) -> Exported:
        """Convert to the form of a library in `exports`.

        Raises:
            UserError: the library has no class for the network as configured.
        """
        raise NotImplementedError

    def own_names(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename the weights of timm, torchvision or transformers to this network's names."""
        return tensors

    def fit_weights(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Adapt this network's weights from training on other inputs, such as larger images."""
        return tensors

    def obstacle(self, tensors: dict[str, Tensor]) -> str | None:
        """Explain why these weights, under this network's names, cannot be loaded; None if unknown.

        A mismatch of shapes is reported without it.
        """
        return None

    def patch_projection(self) -> list[nn.Parameter]:
        """Parameters of the linear map of patches to tokens; empty if there is none."""
        return []

    def layers(self) -> list[list[nn.Parameter]]:
        """Parameters from input to output, grouped by depth, for layer-wise learning-rate decay."""
        return [list(self.parameters())]

    def forward(self, inputs: Any) -> Features:
        """Compute the features of a batch."""
        raise NotImplementedError


backbones: Registry[Backbone] = Registry("backbone")


def lacking_capability(backbone: type[Backbone], capability: str, user: str) -> str:
    """The error message for a backbone that does not offer the capability that `user` needs."""
    able = [
        name
        for name in backbones
        if capability in backbones[name].offers and backbones[name].takes is backbone.takes
    ]
    remedy = (
        f"choose one that has it: {', '.join(able)}"
        if able
        else "no backbone for such inputs has it"
    )
    return (
        f"{user} needs a backbone with '{capability}', "
        f"which '{backbone.name}' does not offer: {remedy}"
    )


def no_class(name: str, library: str, option: str, needed: str, other: str) -> UserError:
    """The error for a network that a library does not have, with a library that has it."""
    return UserError(
        f"{name}: {library} has no counterpart of {option}: export with --to {other}, or pretrain "
        f"with backbone.{needed}"
    )
