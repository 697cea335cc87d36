"""Backbones: the networks that compute features. Importing this package registers them."""

from sslrun.backbones import (  # noqa: F401
    bert,
    dt,
    gpt,
    graph,
    hf,
    igpt,
    library_hf,
    library_timm,
    library_torchvision,
    lstm,
    mlp,
    pixels,
    resnet,
    tokengt,
    vit,
)
from sslrun.backbones.weights import (
    build_backbone,
    build_empty,
    load_backbone,
    load_into,
    save_backbone,
)

__all__ = ["build_backbone", "build_empty", "load_backbone", "load_into", "save_backbone"]
