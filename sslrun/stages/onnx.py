"""Write a backbone as an ONNX graph, with its normalization inside."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sslrun.backbones.base import Backbone, Features
from sslrun.data.specs import ImageSpec, TextSpec
from sslrun.data.text.sequences import Tokens
from sslrun.errors import UserError

ONNX = "model.onnx"
"""Name of the graph in its folder."""
OPSET = 18
EXAMPLES = 2
"""Size of the batch that is traced; the graph takes batches of any size."""
LENGTH = 8
"""Length of the traced sequences; the graph takes any length."""


class ImageGraph(nn.Module):
    """Map images (B, 3, H, W) in [0, 1] to pooled features, and to tokens if there are any."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return _outputs(self.backbone(images))


class TextGraph(nn.Module):
    """Map token ids, the mask of real tokens and segments (B, T) int64 to features and tokens."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor
    ) -> tuple[Tensor, ...]:
        tokens = Tokens(input_ids, token_type_ids, attention_mask, packed=False)
        return _outputs(self.backbone(tokens))


def _outputs(features: Features) -> tuple[Tensor, ...]:
    tokens = () if features.tokens is None else (features.tokens,)
    return (features.pooled, *tokens)


def write_onnx(backbone: Backbone, path: Path) -> None:
    """Write the graph of a backbone in evaluation mode.

    Inputs are `images`, float in [0, 1] at the size that the backbone was trained on; or
    `input_ids`, `attention_mask` and `token_type_ids`, as transformers names them. Outputs are
    `features` (B, D) and, if there are any, `tokens` (B, T, D).

    Raises:
        UserError: onnx is not installed, or ONNX cannot express the network.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        raise UserError("--to onnx needs onnx: pip install 'sslrun[onnx]'") from None
    graph, inputs, dynamic = _prepare(backbone)
    with torch.no_grad():
        count = len(graph(*inputs.values()))
    with _quietly():
        try:
            torch.onnx.export(
                graph,
                tuple(inputs.values()),
                str(path),
                input_names=list(inputs),
                output_names=["features", "tokens"][:count],
                dynamic_shapes=dynamic,
                opset_version=OPSET,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
        except Exception as error:  # torch and onnx raise classes of their own, of many kinds
            if isinstance(error, OSError):
                raise
            cause = " ".join(str(error.__cause__ or error).split())[:200]
            raise UserError(
                f"{backbone.name}: ONNX cannot express the network: {cause}; "
                "export another backbone, or to another library"
            ) from None


def _prepare(backbone: Backbone) -> tuple[nn.Module, dict[str, Tensor], dict[str, Any]]:
    """Return the graph's module, an example of its inputs, and its dimensions of any size.

    Raises:
        UserError: the backbone takes neither images nor text.
    """
    batch = torch.export.Dim("batch")
    if isinstance(backbone.spec, ImageSpec):
        size = backbone.spec.size
        images = torch.rand(EXAMPLES, 3, size, size, generator=torch.Generator().manual_seed(0))
        return ImageGraph(backbone), {"images": images}, {"images": {0: batch}}
    if not isinstance(backbone.spec, TextSpec):
        raise UserError(f"{backbone.name}: {backbone.spec.kind} data cannot be exported to ONNX")
    ids = torch.full((EXAMPLES, LENGTH), backbone.spec.tokenizer.sep)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.zeros_like(ids),
    }
    length = torch.export.Dim("length", max=_longest(backbone))
    return TextGraph(backbone), inputs, {name: {0: batch, 1: length} for name in inputs}


def _longest(backbone: Backbone) -> int:
    """The longest sequence that a backbone of text takes, in tokens."""
    return int(getattr(backbone.options, "positions", 4096))


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Leave out what the exporter prints and logs."""
    kept = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(kept)
