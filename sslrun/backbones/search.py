"""Beam search: find a likely sequence under a model that scores one next token at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sslrun.data.text.tokenizer import Tokenizer

NextToken = Callable[[Tensor, Tensor], Tensor]
"""Score the next token: prefixes (R, T), and for each the row (R,) of the previous call that it
extends by one token -> log-probabilities (R, V)."""


@dataclass(frozen=True)
class Search:
    """How to look for the most likely sequence."""

    beams: int = 1
    """Number of hypotheses to keep for each example; 1: greedy decoding."""
    penalty: float = 0.6
    """Exponent of the length penalty; 0: none."""
    longest: int = 128
    """Maximum number of tokens, the end included."""

    def score(self, log_probs: Tensor, lengths: Tensor) -> Tensor:
        """Divide log-probabilities of sequences by the length penalty of Wu et al. (2016), eq. 14.

        It is ((5 + length) / 6) ** penalty (arXiv:1609.08144). Lengths count the end.
        """
        return log_probs / ((5.0 + lengths) / 6.0) ** self.penalty


def beam_search(
    next_token: NextToken, count: int, tokenizer: Tokenizer, search: Search, device: torch.device
) -> Tensor:
    """Write a sequence for each of `count` examples: ids (count, longest at most).

    A sequence starts with [CLS], which is not returned, and ends with [SEP], then [PAD]. All
    hypotheses are ranked by their score under the length penalty, finished ones with the length
    that they have. The search ends when all hypotheses in the beams are finished. With one beam,
    the most likely token is taken each time.

    Rows of `next_token`: the K hypotheses of the first example, then those of the second.
    """
    beams = search.beams
    first = torch.arange(count, device=device)[:, None] * beams
    origin = torch.arange(count * beams, device=device)
    ids = torch.full((count * beams, 1), tokenizer.cls, device=device)
    # All hypotheses of an example begin alike, so that only the first may grow at the first step.
    log_probs = torch.full((count, beams), float("-inf"), device=device)
    log_probs[:, 0] = 0.0
    lengths = torch.zeros(count, beams, dtype=torch.int64, device=device)
    finished = torch.zeros(count, beams, dtype=torch.bool, device=device)
    for _ in range(search.longest):
        step = _only_pad_after_end(next_token(ids, origin), finished.flatten(), tokenizer.pad)
        vocab = step.shape[1]
        grown = log_probs[..., None] + step.unflatten(0, (count, beams))  # (count, K, V)
        lengths = lengths + (~finished).long()
        ranked = search.score(grown, lengths[..., None]).flatten(1)
        best = ranked.topk(beams).indices
        parent, token = best // vocab, best % vocab
        log_probs = grown.flatten(1).gather(1, best)
        lengths = lengths.gather(1, parent)
        finished = finished.gather(1, parent) | (token == tokenizer.sep)
        origin = (first + parent).flatten()
        ids = torch.cat([ids[origin], token.reshape(-1, 1)], dim=1)
        if finished.all():
            break
    return ids.unflatten(0, (count, beams))[:, 0, 1:]


def _only_pad_after_end(log_probs: Tensor, finished: Tensor, pad: int) -> Tensor:
    """Give finished rows (R,) of log-probabilities (R, V) [PAD] for sure, and the others never."""
    log_probs = log_probs.masked_fill(finished[:, None], float("-inf"))
    log_probs[:, pad] = torch.where(finished, 0.0, float("-inf"))
    return log_probs
