"""Input specs: what a network must know of its inputs to be built, one class for each kind of data."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from sslrun.errors import UserError
from sslrun.files import replacing

if TYPE_CHECKING:
    from sslrun.data.text.tokenizer import Tokenizer

SPEC = "spec.json"
"""The file of a spec, beside the weights of every backbone."""


class InputSpec:
    """What inputs look like. Subclasses are frozen dataclasses with a `kind` of their own.

    `save` writes the spec beside a backbone's weights and `InputSpec.load` reads it back, so that the
    backbone can be rebuilt from its folder alone.
    """

    kind: ClassVar[str]
    """What the inputs are, as in "image": the name in files and messages."""
    unit: ClassVar[str]
    """What progress counts, in the plural: "images"."""
    kinds: ClassVar[dict[str, type[InputSpec]]] = {}
    """Every kind with its class."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "kind" in vars(cls):
            InputSpec.kinds[cls.kind] = cls

    @property
    def vocabulary(self) -> str | None:
        """A digest of the tokens that ids stand for; None where inputs have no vocabulary.

        Weights serve no other vocabulary than the one they were trained with.
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
        """The spec of this class from what `save` wrote into `folder`."""
        return cls(**fields)

    @staticmethod
    def load(folder: Path) -> InputSpec:
        """Read the spec that `save` wrote, of whatever kind. UserError: missing, damaged, or of an unknown kind."""
        path = folder / SPEC
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            kind = fields.pop("kind")
        except FileNotFoundError:
            raise UserError(f"{path}: no such file: it says what inputs the weights beside it take") from None
        except (OSError, ValueError, AttributeError, KeyError):
            raise UserError(f"{path}: not a spec that sslrun wrote") from None
        if kind not in InputSpec.kinds:
            raise UserError(f"{path}: unknown kind of inputs '{kind}': import its plug-in with --import")
        try:
            return InputSpec.kinds[kind].restore(fields, folder)
        except TypeError:
            raise UserError(f"{path}: not a spec of kind '{kind}' as this version writes it") from None


@dataclass(frozen=True)
class ImageSpec(InputSpec):
    """Square color images; gray ones are stored with three equal channels."""

    kind = "image"
    unit = "images"

    size: int
    """Side, in pixels."""
    channels: int = 3


@dataclass(frozen=True)
class TextSpec(InputSpec):
    """Token sequences: their vocabulary and greatest length."""

    kind = "text"
    unit = "sequences"

    tokenizer: Tokenizer
    length: int
    """Tokens of a sequence at most, special ones included."""

    @property
    def vocab(self) -> int:
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

        return cls(load_tokenizer(TokenizerOptions(file=folder / "tokenizer.json")), **fields)
