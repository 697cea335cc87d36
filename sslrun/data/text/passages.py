"""Questions answered by a span of a passage."""

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
from sslrun.data.text.base import PublishedText, TableText, TextCard, TextOptions, TextSource, register_published
from sslrun.data.text.sequences import Sequences, flat
from sslrun.errors import UserError

log = logging.getLogger(__name__)


class SpanRow(NamedTuple):
    """A question about a passage."""

    id: str
    question: str
    context: str
    answers: tuple[tuple[str, int], ...]
    """Each right answer and the character where it starts; none: it can't be answered."""


class SpanSet(NamedTuple):
    """What scores answers: the questions, and what their windows are."""

    rows: list[SpanRow]
    question: Tensor
    """(W,) the question of each window."""
    passage: Tensor
    """(W,) the place in the sequence where the window's passage starts."""
    characters: Tensor
    """(W, T, 2) where in the context each token of the passage starts and ends; -1 elsewhere."""
    best: Tensor
    """(W, T) whether no other window gives the token more context."""


class SpanSource(TextSource):
    """Questions whose answer is a span of a passage. Long passages become several windows, each an example."""

    task = "span"

    class Options(TextOptions):
        question_length: int = Field(64, ge=4)
        """Maximum number of tokens per question, as in BERT."""
        stride: int = Field(128, ge=1)
        """Tokens between the starts of two windows of a passage, as in BERT; at most half a window."""

    @abstractmethod
    def questions(self, split: Split) -> list[SpanRow]: ...

    def texts(self) -> Iterator[str]:
        rows = self.questions("train")
        yield from dict.fromkeys(row.context for row in rows)
        yield from (row.question for row in rows)

    def load(self, split: Split) -> Sequences:
        rows, dropped = _answerable(self.questions(split), training=split == "train")
        if not rows:
            raise UserError(f"{self.title}: split '{split}' has no question whose answer is in its passage")
        if dropped:
            more = ", ..." if len(dropped) > 3 else ""
            log.warning(
                "%s %s: left out %d question%s whose answer is not in the passage: %s",
                self.title,
                split,
                len(dropped),
                "s" if len(dropped) > 1 else "",
                ", ".join(dropped[:3]) + more,
            )
        return windows(rows, self.spec, self.options.question_length, self.options.stride)


def _answerable(rows: list[SpanRow], training: bool) -> tuple[list[SpanRow], list[str]]:
    """The questions that can be learned from, and the names of the others."""
    if not training:
        return rows, []
    sound = [all(row.context[at : at + len(text)] == text for text, at in row.answers) for row in rows]
    return [row for row, good in zip(rows, sound, strict=True) if good], [
        row.id for row, good in zip(rows, sound, strict=True) if not good
    ]


