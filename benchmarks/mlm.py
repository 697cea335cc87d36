"""Masked-language-model pretraining on one machine: sslrun beside transformers' Trainer.

python benchmarks/mlm.py
python benchmarks/mlm.py --device cuda --model bert-base --batch 256 --steps 50

Both: the same BERT with 30,522 entries, the same full sequences of 128 tokens in the same batches,
AdamW, clipping at 1, 15 % of the tokens masked anew each time, no next-sentence prediction.
transformers as in its examples: BertForMaskedLM, DataCollatorForLanguageModeling and Trainer, once
in Trainer's own precision, float32, and once in bf16, which sslrun takes by itself where the device
multiplies in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from beside import DECAY, FOREVER, VOCAB, arguments, bert_config, compare, fast_tokenizer
from transformers import BertForMaskedLM, DataCollatorForLanguageModeling

from sslrun.backbones import build_backbone
from sslrun.data.specs import TextSpec
from sslrun.data.text.sequences import Documents
from sslrun.data.text.tokenizer import blank_tokenizer
from sslrun.pretexts.base import pretexts
from sslrun.training.device import compute
from sslrun.training.loop import Training, train
from sslrun.training.schedule import Schedule

LENGTH, LR = 128, 1e-4


def ours(model: str, corpus: Documents, batch: int, device: str) -> Iterator[None]:
    cls = pretexts["mlm"]
    pretext = cls(cls.Options(pairs="drop"), build_backbone(model, {}, corpus.spec))
    schedule = Schedule(
        steps=FOREVER, batch=batch, lr=LR, weight_decay=DECAY, schedule="linear", clip=1.0
    )
    for _ in train(Training(pretext, schedule, compute(device)), pretext.arrange(corpus, 0), 0):
        yield


def main() -> None:
    given = arguments(__doc__, model="bert-mini", batch=32, steps=3)
    spec = TextSpec(blank_tokenizer(VOCAB), LENGTH)
    texts = torch.randint(5, VOCAB, (max(8 * given.batch, 512), LENGTH - 2), dtype=torch.int32)
    ends = torch.arange(0, texts.numel() + 1, LENGTH - 2)  # each text is a document of one sentence
    corpus = Documents(texts.flatten(), ends, torch.arange(len(ends)), spec)
    tokenizer = fast_tokenizer(spec.tokenizer)
    rows = [
        {
            "input_ids": [spec.tokenizer.cls, *text, spec.tokenizer.sep],
            "attention_mask": [1] * LENGTH,
        }
        for text in texts.tolist()
    ]
    compare(
        given,
        partial(ours, given.model, corpus, given.batch, given.device),
        lambda: BertForMaskedLM(bert_config(given.model)),
        rows,
        DataCollatorForLanguageModeling(tokenizer),
        LR,
        "tokens",
        given.batch * LENGTH,
    )


if __name__ == "__main__":
    main()
