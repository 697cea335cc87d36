"""What language models predict at a gap, as more of the text to its right becomes visible."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, cast

import torch
from pydantic import Field, field_validator
from torch import Tensor

from sslrun.backbones import build_backbone
from sslrun.backbones.text import TextBackbone, gather_tokens
from sslrun.claims.measurements.base import Measurement, measurements, short_schedule, train_to_end
from sslrun.data.examples import Batch
from sslrun.data.source import sources
from sslrun.data.specs import TextSpec
from sslrun.data.splits import Splits, load_splits
from sslrun.data.text.sequences import Tokens
from sslrun.errors import UserError
from sslrun.metric import Metric
from sslrun.pretexts.language import LanguagePretext
from sslrun.pretexts.ltr import Ltr
from sslrun.pretexts.masking import MaskedViews
from sslrun.pretexts.mlm import Mlm
from sslrun.registry import Options
from sslrun.results.address import Column, Row
from sslrun.results.table import Table
from sslrun.training.device import Compute

GAP = "___"
"""Marks the gap in a sentence."""
ENTROPY, SURPRISE = (
    Column(metric=Metric(name, "nats", "lower", digits=2)) for name in ("entropy", "surprise")
)
TOP = 3
"""Number of most likely tokens that the notes list for each sentence."""


class Gaps(NamedTuple):
    """A batch of sequences, each with one gap."""

    tokens: Tokens
    """(B, T); usually [MASK] stands in the gap."""
    position: Tensor
    """(B,): index of the gap in its sequence."""

    def hide(self, right: int | None) -> Tokens:
        """Hide all but `right` tokens after the gap from attention; None hides nothing."""
        if right is None:
            return self.tokens
        index = torch.arange(self.tokens.ids.shape[1], device=self.position.device)
        visible = index <= self.position[:, None] + right
        return self.tokens.keep_only(visible)


class TruncatedMlm(Mlm):
    """Masked language modeling in which half of the texts are truncated at a random token.

    A masked model trained only on whole texts predicts poorly where a text is cut off. Its
    predictions would then sharpen with more context merely because the input becomes more like its
    training data. A left-to-right model does not need this, since it is trained on every prefix.
    """

    def views(self, batch: Batch, generator: torch.Generator) -> MaskedViews:
        """Truncate, then mask. What is cut off is hidden from attention."""
        tokens: Tokens = batch.inputs
        lengths = tokens.real.sum(dim=1)
        # Two uniform draws per sequence: whether it is truncated, and where.
        chance, end = torch.rand(2, len(lengths), generator=generator, device=lengths.device)
        kept = torch.where(chance < 0.5, lengths, 2 + (end * (lengths - 2)).long())
        index = torch.arange(tokens.ids.shape[1], device=lengths.device)
        visible = index < kept[:, None]
        return super().views(batch._replace(inputs=tokens.keep_only(visible)), generator)


MODELS: dict[str, type[LanguagePretext]] = {"masked": TruncatedMlm, "left to right": Ltr}
"""Pretext by the row's name."""