def windows(rows: list[SpanRow], spec: TextSpec, question_length: int, stride: int) -> Sequences:
    """Every question with every window of its passage: labels (W, 2) are the first and last place of its first answer,
    or 0 and 0, [CLS], where the window does not hold it (BERT's run_squad.py trains on those as well)."""
    contexts = list(dict.fromkeys(row.context for row in rows))
    number = {context: at for at, context in enumerate(contexts)}
    encoded = spec.tokenizer.offsets(contexts)
    questions = [ids[:question_length] for ids in spec.tokenizer.encode([row.question for row in rows])]
    tokens, offsets = flat([*(ids for ids, _ in encoded), *questions])
    ranges, labels, owner, passage, characters, best = [], [], [], [], [], []
    for at, (row, question) in enumerate(zip(rows, questions, strict=True)):
        which = number[row.context]
        places = encoded[which][1]
        room = spec.length - 3 - len(question)
        if room < 1:
            raise UserError(
                f"sequences of {spec.length} leave no room beside a question: raise length, or lower question_length"
            )
        starts = _window_starts(len(places), room, min(stride, max(1, room // 2)))
        answer = _token_span(places, row.answers[0]) if row.answers else None
        spans = [(start, min(start + room, len(places))) for start in starts]
        for start, end in spans:
            begins = len(question) + 2
            ranges.append(
                (
                    *(int(offsets[len(contexts) + at + more]) for more in (0, 1)),
                    int(offsets[which]) + start,
                    int(offsets[which]) + end,
                )
            )
            inside = answer is not None and start <= answer[0] and answer[1] < end
            labels.append((answer[0] - start + begins, answer[1] - start + begins) if inside and answer else (0, 0))
            owner.append(at)
            passage.append(begins)
            where = torch.full((spec.length, 2), -1, dtype=torch.int32)
            where[begins : begins + end - start] = torch.tensor(places[start:end], dtype=torch.int32).reshape(-1, 2)
            characters.append(where)
            most = torch.zeros(spec.length, dtype=torch.bool)
            most[begins : begins + end - start] = (
                torch.tensor(
                    [
                        _context(place, start, end)
                        == max(_context(place, *span) for span in spans if span[0] <= place < span[1])
                        for place in range(start, end)
                    ]
                )
                if len(spans) > 1
                else True
            )
            best.append(most)
    extra = SpanSet(rows, torch.tensor(owner), torch.tensor(passage), torch.stack(characters), torch.stack(best))
    return Sequences(tokens, torch.tensor(ranges), torch.tensor(labels), (), spec, extra=extra)


def _window_starts(count: int, room: int, stride: int) -> list[int]:
    starts = [0]
    while starts[-1] + room < count:
        starts.append(starts[-1] + min(room, stride))
    return starts


def _context(place: int, start: int, end: int) -> float:
    """How much context a window gives a token: the lesser side, and a little for the window's length (run_squad.py)."""
    return min(place - start, end - 1 - place) + 0.01 * (end - start)


def _token_span(places: list[tuple[int, int]], answer: tuple[str, int]) -> tuple[int, int] | None:
    """First and last token that an answer touches."""
    text, start = answer
    touched = [at for at, (begin, end) in enumerate(places) if begin < start + len(text) and end > start]
    return (touched[0], touched[-1]) if touched else None


class TableSpans(TableText, SpanSource):
    """Questions in a table with SQuAD's columns: id, question, context, answers {text, answer_start}."""

    splits: tuple[Split, ...] = ("train", "val", "test")

    def questions(self, split: Split) -> list[SpanRow]:
        """A split that the set lacks is carved from train by passages: what a window shows of one is not told twice."""
        if split != "train" and split in self.store.splits:
            return self._read(split)
        rows = self._read("train")
        for held_out, share in (("test", TEST_FRACTION), ("val", VAL_FRACTION)):
            if held_out in self.store.splits:
                continue
            passages = list(dict.fromkeys(row.context for row in rows))
            if len(passages) < 2:
                raise UserError(
                    f"{self.title}: has too few passages to hold some out: add passages, or a file of a {held_out} split"
                )
            held = {passages[at] for at in carve(len(passages), share)[1].tolist()}
            if split == held_out:
                return [row for row in rows if row.context in held]
            rows = [row for row in rows if row.context not in held]
        return rows

    def _read(self, split: Split) -> list[SpanRow]:
        table = self.table(split, "question", "context", "answers")
        return [self._row(split, at, row) for at, row in enumerate(table)]

    def _row(self, split: Split, at: int, row: Mapping[str, Any]) -> SpanRow:
        try:
            answers = tuple(zip(row["answers"]["text"], map(int, row["answers"]["answer_start"]), strict=True))
            return SpanRow(str(row.get("id", at)), row["question"].strip(), row["context"] + "", answers)
        except (AttributeError, KeyError, TypeError, ValueError):
            raise UserError(
                f"{self.title}: split '{split}', row {at}: question and context should be text, answers "
                "{text: [...], answer_start: [...]}, as many of one as of the other"
            ) from None


SPANS = {
    "squad": TextCard("Answers in paragraphs of Wikipedia. Rajpurkar et al., EMNLP 2016.", Hub("rajpurkar/squad", {"train": "train", "test": "validation"})),
    "squad2": TextCard("SQuAD with questions that have no answer. Rajpurkar et al., ACL 2018.", Hub("rajpurkar/squad_v2", {"train": "train", "test": "validation"})),
}  # fmt: skip


class PublishedSpans(PublishedText, TableSpans):
    """A published data set of questions about passages."""


register_published(PublishedSpans, SPANS)


@sources.register("passages")
class OwnSpans(TableSpans):
    """Your own questions about passages, in SQuAD's columns: a JSON or parquet file, or a folder of such files."""

    class Options(SpanSource.Options):
        path: Path
        """A JSON or parquet file, or a folder with one file per split."""

    @cached_property
    def store(self) -> TableStore:
        return FileStore(self.options.path)
