"""Export weights as a folder that transformers loads."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file
from tokenizers import processors

from sslrun.backbones import build_backbone
from sslrun.backbones.base import lacking_capability
from sslrun.backbones.weights import WEIGHTS, read, recorded_network
from sslrun.data.specs import TextSpec
from sslrun.data.text.tokenizer import Tokenizer, TokenizerOptions, blank_tokenizer, load_tokenizer
from sslrun.errors import UserError
from sslrun.files import replacing

TOKENIZER = "tokenizer.json"


def export(source: Path, folder: Path) -> None:
    """Write config.json, model.safetensors and, if the run has one, the tokenizer into `folder`.

    `source` is a run's folder or its file of weights, of a bert or gpt backbone; heads are not
    exported. Raises UserError if there are no weights, if transformers has no class for the
    network, or if the folder cannot be written.
    """
    weights = source / WEIGHTS if source.is_dir() else source
    tensors, about = read(weights)
    cls, options = recorded_network(weights, about)
    if "export" not in cls.offers:
        raise UserError(f"{weights}: {lacking_capability(cls, 'export', 'sslrun export')}")
    spec = TextSpec(blank_tokenizer(len(tensors["token_embed.weight"])), length=8)
    backbone = build_backbone(cls.name, options, spec)
    backbone.load_state_dict(tensors)
    state = {key: tensor.contiguous() for key, tensor in backbone.to_transformers().items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / "model.safetensors") as temporary:
            save_file(state, temporary, {"format": "pt"})
        (folder / "config.json").write_text(
            json.dumps(backbone.transformers_config(), indent=2) + "\n"
        )
        if (weights.parent / TOKENIZER).is_file():
            tokenizer = load_tokenizer(TokenizerOptions(file=weights.parent / TOKENIZER))
            _export_tokenizer(tokenizer, folder, "segments" in backbone.offers)
    except OSError as error:
        raise UserError(f"{folder}: can't be written: {error.strerror}") from None


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
