"""Time masked-language-model pretraining of BERT's block and of ModernBERT's parts.

OMP_NUM_THREADS=1 python benchmarks/fast.py
python benchmarks/fast.py --device cuda --model bert-base --depth 12 --tokens 32768 --steps 50

All train on the same full sequences, which hold no padding. Steps of the variants alternate. Each
has the parts of those before it:

- plain: the paper's block, 15 % of the tokens hidden;
- fast: `fast: true`;
- no dropout: `dropout: 0`;
- window: a window of 128 tokens in two of three layers, `theta: 160000`;
- modern: 30 % hidden;
- rms: RMSNorm.

For each it prints tokens per second, median over steps, and the ratio to plain: of CPU time on a
CPU, and of wall-clock time on CUDA.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from itertools import accumulate
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

PARTS: dict[str, dict[str, Any]] = {
    "plain": {"rate": 0.15},
    "fast": {"fast": True},
    "no dropout": {"dropout": 0.0},
    "window": {"window": 128, "theta": 160_000},
    "modern": {"rate": 0.3},
    "rms": {"norm": "rms"},
}
"""Name -> options that it adds to those before: the share of hidden tokens (`rate`), and the
backbone's."""


def start(parts: dict[str, Any], args: argparse.Namespace, corpus: Documents) -> Iterator[Any]:
    """Pretrain a variant, one step each time the iterator is advanced."""
    options = {"positions": corpus.spec.length, "depth": args.depth, **parts}
    rate = options.pop("rate")
    cls = pretexts["mlm"]
    backbone = build_backbone(args.model, options, corpus.spec)
    pretext = cls(cls.Options(pairs="drop", rate=rate), backbone)
    batch = args.tokens // corpus.spec.length
    schedule = Schedule(steps=1_000_000, batch=batch, lr=1e-4, clip=1.0, precision=args.precision)
    training = Training(pretext, schedule, compute(args.device))
    return train(training, pretext.arrange(corpus, 0), 0)


def time_step(steps: Iterator[Any], device: str) -> float:
    """Take a step, and return its seconds."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    begin = clock()
    next(steps)
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - begin


def draw_texts(length: int, tokens: int, vocab: int) -> Documents:
    """Draw documents of one sentence that fill a sequence each: eight batches."""
    spec = TextSpec(blank_tokenizer(vocab), length)
    texts = torch.randint(5, vocab, (8 * tokens // length, length - 2), dtype=torch.int32)
    ends = torch.arange(0, texts.numel() + 1, length - 2)
    return Documents(texts.flatten(), ends, torch.arange(len(ends)), spec)


def compare(length: int, args: argparse.Namespace) -> None:
    """Train all variants at one length, and print a row for each."""
    corpus = draw_texts(length, args.tokens, args.vocab)
    added = accumulate(PARTS.values(), lambda before, part: before | part)
    runs = {name: start(parts, args, corpus) for name, parts in zip(PARTS, added, strict=True)}
    for steps in runs.values():
        next(steps)  # warms up
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(args.steps):
        for name, steps in runs.items():
            seconds[name].append(time_step(steps, args.device))
    plain = statistics.median(seconds["plain"])
    for name, taken in seconds.items():
        median = statistics.median(taken)
        rate = args.tokens / median
        print(f"| {length} | {name} | {rate:,.0f} | {plain / median:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="bert-mini")
    parser.add_argument("--depth", type=int, default=6, help="number of layers")
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512, 1024])
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a batch")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each variant")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32", help="fp32, bf16 or auto")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {args.model}, {args.depth} layers, {args.tokens} tokens")
    print("| length | variant | tokens/s | ratio |")
    print("|---:|---|---:|---:|")
    for length in args.lengths:
        compare(length, args)
    print(f"{time.process_time():.0f} s of CPU time")


if __name__ == "__main__":
    main()
