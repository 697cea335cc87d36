"""Open the backbone that a command names: of a run, a file, a recipe or another library."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sslrun.backbones import build_backbone, load_into
from sslrun.backbones.base import Backbone, backbones
from sslrun.backbones.weights import WEIGHTS, read, recorded_network
from sslrun.data.source import sources
from sslrun.data.specs import ImageSpec, InputSpec, TextSpec, VideoSpec
from sslrun.data.splits import load_splits
from sslrun.data.text.tokenizer import TokenizerOptions, load_tokenizer
from sslrun.errors import UserError
from sslrun.files import expand_home
from sslrun.recipe import Recipe, load
from sslrun.stages.weights import InitialWeights

DEFAULT_SIZE = 224
"""Side of the images for a backbone of another library, in pixels."""
DEFAULT_LENGTH = 128
"""Largest number of tokens for a backbone of another library."""


class Subject(NamedTuple):
    """A backbone, and the recipe that it belongs to, if any."""

    backbone: Backbone
    recipe: Recipe | None


def open_backbone(
    reference: str,
    overrides: Sequence[str] = (),
    *,
    reads_images: bool = True,
    size: int | None = None,
    seed: int = 0,
    runs: Path = Path("runs"),
) -> Subject:
    """Build the backbone that `reference` names, with its weights.

    It names a run's folder, a file of weights, a recipe, to which `overrides` apply, or a backbone
    of another library, such as `timm:NAME`. If that library has backbones of text and of images,
    `reads_images` decides; `size` is the side of its images in pixels, by default the usual one.

    Raises UserError if there is none.
    """
    path = expand_home(reference)
    kind, _, name = reference.partition(":")
    if name and kind in backbones and backbones[kind].shorthand and not path.exists():
        return Subject(_open_named(kind, name, reads_images, size), None)
    if path.is_dir() or (path.is_file() and path.suffix not in (".yaml", ".yml")):
        return _open_weights(path / WEIGHTS if path.is_dir() else path)
    return _open_recipe(path, overrides, seed, runs)


def _open_named(kind: str, name: str, reads_images: bool, size: int | None) -> Backbone:
    """Build a backbone of another library with its pretrained weights."""
    other = getattr(backbones[kind], "counterpart", None)
    if other is not None and reads_images != issubclass(ImageSpec, backbones[kind].takes):
        kind = other
    cls = backbones[kind]
    assert cls.shorthand is not None
    options: dict[str, Any] = {cls.shorthand: name}
    if cls.takes is TextSpec:
        file = Path(name) / "tokenizer.json"
        tokenizer = TokenizerOptions(file=file) if file.is_file() else TokenizerOptions(hub=name)
        return build_backbone(kind, options, TextSpec(load_tokenizer(tokenizer), DEFAULT_LENGTH))
    if size is not None and "size" in cls.Options.model_fields:
        options["size"] = size
    return build_backbone(kind, options, ImageSpec(size or DEFAULT_SIZE))


def _open_weights(path: Path) -> Subject:
    """Rebuild a backbone from a file of weights and the spec beside it."""
    if not path.is_file():
        raise UserError(
            f"{path.parent}: no checkpoint there; name a pretraining run's folder or its {WEIGHTS}"
        )
    _, about = read(path)
    if "backbone" not in about:
        raise UserError(
            f"{path}: was not written by sslrun, so its architecture is unknown: write a recipe "
            f"with its backbone and weights: {path}, and name the recipe"
        )
    cls, options = recorded_network(path, about)
    backbone = build_backbone(cls.name, options, InputSpec.load(path.parent))
    load_into(backbone, path)
    recipe = path.parent / "recipe.yaml"
    return Subject(backbone, load(recipe) if recipe.is_file() else None)


def _open_recipe(path: Path, overrides: Sequence[str], seed: int, runs: Path) -> Subject:
    """Build the backbone of a recipe with the weights that its evaluations start from."""
    recipe = load(path, overrides)
    origin = InitialWeights.pretrained(recipe, seed, runs)
    if not origin.exists:
        raise UserError(
            f"no pretrained checkpoint for {path} (seed {seed}): run `sslrun pretrain {path}` "
            "first, or take the initial weights with --set pretext=null"
        )
    if origin.pretraining is not None:
        return Subject(_open_weights(origin.pretraining.weights).backbone, recipe)
    torch.manual_seed(seed)
    spec, _ = sources[recipe.data.name](recipe.data.options).sketch(1)
    spec = spec.frame if isinstance(spec, VideoSpec) else spec
    backbone = build_backbone(recipe.backbone.name, recipe.backbone.options, spec)
    if origin.weights is None:
        backbone.fit_inputs(load_splits(recipe.data.name, recipe.data.options).train)
    else:
        load_into(backbone, origin.weights)
        for name, values in origin.normalization.items():
            backbone.get_buffer(name).copy_(torch.tensor(values))
    return Subject(backbone, recipe)
