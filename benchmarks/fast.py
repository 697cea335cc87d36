"""Time masked-language-model pretraining of BERT's block and of ModernBERT's parts.

OMP_NUM_THREADS=1 python benchmarks/fast.py
python benchmarks/fast.py --device cuda --model bert-base --batch 64 --length 512 --steps 50

All train on the same full sequences, which hold no padding. Steps of the variants alternate:

- plain: the paper's block, 15 % of the tokens hidden;
- fast: `fast: true`;
- rms: `fast: true` with RMSNorm;
- modern: the same with a window of 128 tokens in two of three layers, and 30 % hidden.

For each it prints tokens per second of wall-clock time, median over steps, and the ratio to plain.
The window is a mask: it changes what is learned, and saves no time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch

from sslrun.backbones import build_backbone
from sslrun.data.specs import TextSpec
from sslrun.data.text.sequences import Documents
from sslrun.data.text.tokenizer import blank_tokenizer
from sslrun.pretexts.base import pretexts
from sslrun.training.device import compute
from sslrun.training.loop import Training, train
from sslrun.training.schedule import Schedule

VOCAB = 30_522
VARIANTS: dict[str, tuple[dict[str, Any], float]] = {
    "plain": ({}, 0.15),
    "fast": ({"fast": True}, 0.15),
    "rms": ({"fast": True, "norm": "rms"}, 0.15),
    "modern": ({"fast": True, "norm": "rms", "window": 128}, 0.3),
}
"""Name -> options of the backbone, and the share of hidden tokens."""


def start(name: str, args: argparse.Namespace, corpus: Documents) -> Iterator[Any]:
    """Pretrain a variant, one step each time the iterator is advanced."""
    options, rate = VARIANTS[name]
    backbone = build_backbone(args.model, {"positions": args.length, **options}, corpus.spec)
    cls = pretexts["mlm"]
    pretext = cls(cls.Options(pairs="drop", rate=rate), backbone)
    schedule = Schedule(steps=1_000_000, batch=args.batch, lr=1e-4, clip=1.0)
    training = Training(pretext, schedule, compute(args.device))
    return train(training, pretext.arrange(corpus, 0), 0)


def time_step(steps: Iterator[Any], device: str) -> float:
    """Take a step, and return its seconds."""
    begin = time.perf_counter()
    next(steps)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="bert-mini")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    spec = TextSpec(blank_tokenizer(VOCAB), args.length)
    texts = torch.randint(5, VOCAB, (8 * args.batch, args.length - 2), dtype=torch.int32)
    # Each text is a document of one sentence.
    ends = torch.arange(0, texts.numel() + 1, args.length - 2)
    corpus = Documents(texts.flatten(), ends, torch.arange(len(ends)), spec)
    runs = {name: start(name, args, corpus) for name in VARIANTS}
    for steps in runs.values():
        next(steps)  # warms up
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(args.steps):
        for name, steps in runs.items():
            seconds[name].append(time_step(steps, args.device))
    plain = statistics.median(seconds["plain"])
    print(f"torch {torch.__version__}, {args.model}, length {args.length}, batch {args.batch}")
    print("| variant | tokens/s | ratio |")
    print("|---|---:|---:|")
    for name, taken in seconds.items():
        median = statistics.median(taken)
        rate = args.batch * args.length / median
        print(f"| {name} | {rate:,.0f} | {plain / median:.2f} |")


if __name__ == "__main__":
    main()
