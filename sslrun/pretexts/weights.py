"""Save and load pretext tasks with their own weights: heads, latent layers and decoders."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file

from sslrun.backbones.base import Backbone
from sslrun.backbones.weights import read
from sslrun.errors import UserError
from sslrun.files import replacing
from sslrun.pretexts.base import Pretext, pretexts

PRETEXT_WEIGHTS = "pretext.safetensors"
"""Name of the file with a task's own weights in a run's folder, beside the backbone's."""
BACKBONE = "backbone."
"""Prefix of the backbone's weights, which are saved in a file of their own."""


def save_pretext(path: Path, pretext: Pretext) -> None:
    """Write the task's weights and buffers except the backbone's, with its name and options.

    The file is written atomically; `load_pretext` reads it.
    """
    tensors = {
        name: tensor.detach().contiguous().cpu()
        for name, tensor in pretext.state_dict().items()
        if not name.startswith(BACKBONE)
    }
    about = {"pretext": pretext.name, "options": pretext.options.model_dump_json()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, {"sslrun": json.dumps(about)})


def load_pretext(path: Path, backbone: Backbone) -> Pretext:
    """Rebuild the task that `save_pretext` wrote, on the backbone that it trained.

    Raises:
        UserError: the file does not exist, is of an unknown task, or is of another backbone.
    """
    tensors, about = read(path)
    if about.get("pretext") not in pretexts:
        raise UserError(f"{path}: holds no pretext task that is known here")
    cls = pretexts[about["pretext"]]
    try:
        pretext = cls(cls.Options.model_validate_json(about["options"]), backbone)
    except (KeyError, ValueError):
        raise UserError(
            f"{path}: its metadata are not the options of '{cls.name}': it is damaged, or was "
            "written by another version"
        ) from None
    trained = {BACKBONE + name: tensor for name, tensor in backbone.state_dict().items()}
    try:
        pretext.load_state_dict(tensors | trained)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{path}: does not fit '{backbone.name}' as configured: {reason}") from None
    return pretext
