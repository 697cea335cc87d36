"""Save and load what a pretext task keeps beside the backbone: latent layers and decoders."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from sslrun.backbones.base import Backbone
from sslrun.backbones.weights import check_fit, plain_tensors, read, read_metadata
from sslrun.errors import UserError
from sslrun.files import checksum, replacing
from sslrun.pretexts.base import Pretext, pretexts

KEPT = "pretext.safetensors"
"""Name of the file with the modules that a pretext task keeps, beside the backbone's file."""
KEPT_BY, CHECKSUM = "kept_by", "kept_sha256"
"""Metadata of a backbone's file: the task that kept modules beside it, and their file's SHA-256."""


@dataclass(frozen=True)
class KeptModules:
    """The weights of the modules that a pretext task kept."""

    path: Path
    pretext: str
    """Name of the task."""
    options: str
    """Options of the task, as JSON."""
    modules: dict[str, dict[str, Tensor]]
    """Name of a module, as in `Pretext.keeps` -> its weights and buffers."""

    def load_into(self, name: str, module: nn.Module, user: str, hint: str = "") -> None:
        """Load the kept module `name` into a module like it.

        Raises UserError if it does not fit; the message names the `user` and ends with the `hint`.
        """
        tensors = self.modules[name]
        check_fit(tensors, module, user, self.path, hint)
        module.load_state_dict(tensors)

    def rebuild(self, backbone: Backbone) -> Pretext:
        """Build the task on the backbone that it trained; modules that it did not keep are new.

        Raises UserError if the task is unknown, or if it kept modules for another backbone.
        """
        if self.pretext not in pretexts:
            raise UserError(
                f"{self.path}: was kept by the pretext task '{self.pretext}', which is not known "
                "here: name the file that defines it with --import"
            )
        cls = pretexts[self.pretext]
        pretext = cls(cls.Options.model_validate_json(self.options), backbone)
        for name, module in pretext.kept_modules.items():
            self.load_into(name, module, f"{self.pretext} on {backbone.name}")
        return pretext


def save_kept(path: Path, pretext: Pretext) -> dict[str, str]:
    """Write the modules that a task keeps, with its name and options; nothing if it keeps none.

    The file is written atomically. Returns the metadata for the file of the backbone, by which
    `find_kept` finds and checks this one.
    """
    if not pretext.kept_modules:
        return {}
    tensors = {}
    for name, module in pretext.kept_modules.items():
        for key, tensor in plain_tensors(module).items():
            tensors[f"{name}/{key}"] = tensor
    about = {"pretext": pretext.name, "options": pretext.options.model_dump_json()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, {"sslrun": json.dumps(about)})
    return {KEPT_BY: pretext.name, CHECKSUM: checksum(path)}


def find_kept(weights: Path) -> KeptModules | None:
    """Read the modules that were kept beside a backbone's file of weights; None if none were.

    Raises:
        UserError: the file with the modules is missing, damaged, or that of another pretraining.
    """
    expected = read_metadata(weights).get(CHECKSUM)
    if expected is None:
        return None
    path = weights.parent / KEPT
    remedy = f"copy the one that was written with {weights.name}, or pretrain again with --fresh"
    if not path.is_file():
        raise UserError(f"{path}: no such file, but {weights.name} needs it: {remedy}")
    if checksum(path) != expected:
        raise UserError(f"{path}: damaged, or not the one of {weights.name}: {remedy}")
    tensors, about = read(path)
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, key = name.partition("/")
        modules.setdefault(module, {})[key] = tensor
    return KeptModules(path, about["pretext"], about["options"], modules)
