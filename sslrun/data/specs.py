"""Input specs: what a network needs to know about its inputs, one class per kind of data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from sslrun.errors import UserError
from sslrun.files import replacing
from sslrun.runs import check_file

if TYPE_CHECKING:
    from sslrun.data.text.tokenizer import Tokenizer

TOKENIZER = "tokenizer.json"
"""Name of the file with the tokenizer of a spec of text, beside `SPEC`."""
SPEC = "spec.json"
"""Name of a spec's file, beside the weights of every backbone."""


class InputSpec:
    """What inputs look like. Subclasses are frozen dataclasses with a `kind` of their own.

    `save` writes the spec beside the weights of a backbone and `InputSpec.load` reads it back, so
    that the backbone can be rebuilt from its folder alone.
    """

    kind: ClassVar[str]
    """What the inputs are, such as "image": the name in files and messages."""
    unit: ClassVar[str]
    """What progress counts, in the plural: "images"."""
    kinds: ClassVar[dict[str, type[InputSpec]]] = {}
    """Every kind -> its class."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "kind" in vars(cls):
            InputSpec.kinds[cls.kind] = cls

    @property
    def vocabulary(self) -> str | None:
        """A digest of the tokens that ids stand for; None if inputs have no vocabulary.

        Weights fit only the vocabulary that they were trained with.
        """
        return None

    def save(self, folder: Path) -> None:
        """Write the spec into `folder`."""
        self._write(folder, asdict(self))  # type: ignore[call-overload]

    def _write(self, folder: Path, fields: dict[str, Any]) -> None:
        with replacing(folder / SPEC) as temporary:
            temporary.write_text(json.dumps({"kind": self.kind, **fields}), encoding="utf-8")

    @classmethod
    def restore(cls, fields: dict[str, Any], folder: Path) -> Self:
        """Build the spec of this class from the fields that `save` wrote into `folder`."""
        return cls(**fields)

    @staticmethod
    def load(folder: Path) -> InputSpec:
        """Read the spec of any kind that `save` wrote into `folder`.

        Raises:
            UserError: The file is missing, damaged, or of an unknown kind.
        """
        path = folder / SPEC
        for name in (SPEC, TOKENIZER):
            check_file(folder / name)
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            kind = fields.pop("kind")
        except FileNotFoundError:
            raise UserError(
                f"{path}: no such file: it describes the inputs of the weights beside it"
            ) from None
        except (OSError, ValueError, AttributeError, KeyError):
            raise UserError(f"{path}: not a spec written by sslrun") from None
        if kind not in InputSpec.kinds:
            raise UserError(
                f"{path}: unknown kind of inputs '{kind}': import its plug-in with --import"
            )
        try:
            return InputSpec.kinds[kind].restore(fields, folder)
        except TypeError:
            raise UserError(
                f"{path}: not a spec of kind '{kind}' as this version writes it"
            ) from None


@dataclass(frozen=True)
class ImageSpec(InputSpec):
    """Images of one shape; gray ones are stored with three equal channels by default."""

    kind = "image"
    unit = "images"

    size: int
    """Side, in pixels; the height if the images are not square."""
    channels: int = 3
    width: int | None = field(default=None, repr=False)
    """Width, in pixels, if the images are not square; None: equal to `size`."""

    @classmethod
    def of(cls, shape: Sequence[int]) -> ImageSpec:
        """Return the spec of images of a shape (..., C, H, W)."""
        channels, height, width = shape[-3:]
        return cls(height, channels, None if width == height else width)

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width, in pixels."""
        return self.size, self.width or self.size

    @property
    def is_square(self) -> bool:
        return self.shape[0] == self.shape[1]

    def save(self, folder: Path) -> None:
        """Write the spec; a width only if the images are not square."""
        width = {} if self.width is None else {"width": self.width}
        self._write(folder, {"size": self.size, "channels": self.channels, **width})


@dataclass(frozen=True)
class TextSpec(InputSpec):
    """Token sequences: their vocabulary and maximum length."""

    kind = "text"
    unit = "sequences"

    tokenizer: Tokenizer
    length: int
    """Maximum number of tokens per sequence, special tokens included."""

    @property
    def vocab(self) -> int:
        """Size of the vocabulary."""
        return self.tokenizer.vocab

    @property
    def vocabulary(self) -> str:
        return self.tokenizer.digest

    def save(self, folder: Path) -> None:
        """Write the spec, and the tokenizer as tokenizer.json."""
        self.tokenizer.save(folder)
        self._write(folder, {"length": self.length})

    @classmethod
    def restore(cls, fields: dict[str, Any], folder: Path) -> Self:
        from sslrun.data.text.tokenizer import TokenizerOptions, load_tokenizer

        return cls(load_tokenizer(TokenizerOptions(file=folder / TOKENIZER)), **fields)


@dataclass(frozen=True)
class VideoSpec(InputSpec):
    """Clips: a fixed number of color frames of one shape."""

    kind = "video"
    unit = "clips"

    size: int
    """Side of a frame, in pixels; the height if frames are not square."""
    frames: int
    """Number of frames in a clip."""
    channels: int = 3
    width: int | None = field(default=None, repr=False)
    """Width of a frame, in pixels, if frames are not square; None: equal to `size`."""

    @property
    def frame(self) -> ImageSpec:
        """The spec of one frame, for image backbones."""
        return ImageSpec(self.size, channels=self.channels, width=self.width)

    def save(self, folder: Path) -> None:
        """Write the spec; a width only if the frames are not square."""
        width = {} if self.width is None else {"width": self.width}
        fields = {"size": self.size, "frames": self.frames, "channels": self.channels}
        self._write(folder, fields | width)


@dataclass(frozen=True)
class ControlSpec(InputSpec):
    """Windows of trajectories in an environment, which gives states and takes actions."""

    kind = "control"
    unit = "windows"

    environment: str
    """Name of the environment, such as `paths` or `gymnasium:Pendulum-v1`."""
    states: int
    """Size of a state."""
    actions: int
    """Number of discrete actions, or the size of a vector."""
    low: tuple[float, ...] | None = field(default=None, repr=False)
    """Lower bounds of an action's numbers; None: actions are discrete."""
    high: tuple[float, ...] | None = field(default=None, repr=False)
    """Upper bounds of an action's numbers."""
    horizon: int = 1
    """Largest number of steps in an episode."""
    context: int = 20
    """Number of steps in a window."""
    scale: float = 1.0
    """Divisor of returns."""

    @property
    def is_discrete(self) -> bool:
        return self.low is None

    @classmethod
    def restore(cls, fields: dict[str, Any], folder: Path) -> Self:
        bounds = {key: tuple(fields[key]) for key in ("low", "high") if fields.get(key)}
        return cls(**{**fields, **bounds})


@dataclass(frozen=True)
class GraphSpec(InputSpec):
    """Graphs without direction: the categories of their nodes and bonds, and the largest size."""

    kind = "graph"
    unit = "graphs"

    nodes: tuple[int, ...]
    """Number of categories in each column of a node, such as (119, 4): element and chirality."""
    bonds: tuple[int, ...]
    """Number of categories in each column of a bond; empty if all bonds are alike."""
    largest: int = field(compare=False)
    """Number of nodes of the largest graph."""

    @classmethod
    def restore(cls, fields: dict[str, Any], folder: Path) -> Self:
        nodes, bonds = (tuple(fields.pop(name)) for name in ("nodes", "bonds"))
        return cls(nodes, bonds, **fields)
