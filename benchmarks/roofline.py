"""How near pretraining comes to what the machine can do: images/s, and their FLOPs as a share of its bf16 matrix rate.

python benchmarks/roofline.py --device cuda
python benchmarks/roofline.py --rows resnet18 --batch 64 --steps 2

SimCLR, views and all, as `sslrun pretrain` runs it (compiled, where it compiles a long run), on
ResNet-18 with the small stem at 32x32, ResNet-50 and ViT-B/16 at 224x224. The matrix rate is that
of the best of a few square bf16 products, measured before and after each row on the same machine;
FLOPs are counted by torch, forward and backward.
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
"""Of the schedule, of which few are run."""
WARM_UP = 3
"""Steps that aren't timed: the first one's FLOPs are counted, the second is compiled."""


class Row(NamedTuple):
    options: dict[str, str]
    side: int
    batch: int
    """On a GPU; a CPU takes a sixteenth."""


ROWS = {
    "resnet18": Row({"stem": "small"}, 32, 1024),
    "resnet50": Row({}, 224, 256),
    "vit-base": Row({}, 224, 256),
}


def now(made: Compute) -> float:
    if made.device.type == "cuda":
        torch.cuda.synchronize(made.device)
    return time.perf_counter()


def matrix_rate(made: Compute) -> float:
    """FLOPs a second of the best of a few square bf16 products."""
    best = 0.0
    for side in (2048, 4096, 8192) if made.device.type == "cuda" else (512, 1024, 2048):
        a, b = (torch.randn(side, side, device=made.device, dtype=torch.bfloat16) for _ in range(2))
        a @ b
        for _ in range(5):
            began = now(made)
            for _ in range(4):
                a @ b
            best = max(best, 4 * 2 * side**3 / (now(made) - began))
    return best


def trained(name: str, row: Row, batch: int, steps: int, made: Compute) -> tuple[float, float]:
    """Images a second, and FLOPs an image (both its views)."""
    spec, cls = ImageSpec(row.side), pretexts["simclr"]
    pretext = cls(cls.Options(), build_backbone(name, row.options, spec))
    training = Training(
        pretext, Schedule(steps=STEPS, batch=batch, optimizer="adamw", lr=1e-4), made
    )
    images = torch.randint(0, 256, (2 * batch, 3, row.side, row.side), dtype=torch.uint8)
    loop = train(training, made.place(TensorExamples(images, None, (), spec)), 0)
    seconds = []
    for at in range(WARM_UP + steps):
        began = now(made)
        next(loop)
        if at >= WARM_UP:
            seconds.append(now(made) - began)
    assert training.flops is not None
    return batch / statistics.median(seconds), training.flops / batch


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--batch", type=int, help="default: each row's own")
    parser.add_argument(
        "--steps", type=int, default=10, help="steps that are timed; their median counts"
    )
    given = parser.parse_args()
    made = compute(given.device)
    print(f"{made}, torch {torch.__version__}")
    before = matrix_rate(made)
    for name in given.rows:
        row = ROWS[name]
        batch = given.batch or (row.batch if made.device.type == "cuda" else row.batch // 16)
        rate, flops = trained(name, row, batch, given.steps, made)
        after = matrix_rate(made)
        share = rate * flops / statistics.fmean((before, after))
        print(
            f"{name:9} {row.side:3}x{row.side:<3} batch {batch:4}  {rate:9.1f} images/s  {rate * flops / 1e12:7.2f} of "
            f"{after / 1e12:.2f} TFLOP/s: {share:.1%}"
        )
        before = after


if __name__ == "__main__":
    main()
