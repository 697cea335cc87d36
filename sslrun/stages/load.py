"""Load a backbone for use in Python: `backbone = sslrun.load("runs/...")`, `backbone(images)`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from sslrun.backbones import build_backbone, load_backbone
from sslrun.backbones.base import Backbone, backbones
from sslrun.backbones.weights import WEIGHTS
from sslrun.data.examples import Examples, TensorExamples
from sslrun.data.image.images import Decoder, EncodedFiles, convert_arrays
from sslrun.data.specs import ImageSpec, InputSpec, TextSpec
from sslrun.data.text.sequences import build_labeled
from sslrun.data.text.tokenizer import TokenizerOptions, load_tokenizer
from sslrun.errors import UserError

DEFAULT_SIZE = 224
"""Side of the images that a network of any size is given, in pixels."""
LONGEST = 512
"""Largest number of tokens of a text, if the encoder takes more."""

Images = Sequence[Any] | np.ndarray | Tensor


class LoadedBackbone:
    """A pretrained backbone that computes the features of images or of sentences.

    >>> backbone = sslrun.load("runs/simclr-cifar10/pretrain-0123456789ab")
    >>> features = backbone(["a.png", "b.png"])  # (2, D) float32
    """

    def __init__(self, backbone: Backbone, device: torch.device) -> None:
        self.backbone = backbone.to(device).eval()
        """The network; `backbone.backbone(inputs)` returns all its features, such as tokens."""
        self.device = device

    @property
    def width(self) -> int:
        """Width D of the features."""
        return self.backbone.width

    @torch.no_grad()
    def __call__(self, inputs: Images | str, batch: int = 64) -> Tensor:
        """Compute pooled features (N, D) float32, on the CPU.

        A backbone of images takes a list of paths, of PIL images or of arrays (H, W, 3) uint8; or a
        tensor (N, 3, H, W) or an array (N, H, W, 3) of uint8. Images are resized so that the
        shorter side is that of the training images, and the center is cropped, as when sslrun reads
        data. A backbone of text takes sentences; longer ones are cut. A single path or sentence
        counts as a list of one.

        Raises:
            UserError: an input cannot be read.
        """
        inputs = [inputs] if isinstance(inputs, str | os.PathLike) else inputs
        if not len(inputs):
            return torch.empty(0, self.width)
        examples = self._examples(inputs)
        features = []
        for raw in examples.batches(torch.arange(len(examples)).split(batch), self.device):
            given = raw.inputs.float() / 255 if isinstance(raw.inputs, Tensor) else raw.inputs
            features.append(self.backbone(given).pooled.float().cpu())
        return torch.cat(features)

    def _examples(self, inputs: Images) -> Examples:
        """Turn what the user gave into examples."""
        spec = self.backbone.spec
        if isinstance(spec, TextSpec):
            return _sentences(inputs, spec)
        if not isinstance(spec, ImageSpec):
            raise UserError(f"{self.backbone.name}: takes {spec.kind} data, not images or text")
        return TensorExamples(_pixels(inputs, spec.size), None, (), spec)


def _sentences(texts: Any, spec: TextSpec) -> Examples:
    """Encode sentences.

    Raises:
        UserError: one of them is not a string.
    """
    for text in texts:
        if not isinstance(text, str):
            raise UserError(f"this backbone reads sentences, not {type(text).__name__}")
    return build_labeled(spec.tokenizer.encode(list(texts)), None, None, (), spec)


def _pixels(images: Images, size: int) -> Tensor:
    """Return images as (N, 3, size, size) uint8.

    Raises:
        UserError: an image cannot be read, or is of another type.
    """
    if isinstance(images, Tensor):
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise UserError(
                f"images are {images.dtype} {tuple(images.shape)}: they should be uint8 of shape "
                "(N, 3, H, W)"
            )
        return convert_arrays(images.permute(0, 2, 3, 1).cpu().numpy(), size)
    if isinstance(images, np.ndarray):
        return convert_arrays(images, size)
    return torch.cat([_one_image(image, size) for image in images])


def _one_image(image: Any, size: int) -> Tensor:
    """Return one image as (1, 3, size, size) uint8."""
    from PIL import Image

    decoder = Decoder(size)
    if isinstance(image, str | os.PathLike):
        if not os.path.isfile(image):
            raise UserError(f"{image}: no such file")
        return decoder.pack([decoder(EncodedFiles([os.fspath(image)]), 0)])
    if isinstance(image, Image.Image):
        return decoder.pack([decoder.decode(image.copy())])
    if isinstance(image, np.ndarray):
        return convert_arrays(image[None], size)
    raise UserError(
        f"this backbone reads images: paths, PIL images or arrays, not {type(image).__name__}"
    )


def load(source: str | os.PathLike[str], device: str = "cpu") -> LoadedBackbone:
    """Load a backbone, in evaluation mode.

    `source` is a run's folder or its backbone.safetensors; or the name of a model in a library, as
    "timm:NAME", "torchvision:NAME" or "hf:NAME" (images or text; a folder in place of the name).

    Raises:
        UserError: there is no such run or model.
    """
    kind, _, model = os.fspath(source).partition(":")
    path = Path(source)
    if model and kind in backbones and backbones[kind].shorthand == "model" and not path.exists():
        backbone = _load_from_library(kind, model)
    else:
        folder = path.parent if path.name == WEIGHTS else path
        if not (folder / WEIGHTS).is_file():
            raise UserError(
                f"{source}: no {WEIGHTS} there; name a finished run's folder, or a model such as "
                "timm:NAME, torchvision:NAME or hf:NAME"
            )
        backbone = load_backbone(folder)
    return LoadedBackbone(backbone, torch.device(device))


def _load_from_library(kind: str, model: str) -> Backbone:
    """Build a pretrained backbone of another library, for inputs of its own size."""
    spec: InputSpec = ImageSpec(DEFAULT_SIZE)
    if kind == "hf":
        text = _text_spec(model)
        kind, spec = ("hf-image", spec) if text is None else (kind, text)
    backbone = build_backbone(kind, {"model": model}, spec)
    size = getattr(backbone, "size", None)
    if isinstance(spec, ImageSpec) and size is not None:
        backbone.spec = ImageSpec(size)
    return backbone


def _text_spec(model: str) -> TextSpec | None:
    """The inputs of an encoder of text of the transformers library; None for one of images."""
    from sslrun.backbones.hf import load_config

    config: Any = load_config(model)
    if not hasattr(config, "vocab_size"):
        return None
    file = Path(model) / "tokenizer.json"
    if file.is_file():
        tokenizer = load_tokenizer(TokenizerOptions(file=file))
    elif Path(model).is_dir():
        raise UserError(f"{file}: no such file, but an encoder of text needs its tokenizer")
    else:
        tokenizer = load_tokenizer(TokenizerOptions(hub=model))
    positions = cast(int | None, getattr(config, "max_position_embeddings", None))
    return TextSpec(tokenizer, min(LONGEST, positions or LONGEST))
