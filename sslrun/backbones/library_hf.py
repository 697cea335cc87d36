"""Image encoders of the transformers library (an optional extra), by name or from a folder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sslrun.backbones.base import Features, backbones
from sslrun.backbones.hf import load_encoder
from sslrun.backbones.image import IMAGENET_MEAN, IMAGENET_STD, MOST_SPECIAL
from sslrun.backbones.library import (
    LibraryBackbone,
    LibraryOptions,
    Normalization,
    as_features,
)
from sslrun.data.specs import ImageSpec
from sslrun.errors import UserError


@backbones.register("hf-image")
class TransformersImageEncoder(LibraryBackbone):
    """A pretrained image encoder of the transformers library, as `hf:NAME` or `hf:FOLDER`.

    Recipes on images may write `hf`: they get this backbone. Only safetensors files are read, and
    no remote code is run. Pooled features are the last [CLS] of ViTs (without the pooler's layer,
    which many checkpoints lack), else the library's `pooler_output`. Images are normalized as
    preprocessor_config.json says; without that file, by ImageNet's statistics.
    """

    library = "transformers"

    def __init__(self, options: LibraryOptions, spec: ImageSpec) -> None:
        super().__init__(options, spec)
        model = load_encoder(options.model, options.pretrained, dropout=False)
        # CLIP and SigLIP hold an encoder of text, too.
        self.network: Any = getattr(model, "vision_model", model)
        config = self.network.config
        if not hasattr(config, "num_channels"):
            raise UserError(f"{options.model}: is not an encoder of images")
        self.set_normalization(_read_normalization(options.model))
        own = getattr(config, "image_size", None)
        has_positions = _has_positions(self.network) and isinstance(own, int)
        self.size = options.size or (own if has_positions else None)
        self._interpolates = has_positions and self.size != own
        self._special = self._count_special(spec.size)
        # CLIP and SigLIP have no final norm on their tokens, only on their pooled features.
        self._reads_cls = self._special > 0 and self.network is model
        if self._reads_cls and getattr(self.network, "pooler", None) is not None:
            self.network.pooler = None
        self.measure(spec.size)

    def forward(self, inputs: Tensor) -> Features:
        """Images (B, 3, H, W) in [0, 1]."""
        output = self._run(self.prepare(inputs))
        tokens, pooled = output.last_hidden_state, getattr(output, "pooler_output", None)
        if self._reads_cls:
            pooled = tokens[:, 0]
        elif pooled is None:
            pooled = tokens.mean(dim=(2, 3)) if tokens.ndim == 4 else tokens.mean(dim=1)
        return as_features(pooled.flatten(1), tokens, self._special)

    def _run(self, images: Tensor, **arguments: Any) -> Any:
        """Return the library's output for normalized images."""
        if self._interpolates:
            arguments["interpolate_pos_encoding"] = True
        return self.network(pixel_values=images, **arguments)

    @torch.no_grad()
    def _count_special(self, default: int) -> int:
        """Count the leading tokens that belong to no patch: [CLS] and registers.

        Raises:
            UserError: the network cannot read images of `size` or `default` pixels.
        """
        size, patch = self.size or default, getattr(self.network.config, "patch_size", None)
        with self.reading(size):
            tokens = self._run(torch.zeros(1, 3, size, size)).last_hidden_state
        if tokens.ndim != 3 or not isinstance(patch, int):
            return 0
        special = tokens.shape[1] - (size // patch) ** 2
        return special if 0 <= special <= MOST_SPECIAL else 0

    @property
    def attends(self) -> bool:
        return self._reads_cls

    def attention(self, inputs: Tensor) -> Tensor:
        kept = self.network.config._attn_implementation
        self.network.set_attn_implementation("eager")  # the others do not compute the weights
        try:
            output = self._run(self.prepare(inputs), output_attentions=True)
        finally:
            self.network.set_attn_implementation(kept)
        return output.attentions[-1]


def _has_positions(network: Any) -> bool:
    """Whether a network adds learned positions to its patches."""
    embeddings = getattr(network, "embeddings", None)
    names = ("position_embeddings", "position_embedding")
    return any(getattr(embeddings, name, None) is not None for name in names)


def _read_normalization(model: str) -> Normalization:
    """Read the mean and standard deviation of a model's preprocessor_config.json."""
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(model)
    except (OSError, ValueError):
        return IMAGENET_MEAN, IMAGENET_STD
    if settings.get("do_normalize") is False:
        return (0.0,) * 3, (1.0,) * 3
    return settings.get("image_mean", IMAGENET_MEAN), settings.get("image_std", IMAGENET_STD)
