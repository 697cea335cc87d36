"""Fine-tuning on single sentences, on one machine: sslrun beside transformers' Trainer.

python benchmarks/finetune.py
python benchmarks/finetune.py --device cuda --model bert-base --batch 32

Both: the same BERT with 30,522 entries and a head for two classes, the same sentences, of lengths
like those of SST-2's whole sentences (25 tokens on average, 5 to 66), in batches of as many, AdamW,
clipping at 1. transformers as in its examples: BertForSequenceClassification,
DataCollatorWithPadding, which pads a batch to its longest, and Trainer, once in Trainer's own
precision, float32, and once in bf16, which sslrun takes by itself where the device multiplies in
it. A block is a whole epoch, in which both see each sentence once.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from beside import DECAY, FOREVER, VOCAB, arguments, bert_config, compare, fast_tokenizer
from transformers import BertForSequenceClassification, DataCollatorWithPadding

from sslrun.backbones import build_backbone
from sslrun.data.specs import TextSpec
from sslrun.data.text.sequences import Sequences, build_labeled
from sslrun.data.text.tokenizer import blank_tokenizer
from sslrun.tasks.base import TaskLearner, tasks
from sslrun.training.device import compute
from sslrun.training.loop import Training, train
from sslrun.training.schedule import Schedule

LENGTH, LR = 128, 5e-5


def sentences(count: int) -> tuple[list[list[int]], torch.Tensor]:
    """Ids of sentences, without special tokens, and their classes. Lengths are drawn from a gamma distribution."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.distributions.Gamma(torch.tensor(4.3), torch.tensor(4.3 / 23))
    torch.manual_seed(0)
    lengths = drawn.sample((count,)).round().clamp(3, 64).long().tolist()
    ids = [torch.randint(5, VOCAB, (length,), generator=generator).tolist() for length in lengths]
    return ids, torch.randint(0, 2, (count,), generator=generator)


def ours(model: str, examples: Sequences, batch: int, device: str) -> Iterator[None]:
    task = tasks["sentences"](tasks["sentences"].Options(), examples.spec, examples.classes)
    learner = TaskLearner(build_backbone(model, {}, examples.spec), task)
    schedule = Schedule(
        steps=FOREVER, batch=batch, lr=LR, weight_decay=DECAY, schedule="linear", clip=1.0
    )
    for _ in train(Training(learner, schedule, compute(device)), examples, 0):
        yield


def main() -> None:
    given = arguments(__doc__, model="bert-mini", batch=32, steps=50)
    spec = TextSpec(blank_tokenizer(VOCAB), LENGTH)
    ids, labels = sentences(given.steps * given.batch)
    examples = build_labeled(ids, None, labels, ("negative", "positive"), spec)
    rows = [
        {"input_ids": [spec.tokenizer.cls, *each, spec.tokenizer.sep], "attention_mask": [1] * (len(each) + 2), "labels": label}
        for each, label in zip(ids, labels.tolist(), strict=True)
    ]  # fmt: skip
    compare(
        given,
        partial(ours, given.model, examples, given.batch, given.device),
        lambda: BertForSequenceClassification(bert_config(given.model, num_labels=2)),
        rows,
        DataCollatorWithPadding(fast_tokenizer(spec.tokenizer)),
        LR,
        "sentences",
        given.batch,
    )


if __name__ == "__main__":
    main()
