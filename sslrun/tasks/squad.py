"""Answers to questions: from scores of tokens to text, and SQuAD's official metrics.

Rajpurkar et al., EMNLP 2016 (arXiv:1606.05250) and ACL 2018 (arXiv:1806.03822).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import groupby
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

from sslrun.data.text.passages import SpanRow, SpanSet


class Answer(NamedTuple):
    """The best span for a question."""

    text: str
    """Text of the span; empty if there is no span."""
    doubt: float
    """Score of "no answer" minus the score of the span."""
    start: int = 0
    """First character of the text in its passage."""


def decode(
    outputs: Tensor, windows: SpanSet, rows: Tensor, candidates: int, longest: int
) -> dict[int, Answer]:
    """Return the best answer to each question, by the question's number.

    `outputs` (W, T, 2) are the scores of starts and ends in the windows `rows` (W,). Spans are
    those of `_best_spans`; the best span over all windows of a question wins. The score of "no
    answer" is that of [CLS], the lowest over the windows. Both follow BERT's run_squad.py.
    """
    scores, starts, ends = _best_spans(outputs, windows, rows, candidates, longest)
    empty_scores = outputs[:, 0].sum(dim=1)
    spans: dict[int, tuple[float, str, int]] = {}
    lowest_empty: dict[int, float] = {}
    for window, question in enumerate(windows.question[rows].tolist()):
        empty = float(empty_scores[window])
        lowest_empty[question] = min(lowest_empty.get(question, float("inf")), empty)
        best, _, _ = spans.setdefault(question, (float("-inf"), "", 0))
        if scores[window] > best:
            start = int(starts[window])
            text = windows.rows[question].context[start : int(ends[window])]
            spans[question] = (float(scores[window]), text, start)
    return {
        question: Answer(text, lowest_empty[question] - score, start)
        for question, (score, text, start) in spans.items()
    }


def _best_spans(
    outputs: Tensor, windows: SpanSet, rows: Tensor, candidates: int, longest: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The score (W,) of the best span in each window, and its first and last character (W,).

    A score is the sum of the scores of start and end. The `candidates` best starts are combined
    with the `candidates` best ends (K of each). A span must lie in the passage and have at most
    `longest` tokens. Its start must be in the window that gives it the most context.

        start_scores, end_scores (W, K); span_scores (W, K * K), with the start as the slow index
    """
    length = outputs.shape[1]
    characters, has_context = windows.characters[rows][:, :length], windows.best[rows][:, :length]
    inside = characters[..., 0] >= 0
    start = outputs[..., 0].masked_fill(~(inside & has_context), float("-inf"))
    end = outputs[..., 1].masked_fill(~inside, float("-inf"))
    count = min(candidates, length)
    start_scores, start_places = start.topk(count, dim=1)
    end_scores, end_places = end.topk(count, dim=1)
    span_lengths = end_places[:, None, :] - start_places[:, :, None]
    invalid = (span_lengths < 0) | (span_lengths >= longest)
    span_scores = start_scores[:, :, None] + end_scores[:, None, :]
    scores, chosen = span_scores.masked_fill(invalid, float("-inf")).flatten(1).max(dim=1)
    window = torch.arange(len(outputs))
    first = start_places[window, chosen // count]
    last = end_places[window, chosen % count]
    return scores, characters[window, first, 0], characters[window, last, 1]


def score_answers(answers: dict[int, Answer], rows: Sequence[SpanRow]) -> dict[str, float]:
    """Exact match and F1 over the answered questions, in percent, by SQuAD's evaluation.

    Each question counts by its best right answer. If some questions have no answer, a question
    whose "no answer" scores above the best span is left unanswered (a threshold of 0). `best_f1` is
    then the F1 at the threshold that is best for these very questions, as in the official script of
    SQuAD 2.0; Devlin et al. (2019, 4.3) choose their threshold in this way.
    """
    texts = {question: answer.text for question, answer in decide(answers, rows).items()}
    shares = {
        "f1": fmean(_best(word_f1, text, rows[question]) for question, text in texts.items()),
        "exact_match": fmean(
            _best(_same, text, rows[question]) for question, text in texts.items()
        ),
    }
    if _some_unanswerable(rows):
        shares["best_f1"] = _best_f1(answers, rows)
    return {name: 100 * value for name, value in shares.items()}


def decide(answers: dict[int, Answer], rows: Sequence[SpanRow]) -> dict[int, Answer]:
    """Replace the span by an empty text where "no answer" scores higher, if that can be right."""
    unanswerable = _some_unanswerable(rows)
    return {
        question: answer._replace(text="") if unanswerable and answer.doubt > 0 else answer
        for question, answer in answers.items()
    }


def _some_unanswerable(rows: Sequence[SpanRow]) -> bool:
    return any(not row.answers for row in rows)


def _best_f1(answers: dict[int, Answer], rows: Sequence[SpanRow]) -> float:
    """The highest F1, in [0, 1], over all thresholds on doubt.

    Starts with all questions unanswered, and raises the threshold past one doubt after the other.
    """
    unanswered = {question: _best(word_f1, "", rows[question]) for question in answers}
    best = total = sum(unanswered.values())
    by_doubt = sorted(answers.items(), key=_doubt)
    for _, group in groupby(by_doubt, key=_doubt):  # a threshold passes equal doubts together
        for question, answer in group:
            total += _best(word_f1, answer.text, rows[question]) - unanswered[question]
        best = max(best, total)
    return best / len(answers)


def _doubt(item: tuple[int, Answer]) -> float:
    return item[1].doubt


def _best(measure: Callable[[str, str], float], text: str, row: SpanRow) -> float:
    """The highest measure of a text against any of the question's right answers."""
    right = [answer for answer, _ in row.answers if normalize_answer(answer)]
    return max(measure(text, answer) for answer in right or [""])


def _same(answer: str, right: str) -> float:
    """1 if two answers match exactly after normalization, else 0."""
    return float(normalize_answer(answer) == normalize_answer(right))


def normalize_answer(answer: str) -> str:
    """Lowercase an answer, and remove punctuation, articles and runs of white space."""
    lower = "".join(letter for letter in answer.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", lower).split())


def word_f1(answer: str, right: str) -> float:
    """F1 of the words of two answers, in [0, 1]."""
    words, right_words = normalize_answer(answer).split(), normalize_answer(right).split()
    if not words or not right_words:
        return float(words == right_words)
    common = sum((Counter(words) & Counter(right_words)).values())
    return 2 * common / (len(words) + len(right_words))
