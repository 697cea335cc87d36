"""Backbones: the networks that compute features. Importing this package registers them."""

from sslrun.backbones import bert, gpt, hf, igpt, lstm, mlp, pixels, resnet, vit  # noqa: F401
from sslrun.backbones.weights import build_backbone, load_backbone, load_into, save_backbone

__all__ = ["build_backbone", "load_backbone", "load_into", "save_backbone"]
