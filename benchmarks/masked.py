"""Time MAE pretraining beside SimCLR with the same ViT, lightly, and the encoder alone.

python benchmarks/masked.py [--steps 4] [--batch 64] [--width 192] [--depth 6]

All train on 32x32 images in patches of 4, with the same batch and threads. Their blocks of steps
alternate, so that drift in the machine's speed affects all of them. The encoder alone runs forward
and backward on the visible quarter of the patches, without augmentation, decoder, loss and
optimizer: the limit. lightly's building blocks (its MAE example) are timed if lightly and timm are
installed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from blocks import time_blocks
from torch import nn

from sslrun.backbones import build_backbone
from sslrun.backbones.base import Backbone
from sslrun.data.examples import TensorExamples
from sslrun.data.image.augment import Augmentation
from sslrun.data.specs import ImageSpec
from sslrun.pretexts.base import pretexts
from sslrun.training.device import compute
from sslrun.training.loop import Training, train
from sslrun.training.schedule import Schedule

try:
    import timm
    import torchvision
    from lightly.models import utils
    from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM
    from lightly.transforms import MAETransform
except ImportError:
    timm = None

PATCH = 4
PATCHES = (32 // PATCH) ** 2
VISIBLE = PATCHES // 4


def build_vit(args: argparse.Namespace) -> Backbone:
    options = {"patch": PATCH, "width": args.width, "depth": args.depth, "heads": 3, "pool": "mean"}
    return build_backbone("vit-tiny", options, ImageSpec(32))


def train_sslrun(
    name: str, options: dict[str, Any], images: torch.Tensor, args: argparse.Namespace
) -> Iterator[None]:
    """Pretrain with sslrun, one step each time the iterator is advanced."""
    cls = pretexts[name]
    pretext = cls(cls.Options(**options), build_vit(args))
    training = Training(
        pretext, Schedule(epochs=1000, batch=args.batch, lr=1e-3), compute(args.device)
    )
    examples = training.compute.place(TensorExamples(images, None, (), ImageSpec(32)))
    for _ in train(training, examples, 0):
        yield


def run_encoder(images: torch.Tensor, args: argparse.Namespace) -> Iterator[None]:
    """Run the encoder forward and backward on the visible patches."""
    hardware, backbone = compute(args.device), build_vit(args)
    hardware.put(backbone)
    patches = torch.randn(args.batch, VISIBLE, args.width, device=hardware.device)
    while True:
        with hardware.autocast():
            total = backbone.encode(patches).square().mean()
        total.backward()
        backbone.zero_grad()
        yield


class LightlyMAE(nn.Module):
    """MAE of lightly's building blocks on timm's ViT."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        vit = timm.models.VisionTransformer(
            img_size=32, patch_size=PATCH, embed_dim=args.width, depth=args.depth, num_heads=3,
            num_classes=0,
        )  # fmt: skip
        self.encoder = MaskedVisionTransformerTIMM(vit=vit)
        self.decoder = MAEDecoderTIMM(
            num_patches=PATCHES, patch_size=PATCH, embed_dim=args.width,
            decoder_embed_dim=args.decoder_width, decoder_depth=args.decoder_depth,
            decoder_num_heads=4,
        )  # fmt: skip

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        size = (len(images), 1 + PATCHES)
        kept, hidden = utils.random_token_mask(size, mask_ratio=0.75, device=images.device)
        embedded = self.decoder.embed(self.encoder.encode(images=images, idx_keep=kept))
        tokens = utils.repeat_token(self.decoder.mask_token, size)
        tokens = utils.set_at_index(tokens, kept, embedded.type_as(tokens))
        predicted = self.decoder.predict(utils.get_at_index(self.decoder.decode(tokens), hidden))
        target = utils.get_at_index(utils.patchify(images, PATCH), hidden - 1)
        return nn.functional.mse_loss(predicted, target)


def train_lightly(images: torch.Tensor, args: argparse.Namespace) -> Iterator[None]:
    """Pretrain with lightly, one step each time the iterator is advanced."""
    transform = MAETransform(input_size=32)
    pictures = [torchvision.transforms.functional.to_pil_image(image) for image in images]

    class Views(torch.utils.data.Dataset[torch.Tensor]):
        """One augmented view of each picture."""

        def __len__(self) -> int:
            return len(pictures)

        def __getitem__(self, index: int) -> torch.Tensor:
            return transform(pictures[index])[0]

    loader = torch.utils.data.DataLoader(
        Views(), args.batch, shuffle=True, drop_last=True, num_workers=2
    )
    model = LightlyMAE(args).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    while True:
        for views in loader:
            model(views.to(args.device)).backward()
            optimizer.step()
            optimizer.zero_grad()
            yield


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2, help="steps per block")
    parser.add_argument("--blocks", type=int, default=3, help="timed blocks of each")
    parser.add_argument("--batch", type=int, default=256, help="images per step")
    parser.add_argument("--width", type=int, default=192, help="width of the ViT")
    parser.add_argument("--depth", type=int, default=6, help="blocks of the ViT")
    parser.add_argument("--decoder-width", type=int, default=96)
    parser.add_argument("--decoder-depth", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    images = torch.randint(0, 256, (4 * args.batch, 3, 32, 32), dtype=torch.uint8)
    decoder = {"width": args.decoder_width, "depth": args.decoder_depth, "heads": 4}
    views = {"temperature": 0.5, "augmentation": Augmentation.simclr(0.5, blur=0.0)}
    runs = {
        "mae": train_sslrun("mae", decoder, images, args),
        "simclr": train_sslrun("simclr", views, images, args),
        "encoder": run_encoder(images, args),
    }
    if timm is not None:
        runs["lightly"] = train_lightly(images, args)
    seconds = time_blocks(runs, args.steps, args.blocks, args.device)
    rates = {name: args.batch / median for name, median in seconds.items()}
    print(
        f"{args.device}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"batch {args.batch}, ViT {args.depth} x {args.width}, "
        f"decoder {args.decoder_depth} x {args.decoder_width}"
    )
    for name, rate in rates.items():
        print(f"{name:8} {rate:8.1f} images/s, mae / {name} {rates['mae'] / rate:.2f}")


if __name__ == "__main__":
    main()
