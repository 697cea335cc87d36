"""What a masked and a left-to-right language model make of a gap, as more is told of what stands to its right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, cast

import torch
from pydantic import Field, field_validator
from torch import Tensor

from sslrun.backbones import build_backbone
from sslrun.backbones.text import TextBackbone, gather_tokens
from sslrun.claims.measurements.base import Measurement, measurements
from sslrun.data.examples import Batch
from sslrun.data.source import sources
from sslrun.data.specs import TextSpec
from sslrun.data.splits import Splits, load_splits
from sslrun.data.text.sequences import Tokens
from sslrun.errors import UserError
from sslrun.metric import Metric
from sslrun.pretexts.language import LanguagePretext
from sslrun.pretexts.ltr import Ltr
from sslrun.pretexts.mlm import MaskedViews, Mlm
from sslrun.registry import Options
from sslrun.results.address import Column, Row
from sslrun.results.table import Table
from sslrun.training.device import Compute
from sslrun.training.loop import Training, train
from sslrun.training.schedule import Schedule

GAP = "___"
ENTROPY, SURPRISE = (
    Column(metric=Metric(name, "nats", "lower", digits=2)) for name in ("entropy", "surprise")
)
SHOWN = 3
"""Guesses that are told of a sentence."""


class Guess(NamedTuple):
    """A gap in each of some sequences."""

    tokens: Tokens
    """With whatever stands in the gap."""
    gap: Tensor
    """(B,) its place."""

    def seen(self, right: int | None) -> Tokens:
        """What stands to the left and so many tokens to the right (None: all); the rest is out of attention's reach."""
        if right is None:
            return self.tokens
        place = torch.arange(self.tokens.ids.shape[1], device=self.gap.device)
        near = place <= self.gap[:, None] + right
        return self.tokens.keep_only(near)


class TruncatedMlm(Mlm):
    """Masked language modelling in which half of the texts break off at random, out of attention's reach from there on.

    A masked model that has only seen whole texts is at a loss where one breaks off, and would seem
    to sharpen for no other reason than that it is at home again. A left-to-right one meets every
    beginning anyway.
    """

    def views(self, batch: Batch, generator: torch.Generator) -> MaskedViews:
        tokens: Tokens = batch.inputs
        real = tokens.real.sum(dim=1)
        whole, end = torch.rand(2, len(real), generator=generator, device=real.device)
        seen = torch.where(whole < 0.5, real, 2 + (end * (real - 2)).long())
        place = torch.arange(tokens.ids.shape[1], device=real.device)
        near = place < seen[:, None]
        return super().views(batch._replace(inputs=tokens.keep_only(near)), generator)


MODELS: dict[str, type[LanguagePretext]] = {"masked": TruncatedMlm, "left to right": Ltr}
"""Row -> pretext."""


