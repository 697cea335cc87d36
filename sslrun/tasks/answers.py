"""Answers to questions with their passages, right and wrong ones, to be shown to people."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from sslrun.data.text.passages import SpanRow
from sslrun.tasks.squad import Answer, decide, normalize_answer, word_f1

RIGHT, WRONG = 3, 6
"""Largest number of right and of wrong answers to show."""
AROUND = 200
"""Number of characters that are kept beside a marked one."""

Mark = Literal["", "true", "predicted", "both"]


@dataclass(frozen=True)
class MarkedAnswer:
    """An answer to a question about a passage."""

    question: str
    passage: list[tuple[str, Mark]]
    """Pieces of the passage with their marks; long pieces without a mark are shortened."""
    true: str
    """The right answer that is most like the predicted one; empty if the question has none."""
    predicted: str
    """The predicted answer; empty if the question is left unanswered."""
    f1: float
    """F1 of the words of the two answers, in [0, 1]."""
    right: bool
    """Whether they match exactly, by SQuAD's evaluation."""
    certainty: float
    """By how much the score of the prediction, a span or none, exceeds that of the other."""


def choose_answers(answers: dict[int, Answer], rows: Sequence[SpanRow]) -> list[MarkedAnswer]:
    """Choose the first right answers, then the wrong ones that are most certain."""
    marked = [
        _mark(answer, rows[question])
        for question, answer in sorted(decide(answers, rows).items())
        if math.isfinite(answer.doubt)  # else no span was allowed
    ]
    wrong = [answer for answer in marked if not answer.right]
    wrong.sort(key=lambda answer: answer.certainty, reverse=True)
    return [answer for answer in marked if answer.right][:RIGHT] + wrong[:WRONG]


def _mark(answer: Answer, row: SpanRow) -> MarkedAnswer:
    """Mark a predicted answer, and the right one that it is most like, in the passage."""

    def likeness(other: tuple[str, int]) -> tuple[bool, float]:
        same = normalize_answer(answer.text) == normalize_answer(other[0])
        return same, word_f1(answer.text, other[0])

    right = [other for other in row.answers if normalize_answer(other[0])] or [("", 0)]
    true, true_start = max(right, key=likeness)
    is_right, f1 = likeness((true, true_start))
    return MarkedAnswer(
        row.question,
        _cut(row.context, (true_start, len(true)), (answer.start, len(answer.text))),
        true,
        answer.text,
        f1,
        is_right,
        answer.doubt if not answer.text else -answer.doubt,
    )


def _cut(passage: str, true: tuple[int, int], predicted: tuple[int, int]) -> list[tuple[str, Mark]]:
    """Cut a passage at the ends of two spans (start, length), and mark the pieces."""
    ends = {0, len(passage)}
    for start, length in (true, predicted):
        ends |= {start, start + length} if length else set()
    borders = sorted(ends)
    pieces = []
    for start, end in pairwise(borders):
        marks = [at <= start < at + length for at, length in (true, predicted)]
        mark = MARKS[marks[0], marks[1]]
        text = passage[start:end]
        if not mark:
            text = _shorten(text, start == 0, end == len(passage))
        pieces.append((text, mark))
    return pieces


MARKS: dict[tuple[bool, bool], Mark] = {
    (False, False): "", (True, False): "true", (False, True): "predicted", (True, True): "both",
}  # fmt: skip
"""Whether a piece is in the true span, and in the predicted one -> its mark."""


def _shorten(text: str, first: bool, last: bool) -> str:
    """Keep `AROUND` characters beside each mark; the first and last piece have one on one side."""
    before, after = 0 if first else AROUND, 0 if last else AROUND
    if len(text) <= before + after or not before + after:
        return text[: 2 * AROUND]
    return f"{text[:before]} … {text[len(text) - after :]}"
