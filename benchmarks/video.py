"""Time training on films that are decoded while it runs, against clips that are in memory.

python benchmarks/video.py FOLDER [--batch 16] [--frames 4] [--size 64]

FOLDER holds film files. Both trainings read the same clips in the same order, and pass every frame
through the same backbone, forward and backward, with an optimizer step and without augmentation:
a pretext task takes longer, and leaves more time to decode. Each block starts afresh, so that no
clip of a timed block is decoded before it, except those that the warm-up leaves ahead.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

from sslrun.backbones import build_backbone
from sslrun.backbones.base import Backbone
from sslrun.data.examples import Batch
from sslrun.data.image.augment import to_float
from sslrun.data.image.images import count_workers
from sslrun.data.specs import VideoSpec
from sslrun.data.video.decoding import Framing
from sslrun.data.video.files import open_film_files, store_films
from sslrun.data.video.films import ClipExamples, draw_clips
from sslrun.data.video.folders import FILM_SUFFIXES
from sslrun.training.device import compute
from sslrun.training.learner import Learner, Output
from sslrun.training.loop import Training, train
from sslrun.training.schedule import Schedule


class FrameNetwork(Learner):
    """A backbone that reads every frame, with a loss that costs nothing."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def views(self, batch: Batch, generator: torch.Generator) -> Tensor:
        return to_float(batch.inputs.flatten(0, 1))

    def forward(self, views: Tensor) -> Output:
        return Output(self.backbone(views).pooled.square().mean())


def open_clips(args: argparse.Namespace) -> dict[str, ClipExamples]:
    """Return the same clips in memory, and of films that are decoded on request."""
    paths = sorted(str(path) for path in args.folder.rglob("*") if path.suffix in FILM_SUFFIXES)
    streamed, _ = open_film_files(paths, Framing(args.size), False, None)
    stored, _ = store_films(streamed, False, None)
    clips = draw_clips(streamed, args.frames, 1, 1)
    spec = VideoSpec(args.size, args.frames)
    films = {"in memory": stored, "decoded": streamed}
    return {name: ClipExamples(source, clips, spec) for name, source in films.items()}


def time_block(examples: ClipExamples, args: argparse.Namespace) -> float:
    """Return the seconds of a training step."""
    options = {"stem": "small", "channels": args.channels}
    backbone = build_backbone("resnet18", options, examples.spec.frame)
    schedule = Schedule(steps=10**6, batch=args.batch, optimizer="sgd", lr=1e-4)
    hardware = compute(args.device)
    training = Training(FrameNetwork(backbone), schedule, hardware)
    steps = iter(train(training, hardware.place(examples), 0))
    for _ in range(args.warmup):
        next(steps)
    start = time.perf_counter()
    for _ in range(args.steps):
        next(steps)
    if args.device != "cpu":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / args.steps


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder of films")
    parser.add_argument("--channels", type=int, default=64, help="first width of the ResNet-18")
    parser.add_argument("--size", type=int, default=64, help="side of a frame")
    parser.add_argument("--frames", type=int, default=4, help="frames per clip")
    parser.add_argument("--batch", type=int, default=16, help="clips per step")
    parser.add_argument("--steps", type=int, default=10, help="steps per block")
    parser.add_argument("--warmup", type=int, default=3, help="steps before each block")
    parser.add_argument("--blocks", type=int, default=3, help="timed blocks of each")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    clips = open_clips(args)
    seconds: dict[str, list[float]] = {name: [] for name in clips}
    for _ in range(args.blocks):
        for name, examples in clips.items():
            seconds[name].append(time_block(examples, args))
    rates = {name: args.batch / statistics.median(values) for name, values in seconds.items()}
    print(
        f"{args.device}, {torch.get_num_threads()} threads, {count_workers()} decoding workers, "
        f"torch {torch.__version__}, ResNet-18 of {args.channels} channels, {args.batch} clips of "
        f"{args.frames} frames at {args.size}"
    )
    for name, rate in rates.items():
        print(f"{name:10} {rate:8.1f} clips/s")
    print(f"decoded / in memory {rates['decoded'] / rates['in memory']:.2f}")


if __name__ == "__main__":
    main()
