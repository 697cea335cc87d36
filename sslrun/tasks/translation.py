"""Write a text for a text: translation, and other tasks from sequence to sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from sslrun.backbones.base import Backbone, Features
from sslrun.backbones.decoder import Decoder, previous_tokens
from sslrun.backbones.search import Search
from sslrun.backbones.text import TextBackbone, embedding_of
from sslrun.data.examples import Examples
from sslrun.data.specs import TextSpec
from sslrun.data.text.sequences import Sequences
from sslrun.errors import UserError
from sslrun.metric import Metric
from sslrun.tasks.base import Task, TaskLearner, TaskOptions, tasks
from sslrun.training.learner import Output


class TranslationOptions(TaskOptions):
    """Options of tasks that write text."""

    depth: int = Field(2, ge=1)
    """Number of layers in the decoder; that of the pretext task if it starts from its decoder."""
    decoder: Literal["pretrained", "new"] = "pretrained"
    """Decoder to start from. pretrained: that of the pretext task, if it keeps one, as `denoise`
    does; otherwise a new one. new: always a new one."""
    beams: int = Field(1, ge=1, le=64)
    """Number of hypotheses that beam search keeps for each text; 1: greedy decoding. Vaswani et al.
    (2017) and T5 translate with 4."""
    penalty: float = Field(0.6, ge=0)
    """Exponent of the length penalty of Wu et al. (2016, arXiv:1609.08144); 0: none."""

    @property
    def linear(self) -> bool:
        return False


@tasks.register("translation")
class Translation(Task):
    """Write the target text of each source text: translation, and any task from text to text.

    The backbone reads the source, and a decoder writes the target (Vaswani et al. 2017,
    arXiv:1706.03762). Both learn from the true previous tokens (teacher forcing), by the
    cross-entropy of the next one. All metrics are in percent: the share of texts that are exactly
    right, and chrF (Popović, WMT 2015) of the whole split, as sacrebleu computes it. Both compare
    texts as the tokenizer writes them, usually in lower case.
    """

    Options = TranslationOptions
    reads = TextSpec
    decodes = True
    metrics = (Metric("exact_match"), Metric("chrf"))
    spec: TextSpec
    options: TranslationOptions

    def __init__(self, options: TranslationOptions, spec: Any, classes: tuple[str, ...]) -> None:
        super().__init__(options, spec, classes)
        _chrf(("a",), ("a",))  # reports a missing package before anything is trained

    @property
    def starts_from(self) -> str | None:
        return "decoder" if self.options.decoder == "pretrained" else None

    @property
    def search(self) -> Search:
        return Search(self.options.beams, self.options.penalty, self.spec.length)

    def learner(self, backbone: Backbone, frozen_norm: bool = False) -> TranslationLearner:
        assert isinstance(backbone, TextBackbone)
        decoder = Decoder(backbone, self.options.depth, self.name)
        return TranslationLearner(backbone, self, decoder, frozen_norm=frozen_norm)

    def score(self, outputs: Tensor, examples: Examples) -> dict[str, float]:
        """Compute the metrics of written ids (N, T)."""
        assert isinstance(examples, Sequences)
        assert examples.rows is not None
        tokenizer = self.spec.tokenizer
        written = []
        for ids in outputs.tolist():
            kept = [token for token in tokenizer.until_end(ids) if token not in tokenizer.specials]
            written.append(tokenizer.decode(kept))
        targets = [examples.extra[row] for row in examples.rows.tolist()]
        true = [tokenizer.decode(ids) for ids in tokenizer.encode(targets)]
        same = sum(ours == theirs for ours, theirs in zip(written, true, strict=True))
        return {"exact_match": 100 * same / len(true), "chrf": _chrf(written, true)}


def _chrf(written: Sequence[str], true: Sequence[str]) -> float:
    """Compute chrF of a set of texts, in percent, with sacrebleu's defaults: chrF2.

    Raises:
        UserError: sacrebleu is not installed.
    """
    try:
        import sacrebleu
    except ModuleNotFoundError:
        raise UserError(
            "the task 'translation' measures chrF with sacrebleu, which is not installed: "
            "pip install 'sslrun[translation]'"
        ) from None
    return float(sacrebleu.corpus_chrf(list(written), [list(true)]).score)


class TranslationLearner(TaskLearner):
    """A backbone, which reads the source, with a decoder as its head, which writes the target."""

    backbone: TextBackbone
    task: Translation
    head: Decoder

    def forward(self, views: tuple[Any, Any]) -> Output:
        """Compute the cross-entropy of targets (B, T), and the accuracy of their tokens."""
        inputs, targets = views
        memory, memory_mask = self._encode(self.backbone(inputs))
        shared = embedding_of(self.backbone)
        ids = previous_tokens(targets, self.task.spec.tokenizer)
        x = self.head(ids, memory, shared, memory_mask=memory_mask)
        loss, accuracy = self.head.loss(x, shared, targets)
        return Output(loss, {"accuracy": accuracy})

    def _apply_head(self, features: Features) -> Tensor:
        """The ids (B, length) that beam search writes, with [PAD] at the end."""
        memory, memory_mask = self._encode(features)
        tokenizer, search = self.task.spec.tokenizer, self.task.search
        shared = embedding_of(self.backbone)
        written = self.head.generate(memory, shared, memory_mask, tokenizer, search)
        return F.pad(written, (0, search.longest - written.shape[1]), value=tokenizer.pad)

    @staticmethod
    def _encode(features: Features) -> tuple[Tensor, Tensor | None]:
        """What the decoder attends to, (B, S, D), and its mask (B, 1, 1, S)."""
        assert features.tokens is not None
        mask = features.mask
        return features.tokens, None if mask is None else mask[:, None, None]
