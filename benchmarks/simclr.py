"""Time SimCLR pretraining: sslrun, lightly, and the network alone, which is the limit of both.

python benchmarks/simclr.py [--steps 6] [--batch 256]

All three train ResNet-18 with the small stem on 32x32 images, with the same batch and threads.
Their blocks of steps alternate, so that drift in the machine's speed affects all of them.

lightly is used as in its CIFAR-10 benchmark: SimCLRTransform on PIL images in a DataLoader with two
workers, float32 and SGD. The network alone runs forward and backward on two views that are made in
advance.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator

import torch
import torchvision
from torch import nn

from sslrun.backbones import build_backbone
from sslrun.data.examples import TensorExamples
from sslrun.data.image.augment import Augmentation
from sslrun.data.specs import ImageSpec
from sslrun.pretexts.base import pretexts
from sslrun.training.device import compute
from sslrun.training.loop import Training, train
from sslrun.training.schedule import Schedule

try:
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead
    from lightly.transforms import SimCLRTransform
except ImportError:
    sys.exit("lightly is not installed: pip install 'sslrun[benchmarks]'")


def train_sslrun(images: torch.Tensor, batch: int, device: str) -> Iterator[None]:
    """Pretrain with sslrun, one step each time the iterator is advanced."""
    spec = ImageSpec(32)
    cls = pretexts["simclr"]
    options = cls.Options(temperature=0.5, augmentation=Augmentation.simclr(0.5, blur=0.0))
    pretext = cls(options, build_backbone("resnet18", {"stem": "small"}, spec))
    training = Training(
        pretext, Schedule(epochs=1000, batch=batch, optimizer="sgd", lr=0.06), compute(device)
    )
    examples = training.compute.place(TensorExamples(images, None, (), spec))
    for _ in train(training, examples, 0):
        yield


def train_lightly(images: torch.Tensor, batch: int, device: str) -> Iterator[None]:
    """Pretrain with lightly, one step each time the iterator is advanced."""
    transform = SimCLRTransform(input_size=32, cj_strength=0.5, gaussian_blur=0.0)
    pictures = [torchvision.transforms.functional.to_pil_image(image) for image in images]

    class Views(torch.utils.data.Dataset[list[torch.Tensor]]):
        """Two augmented views of each picture."""

        def __len__(self) -> int:
            return len(pictures)

        def __getitem__(self, index: int) -> list[torch.Tensor]:
            return transform(pictures[index])

    loader = torch.utils.data.DataLoader(
        Views(), batch, shuffle=True, drop_last=True, num_workers=2
    )
    network = torchvision.models.resnet18()
    network.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    network.maxpool, network.fc = nn.Identity(), nn.Identity()
    model = nn.Sequential(network, SimCLRProjectionHead(512, 512, 128)).to(device)
    loss, optimizer = NTXentLoss(0.5), torch.optim.SGD(model.parameters(), lr=0.06, momentum=0.9)
    while True:
        for first, second in loader:
            loss(model(first.to(device)), model(second.to(device))).backward()
            optimizer.step()
            optimizer.zero_grad()
            yield


def run_network(images: torch.Tensor, batch: int, device: str) -> Iterator[None]:
    """Run the network forward and backward, without augmentation, loss or optimizer."""
    hardware = compute(device)
    network = torchvision.models.resnet18()
    network.conv1, network.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    hardware.put(network)
    views = (images[:batch].float() / 255).repeat(2, 1, 1, 1).to(hardware.device)
    while True:
        with hardware.autocast():
            total = network(views).square().mean()
        total.backward()
        network.zero_grad()
        yield


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2, help="steps per block")
    parser.add_argument("--blocks", type=int, default=3, help="timed blocks of each")
    parser.add_argument("--batch", type=int, default=256, help="images per step")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    images = torch.randint(0, 256, (4 * args.batch, 3, 32, 32), dtype=torch.uint8)
    runs = {
        "sslrun": train_sslrun(images, args.batch, args.device),
        "lightly": train_lightly(images, args.batch, args.device),
        "network": run_network(images, args.batch, args.device),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for block in range(args.blocks + 1):
        for name, steps in runs.items():
            start = time.perf_counter()
            for _ in range(args.steps):
                next(steps)
            if args.device != "cpu":
                torch.cuda.synchronize()
            if block:  # the first block warms up
                seconds[name].append((time.perf_counter() - start) / args.steps)
    rates = {name: args.batch / statistics.median(times) for name, times in seconds.items()}
    print(
        f"{args.device}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"batch {args.batch}"
    )
    for name, rate in rates.items():
        print(f"{name:8} {rate:8.1f} images/s")
    print(
        f"sslrun / lightly {rates['sslrun'] / rates['lightly']:.2f}, "
        f"sslrun / network {rates['sslrun'] / rates['network']:.2f}"
    )


if __name__ == "__main__":
    main()