@measurements.register("guess")
class GuessMeasurement(Measurement):
    """Entropy and surprise of the prediction at a gap, by the context visible to its right.

    Compares a masked and a left-to-right model with the same architecture and pretraining schedule;
    the masked one is also trained on truncated texts. Both predict one gap in each held-out text,
    while all but a few tokens to the right of it are hidden from attention. They also predict the
    gap in the given sentences, which end without [SEP] because they may be incomplete. Entropy is
    that of the predicted distribution, surprise is the negative log-likelihood of the true token,
    both in nats.
    """

    class Options(Options):
        data: dict[str, Any] = Field({"name": "world", "length": 48, "tokenizer": {"vocab": 600}})
        """The corpus, by `name`, with the options of that data set."""
        backbone: Literal["bert-tiny", "bert-mini", "bert-small"] = "bert-tiny"
        """Backbone of both models."""
        steps: int = Field(2000, ge=1)
        """Pretraining steps of each model."""
        batch: int = Field(32, ge=1)
        """Sequences per step."""
        lr: float = Field(0.001, gt=0)
        """Peak learning rate."""
        right: tuple[Annotated[int, Field(ge=0)], ...] = (0, 1, 2, 4, 8)
        """Numbers of visible tokens to the right of the gap; the whole text is always added."""
        gaps: int = Field(1000, ge=2)
        """Maximum number of held-out texts to evaluate."""
        sentences: tuple[str, ...] = ()
        """Sentences with one gap, written ___; all start with the same words before the gap."""

        @field_validator("data")
        @classmethod
        def _check_data(cls, data: dict[str, Any]) -> dict[str, Any]:
            try:
                sources[str(data.get("name"))].Options.model_validate(_without_name(data))
            except UserError as error:
                raise ValueError(str(error)) from None
            return data

        @field_validator("sentences")
        @classmethod
        def _check_sentences(cls, sentences: tuple[str, ...]) -> tuple[str, ...]:
            if any(sentence.count(GAP) != 1 for sentence in sentences):
                raise ValueError(f"each sentence should have one gap, written {GAP}")
            if len({sentence.split(GAP)[0] for sentence in sentences}) > 1:
                raise ValueError("the sentences should be the same up to the gap")
            return sentences

    options: Options

    def table(self, seed: int, compute: Compute, folder: Path, check: Callable[[], None]) -> Table:
        splits = self._load_splits()
        assert isinstance(splits.spec, TextSpec)
        table = Table("prediction at a gap", marks_best=False)
        table.second = "context"
        gaps, truth = self._draw_gaps(splits, splits.spec, seed)
        for row, pretext in MODELS.items():
            model = self._pretrain(pretext, splits, seed, compute, check)
            for right in (*self.options.right, None):
                context = "all to the right" if right is None else f"{right} to the right"
                log_probs = predict(model, gaps, right, compute.device)
                surprise = -log_probs.gather(1, truth[:, None]).mean().item()
                table.add(Row(row, context), ENTROPY, entropy(log_probs).mean().item(), str(seed))
                table.add(Row(row, context), SURPRISE, surprise, str(seed))
            for sentence in self.options.sentences:
                gap = encode_sentence(sentence, splits.spec)
                log_probs = predict(model, gap, None, compute.device)
                table.add(Row(row, sentence), ENTROPY, entropy(log_probs).item(), str(seed))
                likely = _describe_likely(log_probs[0], splits.spec)
                table.note(f"{row}, {sentence}: {likely} (seed {seed})")
        table.notes.insert(0, f"nats, {len(truth)} gaps in held-out text")
        return table

    def _load_splits(self) -> Splits:
        data = self.options.data
        options = sources[data["name"]].Options.model_validate(_without_name(data))
        return load_splits(data["name"], options)

    def _draw_gaps(self, splits: Splits, spec: TextSpec, seed: int) -> tuple[Gaps, Tensor]:
        """Draw one gap in each held-out text, and return the gaps and the true tokens (B,).

        A gap is far enough from the end that the largest context to its right fits; texts that are
        too short are skipped. Raises UserError if all texts are too short.
        """
        examples: Any = splits.val
        (batch,) = examples.batches(
            [torch.arange(min(len(examples), self.options.gaps))], torch.device("cpu")
        )
        tokens: Tokens = batch.inputs
        # Possible positions in each text: not [CLS], not [SEP], and not the context at the end.
        positions = tokens.real.sum(dim=1) - 2 - max(self.options.right, default=0)
        long_enough = positions >= 1
        tokens, positions = tokens.subset(long_enough), positions[long_enough]
        if not len(positions):
            raise UserError(
                f"{self.options.data['name']}: the texts are shorter than the largest context to "
                "the right of a gap; lower 'right', or raise data.length"
            )
        uniform = torch.rand(len(positions), generator=torch.Generator().manual_seed(seed))
        position = 1 + (uniform * positions).long()
        truth = tokens.ids.gather(1, position[:, None])
        ids = tokens.ids.scatter(1, position[:, None], spec.tokenizer.mask)
        return Gaps(tokens._replace(ids=ids), position), truth[:, 0]

    def _pretrain(
        self,
        cls: type[LanguagePretext],
        splits: Splits,
        seed: int,
        compute: Compute,
        check: Callable[[], None],
    ) -> Any:
        """Pretrain a backbone by a pretext, and return the pretext in evaluation mode."""
        options = self.options
        positions = max(8, splits.source.options.length)
        torch.manual_seed(seed)
        backbone = build_backbone(
            options.backbone, {"causal": cls is Ltr, "positions": positions}, splits.spec
        )
        pretext = cls(cls.Options(), cast(TextBackbone, backbone))
        schedule = short_schedule(options.steps, options.batch, options.lr)
        schedule = schedule.model_copy(update={"schedule": "linear", "clip": 1.0})
        examples = pretext.arrange(splits.pretrain, seed)
        return train_to_end(pretext, examples, schedule, seed, compute, check)


@torch.inference_mode()
def predict(model: Any, gaps: Gaps, right: int | None, device: torch.device) -> Tensor:
    """Predict the token in each gap, as log-probabilities (B, V).

    A masked model predicts it at the gap, a left-to-right one at the token before. `right` is the
    number of visible tokens after the gap; None: all.
    """
    log_probs = []
    for tokens, gap in _split_batches(gaps.hide(right), gaps.position):
        features = model.backbone(tokens.to(device)).tokens
        position = gap - 1 if model.backbone.causal else gap
        logits = model.head(gather_tokens(features, position.to(device)), model.backbone.embedding)
        log_probs.append(logits.float().log_softmax(dim=-1).cpu())
    return torch.cat(log_probs)


def _split_batches(
    tokens: Tokens, position: Tensor, size: int = 256
) -> Iterator[tuple[Tokens, Tensor]]:
    for rows in torch.arange(len(position)).split(size):
        yield tokens.subset(rows), position[rows]


def encode_sentence(sentence: str, spec: TextSpec) -> Gaps:
    """Encode a sentence with a gap, without [SEP] at its end.

    Raises UserError if the sentence is longer than `spec.length` tokens.
    """
    tokenizer = spec.tokenizer
    left, right = tokenizer.encode([part.strip() for part in sentence.split(GAP)])
    ids = torch.tensor([[tokenizer.cls, *left, tokenizer.mask, *right]])
    if ids.shape[1] > spec.length:
        raise UserError(
            f"'{sentence}' has {ids.shape[1]} tokens, but sequences have at most {spec.length}; "
            "raise data.length"
        )
    tokens = Tokens(ids, torch.zeros_like(ids), torch.ones_like(ids))
    return Gaps(tokens, torch.tensor([1 + len(left)]))


def entropy(log_probs: Tensor) -> Tensor:
    """Compute the entropy (B,) of log-probabilities (B, V), in nats."""
    return -(log_probs.exp() * log_probs).sum(dim=-1)


def _describe_likely(log_probs: Tensor, spec: TextSpec) -> str:
    """List the most likely tokens with their probabilities, from log-probabilities (V,)."""
    top = log_probs.topk(TOP)
    words = [spec.tokenizer.strings[token] for token in top.indices.tolist()]
    probabilities = top.values.exp().tolist()
    return ", ".join(f"{word} {p:.0%}" for word, p in zip(words, probabilities, strict=True))


def _without_name(data: dict[str, Any]) -> dict[str, Any]:
    """The data set's options, without its name."""
    return {key: value for key, value in data.items() if key != "name"}
