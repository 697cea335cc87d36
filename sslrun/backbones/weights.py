"""Save and load backbones: safetensors with their architecture, and weights of other libraries."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sslrun.backbones.base import Backbone, backbones
from sslrun.data.specs import InputSpec
from sslrun.errors import UserError
from sslrun.files import replacing
from sslrun.registry import Options
from sslrun.runs import check_file


def build_backbone(name: str, options: Options | Mapping[str, Any], spec: InputSpec) -> Backbone:
    """Build a backbone, initialized by torch's global generator.

    Raises:
        UserError: the name is unknown, or the options do not fit.
    """
    cls = backbones[name]
    return cls(
        options if isinstance(options, Options) else cls.Options.model_validate(options), spec
    )


def build_empty(name: str, options: Options, spec: InputSpec) -> Backbone:
    """Build a backbone whose weights are loaded afterwards: it does not load pretrained ones.

    Raises:
        UserError: the name is unknown, or the options do not fit.
    """
    if "pretrained" not in type(options).model_fields:
        return build_backbone(name, options, spec)
    backbone = build_backbone(name, options.model_copy(update={"pretrained": False}), spec)
    backbone.options = options
    return backbone


def save_backbone(
    path: Path, backbone: Backbone, metadata: Mapping[str, str] | None = None
) -> None:
    """Write the weights and buffers with their architecture and options, and the spec next to them.

    Each file is written atomically; `load_backbone` reads both.
    """
    tensors = plain_tensors(backbone)
    about = {
        "backbone": backbone.name,
        "options": backbone.options.model_dump_json(),
        **(metadata or {}),
    }
    if backbone.spec.vocabulary is not None:
        about["tokenizer"] = backbone.spec.vocabulary
    # One key only, because safetensors writes several keys in no fixed order.
    header = {"sslrun": json.dumps(about)}
    with replacing(path) as temporary:
        save_file(tensors, temporary, header)
    backbone.spec.save(path.parent)


def plain_tensors(network: nn.Module) -> dict[str, Tensor]:
    """The weights and buffers of a network, in the form that safetensors writes."""
    return {
        name: tensor.detach().contiguous().cpu() for name, tensor in network.state_dict().items()
    }


def load_into(backbone: Backbone, path: Path) -> None:
    """Load weights of sslrun, timm, torchvision or transformers into a backbone.

    The architectures must be the same; positions of a ViT are interpolated to its image size.

    Raises:
        UserError: the file does not exist, is not a checkpoint, or is one of another backbone.
    """
    _load(backbone, path, *read(path))


def _load(
    backbone: Backbone, path: Path, tensors: dict[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Load the tensors and metadata of a file into the backbone; see `load_into`."""
    source = metadata.get("backbone")
    if source is not None and source != backbone.name:
        raise UserError(
            f"{path}: this checkpoint holds '{source}', but the recipe names '{backbone.name}'"
        )
    if source is None:
        tensors = backbone.own_names(tensors)
    trained_on = metadata.get("tokenizer")
    if trained_on is not None and trained_on != backbone.spec.vocabulary:
        raise UserError(
            f"{path}: was trained with another tokenizer than the recipe's, so that token ids mean "
            "other words: set data.tokenizer to its own: "
            f"{{file: {path.parent / 'tokenizer.json'}}}"
        )
    if reason := backbone.obstacle(tensors):
        raise UserError(f"{path}: {reason}")
    tensors = backbone.fit_weights(tensors)
    options = metadata.get("options")
    hint = "" if options is None else f"; the file's options are {options}"
    check_fit(tensors, backbone, backbone.name, path, hint)
    backbone.load_state_dict(tensors)


def check_fit(
    tensors: Mapping[str, Tensor], network: nn.Module, name: str, path: Path | str, hint: str = ""
) -> None:
    """Check that weights have the parameters of a network; the message ends with `hint`.

    `name` is the network's in messages.

    Raises:
        UserError: a parameter is missing, unknown or of another shape.
    """
    expected = network.state_dict()
    for parameter in sorted(expected.keys() | tensors.keys()):
        loaded, wanted = tensors.get(parameter), expected.get(parameter)
        if loaded is None or wanted is None or loaded.shape != wanted.shape:
            raise UserError(
                f"{path}: parameter '{parameter}' {_describe_shape(loaded)} in the file, but "
                f"{_describe_shape(wanted)} in '{name}' as configured{hint}"
            )


def _describe_shape(tensor: Tensor | None) -> str:
    return "is missing" if tensor is None else f"has shape {tuple(tensor.shape)}"


WEIGHTS = "backbone.safetensors"
"""Name of the file with a backbone's weights in a run's folder; the spec is next to it."""


def load_backbone(folder: Path) -> Backbone:
    """Rebuild the backbone that a run saved, from the weights, options and spec in its folder.

    Raises:
        UserError: the folder does not exist, or holds no backbone written by sslrun.
    """
    path = folder / WEIGHTS
    tensors, metadata = read(path)
    cls, options = recorded_network(path, metadata)
    backbone = build_empty(cls.name, options, InputSpec.load(folder))
    _load(backbone, path, tensors, metadata)
    return backbone


def recorded_network(path: Path, metadata: Mapping[str, str]) -> tuple[type[Backbone], Options]:
    """The class and options of the backbone in `path`, from the file's metadata.

    Raises:
        UserError: the file was not written by sslrun, or its backbone is unknown.
    """
    if "backbone" not in metadata:
        raise UserError(f"{path}: was not written by sslrun, so its architecture is unknown")
    cls = backbones[metadata["backbone"]]
    try:
        return cls, cls.Options.model_validate_json(metadata["options"])
    except (KeyError, ValueError):
        raise UserError(
            f"{path}: its metadata are not the options of '{cls.name}': it is damaged, or was "
            "written by another version"
        ) from None


def read_metadata(path: Path) -> dict[str, str]:
    """Read what sslrun wrote with the tensors of a file; empty for a file of another program."""
    try:
        with safe_open(str(path), framework="pt") as file:
            about: dict[str, str] = json.loads((file.metadata() or {}).get("sslrun", "{}"))
            return about
    except (SafetensorError, OSError):
        return {}


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors of a file, and the metadata that sslrun wrote with them.

    Raises:
        UserError: the file does not exist, is damaged, or is not a checkpoint.
    """
    check_file(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("sslrun", "{}"))
            if not isinstance(about, dict):
                raise ValueError(about)
            return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except ValueError as error:
        raise UserError(f"{path}: damaged: its metadata cannot be read: {error}") from None
    except (SafetensorError, OSError) as safetensors_error:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception:
            raise UserError(f"{path}: not a checkpoint ({safetensors_error})") from None
    state = state.get("state_dict", state.get("model", state)) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(
        isinstance(value, Tensor) for value in state.values()
    ):
        raise UserError(f"{path}: does not hold a dictionary of weights")
    return state, {}
