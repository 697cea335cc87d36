"""Compare the speed of sslrun and transformers' Trainer, in alternating blocks of steps.

Both run in one process. Each ratio compares two neighboring blocks with the same number of
examples, so that drift in the machine's speed affects both.
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
"""Size of BERT's vocabulary."""
FOREVER = 1_000_000
"""Length of the schedules in steps, far more than are run."""
DECAY = 0.01
"""Weight decay of both."""


class Alternate(TrainerCallback):
    """Time blocks of Trainer's steps, each followed by a block of sslrun's.

    The first block of each side warms up and is not timed.
    """

    def __init__(self, sslrun_steps: Iterator[None], steps: int, blocks: int, cuda: bool) -> None:
        """`sslrun_steps` runs one step each time it is advanced; a block has `steps` steps."""
        self.sslrun_steps = sslrun_steps
        self.steps = steps
        self.blocks = blocks
        self.cuda = cuda
        self.seconds: list[tuple[float, float]] = []
        """Seconds per step of Trainer and of sslrun, for each pair of blocks."""

    def now(self) -> float:
        """Read the clock after the device has finished its work."""
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.start = self.now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.steps:
            return
        middle = self.now()
        for _ in range(self.steps):
            next(self.sslrun_steps)
        end = self.now()
        if state.global_step > self.steps:
            self.seconds.append(((middle - self.start) / self.steps, (end - middle) / self.steps))
        control.should_training_stop = len(self.seconds) == self.blocks
        self.start = self.now()


def parse_arguments(
    description: str | None, model: str, batch: int, steps: int
) -> argparse.Namespace:
    """Parse the command line; the other arguments are the defaults of its options."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=model, help="backbone of sslrun")
    parser.add_argument("--batch", type=int, default=batch, help="examples per step")
    parser.add_argument("--steps", type=int, default=steps, help="steps per block")
    parser.add_argument("--blocks", type=int, default=5, help="timed blocks of each side")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def build_config(model: str, **options: Any) -> BertConfig:
    """Build transformers' configuration of the network that sslrun calls `model`."""
    depth, width = backbones[model].shape  # type: ignore[attr-defined]
    return BertConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        **options,
    )


def wrap_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Wrap sslrun's tokenizer for transformers."""
    special = ("pad", "unk", "cls", "sep", "mask")
    names = {f"{name}_token": f"[{name.upper()}]" for name in special}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer.core, **names)


def compare(
    args: argparse.Namespace,
    start_sslrun: Callable[[], Iterator[None]],
    build_model: Callable[[], Any],
    rows: Sequence[dict[str, Any]],
    collator: Any,
    lr: float,
    unit: str,
    units_per_step: float,
) -> None:
    """Time both sides and print their rates and ratios, with Trainer in float32 and then in bf16.

    Args:
        args: the command line.
        start_sslrun: starts sslrun's training; advancing the iterator runs one step.
        build_model: builds transformers' model.
        rows: Trainer's training data.
        collator: Trainer's collator.
        lr: learning rate of Trainer.
        unit: what a rate counts, such as "tokens".
        units_per_step: how many of them a step processes.
    """
    print(
        f"{args.model}, {args.device}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, batch {args.batch}"
    )
    for bf16 in (False, True):
        alternate = Alternate(start_sslrun(), args.steps, args.blocks, args.device != "cpu")
        with tempfile.TemporaryDirectory() as folder:
            settings = TrainingArguments(
                folder,
                per_device_train_batch_size=args.batch,
                max_steps=FOREVER,
                learning_rate=lr,
                weight_decay=DECAY,
                bf16=bf16,
                use_cpu=args.device == "cpu",
                disable_tqdm=True,
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                dataloader_drop_last=True,
            )
            trainer = Trainer(build_model(), settings, collator, rows, callbacks=[alternate])  # type: ignore[arg-type]
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        print(describe_rates(alternate.seconds, bf16, unit, units_per_step))


def describe_rates(
    seconds: Sequence[tuple[float, float]], bf16: bool, unit: str, units_per_step: float
) -> str:
    """Format the median rates of both sides and the ratios of their blocks.

    `seconds` are per step of Trainer and of sslrun, for each pair of blocks.
    """
    trainer_seconds, sslrun_seconds = zip(*seconds, strict=True)
    trainer_rate = units_per_step / statistics.median(trainer_seconds)
    sslrun_rate = units_per_step / statistics.median(sslrun_seconds)
    ratios = [trainer / sslrun for trainer, sslrun in seconds]
    return (
        f"sslrun {sslrun_rate:9.0f} {unit}/s, "
        f"Trainer {'bf16' if bf16 else 'float32':8} {trainer_rate:9.0f} {unit}/s; "
        f"ratio {statistics.median(ratios):.2f} (blocks {min(ratios):.2f} to {max(ratios):.2f})"
    )
