"""The text tasks of BERT's Figure 4: classes of sentences and pairs, answer spans, tags of words.

Heads are BERT's: dropout (none for spans) and one linear map. `bilstm` adds a randomly initialized
BiLSTM below the map, as in the last row of BERT's Table 5. The paper leaves its size and readout
open. Here each direction is as wide as the backbone, and a whole sequence is read at the last token
of the forward half and the first token of the backward half.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from sslrun.backbones.base import Features
from sslrun.backbones.lstm import LstmStack, reverse_real
from sslrun.backbones.text import gather_tokens
from sslrun.data.examples import Examples
from sslrun.data.specs import TextSpec
from sslrun.data.text.passages import SpanRow
from sslrun.data.text.sequences import IGNORED, Sequences
from sslrun.errors import UserError
from sslrun.metric import Metric
from sslrun.tasks import metrics as measures
from sslrun.tasks.answers import MarkedAnswer, choose_answers
from sslrun.tasks.base import Task, TaskOptions, tasks
from sslrun.tasks.squad import Answer, decode, score_answers

Pool = Literal["pooled", "cls", "mean", "last4", "mixture"]


class TextTaskOptions(TaskOptions):
    """Options that all text tasks share."""

    pool: Pool = "cls"
    dropout: float = Field(0.1, ge=0, lt=1)
    """Dropout rate on the input of the head."""
    bilstm: int = Field(0, ge=0)
    """Number of layers of a randomly initialized BiLSTM between backbone and head; true: one."""

    def check_depth(self, depth: int) -> None:
        if self.pool == "last4" and depth < 4:
            raise UserError(
                f"pool last4 reads 4 layers, but the backbone has {depth}, including embeddings: "
                "take mixture"
            )

    def choices(self) -> list[str]:
        if not self.bilstm:
            return []
        layers = f"{self.bilstm} layer{'s' if self.bilstm > 1 else ''}"
        return [
            f"the BiLSTM has {layers}, in each direction as wide as the backbone; "
            "of whole sequences the forward half is read at the last token and the backward half "
            "at the first"
        ]


class TokenTaskOptions(TextTaskOptions):
    """Options that tasks with one output per token share."""

    pool: Literal["cls", "last4", "mixture"] = "cls"
    """Features of a token. cls: those of the last layer. last4: those of the last four layers,
    concatenated. mixture: a learned mixture of all layers."""

    @property
    def linear(self) -> bool:
        return False


class DroppedLinear(nn.Linear):
    """Dropout, then a linear map; parameters have the names of a linear map."""

    def __init__(self, width: int, outputs: int, dropout: float) -> None:
        super().__init__(width, outputs)
        self.dropout = dropout
        nn.init.trunc_normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x, self.dropout, self.training))


class ScalarMix(nn.Module):
    """A learned mixture of layers, with softmax weights and a scale (Peters et al., NAACL 2018)."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(depth))
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, layers: tuple[Tensor, ...]) -> Tensor:
        shares = self.weights.softmax(dim=0)
        return self.scale * sum(share * layer for share, layer in zip(shares, layers, strict=True))


