"""Figures of text, from what runs kept: guesses at hidden tokens, and answers in passages."""

from __future__ import annotations

import html
from collections.abc import Iterator

from sslrun.pretexts.guesses import Guess, MaskedText
from sslrun.report.looks import Look
from sslrun.results.record import ANSWERS, GUESSES, RunRecord
from sslrun.tasks.answers import MarkedAnswer

TEXTS = 4
"""Largest number of texts with hidden tokens per pretraining."""


def masked_texts(record: RunRecord) -> list[Look]:
    """Draw the guesses of a masked language model; empty if the run kept none.

    Raises UserError if their file is damaged.
    """
    texts = record.read_shown(GUESSES, MaskedText)[:TEXTS]
    return [
        Look(f"Text {number}", "", _masked_text(text)) for number, text in enumerate(texts, start=1)
    ]


def _masked_text(text: MaskedText) -> str:
    """Draw a text with numbered gaps, and the probabilities at each gap as bars."""
    gaps = {guess.place: number for number, guess in enumerate(text.guesses, start=1)}
    words = []
    for place, token in enumerate(text.tokens):
        joined = token.startswith("##")
        shown = html.escape(token.removeprefix("##"))
        if place in gaps:
            shown = f'<b class="gap">{gaps[place]}</b>'
        words.append(shown if joined else f" {shown}")
    lists = [
        f'<div><b class="gap">{number}</b><ul class="bars">{"".join(_bars(text, guess))}</ul></div>'
        for number, guess in enumerate(text.guesses, start=1)
    ]
    return f'<p class="words">{"".join(words)}</p><div class="gaps">{"".join(lists)}</div>'


def _bars(text: MaskedText, guess: Guess) -> Iterator[str]:
    """Draw a bar for each of the best guesses, and for the true token if it is not among them."""
    true = text.tokens[guess.place]
    rows = [(token, share, "") for token, share in guess.best]
    if guess.rank > len(rows) or true not in dict(guess.best):
        rows.append((true, guess.probability, f"rank {guess.rank:,} · "))
    for token, share, rank in rows:
        kind, sign = (' class="true"', "✓ ") if token == true else ("", "")
        yield (
            f"<li{kind}><span>{sign}{html.escape(token)}</span>"
            f'<span class="bar"><i style="width:{100 * share:.1f}%"></i></span>'
            f"<span>{rank}{100 * share:.1f} %</span></li>"
        )


def marked_answers(record: RunRecord) -> dict[str, list[Look]]:
    """Title -> passages with the right and the predicted answer; empty if the run kept none.

    Raises UserError if their file is damaged.
    """
    groups: dict[str, list[Look]] = {}
    for answer in record.read_shown(ANSWERS, MarkedAnswer):
        title = "right answers" if answer.right else "most certain wrong answers"
        groups.setdefault(title, []).append(Look(answer.question, "", _marked_answer(answer)))
    return groups


def _marked_answer(answer: MarkedAnswer) -> str:
    """Draw the passage with its marks, and the two answers, which explain the marks."""
    pieces = "".join(
        f'<mark class="{mark}">{html.escape(text)}</mark>' if mark else html.escape(text)
        for text, mark in answer.passage
    )
    answers = f"right: {_named('true', answer.true)}"
    if not answer.right:
        answers += f" · predicted: {_named('predicted', answer.predicted)}"
    numbers = f"F1 {100 * answer.f1:.0f} %, certainty {answer.certainty:.2f}"
    return f'<p class="words">{pieces}</p><p class="quiet">{answers} · {numbers}</p>'


def _named(mark: str, answer: str) -> str:
    return f'<mark class="{mark}">{html.escape(answer or "no answer")}</mark>'
