"""Weights and configurations of image backbones in the form of other libraries.

Each function returns an `Exported` model. It raises UserError if the library has no class for the
network as configured, and says which option to change before pretraining.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sslrun.backbones.base import Exported, no_class
from sslrun.backbones.image import ImageBackbone

if TYPE_CHECKING:
    from sslrun.backbones.resnet import ResNet
    from sslrun.backbones.vit import ViT

IMAGENET_SIZE = 224
"""Side of the images that timm's and torchvision's entry points assume, in pixels."""


def features_of(backbone: ImageBackbone) -> dict[str, Tensor]:
    """The weights of a backbone without its normalization."""
    return {
        name: tensor
        for name, tensor in backbone.state_dict().items()
        if name not in ("mean", "std")
    }


def preprocessing(backbone: ImageBackbone, size: int) -> dict[str, Any]:
    """The normalization and the size of images, as timm names them."""
    return {
        "input_size": [3, size, size],
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "crop_mode": "center",
        "mean": backbone.mean.tolist(),
        "std": backbone.std.tolist(),
    }


def preprocessor_config(backbone: ImageBackbone, size: int) -> dict[str, Any]:
    """The content of transformers' preprocessor_config.json."""
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": size, "width": size},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": backbone.mean.tolist(),
        "image_std": backbone.std.tolist(),
    }


# ---------------------------------------------------------------- ViT


