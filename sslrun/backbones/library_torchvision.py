"""Classifiers of torchvision as backbones, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from sslrun.backbones.base import Features, backbones
from sslrun.backbones.library import (
    LibraryBackbone,
    LibraryOptions,
    as_features,
    loading,
    switch_off_dropout,
)
from sslrun.data.specs import ImageSpec
from sslrun.errors import UserError
from sslrun.hub import answers
from sslrun.registry import did_you_mean

CLASSIFIERS = ("fc", "heads", "head", "classifier")
"""Names of torchvision's classifiers, of one linear layer or ending with one."""


@backbones.register("torchvision")
class TorchvisionBackbone(LibraryBackbone):
    """A classifier of torchvision without its last linear layer, as `torchvision:NAME`.

    Pooled features are the inputs of that layer. ResNets and Vision Transformers also have tokens
    and a grid.
    """

    class Options(LibraryOptions):
        file: Path | None = None
        """File of weights to load instead of torchvision's: safetensors, or a checkpoint with
        torchvision's names."""
        weights: str = "DEFAULT"
        """Name of torchvision's weights, such as IMAGENET1K_V1; their normalization is used with
        `file`, too."""

    library = "torchvision"
    options: Options

    def __init__(self, options: Options, spec: ImageSpec) -> None:
        super().__init__(options, spec)
        weights = _find_weights(options)
        preset = weights.transforms()
        own = int(preset.crop_size[0])
        self.network: Any = _build(options, weights)
        fixed = hasattr(self.network, "image_size") or type(self.network).__name__ == "MaxVit"
        self.size = options.size or (own if fixed else None)
        self.set_normalization((preset.mean, preset.std))
        switch_off_dropout(self.network)
        if options.file is not None and options.pretrained:
            self.load_file(options.file)
        elif options.pretrained:
            self.load_tensors(_download(options.model, weights), options.model)
        self.measure(spec.size)

    def classifiers(self) -> tuple[str, ...]:
        return tuple(f"{name}." for name in CLASSIFIERS)

    @property
    def _is_vit(self) -> bool:
        from torchvision.models import VisionTransformer

        return isinstance(self.network, VisionTransformer)

    @property
    def _is_resnet(self) -> bool:
        from torchvision.models import ResNet

        return isinstance(self.network, ResNet)

    def forward(self, inputs: Tensor) -> Features:
        """Images (B, 3, H, W) in [0, 1]."""
        images, network = self.prepare(inputs), self.network
        if self._is_vit:
            tokens = network.encoder(self._embed(images))
            return as_features(tokens[:, 0], tokens, special=1)
        if self._is_resnet:
            x = network.maxpool(network.relu(network.bn1(network.conv1(images))))
            x = network.layer4(network.layer3(network.layer2(network.layer1(x))))
            return as_features(network.avgpool(x).flatten(1), x)
        return Features(network(images))

    def _embed(self, images: Tensor) -> Tensor:
        """Tokens (B, 1 + N, D) of a ViT, before their positions are added."""
        patches = self.network._process_input(images)
        return torch.cat([self.network.class_token.expand(images.shape[0], -1, -1), patches], dim=1)

    @property
    def attends(self) -> bool:
        return self._is_vit

    def attention(self, inputs: Tensor) -> Tensor:
        encoder = self.network.encoder
        x = self._embed(self.prepare(inputs)) + encoder.pos_embedding
        blocks = list(encoder.layers)
        for block in blocks[:-1]:
            x = block(x)
        x = blocks[-1].ln_1(x)
        _, weights = blocks[-1].self_attention(
            x, x, x, need_weights=True, average_attn_weights=False
        )
        return weights

    def blocks(self) -> list[nn.Module]:
        network = self.network
        if self._is_vit:
            return list(network.encoder.layers)
        if self._is_resnet:
            stages = (network.layer1, network.layer2, network.layer3, network.layer4)
            return [block for stage in stages for block in stage]
        features = getattr(network, "features", None)
        return list(features) if isinstance(features, nn.Sequential) else []

    def fit_weights(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Interpolate the positions of a ViT to this network's image size, as torchvision does."""
        from torchvision.models.vision_transformer import interpolate_embeddings

        key = "network.encoder.pos_embedding"
        if not self._is_vit or key not in tensors:
            return tensors
        network = self.network
        theirs = {"encoder.pos_embedding": tensors[key]}
        ours = interpolate_embeddings(network.image_size, network.patch_size, theirs)
        return tensors | {key: ours["encoder.pos_embedding"]}


def _find_weights(options: TorchvisionBackbone.Options) -> Any:
    """Find torchvision's weights of a classifier.

    Raises:
        UserError: torchvision has no classifier or no weights of that name.
    """
    from torchvision import models

    known = models.list_models(module=models)
    if options.model not in known:
        raise UserError(
            f"torchvision has no classifier '{options.model}'.{did_you_mean(options.model, known)}"
        )
    available = models.get_model_weights(options.model)
    if options.weights not in available.__members__:
        names = ", ".join(available.__members__)
        raise UserError(
            f"torchvision has no weights '{options.weights}' of '{options.model}': choose {names}"
        )
    return available[options.weights]


def _build(options: TorchvisionBackbone.Options, weights: Any) -> Any:
    """Build a classifier of torchvision without its last layer.

    Raises:
        UserError: the network cannot be a backbone.
    """
    from torchvision import models

    name = options.model
    arguments: dict[str, Any] = {}
    if name.startswith("vit_"):
        arguments["image_size"] = options.size or int(weights.transforms().crop_size[0])
    if name in ("googlenet", "inception_v3"):
        raise UserError(
            f"torchvision:{name}: has auxiliary classifiers, which a backbone cannot have; "
            "choose another network"
        )
    with loading(f"torchvision:{name}"):
        network = models.get_model(name, weights=None, **arguments)
    _remove_classifier(network, name)
    return network


def _download(name: str, weights: Any) -> dict[str, Tensor]:
    """Read torchvision's weights from torch's cache, or download them into it."""
    parts = urlsplit(weights.url)
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(parts.path).name
    if not cached.is_file() and not answers(f"{parts.scheme}://{parts.netloc}"):
        raise UserError(
            f"torchvision:{name}: its weights are not on this machine, and {parts.netloc} cannot "
            f"be reached: put them at {cached}, or set backbone.file, or backbone.pretrained: false"
        )
    with loading(name):
        return weights.get_state_dict(progress=False, check_hash=True, weights_only=True)


def _remove_classifier(network: nn.Module, name: str) -> None:
    """Replace the last linear layer of a classifier by the identity.

    Raises:
        UserError: the classifier does not end with a linear layer.
    """
    key = next((key for key in CLASSIFIERS if hasattr(network, key)), None)
    classifier = None if key is None else getattr(network, key)
    if isinstance(classifier, nn.Linear) and key is not None:
        setattr(network, key, nn.Identity())
        return
    if isinstance(classifier, nn.Sequential):
        last = list(classifier._modules)[-1]
        if isinstance(classifier._modules[last], nn.Linear):
            classifier._modules[last] = nn.Identity()
            return
    raise UserError(
        f"torchvision:{name}: its classifier does not end with a linear layer; "
        "choose another network"
    )
