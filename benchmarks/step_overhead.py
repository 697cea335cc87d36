"""What the loop costs a step: sslrun's beside a bare PyTorch loop on the same network and tensors.

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
from sslrun.training.device import compute
from sslrun.training.learner import Output
from sslrun.training.loop import Training, train
from sslrun.training.schedule import Schedule


class Learner(nn.Module):
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

    def after_step(self, progress: float) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    made = compute(given.device)
    images, labels = torch.rand(given.batch, 3, 32, 32), torch.randint(0, 10, (given.batch,))
    examples = made.place(TensorExamples(images, labels, tuple("0123456789"), ImageSpec(32)))
    training = Training(
        Learner(), Schedule(steps=10**6, batch=given.batch, optimizer="sgd", lr=0.01), made
    )

    def bare() -> Iterator[None]:
        learner = made.put(Learner()).train()
        optimizer = torch.optim.SGD(learner.parameters(), lr=0.01, momentum=0.9, fused=True)
        x, y = images.to(made.device), labels.to(made.device)
        while True:
            with made.autocast():
                loss = learner((x, y)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            yield

    loops = {"sslrun": train(training, examples, 0), "bare": bare()}
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for at in range(given.steps + 5):
        for name, loop in loops.items():
            began = time.perf_counter()
            next(loop)
            if made.device.type == "cuda":
                torch.cuda.synchronize()
            if at >= 5:
                seconds[name].append(time.perf_counter() - began)
    ratio = statistics.median(
        a / b for a, b in zip(seconds["sslrun"], seconds["bare"], strict=True)
    )
    for name, each in seconds.items():
        print(f"{name:7} {1000 * statistics.median(each):8.2f} ms a step of {given.batch}")
    print(f"overhead, median of paired ratios: {100 * (ratio - 1):+.1f} %")


if __name__ == "__main__":
    main()