def vit_to_timm(vit: ViT) -> Exported:
    """A ViT as timm's VisionTransformer, with registers and either kind of pooling."""
    width, depth, heads = vit.shape_of(vit.options)
    size, registers, mean = vit.side * vit.patch, vit.options.registers, vit.options.pool == "mean"
    tensors = features_of(vit)
    # timm's registers have positions, ours have none.
    positions = tensors["pos_embed"]
    no_positions = positions.new_zeros(1, registers, width)
    tensors["pos_embed"] = torch.cat([positions[:, :1], no_positions, positions[:, 1:]], dim=1)
    arguments = {
        "img_size": size,
        "patch_size": vit.patch,
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        "reg_tokens": registers,
        "global_pool": "avg" if mean else "token",
        "fc_norm": False,
    }
    settings = preprocessing(vit, size) | {
        "fixed_input_size": True,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    return timm_model("vit_small_patch16_224", tensors, arguments, settings, width)


def timm_model(
    architecture: str,
    tensors: dict[str, Tensor],
    arguments: dict[str, Any],
    settings: dict[str, Any],
    width: int,
) -> Exported:
    """A model of timm with the config.json that its loader reads."""
    config = {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": width,
        "pretrained_cfg": {**settings, "num_classes": 0},
        "model_args": arguments,
    }
    return Exported(tensors, {"config.json": config})


VIT_TO_TORCHVISION = [
    ("patch_embed.proj.", "conv_proj."),
    ("blocks.", "encoder.layers.encoder_layer_"),
    (".norm1.", ".ln_1."),
    (".norm2.", ".ln_2."),
    (".attn.qkv.", ".self_attention.in_proj_"),
    (".attn.proj.", ".self_attention.out_proj."),
    (".mlp.fc1.", ".mlp.0."),
    (".mlp.fc2.", ".mlp.3."),
    ("cls_token", "class_token"),
    ("pos_embed", "encoder.pos_embedding"),
]
"""Parts of parameter names: here, and in torchvision."""


def vit_to_torchvision(vit: ViT) -> Exported:
    """A ViT as torchvision's VisionTransformer."""
    if vit.options.registers:
        raise no_class(vit.name, "torchvision", "registers", "registers: 0", "timm")
    if vit.options.pool == "mean":
        raise no_class(vit.name, "torchvision", "pool: mean", "pool: cls", "timm")
    width, depth, heads = vit.shape_of(vit.options)
    size = vit.side * vit.patch
    tensors = renamed(features_of(vit), VIT_TO_TORCHVISION, ("norm.", "encoder.ln."))
    arguments = {
        "image_size": size,
        "patch_size": vit.patch,
        "num_layers": depth,
        "num_heads": heads,
        "hidden_dim": width,
        "mlp_dim": 4 * width,
    }
    config = {"model": "VisionTransformer", "arguments": arguments, **preprocessing(vit, size)}
    return Exported(tensors, {"config.json": config})


VIT_TO_TRANSFORMERS = [
    ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
    ("blocks.", "encoder.layer."),
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
    (".attn.proj.", ".attention.output.dense."),
    (".mlp.fc1.", ".intermediate.dense."),
    (".mlp.fc2.", ".output.dense."),
    ("cls_token", "embeddings.cls_token"),
    ("pos_embed", "embeddings.position_embeddings"),
]
"""Parts of parameter names: here, and in transformers' files of weights."""


def vit_to_transformers(vit: ViT) -> Exported:
    """A ViT as transformers' ViTModel, without a pooler."""
    if vit.options.registers:
        raise no_class(vit.name, "transformers' ViTModel", "registers", "registers: 0", "timm")
    width, depth, heads = vit.shape_of(vit.options)
    size = vit.side * vit.patch
    tensors = {}
    for name, tensor in features_of(vit).items():
        if ".attn.qkv." not in name:
            tensors[name] = tensor
            continue
        block, kind = name.split(".")[1], name.rsplit(".", 1)[1]
        for part, piece in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
            tensors[f"encoder.layer.{block}.attention.attention.{part}.{kind}"] = piece
    config = {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "hidden_act": "gelu",
        "hidden_dropout_prob": vit.options.dropout,
        "attention_probs_dropout_prob": vit.options.dropout,
        "layer_norm_eps": 1e-6,
        "image_size": size,
        "patch_size": vit.patch,
        "num_channels": 3,
        "qkv_bias": True,
    }
    files = {"config.json": config, "preprocessor_config.json": preprocessor_config(vit, size)}
    return Exported(renamed(tensors, VIT_TO_TRANSFORMERS, ("norm.", "layernorm.")), files)


# ---------------------------------------------------------------- ResNet


def resnet_to_timm(resnet: ResNet) -> Exported:
    """A ResNet as timm's, whose names are torchvision's."""
    _check_resnet(resnet, "timm")
    settings = preprocessing(resnet, resnet.spec.size) | {
        "first_conv": "conv1",
        "classifier": "fc",
    }
    return timm_model(resnet.name, features_of(resnet), {}, settings, resnet.width)


def resnet_to_torchvision(resnet: ResNet) -> Exported:
    """A ResNet as torchvision's, whose names are ours."""
    _check_resnet(resnet, "torchvision")
    config = {"model": resnet.name, "arguments": {}, **preprocessing(resnet, resnet.spec.size)}
    return Exported(features_of(resnet), {"config.json": config})


def resnet_to_transformers(resnet: ResNet) -> Exported:
    """A ResNet as transformers' ResNetModel, of any number of channels."""
    _check_stages(resnet, "transformers")
    tensors = {}
    for name, tensor in features_of(resnet).items():
        tensors[_resnet_name(name)] = tensor
    widths = [resnet.width // 8 * 2**stage for stage in range(4)]
    config = {
        "architectures": ["ResNetModel"],
        "model_type": "resnet",
        "num_channels": 3,
        "embedding_size": resnet.options.channels,
        "hidden_sizes": widths,
        "depths": list(resnet.blocks),
        "layer_type": "bottleneck" if resnet.bottleneck else "basic",
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": False,
    }
    processor = preprocessor_config(resnet, resnet.spec.size)
    return Exported(tensors, {"config.json": config, "preprocessor_config.json": processor})


def _resnet_name(name: str) -> str:
    """Translate a name, such as layer2.0.bn1.bias, to transformers' ResNetModel.

    That one is encoder.stages.1.layers.0.layer.0.normalization.bias.
    """
    *path, layer, kind = name.split(".")
    if not path:  # conv1 and bn1
        part = "convolution" if layer == "conv1" else "normalization"
        return f"embedder.embedder.{part}.{kind}"
    stage, block = int(path[0].removeprefix("layer")) - 1, path[1]
    prefix = f"encoder.stages.{stage}.layers.{block}"
    if path[2:] == ["downsample"]:
        part = "convolution" if layer == "0" else "normalization"
        return f"{prefix}.shortcut.{part}.{kind}"
    part = "convolution" if layer.startswith("conv") else "normalization"
    return f"{prefix}.layer.{int(layer[-1]) - 1}.{part}.{kind}"


def _check_stages(resnet: ResNet, library: str) -> None:
    """Raise UserError for a stem, strides or padding that no other library builds."""
    if resnet.options.stem == "small":
        raise no_class(resnet.name, library, "stem: small", "stem: imagenet", "onnx")
    if resnet.options.strides != (1, 2, 2, 2):
        strides = f"strides: {list(resnet.options.strides)}"
        raise no_class(resnet.name, library, strides, "strides: [1, 2, 2, 2]", "onnx")
    if resnet.options.padding != "zeros":
        raise no_class(resnet.name, library, "padding: reflect", "padding: zeros", "onnx")


def _check_resnet(resnet: ResNet, library: str) -> None:
    """Raise UserError for a ResNet that neither timm nor torchvision builds."""
    _check_stages(resnet, library)
    if resnet.options.channels != 64:
        channels = f"channels: {resnet.options.channels}"
        raise no_class(resnet.name, library, channels, "channels: 64", "transformers")


# ---------------------------------------------------------------- names


def renamed(
    tensors: dict[str, Tensor], pairs: list[tuple[str, str]], norm: tuple[str, str]
) -> dict[str, Tensor]:
    """Replace parts of names by `pairs` of (here, there); `norm` is that of the last norm."""
    names = {}
    for name in tensors:
        theirs = name.replace(*norm) if name.startswith(norm[0]) else name
        for ours, part in pairs:
            theirs = theirs.replace(ours, part)
        names[name] = theirs
    return {names[name]: tensor for name, tensor in tensors.items()}
