"""Export weights as a folder that another library loads, or as an ONNX graph."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal, get_args

from safetensors.torch import save_file
from tokenizers import processors

from sslrun.backbones import build_empty
from sslrun.backbones.base import Backbone, backbones
from sslrun.backbones.weights import WEIGHTS, check_fit, read, read_metadata, recorded_network
from sslrun.data.specs import TOKENIZER, ImageSpec, InputSpec, TextSpec
from sslrun.data.text.tokenizer import Tokenizer, TokenizerOptions, blank_tokenizer, load_tokenizer
from sslrun.errors import UserError
from sslrun.files import replacing
from sslrun.pretexts.weights import KEPT, KEPT_BY
from sslrun.registry import did_you_mean
from sslrun.runs import check_output, report_unwritable
from sslrun.stages.onnx import ONNX, write_onnx

Target = Literal["transformers", "timm", "torchvision", "onnx"]
TARGETS: tuple[Target, ...] = get_args(Target)
MODEL = "model.safetensors"


def export(source: Path, folder: Path, to: str = "transformers", force: bool = False) -> list[str]:
    """Write a backbone into `folder` in the form of a library, or as an ONNX graph.

    `source` is a run's folder or its file of weights; heads are not exported. The folder holds
    model.safetensors and the library's JSON files, or model.onnx; and the tokenizer, if the run has
    one. Files that the folder holds already are replaced only with `force`. Returns what to report:
    what the run has and the folder does not.

    Raises UserError if there are no weights, if the library has no class for the network, or if the
    folder cannot be written or holds files.
    """
    if to not in TARGETS:
        raise UserError(f"--to {to}: no such library.{did_you_mean(to, list(TARGETS))}")
    if not force and folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder}: holds files; name a new folder, or add --force to replace them")
    check_output(folder, is_folder=True)
    weights = source / WEIGHTS if source.is_dir() else source
    backbone = _load(weights, to)
    exported = None if to == "onnx" else backbone.export(to)
    with report_unwritable(folder, "name another folder"):
        folder.mkdir(parents=True, exist_ok=True)
        if exported is None:
            with replacing(folder / ONNX) as temporary:
                write_onnx(backbone, temporary)
        else:
            tensors = {key: tensor.contiguous() for key, tensor in exported.tensors.items()}
            with replacing(folder / MODEL) as temporary:
                save_file(tensors, temporary, {"format": "pt"})
            for name, content in exported.files.items():
                with replacing(folder / name) as temporary:
                    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if (weights.parent / TOKENIZER).is_file():
            tokenizer = load_tokenizer(TokenizerOptions(file=weights.parent / TOKENIZER))
            _export_tokenizer(tokenizer, folder, "segments" in backbone.offers)
    kept_by = read_metadata(weights).get(KEPT_BY)
    if kept_by is None:
        return []
    return [
        f"{folder}: holds the backbone alone; what the pretext task {kept_by} kept in "
        f"{weights.parent / KEPT} is left out"
    ]


def _load(weights: Path, to: str) -> Backbone:
    """Load the backbone in a file of weights, in evaluation mode.

    Raises:
        UserError: there is none, or the library `to` has no class for it.
    """
    tensors, about = read(weights)
    cls, options = recorded_network(weights, about)
    if to != "onnx" and to not in cls.exports:
        able = [name for name in backbones if to in backbones[name].exports]
        raise UserError(
            f"{weights}: {to} has no class for '{cls.name}', only for {', '.join(able)}; "
            "export with --to onnx"
        )
    spec: InputSpec
    if "token_embed.weight" in tensors and not (weights.parent / TOKENIZER).is_file():
        spec = TextSpec(blank_tokenizer(len(tensors["token_embed.weight"])), length=8)
    else:
        spec = InputSpec.load(weights.parent)
    if to != "onnx" and isinstance(spec, ImageSpec) and (spec.channels != 3 or not spec.is_square):
        height, width = spec.shape
        raise UserError(
            f"{weights}: takes images of {height}x{width} pixels and {spec.channels} channels, but "
            f"an export for {to} takes square color images only; export with --to onnx"
        )
    backbone = build_empty(cls.name, options, spec)
    check_fit(tensors, backbone, backbone.name, weights)
    backbone.load_state_dict(tensors)
    return backbone.eval()


def _export_tokenizer(tokenizer: Tokenizer, folder: Path, segments: bool) -> None:
    """Write a tokenizer that adds [CLS] and [SEP], and segment ids if the network takes them."""
    tokenizer.core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", tokenizer.cls), ("[SEP]", tokenizer.sep)],
    )
    tokenizer.save(folder)
    special = ("pad", "unk", "cls", "sep", "mask")
    names = {f"{token}_token": f"[{token.upper()}]" for token in special}
    inputs = ["input_ids", *(["token_type_ids"] if segments else []), "attention_mask"]
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": inputs, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