@measurements.register("guess")
class GuessMeasurement(Measurement):
    """Entropy of the guess at a gap, and its surprise at what stood there, by how much of the right context is told.

    A BERT and the same network left to right are pretrained alike (the first on texts that break
    off too), and guess at one gap in each held-out text, all but so many tokens to the right of it
    hidden from attention. Then sentences with a gap, each telling more: without a [SEP] behind,
    since they are told as far as known, as in the lecture's `I am ___`. In nats.
    """

    class Options(Options):
        data: dict[str, Any] = Field({"name": "world", "length": 48, "tokenizer": {"vocab": 600}})
        """The corpus."""
        backbone: Literal["bert-tiny", "bert-mini", "bert-small"] = "bert-tiny"
        """Backbone of both models."""
        steps: int = Field(2000, ge=1)
        """Pretraining steps of each model."""
        batch: int = Field(32, ge=1)
        """Sequences per step."""
        lr: float = Field(0.001, gt=0)
        """Peak learning rate."""
        right: tuple[Annotated[int, Field(ge=0)], ...] = (0, 1, 2, 4, 8)
        """Numbers of visible tokens to the right of the gap."""
        gaps: int = Field(1000, ge=2)
        """Maximum number of held-out texts to evaluate."""
        sentences: tuple[str, ...] = ()
        """Sentences with one gap, written ___; all start with the same words before the gap."""

        @field_validator("data")
        @classmethod
        def _corpus(cls, data: dict[str, Any]) -> dict[str, Any]:
            try:
                sources[str(data.get("name"))].Options.model_validate(
                    {k: v for k, v in data.items() if k != "name"}
                )
            except UserError as error:
                raise ValueError(str(error)) from None
            return data

        @field_validator("sentences")
        @classmethod
        def _gapped(cls, sentences: tuple[str, ...]) -> tuple[str, ...]:
            if any(each.count(GAP) != 1 for each in sentences):
                raise ValueError(f"each sentence should have one gap, written {GAP}")
            if len({each.split(GAP)[0] for each in sentences}) > 1:
                raise ValueError("the sentences should be the same up to the gap")
            return sentences

    options: Options

    def table(self, seed: int, compute: Compute, folder: Path, check: Callable[[], None]) -> Table:
        given = self.options
        options = {key: value for key, value in given.data.items() if key != "name"}
        splits = load_splits(
            given.data["name"], sources[given.data["name"]].Options.model_validate(options)
        )
        made = Table("the guess at a gap", marks_best=False)
        made.second = "told"
        assert isinstance(splits.spec, TextSpec)
        held_out, truth = self._gaps(splits, splits.spec, seed)
        for row, pretext in MODELS.items():
            model = self._trained(pretext, splits, seed, compute, check)

            def guess(guess: Guess, right: int | None, model: Any = model) -> Tensor:
                return guesses(model, guess, right, compute.device)

            for right in (*given.right, None):
                told = "all to the right" if right is None else f"{right} to the right"
                log = guess(held_out, right)
                made.add(Row(row, told), ENTROPY, entropy(log).mean().item(), str(seed))
                made.add(
                    Row(row, told),
                    SURPRISE,
                    -log.gather(1, truth[:, None]).mean().item(),
                    str(seed),
                )
            for sentence in given.sentences:
                log = guess(gapped(sentence, splits.spec), None)
                made.add(Row(row, sentence), ENTROPY, entropy(log).item(), str(seed))
                best = log[0].topk(SHOWN)
                words = (splits.spec.tokenizer.strings[each] for each in best.indices.tolist())
                shown = zip(words, best.values.exp().tolist(), strict=True)
                made.note(
                    f"{row}, {sentence}: {', '.join(f'{word} {p:.0%}' for word, p in shown)} (seed {seed})"
                )
        made.notes.insert(0, f"nats, {len(truth)} gaps in held-out text")
        return made

    def _gaps(self, splits: Splits, spec: TextSpec, seed: int) -> tuple[Guess, Tensor]:
        """One gap in the beginning of each held-out document, where the context asked for fits; and what stood there."""
        examples: Any = splits.val
        (batch,) = examples.batches(
            [torch.arange(min(len(examples), self.options.gaps))], torch.device("cpu")
        )
        tokens: Tokens = batch.inputs
        room = (
            tokens.real.sum(dim=1) - 2 - max(self.options.right, default=0)
        )  # [CLS] before, [SEP] behind
        kept = room >= 1
        tokens, room = tokens.subset(kept), room[kept]
        if not len(room):
            raise UserError(
                f"{self.options.data['name']}: its sequences are too short for that much right context"
            )
        draw = torch.rand(len(room), generator=torch.Generator().manual_seed(seed))
        gap = 1 + (draw * room).long()
        truth = tokens.ids.gather(1, gap[:, None])
        ids = tokens.ids.scatter(1, gap[:, None], spec.tokenizer.mask)
        return Guess(tokens._replace(ids=ids), gap), truth[:, 0]

    def _trained(
        self,
        cls: type[LanguagePretext],
        splits: Splits,
        seed: int,
        compute: Compute,
        check: Callable[[], None],
    ) -> Any:
        """The pretext with its backbone, pretrained."""
        given = self.options
        positions = max(8, splits.source.options.length)
        torch.manual_seed(seed)
        backbone = build_backbone(
            given.backbone, {"causal": cls is Ltr, "positions": positions}, splits.spec
        )
        pretext = cls(cls.Options(), cast(TextBackbone, backbone))
        schedule = Schedule(
            steps=given.steps, batch=given.batch, optimizer="adamw", lr=given.lr, weight_decay=0.01, warmup=0.1,
            schedule="linear", clip=1.0,
        )  # fmt: skip
        training = Training(pretext, schedule, compute)
        for _ in train(training, compute.place(pretext.arrange(splits.pretrain, seed)), seed):
            check()
        return training.averaged.eval()


@torch.inference_mode()
def guesses(model: Any, guess: Guess, right: int | None, device: torch.device) -> Tensor:
    """(B, V) log-probabilities of what stands in the gap: at it, or as foretold by the token before it."""
    found = []
    for tokens, gap in _batches(guess.seen(right), guess.gap):
        features = model.backbone(tokens.to(device)).tokens
        place = gap - 1 if model.backbone.causal else gap
        scores = model.head(gather_tokens(features, place.to(device)), model.backbone.embedding)
        found.append(scores.float().log_softmax(dim=-1).cpu())
    return torch.cat(found)


def _batches(tokens: Tokens, gap: Tensor, size: int = 256) -> Iterator[tuple[Tokens, Tensor]]:
    for rows in torch.arange(len(gap)).split(size):
        yield tokens.subset(rows), gap[rows]


def gapped(sentence: str, spec: TextSpec) -> Guess:
    """A sentence with a gap, as a model reads it. UserError: too long."""
    tokenizer = spec.tokenizer
    left, right = tokenizer.encode([part.strip() for part in sentence.split(GAP)])
    ids = torch.tensor([[tokenizer.cls, *left, tokenizer.mask, *right]])
    if ids.shape[1] > spec.length:
        raise UserError(f"'{sentence}' is longer than sequences are; raise data.length")
    return Guess(
        Tokens(ids, torch.zeros_like(ids), torch.ones_like(ids)), torch.tensor([1 + len(left)])
    )


def entropy(log: Tensor) -> Tensor:
    """Of log-probabilities (B, V), in nats."""
    return -(log.exp() * log).sum(dim=-1)