class BiLstm(nn.Module):
    """LSTM layers in both directions; each reads both directions of the layer below."""

    def __init__(self, inputs: int, width: int, depth: int, dropout: float) -> None:
        super().__init__()
        widths = [inputs, *[2 * width] * (depth - 1)]
        self.ahead = nn.ModuleList(LstmStack(below, width, 1, dropout) for below in widths)
        self.back = nn.ModuleList(LstmStack(below, width, 1, dropout) for below in widths)

    def forward(self, x: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """States (B, T, D) of the top layer's two directions; `real` (B, T) is False at padding."""
        for ahead, back in zip(self.ahead, self.back, strict=True):
            forwards, backwards = ahead(x)[0], reverse_real(back(reverse_real(x, real))[0], real)
            x = torch.cat([forwards, backwards], dim=-1)
        return forwards, backwards


class TextHead(nn.Module):
    """A head that reads more than one vector per example; `whole`: one output per sequence."""

    def __init__(
        self, width: int, depth: int, outputs: int, options: TextTaskOptions, whole: bool
    ) -> None:
        super().__init__()
        self.pool, self.whole = options.pool, whole
        options.check_depth(depth)
        self.mix = ScalarMix(depth) if self.pool == "mixture" else None
        inputs = 4 * width if self.pool == "last4" else width
        self.bilstm = (
            BiLstm(inputs, width, options.bilstm, options.dropout) if options.bilstm else None
        )
        self.linear = DroppedLinear(
            2 * width if options.bilstm else inputs, outputs, options.dropout
        )

    def forward(self, features: Features) -> Tensor:
        """Outputs (B, C) for whole sequences, or (B, T, C) for tokens, with -inf at padding."""
        tokens, real, read = features.tokens, features.mask, features.read
        assert tokens is not None
        assert real is not None
        assert read is not None
        if self.mix is not None:
            tokens = self.mix(features.layers)
        elif self.pool == "last4":
            tokens = torch.cat(features.layers[-4:], dim=-1)
        if self.bilstm is not None:
            ahead, back = self.bilstm(tokens, real)
            if self.whole:
                last = real.sum(dim=1) - 1
                return self.linear(torch.cat([gather_tokens(ahead, last), back[:, 0]], dim=-1))
            tokens = torch.cat([ahead, back], dim=-1)
        if self.whole:
            return self.linear(gather_tokens(tokens, read))
        return self.linear(tokens).masked_fill(~real[..., None], float("-inf"))


@tasks.register("sentences")
class Sentences(Task):
    """Predict the class of a sentence or a pair; or a number, if the labels are numbers.

    All metrics are in percent, including correlations.
    """

    class Options(TextTaskOptions):
        pool: Pool = "pooled"
        """Features of a sequence. pooled: the backbone's pooled features (BERT: the tanh of a
        linear map of [CLS]). cls: the last layer at [CLS], or at the last token in causal
        backbones. mean: the mean over tokens. last4: the last four layers at that token,
        concatenated. mixture: a learned mixture of all layers at that token."""
        metric: Literal["accuracy", "f1", "macro_f1", "matthews", "spearman"] | None = None
        """Metric for model selection and tables; default: accuracy for classes, spearman for
        numbers. f1: F1 of class 1."""

        @property
        def linear(self) -> bool:
            return not self.bilstm and self.pool != "mixture"

        @model_validator(mode="after")
        def _one_readout(self) -> Sentences.Options:
            if self.bilstm and self.pool == "mean":
                raise ValueError(
                    "bilstm reads a sequence at its ends, not at the mean: leave out pool or bilstm"
                )
            return self

    reads = TextSpec
    options: Sentences.Options

    def __init__(self, options: Sentences.Options, spec: Any, classes: tuple[str, ...]) -> None:
        super().__init__(options, spec, classes)
        primary = options.metric or ("accuracy" if classes else "spearman")
        if (primary == "spearman") != (not classes):
            raise UserError(
                f"metric {primary}: spearman is for numbers, the others are for classes"
            )
        if primary == "f1" and len(classes) != 2:
            raise UserError(
                f"metric f1 needs two classes, but there are {len(classes)}: take macro_f1"
            )
        names: tuple[str, ...] = ("spearman", "pearson")
        if classes:
            names = ("accuracy", "macro_f1", "matthews", *(["f1"] if len(classes) == 2 else []))
        self.metrics = tuple(Metric(name) for name in dict.fromkeys((primary, *names)))

    @property
    def linear(self) -> bool:
        return bool(self.classes) and super().linear

    def head(self, width: int, depth: int = 0) -> nn.Module:
        outputs = max(1, len(self.classes))
        if not self.options.linear:
            return TextHead(width, depth, outputs, self.options, whole=True)
        self.options.check_depth(depth)
        return DroppedLinear(
            4 * width if self.options.pool == "last4" else width, outputs, self.options.dropout
        )

    def readout(self, features: Features) -> Any:
        if not self.options.linear:
            return features
        tokens, real, read = features.tokens, features.mask, features.read
        assert tokens is not None
        assert real is not None
        assert read is not None
        match self.options.pool:
            case "cls":
                return gather_tokens(tokens, read)
            case "mean":
                return (tokens * real[..., None]).sum(dim=1) / real.sum(dim=1, keepdim=True)
            case "last4":
                return torch.cat(
                    [gather_tokens(layer, read) for layer in features.layers[-4:]], dim=-1
                )
        return features.pooled

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (
            F.cross_entropy(outputs, targets)
            if self.classes
            else F.mse_loss(outputs[:, 0], targets)
        )

    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """Compute the metrics, in percent.

        For classes they are accuracy, F1 and Matthews' correlation; for numbers the correlations
        that STS-B reports.
        """
        if not self.classes:
            return {
                "spearman": measures.spearman(outputs[:, 0], targets),
                "pearson": measures.pearson(outputs[:, 0], targets),
            }
        values = {
            "accuracy": measures.accuracy(outputs, targets),
            "macro_f1": measures.macro_f1(outputs, targets),
            "matthews": measures.matthews(outputs, targets),
        }
        if len(self.classes) == 2:
            values["f1"] = measures.f1(outputs, targets)
        return values


@tasks.register("span")
class Span(Task):
    """Find the span of a passage that answers a question (SQuAD, Rajpurkar et al., EMNLP 2016).

    The head scores each token as the start and as the end of the answer. All metrics are in
    percent; best_f1 is reported if some questions have no answer.
    """

    class Options(TokenTaskOptions):
        dropout: float = Field(0.0, ge=0, lt=1)
        """Dropout rate on the input of the head; BERT uses none for spans."""
        answer_length: int = Field(30, ge=1)
        """Maximum length of an answer, in tokens."""
        candidates: int = Field(20, ge=1)
        """Number of best starts, and of best ends, to combine in each window."""

    reads = TextSpec
    options: Span.Options
    metrics = (Metric("f1"), Metric("exact_match"), Metric("best_f1"))
    conditional = frozenset({"best_f1"})

    def head(self, width: int, depth: int = 0) -> nn.Module:
        return TextHead(width, depth, 2, self.options, whole=False)

    def readout(self, features: Features) -> Features:
        return features

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        start, end = outputs.float().unbind(dim=-1)
        return (F.cross_entropy(start, targets[:, 0]) + F.cross_entropy(end, targets[:, 1])) / 2

    def score(self, outputs: Tensor, examples: Examples) -> dict[str, float]:
        """Exact match and F1 by SQuAD's evaluation, in percent; see `score_answers`."""
        answers, rows = self._decode(outputs, examples)
        return score_answers(answers, rows)

    def answers(self, outputs: Tensor, examples: Examples) -> list[MarkedAnswer]:
        return choose_answers(*self._decode(outputs, examples))

    def _decode(
        self, outputs: Tensor, examples: Examples
    ) -> tuple[dict[int, Answer], list[SpanRow]]:
        """The best answers, by the question's number, and the questions."""
        assert isinstance(examples, Sequences)
        assert examples.rows is not None
        answers = decode(
            outputs.cpu(),
            examples.extra,
            examples.rows,
            self.options.candidates,
            self.options.answer_length,
        )
        return answers, examples.extra.rows


@tasks.register("tagging")
class Tagging(Task):
    """Predict a tag for each word at its first piece, without a CRF (Devlin et al., NAACL 2019).

    The primary metric is F1 of entities, or the accuracy of words if the tags mark no entities,
    such as parts of speech. All metrics are in percent.
    """

    Options = TokenTaskOptions
    reads = TextSpec
    options: TokenTaskOptions

    def __init__(self, options: TokenTaskOptions, spec: Any, classes: tuple[str, ...]) -> None:
        super().__init__(options, spec, classes)
        entities = any(tag.startswith(("B-", "I-")) for tag in classes)
        names = (
            ("f1", "precision", "recall", "accuracy")
            if entities
            else ("accuracy", "f1", "precision", "recall")
        )
        self.metrics = tuple(Metric(name) for name in names)

    def head(self, width: int, depth: int = 0) -> nn.Module:
        return TextHead(width, depth, len(self.classes), self.options, whole=False)

    def readout(self, features: Features) -> Features:
        return features

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        known = targets != IGNORED
        scores = outputs.masked_fill(~known[..., None], 0)  # -inf at padding has no gradient
        losses = F.cross_entropy(
            scores.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        return losses / known.sum().clamp_min(1)

    def score(self, outputs: Tensor, examples: Examples) -> dict[str, float]:
        """Precision, recall and F1 of entities (exact span and type), and accuracy of tags.

        They are in percent. Words that were cut off count as predicted outside of entities.
        """
        assert isinstance(examples, Sequences)
        assert examples.rows is not None
        best, device = outputs.argmax(dim=-1).cpu(), torch.device("cpu")
        places = torch.arange(len(examples)).split(512)
        truth, guess = [], []
        for rows, batch in zip(places, examples.batches(places, device), strict=True):
            assert batch.labels is not None
            for row, labels in zip(rows.tolist(), batch.labels, strict=True):
                tags = examples.extra.tags[int(examples.rows[row])]
                chosen = best[row, : len(labels)][labels != IGNORED].tolist()
                predicted = [self.classes[tag] for tag in chosen]
                truth.append(tags)
                guess.append(predicted + ["O"] * (len(tags) - len(predicted)))
        return measures.entities(guess, truth)
