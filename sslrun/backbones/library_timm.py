"""Image networks of timm (an optional extra), by name or from a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sslrun.backbones.base import Features, backbones
from sslrun.backbones.library import (
    LibraryBackbone,
    LibraryOptions,
    as_features,
    attention_weights,
    extra_missing,
    loading,
    switch_off_dropout,
)
from sslrun.data.specs import ImageSpec
from sslrun.hub import reach_hub

WEIGHTS = "model.safetensors"
"""Name of the file of weights in timm's folders."""


@backbones.register("timm")
class TimmBackbone(LibraryBackbone):
    """An image network of timm, as `timm:NAME`, `timm:hf-hub:OWNER/NAME` or `timm:FOLDER`.

    Pooled features are timm's own before the classifier (`forward_head` with `pre_logits`). Tokens
    are those of `forward_features` without special ones. A folder holds config.json and
    model.safetensors, as `timm.models.save_for_hf` and `sslrun export --to timm` write them.
    Parameters are grouped for layer decay as timm does.
    """

    class Options(LibraryOptions):
        file: Path | None = None
        """File of weights to load instead of timm's: safetensors, or a checkpoint with timm's
        names."""

    library = "timm"
    options: Options

    def __init__(self, options: Options, spec: ImageSpec) -> None:
        super().__init__(options, spec)
        is_folder = Path(options.model).is_dir()
        download = options.pretrained and not is_folder and options.file is None
        self.network: Any = _create(options, is_folder, download)
        settings = self.network.pretrained_cfg
        own = int(settings["input_size"][-1])
        self.size = options.size or (own if settings.get("fixed_input_size") else None)
        self.set_normalization((settings["mean"], settings["std"]))
        switch_off_dropout(self.network)
        if options.pretrained and not download:
            self.load_file(options.file or _weights_in(Path(options.model)))
        self.measure(spec.size)

    def classifiers(self) -> tuple[str, ...]:
        names = self.network.pretrained_cfg.get("classifier") or ()
        return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))

    def forward(self, inputs: Tensor) -> Features:
        """Images (B, 3, H, W) in [0, 1]."""
        output = self.network.forward_features(self.prepare(inputs))
        pooled = self.network.forward_head(output, pre_logits=True).flatten(1)
        channels_last = str(getattr(self.network, "output_fmt", "NCHW")).endswith("NHWC")
        special = int(getattr(self.network, "num_prefix_tokens", 0))
        return as_features(pooled, output, special, channels_last)

    @property
    def attends(self) -> bool:
        from timm.layers.attention import Attention
        from timm.models.vision_transformer import VisionTransformer

        network = self.network
        return (
            type(network) is VisionTransformer
            and network.has_class_token
            and type(network.blocks[-1].attn) is Attention
        )

    def attention(self, inputs: Tensor) -> Tensor:
        network = self.network
        x = network._pos_embed(network.patch_embed(self.prepare(inputs)))
        x = network.blocks[:-1](network.norm_pre(network.patch_drop(x)))
        last = network.blocks[-1]
        attention = last.attn
        qkv = attention.qkv(last.norm1(x)).unflatten(2, (3, attention.num_heads, -1))
        q, k, _ = qkv.permute(2, 0, 3, 1, 4)
        return attention_weights(attention.q_norm(q), attention.k_norm(k))

    def layers(self) -> list[list[nn.Parameter]]:
        from timm.models import group_parameters

        if not hasattr(self.network, "group_matcher"):
            return super().layers()
        named = dict(self.network.named_parameters())
        groups = group_parameters(self.network, self.network.group_matcher(coarse=False))
        return [[named[name] for name in groups[depth]] for depth in sorted(groups)]


def _create(options: TimmBackbone.Options, is_folder: bool, download: bool) -> Any:
    """Build a network of timm without a classifier; load its weights if `download` says so.

    Raises:
        UserError: timm is not installed, or the network cannot be loaded.
    """
    try:
        import timm
    except ImportError:
        raise extra_missing("timm", "timm") from None
    name = f"local-dir:{options.model}" if is_folder else options.model
    if download or name.startswith("hf-hub:"):
        reach_hub()
    with loading(f"timm:{options.model}"):
        arguments: dict[str, Any] = {"num_classes": 0}
        if options.size is not None:
            plain: Any = timm.create_model(name, **arguments)
            if plain.pretrained_cfg.get("fixed_input_size"):
                arguments["img_size"] = options.size
        return timm.create_model(name, pretrained=download, **arguments)


def _weights_in(folder: Path) -> Path:
    """The file of weights in a folder that timm wrote; safetensors if there is a choice."""
    legacy = folder / "pytorch_model.bin"
    return legacy if legacy.is_file() and not (folder / WEIGHTS).is_file() else folder / WEIGHTS
