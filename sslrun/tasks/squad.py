"""Answers to questions: from scores of tokens to text, and SQuAD's official measures (Rajpurkar et al. 2016, 2018)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

from torch import Tensor

from sslrun.data.passages import SpanRow, SpanSet


def decode(outputs: Tensor, windows: SpanSet, rows: Tensor, candidates: int, longest: int) -> dict[int, str]:
    """The best answer to each question, by its number; "" where none is right, if the set has such questions.

    `outputs` (W, T, 2): of the windows `rows` (W,). As in BERT's run_squad.py: the best starts with the best ends of each
    window, both in the passage, in order, not too long, and the start in the window that gives it the most context; the
    sum of both scores decides, over all windows of a question. No answer scores as [CLS], by its lowest.
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
    unanswerable = any(not row.answers for row in windows.rows)
    found: dict[int, tuple[float, str]] = {}
    nothing: dict[int, float] = {}
    for at, question in enumerate(windows.question[rows].tolist()):
        nothing[question] = min(nothing.get(question, float("inf")), float(empty[at]))
        if score[at] > found.get(question, (float("-inf"), ""))[0]:
            first, last = int(characters[at, begins[at], 0]), int(characters[at, finishes[at], 1])
            found[question] = (float(score[at]), windows.rows[question].context[first:last])
        found.setdefault(question, (float("-inf"), ""))
    return {
        question: "" if unanswerable and nothing[question] > score else text
        for question, (score, text) in found.items()
    }


def squad_scores(answers: dict[int, str], rows: Sequence[SpanRow]) -> dict[str, float]:
    """Exact match and F1 over the questions answered, in percent; the best of each question's right answers counts."""
    exact = f1 = 0.0
    for question, answer in answers.items():
        right = [text for text, _ in rows[question].answers if normalised(text)] or [""]
        exact += max(float(normalised(answer) == normalised(each)) for each in right)
        f1 += max(overlap(answer, each) for each in right)
    return {"f1": 100 * f1 / len(answers), "exact_match": 100 * exact / len(answers)}


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
