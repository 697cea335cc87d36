"""Answers to questions: from scores of tokens to text, and SQuAD's official measures (Rajpurkar et al. 2016, 2018)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import groupby
from statistics import fmean
from typing import NamedTuple

from torch import Tensor

from sslrun.data.text.passages import SpanRow, SpanSet


class Answer(NamedTuple):
    """The best span for a question."""

    text: str
    """"" where there is none."""
    doubt: float
    """By how much no answer scores above it."""


def decode(
    outputs: Tensor, windows: SpanSet, rows: Tensor, candidates: int, longest: int
) -> dict[int, Answer]:
    """The best answer to each question, by its number.

    `outputs` (W, T, 2): of the windows `rows` (W,). As in BERT's run_squad.py: the best starts with
    the best ends of each window, both in the passage, in order, not too long, and the start in the
    window that gives it the most context; the sum of both scores decides, over all windows of a
    question. No answer scores as [CLS], by its lowest.
    """
    length = outputs.shape[1]
    characters, best = windows.characters[rows][:, :length], windows.best[rows][:, :length]
    inside = characters[..., 0] >= 0
    start = outputs[..., 0].masked_fill(~(inside & best), float("-inf"))
    end = outputs[..., 1].masked_fill(~inside, float("-inf"))
    count = min(candidates, length)
    start_score, start_at = start.topk(count, dim=1)
    end_score, end_at = end.topk(count, dim=1)
    span = end_at[:, None, :] - start_at[:, :, None]
    total = start_score[:, :, None] + end_score[:, None, :]
    total = total.masked_fill((span < 0) | (span >= longest), float("-inf")).flatten(1)
    score, chosen = total.max(dim=1)
    begins = start_at.gather(1, (chosen // count)[:, None])[:, 0]
    finishes = end_at.gather(1, (chosen % count)[:, None])[:, 0]
    empty = outputs[:, 0].sum(dim=1)
    found: dict[int, tuple[float, str]] = {}
    nothing: dict[int, float] = {}
    for at, question in enumerate(windows.question[rows].tolist()):
        nothing[question] = min(nothing.get(question, float("inf")), float(empty[at]))
        if score[at] > found.get(question, (float("-inf"), ""))[0]:
            first, last = int(characters[at, begins[at], 0]), int(characters[at, finishes[at], 1])
            found[question] = (float(score[at]), windows.rows[question].context[first:last])
        found.setdefault(question, (float("-inf"), ""))
    return {
        question: Answer(text, nothing[question] - score)
        for question, (score, text) in found.items()
    }


def squad_scores(answers: dict[int, Answer], rows: Sequence[SpanRow]) -> dict[str, float]:
    """Exact match and F1 over the questions answered, in percent; the best of each question's right answers counts.

    Where some questions have no answer, none is told where that scores above the best span (a
    threshold of 0); `best_f1` is the F1 by the threshold that is best for these very questions, as
    SQuAD 2.0's official script gives it and Devlin et al. (2019, 4.3) choose theirs.
    """
    unanswerable = any(not row.answers for row in rows)
    told = {
        at: "" if unanswerable and answer.doubt > 0 else answer.text
        for at, answer in answers.items()
    }
    found = {
        "f1": fmean(_best(overlap, text, rows[at]) for at, text in told.items()),
        "exact_match": fmean(_best(_same, text, rows[at]) for at, text in told.items()),
    }
    if unanswerable:
        found["best_f1"] = _best_f1(answers, rows)
    return {name: 100 * value for name, value in found.items()}


def _best_f1(answers: dict[int, Answer], rows: Sequence[SpanRow]) -> float:
    """The highest F1, in [0, 1], that a threshold on doubt gives."""
    empty = {at: _best(overlap, "", rows[at]) for at in answers}
    best = found = sum(empty.values())
    by_doubt = sorted(answers.items(), key=lambda each: each[1].doubt)
    for _, equals in groupby(
        by_doubt, key=lambda each: each[1].doubt
    ):  # a threshold lets all of them in
        for at, answer in equals:
            found += _best(overlap, answer.text, rows[at]) - empty[at]
        best = max(best, found)
    return best / len(answers)


def _best(measure: Callable[[str, str], float], text: str, row: SpanRow) -> float:
    """The measure by whichever of the right answers is best for it."""
    return max(
        measure(text, each)
        for each in [right for right, _ in row.answers if normalised(right)] or [""]
    )


def _same(answer: str, right: str) -> float:
    return float(normalised(answer) == normalised(right))


def normalised(answer: str) -> str:
    """Lower case, without punctuation, articles and runs of white space."""
    lower = "".join(each for each in answer.lower() if each not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", lower).split())


def overlap(answer: str, right: str) -> float:
    """F1 of two answers' words, in [0, 1]."""
    given, wanted = normalised(answer).split(), normalised(right).split()
    if not given or not wanted:
        return float(given == wanted)
    common = sum((Counter(given) & Counter(wanted)).values())
    return 2 * common / (len(given) + len(wanted))
