"""Time pretraining: sslrun, lightly, and the network alone, which is the limit of both.

python benchmarks/simclr.py [--pretext simclr] [--steps 2] [--batch 256]
    [--options '{"views": 2, "crops": {"count": 4}}'] [--backbone vit-tiny]

All train the same backbone on 32x32 images, with the same batch and threads: ResNet-18 with the
small stem, or ViT-Ti with patches of 4 if the pretext task needs patches. Their blocks of steps
alternate, so that drift in the machine's speed affects all of them.

The network alone runs forward and backward on the images that the pretext task's views hold, made
in advance, without augmentation, loss and optimizer. lightly has a row for SimCLR and
LeJEPA, if it is installed (`pip install 'sslrun[benchmarks]'`): as in its CIFAR-10 benchmark,
SimCLRTransform on PIL images in a DataLoader with two workers, float32 and SGD.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch
import torchvision
from blocks import time_blocks
from torch import nn

from sslrun.backbones import build_backbone
from sslrun.backbones.base import Backbone, backbones
from sslrun.data.examples import Batch, TensorExamples
from sslrun.data.image.augment import Augmentation
from sslrun.data.specs import ImageSpec
from sslrun.pretexts.base import Pretext, pretexts
from sslrun.pretexts.heads import mlp
from sslrun.training.device import compute
from sslrun.training.loop import Training, train
from sslrun.training.schedule import Schedule

SPEC = ImageSpec(32)
DEFAULTS: dict[str, dict[str, Any]] = {
    "simclr": {"temperature": 0.5, "augmentation": Augmentation.simclr(0.5, blur=0.0)},
    "lejepa": {"views": 2, "augmentation": Augmentation.simclr(0.5, blur=0.0)},
}
"""Options of a pretext task: the views are those of lightly's transform."""
SHAPES = {"resnet18": {"stem": "small"}, "vit-tiny": {"patch": 4}}
"""Options of the backbones."""


def image_pretexts() -> list[str]:
    """Names of the pretext tasks that read images."""
    return [name for name in pretexts if pretexts[name].reads is ImageSpec]


def build_network(pretext: str, name: str | None) -> Backbone:
    """Build the backbone called `name`; default: the first that offers what the task needs."""
    needs = set(pretexts[pretext].needs)
    name = name or next(each for each in SHAPES if needs <= backbones[each].offers)
    return build_backbone(name, SHAPES.get(name, {}), SPEC)


def build_pretext(args: argparse.Namespace) -> Pretext:
    cls = pretexts[args.pretext]
    options = cls.Options(**DEFAULTS.get(args.pretext, {}) | json.loads(args.options))
    return cls(options, build_network(args.pretext, args.backbone))


def train_sslrun(images: torch.Tensor, args: argparse.Namespace) -> Iterator[None]:
    """Pretrain with sslrun, one step each time the iterator is advanced."""
    pretext = build_pretext(args)
    examples = TensorExamples(images, None, (), SPEC)
    pretext.fit(examples)
    schedule = Schedule(epochs=1000, batch=args.batch, optimizer="sgd", lr=1e-3)
    training = Training(pretext, schedule, compute(args.device))
    for _ in train(training, training.compute.place(examples), 0):
        yield


def train_lightly(images: torch.Tensor, args: argparse.Namespace) -> Iterator[None]:
    """Pretrain SimCLR or LeJEPA with lightly, one step each time the iterator is advanced."""
    from lightly.loss import LeJEPALoss, NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead
    from lightly.transforms import SimCLRTransform

    transform = SimCLRTransform(input_size=32, cj_strength=0.5, gaussian_blur=0.0)
    pictures = [torchvision.transforms.functional.to_pil_image(image) for image in images]

    class Views(torch.utils.data.Dataset[list[torch.Tensor]]):
        """Two augmented views of each picture."""

        def __len__(self) -> int:
            return len(pictures)

        def __getitem__(self, index: int) -> list[torch.Tensor]:
            return transform(pictures[index])

    loader = torch.utils.data.DataLoader(
        Views(), args.batch, shuffle=True, drop_last=True, num_workers=2
    )
    network = torchvision.models.resnet18()
    network.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    network.maxpool, network.fc = nn.Identity(), nn.Identity()
    is_lejepa = args.pretext == "lejepa"
    head = mlp([512, 2048, 2048, 16]) if is_lejepa else SimCLRProjectionHead(512, 512, 128)
    model = nn.Sequential(network, head).to(args.device)
    contrast, gaussian = NTXentLoss(0.5), LeJEPALoss(lambda_param=0.02, sigreg_num_vectors=256)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    while True:
        for batch in loader:
            first, second = (model(view.to(args.device)) for view in batch)
            if is_lejepa:
                # lightly's loss wants a local view; it costs the same as a second global one.
                loss = gaussian(local_proj=second[None], global_proj=first[None])
            else:
                loss = contrast(first, second)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            yield


def run_network(images: torch.Tensor, args: argparse.Namespace) -> Iterator[None]:
    """Run the backbone forward and backward on the views' images, one pass for each size."""
    hardware = compute(args.device)
    pretext = build_pretext(args)
    pretext.fit(TensorExamples(images, None, (), SPEC))
    hardware.put(pretext)
    batch = Batch(images[: args.batch].to(hardware.device), None)
    made = pretext.views(batch, hardware.generator())
    made = (made,) if isinstance(made, torch.Tensor) else made
    sizes: dict[tuple[int, ...], list[torch.Tensor]] = {}
    for view in made:
        if view.ndim == 4 and view.shape[1] == 3 and view.is_floating_point():
            sizes.setdefault(tuple(view.shape[-2:]), []).append(view)
    passes = [torch.cat(views) for views in sizes.values()]
    while True:
        with hardware.autocast():
            total = sum(pretext.backbone(views).pooled.square().mean() for views in passes)
        assert isinstance(total, torch.Tensor)
        total.backward()
        pretext.zero_grad()
        yield


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pretext", default="simclr", choices=image_pretexts())
    parser.add_argument("--backbone", default=None, help="name of an image backbone")
    parser.add_argument("--options", default="{}", help="options of the pretext task, as JSON")
    parser.add_argument("--steps", type=int, default=2, help="steps per block")
    parser.add_argument("--blocks", type=int, default=3, help="timed blocks of each")
    parser.add_argument("--batch", type=int, default=256, help="images per step")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    images = torch.randint(0, 256, (4 * args.batch, 3, 32, 32), dtype=torch.uint8)
    runs = {"sslrun": train_sslrun(images, args), "network": run_network(images, args)}
    compared = args.pretext in ("simclr", "lejepa") and args.backbone is None
    if compared and find_spec("lightly") is not None:
        runs["lightly"] = train_lightly(images, args)
    seconds = time_blocks(runs, args.steps, args.blocks, args.device)
    rates = {name: args.batch / median for name, median in seconds.items()}
    print(
        f"{args.device}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"{args.pretext}, batch {args.batch}"
    )
    for name, rate in rates.items():
        print(f"{name:8} {rate:8.1f} images/s")
    for name, rate in rates.items():
        if name != "sslrun":
            print(f"sslrun / {name} {rates['sslrun'] / rate:.2f}")


if __name__ == "__main__":
    main()
