"""Backbones: the networks whose features are the point. Importing this package makes all of them known by name."""

from sslrun.backbones import bert, gpt, hf, lstm, mlp, pixels, resnet, vit  # noqa: F401
from sslrun.backbones.weights import build_backbone, load_backbone, load_into, save_backbone

__all__ = ["build_backbone", "load_backbone", "load_into", "save_backbone"]
