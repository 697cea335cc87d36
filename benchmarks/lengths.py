"""Measure what batching by length saves on small sets, and which examples meet again in a batch.

OMP_NUM_THREADS=1 python benchmarks/lengths.py

Trains a small BERT on two tasks of the small world (sentence pairs and spans) and on its documents
(masked language modeling, one pair of segments a row), with three orders of the examples:

- random: lengths are ignored.
- whole epoch: sorted by length in stretches of up to 50 batches, without noise. This was the order
  before stretches were limited to an eighth of an epoch.
- eighth: the order of `sslrun.training.order`.

Blocks of one epoch alternate between the orders. For each order it prints

- padding: share of the computed positions that hold no token;
- again: the largest number of a batch's examples that shared a batch in the previous epoch, as a
  share of the batch, averaged over batches;
- tokens per second of this process's CPU time (user seconds), median over blocks;
- seconds: user seconds of an epoch, median over blocks;
- ratio: user seconds of a random order's block to those of the block beside it, median.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch

from sslrun.backbones import build_backbone
from sslrun.data.examples import Examples
from sslrun.data.source import sources
from sslrun.pretexts.base import pretexts
from sslrun.tasks.base import TaskLearner, tasks
from sslrun.training import order
from sslrun.training.device import compute
from sslrun.training.learner import Learner
from sslrun.training.loop import Training, train
from sslrun.training.schedule import Schedule

VOCAB = 300
LENGTH = 64
ORDERS = ("random", "whole epoch", "eighth")


@contextmanager
def ordered(name: str) -> Iterator[None]:
    """Let `sslrun.training.order` group lengths as the order `name` does."""
    kept = order.EPOCH_SHARE, order.NOISE
    if name == "whole epoch":
        order.EPOCH_SHARE, order.NOISE = 1, 0.0
    try:
        yield
    finally:
        order.EPOCH_SHARE, order.NOISE = kept


def load(name: str, count: int, model: str = "bert-tiny") -> tuple[Examples, Learner]:
    """Load `count` examples of a set of the small world, and build what is trained on them.

    Of the corpus, a quarter as many documents, of about two rows each: a very small set.
    """
    options: dict[str, Any] = {"length": LENGTH, "tokenizer": {"vocab": VOCAB}}
    if name == "world":
        options["documents"] = count // 4
    else:
        options["train"] = count
        options["tokenizer"]["corpus"] = {"name": "world"}
    source = sources[name](sources[name].Options.model_validate(options))
    examples = source.load("train")
    backbone = build_backbone(model, {"positions": LENGTH}, examples.spec)
    if name == "world":
        mlm = pretexts["mlm"]
        pretext = mlm(mlm.Options(pairs="keep", dupes=1), backbone)
        return pretext.arrange(examples, 0), pretext
    task = tasks[source.task]
    return examples, TaskLearner(backbone, task(task.Options(), examples.spec, examples.classes))


class Side:
    """A training with one of the orders, run an epoch at a time."""

    def __init__(self, name: str, order_name: str, count: int, batch: int) -> None:
        self.order_name = order_name
        torch.manual_seed(0)
        self.examples, learner = load(name, count)
        self.steps = len(self.examples) // batch
        self.schedule = Schedule(
            epochs=1000, batch=batch, lr=1e-4, by_length=order_name != "random", precision="fp32"
        )
        self.loop = train(Training(learner, self.schedule, compute("cpu")), self.examples, 0)

    def run_epoch(self) -> float:
        """Train for an epoch, and return its user seconds."""
        start = os.times().user
        with ordered(self.order_name):
            for _ in range(self.steps):
                next(self.loop)
        return os.times().user - start

    def batches(self, epochs: int) -> torch.Tensor:
        """The batches (epochs, steps, batch) of the first epochs."""
        with ordered(self.order_name):
            found = order.indices(self.examples, self.schedule, 0, 0, epochs * self.steps)
            return torch.stack(list(found)).view(epochs, self.steps, -1)


def measure_padding(batches: torch.Tensor, lengths: torch.Tensor) -> float:
    """Compute the share of positions without a token if each batch is padded to its longest."""
    found = lengths[batches]
    return 1 - (found.sum() / (found.amax(dim=-1).sum() * batches.shape[-1])).item()


def measure_again(batches: torch.Tensor, count: int) -> float:
    """Compute the largest share of a batch that shared a batch in the previous epoch, averaged."""
    shares = []
    for before, after in pairwise(batches):
        batch_of = torch.full((count,), -1)
        batch_of[before] = torch.arange(len(before))[:, None].expand_as(before)
        for batch in after:
            places = batch_of[batch]
            shares.append(places[places >= 0].bincount().max().item() / len(batch))
    return statistics.mean(shares)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--examples", type=int, default=1500, help="examples of each set")
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 32], help="batch sizes")
    parser.add_argument("--sets", nargs="+", default=["world-paraphrase", "world-span", "world"])
    parser.add_argument("--blocks", type=int, default=5, help="timed epochs of each order")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("| set | batch | order | padding | again | tokens/s | seconds | ratio |")
    print("|---|---:|---|---:|---:|---:|---:|---:|")
    for name in args.sets:
        for batch in args.batch:
            compare(name, args.examples, batch, args.blocks)


def compare(name: str, count: int, batch: int, blocks: int) -> None:
    """Train with each order in turn, and print a row for each."""
    sides = [Side(name, order_name, count, batch) for order_name in ORDERS]
    for side in sides:
        side.run_epoch()  # warms up
    seconds = [[side.run_epoch() for side in sides] for _ in range(blocks)]
    lengths = sides[0].examples.lengths
    assert lengths is not None
    for place, side in enumerate(sides):
        batches = side.batches(blocks + 1)
        taken = statistics.median(block[place] for block in seconds)
        ratio = statistics.median(block[0] / block[place] for block in seconds)
        rate = lengths[batches].sum().item() / len(batches) / taken
        print(
            f"| {name} | {batch} | {side.order_name} | {measure_padding(batches, lengths):.0%} "
            f"| {measure_again(batches, len(lengths)):.0%} | {rate:,.0f} | {taken:.2f} "
            f"| {ratio:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
