"""Backbones in files: safetensors that name their architecture, and weights of other libraries."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sslrun.backbones.base import Backbone, backbones
from sslrun.data.specs import InputSpec
from sslrun.errors import UserError
from sslrun.files import replacing
from sslrun.registry import Options


def build_backbone(name: str, options: Options | Mapping[str, Any], spec: InputSpec) -> Backbone:
    """Build a backbone, initialized by torch's global generator. UserError: unknown name, or options that do not fit."""
    cls = backbones[name]
    return cls(
        options if isinstance(options, Options) else cls.Options.model_validate(options), spec
    )


def save_backbone(
    path: Path, backbone: Backbone, metadata: Mapping[str, str] | None = None
) -> None:
    """Write weights and buffers, with their architecture and options, and beside them the backbone's own spec.

    Each file is written atomically; `load_backbone` reads both.
    """
    tensors = {
        name: tensor.detach().contiguous().cpu() for name, tensor in backbone.state_dict().items()
    }
    about = {
        "backbone": backbone.name,
        "options": backbone.options.model_dump_json(),
        **(metadata or {}),
    }
    if backbone.spec.vocabulary is not None:
        about["tokenizer"] = backbone.spec.vocabulary
    written = {"sslrun": json.dumps(about)}  # one key: safetensors writes several in no fixed order
    with replacing(path) as temporary:
        save_file(tensors, temporary, written)
    backbone.spec.save(path.parent)


def load_into(backbone: Backbone, path: Path) -> None:
    """Load weights of sslrun, timm, torchvision or transformers into a backbone of the same architecture.

    Positions of a ViT are interpolated to its image size. UserError: no such file, not a
    checkpoint, or a checkpoint of another backbone.
    """
    _load(backbone, path, *read(path))


def _load(
    backbone: Backbone, path: Path, tensors: dict[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """`load_into` with what was read from the file."""
    source = metadata.get("backbone")
    if source is not None and source != backbone.name:
        raise UserError(
            f"{path}: this checkpoint is of '{source}', the recipe asks for '{backbone.name}'"
        )
    if source is None:
        tensors = backbone.own_names(tensors)
    trained_on = metadata.get("tokenizer")
    if trained_on is not None and trained_on != backbone.spec.vocabulary:
        raise UserError(
            f"{path}: was trained with another tokenizer than the recipe's, so that token ids mean other words: "
            f"use its own, as data.tokenizer: {{file: {path.parent / 'tokenizer.json'}}}"
        )
    tensors = backbone.fit_weights(tensors)
    own = backbone.state_dict()
    for name in own.keys() | tensors.keys():
        mine, its = own.get(name), tensors.get(name)
        if mine is None or its is None or mine.shape != its.shape:
            theirs, ours = (
                "is missing" if w is None else f"has shape {tuple(w.shape)}" for w in (its, mine)
            )
            options = (
                f"; the file's options are {metadata['options']}" if "options" in metadata else ""
            )
            raise UserError(
                f"{path}: parameter '{name}' {theirs} in the file, but {ours} in '{backbone.name}' as configured{options}"
            )
    backbone.load_state_dict(tensors)


WEIGHTS = "backbone.safetensors"
"""The file of a backbone's weights in a run's folder; its spec lies beside it."""


def load_backbone(folder: Path) -> Backbone:
    """Rebuild the backbone that a run saved, from its folder alone: weights, options and input spec.

    UserError: no such folder, or not one that holds a backbone written by sslrun.
    """
    path = folder / WEIGHTS
    tensors, metadata = read(path)
    cls, options = recorded_network(path, metadata)
    backbone = build_backbone(cls.name, options, InputSpec.load(folder))
    _load(backbone, path, tensors, metadata)
    return backbone


def recorded_network(path: Path, metadata: Mapping[str, str]) -> tuple[type[Backbone], Options]:
    """The class and options of the backbone that sslrun wrote to `path`, from the file's metadata.

    UserError: the file was not written by sslrun, or its backbone is unknown.
    """
    if "backbone" not in metadata:
        raise UserError(f"{path}: was not written by sslrun, so its architecture is unknown")
    cls = backbones[metadata["backbone"]]
    return cls, cls.Options.model_validate_json(metadata["options"])


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors in a file, and the metadata that sslrun wrote with them. UserError: no such file, or no checkpoint."""
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
