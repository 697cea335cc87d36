"""Token sequences: documents to pretrain on, laid out in several ways, and labelled sentences, pairs and passages.

Text is one flat tensor of ids, in memory or mapped from a file; an example is a pair of ranges of it. Ids become
`[CLS] A [SEP]` or `[CLS] A [SEP] B [SEP]` (Devlin et al. 2019) a batch at a time, where the tensor lies.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sslrun.data.cache import locked
from sslrun.data.examples import Batch, Examples, to_device
from sslrun.data.specs import TextSpec
from sslrun.errors import UserError
from sslrun.files import replacing

IGNORED = -100
"""The label of a token that has none; `cross_entropy` skips it."""
PAIRS_VERSION = 1
"""Raised when the same corpus makes other pairs."""
AT_ONCE = 1_000_000
"""Numbers of pairs that memory holds while they are made."""
SHORT = 0.1
"""Share of BERT's pretraining sequences that are shorter than could be."""


class Tokens(NamedTuple):
    """A batch of sequences."""

    ids: Tensor
    """(B, T) int64."""
    segments: Tensor
    """(B, T) int64: 0 up to the first [SEP], 1 in the second part."""
    documents: Tensor
    """(B, T) int64: which of the sequence's documents a token belongs to, from 1; 0: padding."""
    packed: bool = True
    """Whether a sequence may hold several documents. Known to who makes the batch, that nobody has to ask the device."""
    padded: bool = True
    """Whether there may be padding."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Tokens:
        """The same with each tensor changed."""
        return self._replace(ids=change(self.ids), segments=change(self.segments), documents=change(self.documents))

    def subset(self, rows: Tensor) -> Tokens:
        """Some of the sequences: (M,) which, or (B,) bool whether."""
        return self.map(lambda each: each[rows])

    def kept(self, near: Tensor) -> Tokens:
        """The same with what is not `near`, (B, T) bool or 0 and 1, as if it were padding."""
        return self._replace(documents=self.documents * near, padded=True)

    def to(self, device: torch.device) -> Tokens:
        return self.map(lambda each: to_device(each, device))

    def numel(self) -> int:
        """How many tokens there are, padding included."""
        return self.ids.numel()

    @property
    def real(self) -> Tensor:
        """(B, T) bool: what is no padding."""
        return self.documents > 0

    def attendable(self) -> Tensor | None:
        """Bool, broadcastable to (B, 1, T, T): each token to those of its document (of packed ones padding to padding, that
        no row be empty). None: all to all, for which attention has faster kernels."""
        if self.packed:
            return (self.documents[:, :, None] == self.documents[:, None, :])[:, None]
        return self.real[:, None, None] if self.padded else None


# ---------------------------------------------------------------- pairs of ranges


@dataclass(frozen=True)
class Sequences(Examples):
    """Examples of one or two ranges of a flat tensor of ids."""

    tokens: Tensor
    """(S,) integers, all texts one after the other."""
    ranges: Tensor
    """(N, 4) int64: where A starts and ends, where B starts and ends (an empty B: none)."""
    labels: Tensor | None
    """(N,) int64, or whatever a task compares with, one row an example; None where there are none."""
    classes: tuple[str, ...]
    spec: TextSpec
    tags: Tensor | None = None
    """(S,) labels of the tokens, `IGNORED` for none; batches then carry these as labels (B, T)."""
    extra: Any = None
    """What a task needs besides to score them; rows as `rows` says."""
    rows: Tensor | None = None
    """(N,) the place of each example among those that `extra` describes."""

    def __post_init__(self) -> None:
        if self.rows is None:
            object.__setattr__(self, "rows", torch.arange(len(self.ranges)))

    def __len__(self) -> int:
        return len(self.ranges)

    @property
    def strata(self) -> Tensor | None:
        """(N,) what label fractions keep in balance: the class, where an example has one."""
        if self.labels is None and self.tags is None:
            return None
        if self.labels is not None and self.labels.ndim == 1 and not self.labels.is_floating_point():
            return self.labels
        return torch.zeros(len(self), dtype=torch.int64)

    @property
    def lengths(self) -> Tensor:
        """(N,) tokens with the special ones."""
        return _lengths(self.ranges)

    def subset(self, indices: Tensor) -> Sequences:
        assert self.rows is not None
        labels = self.labels if self.labels is None else self.labels[indices]
        return replace(self, ranges=self.ranges[indices], labels=labels, rows=self.rows[indices])

    def batches(self, indices: Iterable[Tensor], device: torch.device) -> Iterator[Batch]:
        for chosen in indices:
            tokens, tags = self._collated(self.ranges[chosen])
            labels = tags if self.tags is not None else None if self.labels is None else self.labels[chosen]
            yield Batch(tokens, labels).to(device)

    @property
    def nbytes(self) -> int:
        return self.tokens.nbytes + (0 if self.tags is None else self.tags.nbytes)

    def to(self, device: torch.device) -> Sequences:
        return replace(self, tokens=self.tokens.to(device), tags=None if self.tags is None else self.tags.to(device))

    def _collated(self, ranges: Tensor) -> tuple[Tokens, Tensor | None]:
        """Ids, and tags where there are any, of `ranges` (B, 4): made where the text lies."""
        lengths = _lengths(ranges)
        longest, padded = int(lengths.max()), bool(lengths.min() < lengths.max())
        a, a_end, b, b_end = (column[:, None] for column in to_device(ranges, self.tokens.device).unbind(1))
        first, second, total = a_end - a, b_end - b, to_device(lengths, self.tokens.device)[:, None]
        place = torch.arange(longest, device=self.tokens.device)
        in_a = (place >= 1) & (place < 1 + first)
        in_b = (place >= 2 + first) & (place < 2 + first + second)
        text = in_a | in_b
        source = torch.where(in_a, a + place - 1, torch.where(in_b, b + place - 2 - first, 0))
        tokenizer = self.spec.tokenizer
        special = torch.where(place == 0, tokenizer.cls, torch.where(place < total, tokenizer.sep, tokenizer.pad))
        ids = torch.where(text, self.tokens[source].long(), special)
        segments = ((place >= 2 + first) & (place < total)).long()
        tags = None if self.tags is None else torch.where(text, self.tags[source].long(), IGNORED)
        return Tokens(ids, segments, (place < total).long(), packed=False, padded=padded), tags


def _lengths(ranges: Tensor) -> Tensor:
    """(N,) tokens of `ranges` (N, 4), with the special ones."""
    a, a_end, b, b_end = ranges.unbind(1)
    return 2 + a_end - a + torch.where(b_end > b, b_end - b + 1, 0)


def flat(texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """All ids (S,) int32 one after the other, and where each text starts, with the end of the last (N + 1,)."""
    lengths = np.fromiter((len(each) for each in texts), np.int64, len(texts))
    offsets = np.concatenate([[0], lengths.cumsum()])
    ids = np.fromiter((number for each in texts for number in each), np.int32, int(offsets[-1]))
    return torch.from_numpy(ids), torch.from_numpy(offsets)


def trimmed(ranges: Tensor, length: int) -> Tensor:
    """Ranges (N, 4) shortened to fit `length` with their specials: the longer of the two loses its end, token by token,
    as BERT's fine-tuning code does it."""
    a, a_end, b, b_end = ranges.unbind(1)
    first, second = a_end - a, b_end - b
    room = torch.where(second > 0, length - 3, length - 2)
    # A keeps half of the room or what B leaves of it, whichever is more; of equals A is cut last.
    kept_first = torch.minimum(first, torch.maximum((room + 1) // 2, room - second))
    kept_second = torch.minimum(second, room - kept_first)
    return torch.stack([a, a + kept_first, b, b + kept_second], dim=1)


def labelled(
    first: Sequence[Sequence[int]],
    second: Sequence[Sequence[int]] | None,
    labels: Tensor | None,
    classes: tuple[str, ...],
    spec: TextSpec,
) -> Sequences:
    """Single texts, or pairs of them, as ids; longer ones are cut to the spec's length."""
    tokens, offsets = flat([*first, *(second or ())])
    count = len(first)
    starts, ends = offsets[:-1], offsets[1:]
    if second is None:
        none = torch.zeros(count, dtype=torch.int64)
        ranges = torch.stack([starts, ends, none, none], dim=1)
    else:
        ranges = torch.stack([starts[:count], ends[:count], starts[count:], ends[count:]], dim=1)
    return Sequences(tokens, trimmed(ranges, spec.length), labels, classes, spec)


# ---------------------------------------------------------------- documents


@dataclass(frozen=True)
class Documents(Examples):
    """Text to pretrain on: documents of sentences. As examples they are each document's beginning."""

    tokens: Tensor
    """(S,) int32, perhaps mapped from a file."""
    sentences: Tensor
    """(M + 1,) where each sentence starts in `tokens`, and the end."""
    documents: Tensor
    """(D + 1,) where each document starts in `sentences`, and the end."""
    spec: TextSpec
    chosen: Tensor = None  # type: ignore[assignment]
    """(N,) which documents; by default all."""
    folder: Path | None = None
    """Where layouts that take long are kept for the next time."""
    labels = None
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.chosen is None:
            object.__setattr__(self, "chosen", torch.arange(len(self.documents) - 1))

    def __len__(self) -> int:
        return len(self.chosen)

    def subset(self, indices: Tensor) -> Documents:
        return replace(self, chosen=self.chosen[indices])

    def batches(self, indices: Iterable[Tensor], device: torch.device) -> Iterator[Batch]:
        yield from self.beginnings().batches(indices, device)

    def beginnings(self) -> Sequences:
        """As much of each document as fits a sequence."""
        start, end = (self.sentences[self.documents[self.chosen + more]] for more in (0, 1))
        none = torch.zeros_like(start)
        ranges = torch.stack([start, end, none, none], dim=1)
        return Sequences(self.tokens, trimmed(ranges, self.spec.length), None, (), self.spec)

    def words(self) -> int:
        """Tokens in all."""
        first, last = self.documents[self.chosen], self.documents[self.chosen + 1]
        return int((self.sentences[last] - self.sentences[first]).sum())

    def unigrams(self) -> Tensor:
        """(V,) how often each entry of the vocabulary occurs."""
        counts = torch.zeros(self.spec.vocab, dtype=torch.int64)
        for some in self.chosen.split(16):  # of which a text file's may have a million tokens each
            starts, ends = (self.sentences[self.documents[some + more]].tolist() for more in (0, 1))
            text = torch.cat([self.tokens[start:end] for start, end in zip(starts, ends, strict=True)])
            counts += text.bincount(minlength=self.spec.vocab)
        return counts

    def paired(self, dupes: int, seed: int, random: float = 0.5) -> Sequences:
        """BERT's pairs of segments, labelled 0 where B goes on from A and 1 where B is from another document.

        As create_pretraining_data.py of its authors: sentences of a document are gathered up to the length aimed at
        (in a tenth of the cases a random shorter one, drawn for each pair, there for each document) and divided at
        random; half of the time (a share `random`), and whenever there is nothing to divide, B is drawn from a random
        place of another document, and what A left over is used next; with `random` 0 never, and what can't be divided
        stays alone. Pairs that are too long lose tokens at a random end of the longer part. `dupes`: times all documents
        are gone through, divided anew. UserError: a single document, where no other can be drawn from.
        """
        if random and len(self) < 2:
            raise UserError(
                "pairs of segments draw the second from another document, and there is only one (of the corpus, or of the "
                "tenth of its documents that is held out): separate documents (by a blank line in .txt files), or set "
                "pretext.nsp to false and pretext.pairs to next or drop"
            )
        table = torch.from_numpy(self._kept_pairs(dupes, seed, random))
        return Sequences(self.tokens, table[:, :4], table[:, 4], ("next", "random"), self.spec)

    def _kept_pairs(self, dupes: int, seed: int, random: float) -> np.ndarray:
        """(N, 5) places and labels of the pairs; mapped from a file where there is a folder, that memory needn't hold
        those of a large corpus, and a run which goes on needn't divide it again."""
        if self.folder is None:
            return np.concatenate(list(self._pairs(dupes, seed, random)))
        key = hashlib.sha256(self.chosen.numpy().tobytes())
        key.update(repr((PAIRS_VERSION, self.spec.length, dupes, seed, random)).encode())
        file = self.folder / f"pairs-{key.hexdigest()[:16]}"
        if not file.exists():
            with locked(file):
                if not file.exists():
                    with replacing(file) as temporary, open(temporary, "wb") as parts:
                        for part in self._pairs(dupes, seed, random):
                            parts.write(part.tobytes())  # `tofile` does not say that a disk is full
        return np.memmap(file, np.int64, "c").reshape(-1, 5)

    def _pairs(self, dupes: int, seed: int, random: float) -> Iterator[np.ndarray]:
        """(N, 5) at a time. UserError: there are none."""
        draw = np.random.default_rng([seed, 0x6273])
        sentences, documents = self.sentences.numpy(), self.documents.numpy()
        found, order, count = array("q"), self.chosen.numpy(), 0  # a tenth of what tuples of numbers take
        for _ in range(dupes):
            for document in order:
                for pair in _pairs_of(document, order, sentences, documents, self.spec.length - 3, random, draw):
                    found.extend(pair)
                if len(found) >= AT_ONCE:
                    yield np.frombuffer(found, np.int64).reshape(-1, 5)
                    count, found = count + len(found), array("q")
        if found:
            yield np.frombuffer(found, np.int64).reshape(-1, 5)
        elif not count:
            raise UserError("the corpus holds no sentences: one a line, a blank line between documents")

    def packed(self, dupes: int = 1) -> Packed:
        """All documents one after the other, in sequences that are full. Each of `dupes` cuts them elsewhere."""
        return Packed.of(self, dupes)


def _pairs_of(
    document: int,
    order: np.ndarray,
    sentences: np.ndarray,
    documents: np.ndarray,
    room: int,
    share: float,
    draw: np.random.Generator,
) -> Iterator[tuple[int, int, int, int, int]]:
    """One document's pairs: four places in the tokens and whether B is random, as a `share` of them is."""
    at, end = int(documents[document]), int(documents[document + 1])
    start, target = at, _aimed(room, draw)
    while at < end:
        at += 1
        if at < end and sentences[at] - sentences[start] < target:
            continue
        cut = at if at - start == 1 else start + 1 + int(draw.integers(at - start - 1))
        first = (int(sentences[start]), int(sentences[cut]))
        random = share > 0 and (cut == at or draw.random() < share)
        if random:
            other = document
            for _ in range(10):
                other = int(order[draw.integers(len(order))])
                if other != document:
                    break
            begin, stop = int(documents[other]), int(documents[other + 1])
            begin += int(draw.integers(stop - begin))
            wanted = sentences[begin] + max(1, target - (first[1] - first[0]))
            upto = min(stop, int(np.searchsorted(sentences, wanted)))
            second = (int(sentences[begin]), int(sentences[max(upto, begin + 1)]))
            at = cut  # what A left over is put back
        else:
            second = (int(sentences[cut]), int(sentences[at]))
        if first[1] > first[0] and (second[1] > second[0] or not share):
            yield (*_shortened(first, second, room, draw), int(random))
        start, target = at, _aimed(room, draw)


def _aimed(room: int, draw: np.random.Generator) -> int:
    """The length aimed at."""
    return int(draw.integers(2, room + 1)) if draw.random() < SHORT else room


def _shortened(
    first: tuple[int, int], second: tuple[int, int], room: int, draw: np.random.Generator
) -> tuple[int, int, int, int]:
    """Both parts without what does not fit: the longer loses a token, at its front or its back, until they fit."""
    (a, a_end), (b, b_end) = first, second
    while a_end - a + b_end - b > room:
        front = draw.random() < 0.5
        if a_end - a > b_end - b:
            a, a_end = (a + 1, a_end) if front else (a, a_end - 1)
        else:
            b, b_end = (b + 1, b_end) if front else (b, b_end - 1)
    return a, a_end, b, b_end


@dataclass(frozen=True)
class Packed(Examples):
    """Full sequences of running text: `[CLS] ... [SEP] ... [SEP]`, a [SEP] after each document."""

    corpus: Documents
    starts: Tensor
    """(D + 1,) where each chosen document starts in the running text of the documents with their [SEP]s."""
    places: Tensor
    """(N,) where each sequence starts in the running text."""
    begins: Tensor
    """(D,) where each chosen document starts in the corpus's tokens."""
    labels = None
    classes: tuple[str, ...] = ()

    @property
    def spec(self) -> TextSpec:  # type: ignore[override]
        return self.corpus.spec

    @classmethod
    def of(cls, corpus: Documents, dupes: int) -> Packed:
        chosen = corpus.chosen
        begins = corpus.sentences[corpus.documents[chosen]]
        lengths = corpus.sentences[corpus.documents[chosen + 1]] - begins + 1
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        width, total = corpus.spec.length - 1, int(starts[-1])
        shifts = [width * dupe // dupes for dupe in range(dupes)]
        places = torch.cat([torch.arange(shift, max(shift, total - width + 1), width) for shift in shifts])
        if len(places) == 0:
            raise UserError(f"the corpus holds {total} tokens, less than one sequence of {corpus.spec.length}")
        return cls(corpus, starts, places, begins)

    def __len__(self) -> int:
        return len(self.places)

    def subset(self, indices: Tensor) -> Packed:
        return replace(self, places=self.places[indices])

    @property
    def nbytes(self) -> int:
        return self.corpus.tokens.nbytes + self.starts.nbytes + self.begins.nbytes

    def to(self, device: torch.device) -> Packed:
        corpus = replace(self.corpus, tokens=self.corpus.tokens.to(device))
        return replace(self, corpus=corpus, starts=self.starts.to(device), begins=self.begins.to(device))

    def batches(self, indices: Iterable[Tensor], device: torch.device) -> Iterator[Batch]:
        for chosen in indices:
            yield Batch(self._collated(self.places[chosen]), None).to(device)

    def _collated(self, places: Tensor) -> Tokens:
        """The sequences that start at `places` (B,), made where the text lies."""
        text, tokenizer = self.corpus.tokens, self.spec.tokenizer
        place = to_device(places, text.device)[:, None] + torch.arange(self.spec.length - 1, device=text.device)
        document = torch.searchsorted(self.starts, place, right=True) - 1
        begins = self.begins[document]
        separator = place + 1 == self.starts[document + 1]
        source = torch.where(separator, begins, begins + place - self.starts[document])
        ids = F.pad(torch.where(separator, tokenizer.sep, text[source].long()), (1, 0), value=tokenizer.cls)
        number = document - document[:, :1] + 1
        number = torch.cat([number[:, :1], number], dim=1)
        return Tokens(ids, torch.zeros_like(ids), number, padded=False)
