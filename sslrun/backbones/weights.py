"""Backbones in files: safetensors that name the architecture they belong to, and other libraries' weights."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sslrun.backbones.base import Backbone, backbones
from sslrun.backbones.bert import Bert
from sslrun.backbones.gpt import Gpt
from sslrun.backbones.vit import ViT, interpolated
from sslrun.data.specs import InputSpec, TextSpec
from sslrun.errors import UserError
from sslrun.files import replacing
from sslrun.registry import Options


def build_backbone(name: str, options: Options | Mapping[str, Any], spec: InputSpec) -> Backbone:
    """A backbone as initialised by torch's global generator. UserError: no such name, or options that don't fit."""
    cls = backbones[name]
    return cls(options if isinstance(options, Options) else cls.Options.model_validate(options), spec)


def save_backbone(path: Path, backbone: Backbone, metadata: Mapping[str, str] | None = None) -> None:
    """Write weights, buffers and what they belong to, whole or not at all."""
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in backbone.state_dict().items()}
    about = {"backbone": backbone.name, "options": backbone.options.model_dump_json(), **(metadata or {})}
    if isinstance(backbone.spec, TextSpec):
        about["tokenizer"] = backbone.spec.tokenizer.digest
    written = {"sslrun": json.dumps(about)}  # one key: safetensors writes several in no fixed order
    with replacing(path) as temporary:
        save_file(tensors, temporary, written)


def load_into(backbone: Backbone, path: Path) -> None:
    """Load a file of ours, or of timm's, torchvision's or transformers' names, into a backbone of the same architecture.

    Positions of a ViT are interpolated where its images have another size. UserError: no such file, no checkpoint, or
    one of another backbone.
    """
    tensors, metadata = read(path)
    source = metadata.get("backbone")
    if source is not None and source != backbone.name:
        raise UserError(f"{path}: this checkpoint is of '{source}', the recipe asks for '{backbone.name}'")
    if source is None:
        tensors = _own_names(tensors, backbone)
    trained_on = metadata.get("tokenizer")
    if trained_on is not None and isinstance(backbone.spec, TextSpec) and trained_on != backbone.spec.tokenizer.digest:
        raise UserError(
            f"{path}: was trained with another tokenizer than the recipe's, whose ids mean other words: "
            f"name its own, as data.tokenizer: {{file: {path.parent / 'tokenizer.json'}}}"
        )
    if isinstance(backbone, ViT):
        tensors = _fitted_positions(tensors, backbone)
    own = backbone.state_dict()
    for name in own.keys() | tensors.keys():
        mine, its = own.get(name), tensors.get(name)
        if mine is None or its is None or mine.shape != its.shape:
            shapes = " and ".join("nothing" if each is None else str(tuple(each.shape)) for each in (its, mine))
            options = f" (its options: {metadata['options']})" if "options" in metadata else ""
            raise UserError(
                f"{path}: does not fit '{backbone.name}' as the recipe has it{options}: '{name}' is {shapes}, there and here"
            )
    backbone.load_state_dict(tensors)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Weights, and what a file of ours says of them. UserError: no such file, or no checkpoint."""
    try:
        with safe_open(str(path), framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("sslrun", "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as safetensors_error:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception:
            raise UserError(f"{path}: not a checkpoint ({safetensors_error})") from None
    state = state.get("state_dict", state.get("model", state)) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(each, Tensor) for each in state.values()):
        raise UserError(f"{path}: holds no dictionary of weights")
    return state, {}


def _own_names(tensors: dict[str, Tensor], backbone: Backbone) -> dict[str, Tensor]:
    """torchvision's ResNet and timm's ViT have our names, and a classifier besides; transformers' are converted."""
    if isinstance(backbone, Bert | Gpt):
        return backbone.from_transformers(tensors)
    classifier = re.compile(r"(fc|head|pre_logits)\.")
    found = {name: tensor for name, tensor in tensors.items() if not classifier.match(name)}
    if isinstance(backbone, ViT):
        found = _timm_positions(found)
    # Their images are normalised as ImageNet's, which a fresh backbone's buffers are.
    return found | {name: tensor for name, tensor in backbone.state_dict().items() if name in ("mean", "std")}


def _timm_positions(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's registers have positions, which are added to ours, who have none; or its [CLS] has none, which is 0 here."""
    positions, registers = tensors.get("pos_embed"), tensors.get("reg_token")
    if positions is None or registers is None or positions.ndim != 3:
        return tensors
    count = registers.shape[1]
    if (positions.shape[1] ** 0.5).is_integer():
        return tensors | {"pos_embed": torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)}
    own, of_registers, of_patches = positions.split([1, count, positions.shape[1] - 1 - count], dim=1)
    return tensors | {"reg_token": registers + of_registers, "pos_embed": torch.cat([own, of_patches], dim=1)}


def _fitted_positions(tensors: dict[str, Tensor], backbone: ViT) -> dict[str, Tensor]:
    positions = tensors.get("pos_embed")
    if positions is None or positions.shape == backbone.pos_embed.shape or positions.ndim != 3:
        return tensors
    side = round((positions.shape[1] - 1) ** 0.5)
    if side**2 != positions.shape[1] - 1:
        return tensors
    grid = interpolated(positions[:, 1:], side, backbone.side, backbone.side)
    return tensors | {"pos_embed": torch.cat([positions[:, :1], grid], dim=1)}
