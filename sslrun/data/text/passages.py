"""Questions that are answered by a span of a passage."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from sslrun.data.source import sources
from sslrun.data.specs import TextSpec
from sslrun.data.splits import TEST_FRACTION, VAL_FRACTION, carve
from sslrun.data.stores import FileStore, Hub, Split, TableStore
from sslrun.data.text.base import (
    PublishedText,
    TableText,
    TextCard,
    TextOptions,
    TextSource,
    register_published,
)
from sslrun.data.text.sequences import Sequences, concatenate_texts
from sslrun.data.text.tokenizer import Tokenizer
from sslrun.errors import UserError

log = logging.getLogger(__name__)

Window = tuple[int, int]
"""First token of a window in its passage, and one past its last."""


class SpanRow(NamedTuple):
    """A question about a passage."""

    id: str
    question: str
    context: str
    answers: tuple[tuple[str, int], ...]
    """Each correct answer and its first character; empty if the question has no answer."""


class SpanSet(NamedTuple):
    """The questions and their windows, to score answers. W windows of T tokens at most."""

    rows: list[SpanRow]
    question: Tensor
    """(W,) index of the question of each window."""
    passage: Tensor
    """(W,) position in the sequence where the passage of the window starts."""
    characters: Tensor
    """(W, T, 2) characters [start, end) of each token in the context; -1 outside the passage."""
    best: Tensor
    """(W, T) bool: no other window gives the token more context."""


class SpanSource(TextSource):
    """Questions answered by a span of a passage. A long passage is cut into overlapping windows.

    Each window, with the question, is an example.
    """

    task = "span"

    class Options(TextOptions):
        question_length: int = Field(64, ge=4)
        """Maximum number of tokens in a question, as in BERT."""
        stride: int = Field(128, ge=1)
        """Tokens between the starts of two windows, as in BERT; capped at half a window."""

    @abstractmethod
    def questions(self, split: Split) -> list[SpanRow]:
        """Return the questions of a split."""

    def texts(self) -> Iterator[str]:
        rows = self.questions("train")
        yield from dict.fromkeys(row.context for row in rows)
        yield from (row.question for row in rows)

    def load(self, split: Split) -> Sequences:
        rows = self.questions(split)
        if split == "train":
            rows = self._drop_misplaced(rows, split)
        if not rows:
            raise UserError(
                f"{self.title}: split '{split}' has no question whose answer is in its passage"
            )
        return build_windows(rows, self.spec, self.options.question_length, self.options.stride)

    def _drop_misplaced(self, rows: list[SpanRow], split: Split) -> list[SpanRow]:
        """Remove questions with an answer that is not where it should be, with a warning."""
        kept = [row for row in rows if _answers_match(row)]
        dropped = [row.id for row in rows if not _answers_match(row)]
        if dropped:
            log.warning(
                "%s %s: left out %d question%s whose answer is not in the passage: %s%s",
                self.title,
                split,
                len(dropped),
                "s" if len(dropped) > 1 else "",
                ", ".join(dropped[:3]),
                ", ..." if len(dropped) > 3 else "",
            )
        return kept


def _answers_match(row: SpanRow) -> bool:
    """Return whether the passage has every answer at the character where it should start."""
    return all(row.context[start : start + len(text)] == text for text, start in row.answers)


class _Passage(NamedTuple):
    """An encoded passage."""

    start: int
    """Position of its first token among all tokens."""
    offsets: list[tuple[int, int]]
    """Characters [start, end) of each token."""


class _Question(NamedTuple):
    """An encoded question."""

    start: int
    """Position of its first token among all tokens."""
    length: int
    """Number of its tokens."""


def build_windows(
    rows: list[SpanRow], spec: TextSpec, question_length: int, stride: int
) -> Sequences:
    """Combine every question with every window of its passage, W examples in all.

    Labels (W, 2) are the positions of the first and last token of the first answer, or 0 and 0,
    [CLS], if the window does not hold it. BERT's run_squad.py trains on those windows, too.

    Raises:
        UserError: A question leaves no room for its passage.
    """
    tokens, passages, questions = _encode_rows(rows, spec.tokenizer, question_length)
    builder = _WindowBuilder(spec.length, stride)
    for number, (row, question) in enumerate(zip(rows, questions, strict=True)):
        builder.add(number, row, question, passages[row.context])
    ranges, labels = torch.tensor(builder.ranges), torch.tensor(builder.labels)
    return Sequences(tokens, ranges, labels, (), spec, extra=builder.span_set(rows))


def _encode_rows(
    rows: list[SpanRow], tokenizer: Tokenizer, question_length: int
) -> tuple[Tensor, dict[str, _Passage], list[_Question]]:
    """Encode each passage once and each question, cut to `question_length` tokens.

    Returns:
        The tokens (S,) of all passages, then of all questions; the passages by their text; and the
        questions in the order of `rows`.
    """
    contexts = list(dict.fromkeys(row.context for row in rows))
    encoded = tokenizer.offsets(contexts)
    question_ids = tokenizer.encode([row.question for row in rows])
    question_ids = [ids[:question_length] for ids in question_ids]
    tokens, offsets = concatenate_texts([*(ids for ids, _ in encoded), *question_ids])
    starts = iter(offsets.tolist())
    passages = {}
    for context, (_, characters) in zip(contexts, encoded, strict=True):
        passages[context] = _Passage(next(starts), characters)
    questions = [_Question(next(starts), len(ids)) for ids in question_ids]
    return tokens, passages, questions


class _WindowBuilder:
    """Collects the windows of questions.

    Layout of a sequence with a question of Q tokens and a window [start, end) of its passage:

        position  0      1 ... Q   Q + 1  Q + 2 ... Q + 1 + end - start  then
        token     [CLS]  question  [SEP]  passage[start:end]             [SEP]
    """

    def __init__(self, length: int, stride: int) -> None:
        """`length`: maximum number of tokens in a sequence. `stride`: tokens between windows."""
        self.length = length
        self.stride = stride
        self.ranges: list[tuple[int, int, int, int]] = []
        self.labels: list[tuple[int, int]] = []
        self.owners: list[int] = []
        self.begins: list[int] = []
        self.characters: list[Tensor] = []
        self.best: list[Tensor] = []

    def add(self, number: int, row: SpanRow, question: _Question, passage: _Passage) -> None:
        """Add the windows of question `number`."""
        room = self.length - 3 - question.length
        if room < 1:
            raise UserError(
                f"sequences of {self.length} tokens leave no room beside a question; raise length, "
                "or lower question_length"
            )
        count = len(passage.offsets)
        starts = _window_starts(count, room, min(self.stride, max(1, room // 2)))
        windows = [(start, min(start + room, count)) for start in starts]
        answer = _token_span(passage.offsets, row.answers[0]) if row.answers else None
        begin = question.length + 2
        for window in windows:
            start, end = window
            self.ranges.append(
                (
                    question.start,
                    question.start + question.length,
                    passage.start + start,
                    passage.start + end,
                )
            )
            self.labels.append(_label(answer, window, begin))
            self.owners.append(number)
            self.begins.append(begin)
            self.characters.append(self._place_characters(passage.offsets, window, begin))
            self.best.append(self._mark_best(windows, window, begin))

    def _place_characters(
        self, offsets: list[tuple[int, int]], window: Window, begin: int
    ) -> Tensor:
        """Return (T, 2) the characters of each token of the passage; -1 elsewhere."""
        start, end = window
        characters = torch.full((self.length, 2), -1, dtype=torch.int32)
        span = torch.tensor(offsets[start:end], dtype=torch.int32).reshape(-1, 2)
        characters[begin : begin + end - start] = span
        return characters

    def _mark_best(self, windows: list[Window], window: Window, begin: int) -> Tensor:
        """Return (T,) bool: tokens of the passage that have the most context in `window`."""
        start, end = window
        best = torch.zeros(self.length, dtype=torch.bool)
        if len(windows) == 1:
            best[begin : begin + end - start] = True
            return best
        is_best = []
        for token in range(start, end):
            scores = [_context_score(token, *other) for other in windows if _holds(other, token)]
            is_best.append(_context_score(token, start, end) == max(scores))
        best[begin : begin + end - start] = torch.tensor(is_best)
        return best

    def span_set(self, rows: list[SpanRow]) -> SpanSet:
        """Return the questions and their windows, to score answers."""
        return SpanSet(
            rows,
            torch.tensor(self.owners),
            torch.tensor(self.begins),
            torch.stack(self.characters),
            torch.stack(self.best),
        )


def _label(answer: tuple[int, int] | None, window: Window, begin: int) -> tuple[int, int]:
    """Return the positions of an answer in the sequence; (0, 0) if the window does not hold it."""
    start, end = window
    if answer is None or answer[0] < start or answer[1] >= end:
        return 0, 0
    return answer[0] - start + begin, answer[1] - start + begin


def _holds(window: Window, token: int) -> bool:
    return window[0] <= token < window[1]


def _window_starts(count: int, room: int, stride: int) -> list[int]:
    """Return the starts of windows of `room` tokens that cover `count` tokens."""
    starts = [0]
    while starts[-1] + room < count:
        starts.append(starts[-1] + min(room, stride))
    return starts


def _context_score(token: int, start: int, end: int) -> float:
    """Rate the context that a window gives a token, as in run_squad.py.

    It is the number of tokens on the side with fewer, plus a little for the length of the window.
    """
    return min(token - start, end - 1 - token) + 0.01 * (end - start)


def _token_span(offsets: list[tuple[int, int]], answer: tuple[str, int]) -> tuple[int, int] | None:
    """Return the first and last token that overlap an answer; None if there are none."""
    text, start = answer
    touched = [
        token
        for token, (begin, end) in enumerate(offsets)
        if begin < start + len(text) and end > start
    ]
    return (touched[0], touched[-1]) if touched else None


class TableSpans(TableText, SpanSource):
    """Questions in a table with SQuAD's columns.

    They are id, question, context, and answers, which holds {text, answer_start}.
    """

    splits: tuple[Split, ...] = ("train", "val", "test")

    def questions(self, split: Split) -> list[SpanRow]:
        """Return the questions of a split; a split that the set lacks is carved from train.

        Whole passages are held out, so that no passage is in two splits.

        Raises:
            UserError: The set has fewer than two passages to divide.
        """
        if split != "train" and split in self.store.splits:
            return self._read(split)
        rows = self._read("train")
        for held_out, share in (("test", TEST_FRACTION), ("val", VAL_FRACTION)):
            if held_out in self.store.splits:
                continue
            passages = list(dict.fromkeys(row.context for row in rows))
            if len(passages) < 2:
                raise UserError(
                    f"{self.title}: has too few passages to hold some out; add passages, or a file "
                    f"of a {held_out} split"
                )
            held = {passages[index] for index in carve(len(passages), share)[1].tolist()}
            if split == held_out:
                return [row for row in rows if row.context in held]
            rows = [row for row in rows if row.context not in held]
        return rows

    def _read(self, split: Split) -> list[SpanRow]:
        table = self.table(split, "question", "context", "answers")
        return [self._parse_row(split, number, row) for number, row in enumerate(table)]

    def _parse_row(self, split: Split, number: int, row: Mapping[str, Any]) -> SpanRow:
        """Parse a row of the table.

        Raises:
            UserError: A column has the wrong type, or answers and their starts differ in number.
        """
        try:
            texts, starts = row["answers"]["text"], map(int, row["answers"]["answer_start"])
            answers = tuple(zip(texts, starts, strict=True))
            name = str(row.get("id", number))
            # `+ ""` raises TypeError for anything but text.
            return SpanRow(name, row["question"].strip(), row["context"] + "", answers)
        except (AttributeError, KeyError, TypeError, ValueError):
            raise UserError(
                f"{self.title}: split '{split}', row {number}: question and context should be "
                "text, and answers {text: [...], answer_start: [...]} with lists of equal length"
            ) from None


SPANS = {
    "squad": TextCard(
        "Questions answered in paragraphs of Wikipedia. Rajpurkar et al., EMNLP 2016.",
        Hub("rajpurkar/squad", {"train": "train", "test": "validation"}),
    ),
    "squad2": TextCard(
        "SQuAD with additional questions that have no answer. Rajpurkar et al., ACL 2018.",
        Hub("rajpurkar/squad_v2", {"train": "train", "test": "validation"}),
    ),
}


class PublishedSpans(PublishedText, TableSpans):
    """A published set of questions about passages."""


register_published(PublishedSpans, SPANS)


@sources.register("passages")
class OwnSpans(TableSpans):
    """Your own questions about passages: a JSON or parquet file, or a folder of them.

    The columns are SQuAD's: id, question, context, and answers with {text, answer_start}.
    """

    class Options(SpanSource.Options):
        path: Path
        """A file, or a folder of files."""

    @cached_property
    def store(self) -> TableStore:
        return FileStore(self.options.path)
