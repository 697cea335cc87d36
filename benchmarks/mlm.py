"""Time masked-language-model pretraining: sslrun and transformers' Trainer.

python benchmarks/mlm.py
python benchmarks/mlm.py --device cuda --model bert-base --batch 256 --steps 50

Both sides train the same BERT with 30,522 vocabulary entries on the same full sequences of 128
tokens in batches of the same size, with AdamW, gradient clipping at 1, and no next-sentence
prediction. In each epoch, another 15 % of the tokens are masked.

transformers is used as in its examples: BertForMaskedLM, DataCollatorForLanguageModeling and
Trainer. Trainer runs once in float32, its default, and once in bf16. sslrun chooses bf16 itself if
the device supports it in hardware.
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
from transformers import BertForMaskedLM, DataCollatorForLanguageModeling

from sslrun.backbones import build_backbone
from sslrun.data.specs import TextSpec
from sslrun.data.text.sequences import Documents
from sslrun.data.text.tokenizer import blank_tokenizer
from sslrun.pretexts.base import pretexts
from sslrun.training.device import compute
from sslrun.training.loop import Training, train
from sslrun.training.schedule import Schedule

LENGTH = 128
"""Length of every sequence, in tokens."""
LR = 1e-4


def train_sslrun(model: str, corpus: Documents, batch: int, device: str) -> Iterator[None]:
    """Pretrain with sslrun, one step each time the iterator is advanced."""
    cls = pretexts["mlm"]
    pretext = cls(cls.Options(pairs="drop"), build_backbone(model, {}, corpus.spec))
    schedule = Schedule(
        steps=FOREVER, batch=batch, lr=LR, weight_decay=DECAY, schedule="linear", clip=1.0
    )
    for _ in train(Training(pretext, schedule, compute(device)), pretext.arrange(corpus, 0), 0):
        yield


def main() -> None:
    args = parse_arguments(__doc__, model="bert-mini", batch=32, steps=3)
    spec = TextSpec(blank_tokenizer(VOCAB), LENGTH)
    texts = torch.randint(5, VOCAB, (max(8 * args.batch, 512), LENGTH - 2), dtype=torch.int32)
    # Each text is a document of one sentence.
    ends = torch.arange(0, texts.numel() + 1, LENGTH - 2)
    corpus = Documents(texts.flatten(), ends, torch.arange(len(ends)), spec)
    tokenizer = wrap_tokenizer(spec.tokenizer)
    rows = [
        {
            "input_ids": [spec.tokenizer.cls, *text, spec.tokenizer.sep],
            "attention_mask": [1] * LENGTH,
        }
        for text in texts.tolist()
    ]
    compare(
        args,
        partial(train_sslrun, args.model, corpus, args.batch, args.device),
        lambda: BertForMaskedLM(build_config(args.model)),
        rows,
        DataCollatorForLanguageModeling(tokenizer),
        LR,
        "tokens",
        args.batch * LENGTH,
    )


if __name__ == "__main__":
    main()
