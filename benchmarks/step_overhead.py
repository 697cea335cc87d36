"""Measure the overhead of sslrun's training loop per step, against a bare PyTorch loop.

Both loops train the same network on the same tensors, and their steps alternate.

python benchmarks/step_overhead.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from sslrun.backbones import build_backbone
from sslrun.data.examples import Batch, TensorExamples
from sslrun.data.specs import ImageSpec
from sslrun.training.device import Compute, compute
from sslrun.training.learner import Learner, Output
from sslrun.training.loop import Training, train
from sslrun.training.schedule import Schedule

WARM_UP = 5
"""Steps that are not timed."""


class Classifier(Learner):
    """A classifier whose views are the images themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = build_backbone("resnet18", {"stem": "small"}, ImageSpec(32))
        self.head = nn.Linear(512, 10)

    def views(
        self, batch: Batch, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return batch.inputs, batch.labels

    def forward(self, views: tuple[torch.Tensor, torch.Tensor]) -> Output:
        return Output(F.cross_entropy(self.head(self.backbone(views[0]).pooled), views[1]))


def run_bare_loop(images: torch.Tensor, labels: torch.Tensor, hardware: Compute) -> Iterator[None]:
    """Train with a plain PyTorch loop, one step each time the iterator is advanced."""
    learner = hardware.put(Classifier()).train()
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.01, momentum=0.9, fused=True)
    x, y = images.to(hardware.device), labels.to(hardware.device)
    while True:
        with hardware.autocast():
            loss = learner((x, y)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=30, help="timed steps of each loop")
    parser.add_argument("--batch", type=int, default=32, help="images per step")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    hardware = compute(args.device)
    images, labels = torch.rand(args.batch, 3, 32, 32), torch.randint(0, 10, (args.batch,))
    examples = hardware.place(TensorExamples(images, labels, tuple("0123456789"), ImageSpec(32)))
    schedule = Schedule(steps=10**6, batch=args.batch, optimizer="sgd", lr=0.01)
    training = Training(Classifier(), schedule, hardware)
    loops = {
        "sslrun": train(training, examples, 0),
        "bare": run_bare_loop(images, labels, hardware),
    }
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for step in range(args.steps + WARM_UP):
        for name, loop in loops.items():
            start = time.perf_counter()
            next(loop)
            if hardware.device.type == "cuda":
                torch.cuda.synchronize()
            if step >= WARM_UP:
                seconds[name].append(time.perf_counter() - start)
    pairs = zip(seconds["sslrun"], seconds["bare"], strict=True)
    ratio = statistics.median(sslrun / bare for sslrun, bare in pairs)
    for name, times in seconds.items():
        print(f"{name:7} {1000 * statistics.median(times):8.2f} ms per step of {args.batch} images")
    print(f"overhead, median of paired ratios: {100 * (ratio - 1):+.1f} %")


if __name__ == "__main__":
    main()
