"""SimCLR pretraining on one machine: sslrun beside lightly, and the bare network, which is the limit of both.

python benchmarks/simclr.py [--steps 6] [--batch 256]

All three: ResNet-18 with the small stem, 32x32 images, the same batch and threads, in blocks one
after the other, so that a machine whose speed drifts drifts for all. lightly as in its CIFAR-10
benchmark: SimCLRTransform on PIL images in a DataLoader with two workers, float32, SGD. The bare
network: forward and backward of two ready views.
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


def ours(images: torch.Tensor, batch: int, device: str) -> Iterator[None]:
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


def lightlys(images: torch.Tensor, batch: int, device: str) -> Iterator[None]:
    transform = SimCLRTransform(input_size=32, cj_strength=0.5, gaussian_blur=0.0)
    pictures = [torchvision.transforms.functional.to_pil_image(image) for image in images]

    class Views(torch.utils.data.Dataset[list[torch.Tensor]]):
        def __len__(self) -> int:
            return len(pictures)

        def __getitem__(self, index: int) -> list[torch.Tensor]:
            return transform(pictures[index])

    loader = torch.utils.data.DataLoader(
        Views(), batch, shuffle=True, drop_last=True, num_workers=2
    )
    network = torchvision.models.resnet18()
    network.conv1, network.maxpool, network.fc = (
        nn.Conv2d(3, 64, 3, 1, 1, bias=False),
        nn.Identity(),
        nn.Identity(),
    )
    model = nn.Sequential(network, SimCLRProjectionHead(512, 512, 128)).to(device)
    loss, optimizer = NTXentLoss(0.5), torch.optim.SGD(model.parameters(), lr=0.06, momentum=0.9)
    while True:
        for first, second in loader:
            loss(model(first.to(device)), model(second.to(device))).backward()
            optimizer.step()
            optimizer.zero_grad()
            yield


def bare(images: torch.Tensor, batch: int, device: str) -> Iterator[None]:
    made = compute(device)
    network = torchvision.models.resnet18()
    network.conv1, network.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    made.put(network)
    views = (images[:batch].float() / 255).repeat(2, 1, 1, 1).to(made.device)
    while True:
        with made.autocast():
            total = network(views).square().mean()
        total.backward()
        network.zero_grad()
        yield


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2, help="steps a block")
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    images = torch.randint(0, 256, (4 * given.batch, 3, 32, 32), dtype=torch.uint8)
    runs = {
        name: make(images, given.batch, given.device)
        for name, make in (("sslrun", ours), ("lightly", lightlys), ("network", bare))
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for block in range(given.blocks + 1):
        for name, steps in runs.items():
            began = time.perf_counter()
            for _ in range(given.steps):
                next(steps)
            if given.device != "cpu":
                torch.cuda.synchronize()
            if block:  # the first warms up
                seconds[name].append((time.perf_counter() - began) / given.steps)
    rates = {name: given.batch / statistics.median(each) for name, each in seconds.items()}
    print(
        f"{given.device}, {torch.get_num_threads()} threads, torch {torch.__version__}, batch {given.batch}"
    )
    for name, rate in rates.items():
        print(f"{name:8} {rate:8.1f} images/s")
    print(
        f"sslrun / lightly {rates['sslrun'] / rates['lightly']:.2f}, sslrun / network {rates['sslrun'] / rates['network']:.2f}"
    )


if __name__ == "__main__":
    main()
