"""Masked language modelling, with or without next-sentence prediction."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from sslrun.backbones.text import TextBackbone, at
from sslrun.data.examples import Batch, Examples
from sslrun.data.text.sequences import IGNORED, Documents, Tokens
from sslrun.errors import UserError
from sslrun.pretexts.base import pretexts
from sslrun.pretexts.language import LanguageOptions, LanguagePretext, TokenHead, embedding_of, entropy
from sslrun.training.learner import Output

RATE = 0.15
"""BERT's share of chosen tokens; every held-out loss is taken at it, that losses of other rates may be compared."""


class Masked(NamedTuple):
    """Sequences with some tokens hidden."""

    tokens: Tokens
    """As the backbone is given them."""
    places: Tensor
    """(B, K) where tokens were chosen; K is the same for all, and what is too many has no target."""
    targets: Tensor
    """(B, K) what stood there."""
    related: Tensor | None
    """(B,) 0 where the second segment goes on from the first, 1 where it is from elsewhere."""


@pretexts.register("mlm")
class Mlm(LanguagePretext):
    """Name hidden tokens from both sides. BERT: Devlin et al., NAACL 2019.

    Of each sequence exactly `round(rate * tokens)` are chosen (at least one, never special ones), of which 80 % become
    [MASK], 10 % a random token, 10 % stay; the loss is of the chosen ones alone, and so is the head's work. With `nsp`,
    whether the second segment goes on from the first is told from [CLS]. Chosen anew each time a sequence is seen;
    BERT's own code chose ten times, once for each of its `dupes`.
    """

    class Options(LanguageOptions):
        nsp: bool = False
        """Add next-sentence prediction to the loss, as BERT."""
        rate: float = Field(RATE, gt=0, lt=1)
        """Share of the tokens chosen."""
        mask: float = Field(0.8, ge=0, le=1)
        """Share of the chosen that become [MASK]."""
        replace: float = Field(0.1, ge=0, le=1)
        """Share of the chosen that become a random token; the rest stays."""
        whole_words: bool = False
        """Choose all pieces of a word or none."""
        masking: Literal["dynamic", "static"] = "dynamic"
        """static: the same tokens of a sequence are chosen each time it is seen, as in BERT's own code."""

        @model_validator(mode="after")
        def _consistent(self) -> Mlm.Options:
            if self.nsp and self.pairs != "keep":
                raise ValueError("nsp: true needs pairs: keep")
            if self.mask + self.replace > 1 + 1e-9:
                raise ValueError("mask and replace are shares of the chosen tokens: together 1 at most")
            return self

        def choices(self) -> list[str]:
            if self.nsp:
                return []
            if self.pairs == "keep":
                return ["without next-sentence prediction the pairs of segments are kept, its loss alone is dropped"]
            if self.pairs == "next":
                return ["without next-sentence prediction the second segment of a pair always goes on from the first"]
            return ["without next-sentence prediction full sequences of running text take the place of pairs"]

    options: Options
    continues: Tensor

    def __init__(self, options: Options, backbone: TextBackbone) -> None:
        super().__init__(options, backbone)
        if backbone.causal:
            raise UserError(
                f"pretext 'mlm' names tokens from both sides, and '{backbone.name}' sees one alone: "
                "take pretext 'ltr', or a backbone that is not causal"
            )
        self.tokenizer = backbone.spec.tokenizer
        self.register_buffer("continues", self.tokenizer.continues, persistent=False)
        table = embedding_of(backbone)
        self.head = TokenHead(backbone.width, backbone.spec.vocab, None if table is None else table.shape[1])
        self.nsp = nn.Linear(backbone.width, 2) if options.nsp else None

    def arrange(self, examples: Examples, seed: int) -> Examples:
        if self.options.nsp and not isinstance(examples, Documents):
            raise UserError(
                "next-sentence prediction needs documents of sentences, and the data has labelled texts: name a corpus, "
                "or set pretext.nsp to false"
            )
        return super().arrange(examples, seed)

    def views(self, batch: Batch, generator: torch.Generator) -> Masked:
        return self._masked(batch, generator, self.options.rate)

    def forward(self, views: Masked) -> Output:
        features = self.backbone(views.tokens)
        assert features.tokens is not None
        loss, accuracy = self.head.loss(at(features.tokens, views.places), embedding_of(self.backbone), views.targets)
        metrics = {"mlm_loss": loss.detach(), "mlm_accuracy": accuracy}
        if self.nsp is not None and views.related is not None:
            related = self.nsp(features.pooled).float()
            nsp_loss = F.cross_entropy(related, views.related)
            right = (related.detach().argmax(dim=1) == views.related).float().mean()
            metrics |= {"nsp_loss": nsp_loss.detach(), "nsp_accuracy": right}
            loss = loss + nsp_loss
        return Output(loss, metrics)

    def held_out(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """At BERT's rate; the loss is that of the masked tokens alone, whatever else is trained on."""
        metrics = self(self._masked(batch, generator, RATE)).metrics
        return {
            "held_out_loss": metrics["mlm_loss"],
            **{f"held_out_{k}": v for k, v in metrics.items() if k != "mlm_loss"},
        }

    def without_context(self, shares: Tensor) -> float:
        """Of what stands under [MASK] its entropy; of the other chosen tokens the entropy given what is shown, which may
        be the token itself."""
        mask, replace = self.options.mask, self.options.replace
        kept = (1 - mask - replace) * shares
        replaced = replace * shares / len(shares)  # by each token of the vocabulary
        both = (len(shares) - 1) * entropy(replaced) + entropy(kept + replaced)  # what stood there, and what is shown
        shown = entropy(kept + replace / len(shares))
        return mask * entropy(shares) + both - shown

    def _masked(self, batch: Batch, generator: torch.Generator, rate: float) -> Masked:
        tokens = self.tokens(batch)
        ids, tokenizer = tokens.ids, self.tokenizer
        noise = _static(ids, tokens.real) if self.options.masking == "static" else _drawn(ids, generator)
        allowed = tokens.real & (ids != tokenizer.cls) & (ids != tokenizer.sep) & (ids != tokenizer.pad)
        wanted, most = _wanted(tokens.real.sum(dim=1), rate), max(1, round(ids.shape[1] * rate))
        order = noise[0]
        if self.options.whole_words:
            order, allowed = self._whole_words(order, ids, allowed, wanted, most)
        ranked, places = order.masked_fill(~allowed, 2.0).topk(most, dim=1, largest=False)
        chosen = (torch.arange(most, device=ids.device) < wanted[:, None]) & (ranked < 1.5)
        targets = torch.where(chosen, ids.gather(1, places), IGNORED)
        fate, other = noise[1].gather(1, places), noise[2].gather(1, places)
        new = torch.where(fate < self.options.mask, tokenizer.mask, ids.gather(1, places))
        random = (fate >= self.options.mask) & (fate < self.options.mask + self.options.replace)
        new = torch.where(random, (other * tokenizer.vocab).long().clamp_max(tokenizer.vocab - 1), new)
        new = torch.where(chosen, new, ids.gather(1, places))
        return Masked(tokens._replace(ids=ids.scatter(1, places, new)), places, targets, batch.labels)

    def _whole_words(
        self, noise: Tensor, ids: Tensor, allowed: Tensor, wanted: Tensor, most: int
    ) -> tuple[Tensor, Tensor]:
        """(B, T) an order in which the pieces of a word follow one another, and which pieces may be chosen: word after
        word at random, but for those with more pieces than are still wanted (as BERT's own code)."""
        first = ~self.continues[ids]
        first[:, 0] = True
        places = torch.arange(ids.shape[1], device=ids.device)
        word = torch.where(first, places, 0).cummax(dim=1).values
        order = noise.gather(1, word)
        pieces = torch.zeros_like(ids).scatter_add(1, word, allowed.long()).gather(1, word)
        chosen, left = torch.zeros_like(allowed), wanted
        for _ in range(most):
            fits = allowed & ~chosen & (pieces <= left[:, None])
            lowest = order.masked_fill(~fits, 2.0).argmin(dim=1, keepdim=True)
            taken = fits & (word == word.gather(1, lowest)) & fits.gather(1, lowest)
            chosen, left = chosen | taken, left - taken.sum(dim=1)
        return order, chosen


def _wanted(lengths: Tensor, rate: float) -> Tensor:
    """How many tokens of sequences are chosen: in float64, as Python's own, since float32 rounds some halves the other
    way (but for Apple's GPUs, which have no other)."""
    exact = lengths.float() if lengths.device.type == "mps" else lengths.double()
    return (exact * rate).round().clamp_min(1).long()


def _drawn(ids: Tensor, generator: torch.Generator) -> Tensor:
    """(3, B, T) uniform in [0, 1)."""
    return torch.rand(3, *ids.shape, generator=generator, device=ids.device)


def _static(ids: Tensor, real: Tensor) -> Tensor:
    """(3, B, T) like uniform in [0, 1), but a function of the sequence alone, however far it is padded: a hash
    (splitmix64) of ids and place."""
    place = torch.arange(ids.shape[1], device=ids.device)
    sequence = ((ids + 1) * _mixed(place + 1) * real).sum(dim=1, keepdim=True)
    kinds = torch.arange(3, device=ids.device)[:, None, None]
    return ((_mixed(sequence + _mixed(place) + _mixed(kinds + 7919)) >> 11) & (2**24 - 1)).float() / 2**24


def _mixed(x: Tensor) -> Tensor:
    x = x * -7046029254386353131
    x = (x ^ (x >> 30)) * -4658895280553007687
    x = (x ^ (x >> 27)) * -7723592293110705685
    return x ^ (x >> 31)
