"""sslrun beside transformers' Trainer: blocks of steps of both alternate in one process.

Each ratio is of two neighbouring blocks of as many examples, so that a machine whose speed drifts
drifts for both.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from sslrun.backbones.base import backbones
from sslrun.data.text.tokenizer import Tokenizer

try:
    import accelerate  # noqa: F401 (Trainer needs it)
    from transformers import (
        BertConfig,
        PreTrainedTokenizerFast,
        PrinterCallback,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )
except ImportError:
    sys.exit("transformers or accelerate is not installed: pip install 'sslrun[benchmarks]'")

VOCAB = 30_522
"""BERT's."""
FOREVER = 1_000_000
"""Steps of the schedules, of which few are run."""
DECAY = 0.01


class Alternate(TrainerCallback):
    """Times blocks of Trainer's steps, and after each a block of ours. The first of each warms up."""

    def __init__(self, ours: Iterator[None], steps: int, blocks: int, cuda: bool) -> None:
        self.ours, self.steps, self.blocks, self.cuda = ours, steps, blocks, cuda
        self.seconds: list[tuple[float, float]] = []
        """Of a step of Trainer's, and of ours, block by block."""

    def now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_train_begin(self, *given: Any, **more: Any) -> None:
        self.began = self.now()

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step % self.steps:
            return
        between = self.now()
        for _ in range(self.steps):
            next(self.ours)
        after = self.now()
        if state.global_step > self.steps:
            self.seconds.append(
                ((between - self.began) / self.steps, (after - between) / self.steps)
            )
        control.should_training_stop = len(self.seconds) == self.blocks
        self.began = self.now()


def arguments(about: str | None, model: str, batch: int, steps: int) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=model)
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--steps", type=int, default=steps, help="steps a block")
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def bert_config(model: str, **more: Any) -> BertConfig:
    """transformers' configuration of our model of that name."""
    depth, width = backbones[model].shape  # type: ignore[attr-defined]
    return BertConfig(
        vocab_size=VOCAB, hidden_size=width, num_hidden_layers=depth, num_attention_heads=width // 64, intermediate_size=4 * width,
        **more,
    )  # fmt: skip


def fast_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    names = {f"{each}_token": f"[{each.upper()}]" for each in ("pad", "unk", "cls", "sep", "mask")}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer.core, **names)


def compare(
    given: argparse.Namespace,
    ours: Callable[[], Iterator[None]],
    model: Callable[[], Any],
    rows: Sequence[dict[str, Any]],
    collator: Any,
    lr: float,
    unit: str,
    units_a_step: float,
) -> None:
    """Train by both, and print rates and ratios; by Trainer once in its own precision and once in bf16."""
    print(
        f"{given.model}, {given.device}, {torch.get_num_threads()} threads, torch {torch.__version__}, batch {given.batch}"
    )
    for bf16 in (False, True):
        alternate = Alternate(ours(), given.steps, given.blocks, given.device != "cpu")
        with tempfile.TemporaryDirectory() as folder:
            settings = TrainingArguments(
                folder, per_device_train_batch_size=given.batch, max_steps=FOREVER, learning_rate=lr,
                weight_decay=DECAY, bf16=bf16, use_cpu=given.device == "cpu", disable_tqdm=True, report_to=[],
                save_strategy="no", logging_strategy="no", dataloader_drop_last=True,
            )  # fmt: skip
            trainer = Trainer(model(), settings, collator, rows, callbacks=[alternate])  # type: ignore[arg-type]
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        theirs, mine = (
            units_a_step / statistics.median(each) for each in zip(*alternate.seconds, strict=True)
        )
        ratios = [a / b for a, b in alternate.seconds]
        print(
            f"sslrun {mine:9.0f} {unit}/s, Trainer {'bf16' if bf16 else 'as it is':8} {theirs:9.0f} {unit}/s; "
            f"ratio {statistics.median(ratios):.2f} (blocks {min(ratios):.2f} to {max(ratios):.2f})"
        )
