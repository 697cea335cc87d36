"""Measure SimCLR pretraining in images/s, and its FLOP/s relative to the bf16 matrix rate.

python benchmarks/roofline.py --device cuda
python benchmarks/roofline.py --rows resnet18 --batch 64 --steps 2

SimCLR runs as in `sslrun pretrain`: with augmentation, and compiled if sslrun compiles a long run
on this device. The networks are ResNet-18 with the small stem at 32x32, and ResNet-50 and ViT-B/16
at 224x224. The matrix rate is that of the fastest of several square bf16 matrix products, measured
on the same machine before and after each row. torch counts the FLOPs of forward and backward.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import NamedTuple

import torch

from sslrun.backbones import build_backbone
from sslrun.data.examples import TensorExamples
from sslrun.data.specs import ImageSpec
from sslrun.pretexts.base import pretexts
from sslrun.training.device import Compute, compute
from sslrun.training.loop import Training, train
from sslrun.training.schedule import Schedule

STEPS = 10**6
"""Length of the schedule in steps, far more than are run."""
WARM_UP = 3
"""Steps that are not timed: FLOPs are counted in the first, and the second compiles."""


class Row(NamedTuple):
    """A network with its input size and batch."""

    options: dict[str, str]
    """Options of the backbone."""
    side: int
    """Side of the images, in pixels."""
    batch: int
    """Images per step on a GPU; a CPU gets a sixteenth of it."""


ROWS = {
    "resnet18": Row({"stem": "small"}, 32, 1024),
    "resnet50": Row({}, 224, 256),
    "vit-base": Row({}, 224, 256),
}
"""Rows by the backbone's name."""


def now(hardware: Compute) -> float:
    """Read the clock after the device has finished its work."""
    if hardware.device.type == "cuda":
        torch.cuda.synchronize(hardware.device)
    return time.perf_counter()


def measure_matrix_rate(hardware: Compute) -> float:
    """Measure the FLOP/s of the fastest of several square bf16 matrix products."""
    device = hardware.device
    best = 0.0
    for side in (2048, 4096, 8192) if device.type == "cuda" else (512, 1024, 2048):
        a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
        a @ b  # warms up
        for _ in range(5):
            start = now(hardware)
            for _ in range(4):
                a @ b
            best = max(best, 4 * 2 * side**3 / (now(hardware) - start))
    return best


def measure_training(
    name: str, row: Row, batch: int, steps: int, hardware: Compute
) -> tuple[float, float]:
    """Measure images per second, and FLOPs per image (for both of its views)."""
    spec, cls = ImageSpec(row.side), pretexts["simclr"]
    pretext = cls(cls.Options(), build_backbone(name, row.options, spec))
    training = Training(
        pretext, Schedule(steps=STEPS, batch=batch, optimizer="adamw", lr=1e-4), hardware
    )
    images = torch.randint(0, 256, (2 * batch, 3, row.side, row.side), dtype=torch.uint8)
    loop = train(training, hardware.place(TensorExamples(images, None, (), spec)), 0)
    seconds = []
    for step in range(WARM_UP + steps):
        start = now(hardware)
        next(loop)
        if step >= WARM_UP:
            seconds.append(now(hardware) - start)
    assert training.flops is not None
    return batch / statistics.median(seconds), training.flops / batch


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--rows", nargs="+", choices=list(ROWS), default=list(ROWS), help="networks to measure"
    )
    parser.add_argument("--batch", type=int, help="images per step; default: each row's own")
    parser.add_argument(
        "--steps", type=int, default=10, help="number of timed steps; their median counts"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    hardware = compute(args.device)
    print(f"{hardware}, torch {torch.__version__}")
    before = measure_matrix_rate(hardware)
    for name in args.rows:
        row = ROWS[name]
        batch = args.batch or (row.batch if hardware.device.type == "cuda" else row.batch // 16)
        rate, flops = measure_training(name, row, batch, args.steps, hardware)
        after = measure_matrix_rate(hardware)
        share = rate * flops / statistics.fmean((before, after))
        print(
            f"{name:9} {row.side:3}x{row.side:<3} batch {batch:4}  {rate:9.1f} images/s  "
            f"{rate * flops / 1e12:7.2f} of {after / 1e12:.2f} TFLOP/s: {share:.1%}"
        )
        before = after


if __name__ == "__main__":
    main()
