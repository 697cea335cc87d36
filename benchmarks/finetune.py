"""Time fine-tuning on single sentences: sslrun and transformers' Trainer.

python benchmarks/finetune.py
python benchmarks/finetune.py --device cuda --model bert-base --batch 32

Both sides train the same BERT with 30,522 vocabulary entries and a head for two classes, on the
same sentences in batches of the same size, with AdamW and gradient clipping at 1. The lengths of
sentences are distributed like those of SST-2's whole sentences (25 tokens on average, 5 to 66).

transformers is used as in its examples: BertForSequenceClassification, Trainer, and
DataCollatorWithPadding, which pads a batch to its longest sentence. Trainer runs once in float32,
its default, and once in bf16. sslrun chooses bf16 itself if the device supports it in hardware. A
block is a whole epoch, in which both sides see each sentence once.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from compare_trainer import (
    DECAY,
    FOREVER,
    VOCAB,
    build_config,
    compare,
    parse_arguments,
    wrap_tokenizer,
)
from transformers import BertForSequenceClassification, DataCollatorWithPadding

from sslrun.backbones import build_backbone
from sslrun.data.specs import TextSpec
from sslrun.data.text.sequences import Sequences, build_labeled
from sslrun.data.text.tokenizer import blank_tokenizer
from sslrun.tasks.base import TaskLearner, tasks
from sslrun.training.device import compute
from sslrun.training.loop import Training, train
from sslrun.training.schedule import Schedule

LENGTH = 128
"""Maximum length of a sentence, in tokens."""
LR = 5e-5


def draw_sentences(count: int) -> tuple[list[list[int]], torch.Tensor]:
    """Draw the token ids of sentences, without special tokens, and their classes (count,).

    Lengths follow a gamma distribution.
    """
    generator = torch.Generator().manual_seed(0)
    distribution = torch.distributions.Gamma(torch.tensor(4.3), torch.tensor(4.3 / 23))
    torch.manual_seed(0)
    lengths = distribution.sample((count,)).round().clamp(3, 64).long().tolist()
    ids = [torch.randint(5, VOCAB, (length,), generator=generator).tolist() for length in lengths]
    return ids, torch.randint(0, 2, (count,), generator=generator)


def train_sslrun(model: str, examples: Sequences, batch: int, device: str) -> Iterator[None]:
    """Fine-tune with sslrun, one step each time the iterator is advanced."""
    task = tasks["sentences"](tasks["sentences"].Options(), examples.spec, examples.classes)
    learner = TaskLearner(build_backbone(model, {}, examples.spec), task)
    schedule = Schedule(
        steps=FOREVER, batch=batch, lr=LR, weight_decay=DECAY, schedule="linear", clip=1.0
    )
    for _ in train(Training(learner, schedule, compute(device)), examples, 0):
        yield


def main() -> None:
    args = parse_arguments(__doc__, model="bert-mini", batch=32, steps=50)
    spec = TextSpec(blank_tokenizer(VOCAB), LENGTH)
    ids, labels = draw_sentences(args.steps * args.batch)
    examples = build_labeled(ids, None, labels, ("negative", "positive"), spec)
    rows = []
    for sentence, label in zip(ids, labels.tolist(), strict=True):
        tokens = [spec.tokenizer.cls, *sentence, spec.tokenizer.sep]
        rows.append({"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": label})
    compare(
        args,
        partial(train_sslrun, args.model, examples, args.batch, args.device),
        lambda: BertForSequenceClassification(build_config(args.model, num_labels=2)),
        rows,
        DataCollatorWithPadding(wrap_tokenizer(spec.tokenizer)),
        LR,
        "sentences",
        args.batch,
    )


if __name__ == "__main__":
    main()
