"""Parts of pretext tasks on text: the layout of sequences, and what is reported of them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from sslrun.backbones.text import TextBackbone
from sslrun.data.examples import Batch, Examples
from sslrun.data.specs import TextSpec
from sslrun.data.text.sequences import IGNORED, Documents, Tokens
from sslrun.pretexts.base import Pretext, PretextOptions

Pairs = Annotated[
    Literal["keep", "next", "drop"],
    Field(
        description="Layout of text. keep: BERT's pairs of segments, half of them unrelated "
        "(RoBERTa suspects that BERT's row without next-sentence prediction kept them; Liu et al. "
        "2019). next: pairs whose second segment always continues the first. drop: full sequences "
        "of running text."
    ),
]


class LanguageOptions(PretextOptions):
    """Options that all pretext tasks on text share: the layout of sequences."""

    pairs: Pairs = "keep"
    dupes: int = Field(1, ge=1)
    """Number of times that the corpus is laid out, each time cut at other places. An epoch reads
    all copies. BERT: 10."""
    cross_documents: bool = False
    """With `pairs: drop`: let tokens also attend to the other documents of their sequence."""

    @model_validator(mode="after")
    def _one_layout(self) -> LanguageOptions:
        if self.cross_documents and self.pairs != "drop":
            raise ValueError(
                "cross_documents: true needs pairs: drop; "
                "the segments of a pair attend to each other anyway"
            )
        return self


class LanguagePretext(Pretext):
    """Base class of pretext tasks on text."""

    reads = TextSpec
    backbone: TextBackbone
    options: Any

    def arrange(self, examples: Examples, seed: int) -> Examples:
        """Lay out documents in pairs, or pack them; texts of a labeled task do not change.

        Krishna et al. 2023 pretrain on such texts.
        """
        if not isinstance(examples, Documents):
            return examples
        options = self.options
        if options.pairs == "drop":
            return examples.pack(options.dupes)
        return examples.build_pairs(
            options.dupes, seed, random=0.5 if options.pairs == "keep" else 0.0
        )

    def tokens(self, batch: Batch) -> Tokens:
        """The batch's tokens, with the documents within which they may attend to each other."""
        tokens: Tokens = batch.inputs
        if self.options.cross_documents:
            return tokens._replace(documents=tokens.real.long(), packed=False)
        return tokens

    def words(self, tokens: Tokens) -> Tensor:
        """(B, T) bool: the tokens of the text, without [CLS], [SEP] and padding."""
        ids, tokenizer = tokens.ids, self.backbone.spec.tokenizer
        special = (ids == tokenizer.cls) | (ids == tokenizer.sep) | (ids == tokenizer.pad)
        return tokens.real & ~special

    def log_probs(self, tokens: Tokens) -> Tensor:
        """Log-probability (B, T) of each token in its context, for tasks that score texts."""
        raise NotImplementedError

    def score_texts(self, inputs: Any) -> Tensor:
        return torch.where(self.words(inputs), self.log_probs(inputs), 0.0).sum(dim=1)

    def held_out(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        output = self(self.views(batch, generator))
        return {
            "held_out_loss": output.loss,
            **{f"held_out_{name}": value for name, value in output.metrics.items()},
        }

    def floor(self, examples: Examples) -> float | None:
        if not isinstance(examples, Documents):
            return None
        counts = examples.count_unigrams().double()
        return self.without_context(counts / counts.sum())

    def without_context(self, shares: Tensor) -> float:
        """Lowest loss, in nats, of a model that knows only the tokens' frequencies `shares` (V,).

        By default it is their entropy.
        """
        return entropy(shares)


def entropy(shares: Tensor) -> float:
    """Entropy of a distribution (V,), in nats."""
    return -torch.xlogy(shares, shares).sum().item()


def following(tokens: Tokens) -> Tensor:
    """The token after each token (B, T) in its document; `IGNORED` after the last one."""
    after = tokens.ids.roll(-1, dims=1)
    same = tokens.documents.roll(-1, dims=1) == tokens.documents
    same[:, -1] = False
    return torch.where(same & tokens.real, after, IGNORED)


def preceding(tokens: Tokens) -> Tensor:
    """The token before each token (B, T) in its document; `IGNORED` before the first one."""
    before = tokens.ids.roll(1, dims=1)
    same = tokens.documents.roll(1, dims=1) == tokens.documents
    same[:, 0] = False
    return torch.where(same & tokens.real, before, IGNORED)
