"""Token sequences: documents to pretrain on, in several layouts, and labeled sentences and pairs.

All texts are one flat tensor of ids, in memory or mapped from a file. An example is a pair of
ranges of it. Batches are built on the device of that tensor, as `[CLS] A [SEP]` or
`[CLS] A [SEP] B [SEP]` (Devlin et al., NAACL 2019).

Shape legend: B sequences in a batch, T tokens per sequence, N examples, S tokens of all texts,
V entries of the vocabulary.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
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
from sslrun.files import are_intact, checksum, replacing, write_sums

IGNORED = -100
"""Label of a token without a label; `cross_entropy` skips it."""
PAIRS_VERSION = 1
"""Raise it when the same corpus would give different pairs."""
SENTENCES_VERSION = 1
"""Raise it when the same corpus would give different sentences."""
BUFFERED = 1_000_000
"""Integers of pairs, 5 per pair, that are kept in memory before they are written."""
PART = 2**18
"""Examples or documents that are computed on at a time, to bound memory use."""
SHORT_SHARE = 0.1
"""Share of BERT's pretraining sequences that are shorter than possible."""


class Tokens(NamedTuple):
    """A batch of sequences."""

    ids: Tensor
    """(B, T) int64."""
    segments: Tensor
    """(B, T) int64: 0 up to the first [SEP], 1 in the second part."""
    documents: Tensor
    """(B, T) int64: number of the document within its sequence, from 1; 0 at padding."""
    packed: bool = True
    """Whether a sequence may hold several documents. Stored, to avoid a query of the device."""
    padded: bool = True
    """Whether there may be padding."""
    causal: bool = False
    """Whether tokens attend only to earlier ones, in backbones that offer "causal"."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Tokens:
        """Apply `change` to each tensor."""
        return self._replace(
            ids=change(self.ids),
            segments=change(self.segments),
            documents=change(self.documents),
        )

    def subset(self, rows: Tensor) -> Tokens:
        """Select sequences by index (M,) or by a mask (B,) bool."""
        return self.map(lambda tensor: tensor[rows])

    def keep_only(self, mask: Tensor) -> Tokens:
        """Turn every token outside `mask`, (B, T) bool or 0 and 1, into padding."""
        return self._replace(documents=self.documents * mask, padded=True)

    def to(self, device: torch.device) -> Tokens:
        return self.map(lambda tensor: to_device(tensor, device))

    def numel(self) -> int:
        """Return the number of tokens, padding included."""
        return self.ids.numel()

    @property
    def real(self) -> Tensor:
        """(B, T) bool: False at padding."""
        return self.documents > 0

    def attendable(self) -> Tensor | None:
        """Return the attention mask, bool, broadcastable to (B, 1, T, T).

        A token attends to the tokens of its document. In packed sequences padding attends to
        padding, so that no row is empty. None means that all attend to all, for which attention has
        faster kernels.
        """
        if self.packed:
            return (self.documents[:, :, None] == self.documents[:, None, :])[:, None]
        return self.real[:, None, None] if self.padded else None


# ---------------------------------------------------------------- pairs of ranges


@dataclass(frozen=True)
class Sequences(Examples):
    """Examples of one or two ranges of a flat tensor of ids."""

    tokens: Tensor
    """(S,) integers: all texts, concatenated."""
    ranges: Tensor
    """(N, 4) int64: start and end of A, start and end of B; B is empty in single texts."""
    labels: Tensor | None
    """(N, ...) int64 classes or other targets of a task, one row per example; None without."""
    classes: tuple[str, ...]
    spec: TextSpec
    tags: Tensor | None = None
    """(S,) labels of tokens, `IGNORED` for none; if set, the labels of a batch are these (B, T)."""
    extra: Any = None
    """What a task needs in addition for its scores; indexed by `rows`."""
    rows: Tensor | None = None
    """(N,) the index of each example in `extra`; None without."""

    def __post_init__(self) -> None:
        if self.rows is None and self.extra is not None:
            object.__setattr__(self, "rows", torch.arange(len(self.ranges)))

    def __len__(self) -> int:
        return len(self.ranges)

    @property
    def strata(self) -> Tensor | None:
        """(N,) groups that label fractions keep in balance: the classes, or one group without."""
        if self.labels is None and self.tags is None:
            return None
        labels = self.labels
        if labels is not None and labels.ndim == 1 and not labels.is_floating_point():
            return labels
        return torch.zeros(len(self), dtype=torch.int64)

    @cached_property
    def lengths(self) -> Tensor:
        """(N,) int32 number of tokens, special tokens included."""
        return torch.cat([_count_tokens(part).int() for part in self.ranges.split(PART)])

    def subset(self, indices: Tensor) -> Sequences:
        labels = self.labels if self.labels is None else self.labels[indices]
        rows = self.rows if self.rows is None else self.rows[indices]
        return replace(self, ranges=self.ranges[indices], labels=labels, rows=rows)

    def batches(self, indices: Iterable[Tensor], device: torch.device) -> Iterator[Batch]:
        for chosen in indices:
            tokens, labels = self._collate(self.ranges[chosen])
            if self.tags is None and self.labels is not None:
                labels = self.labels[chosen]
            yield Batch(tokens, labels).to(device)

    @property
    def nbytes(self) -> int:
        return self.tokens.nbytes + (0 if self.tags is None else self.tags.nbytes)

    def to(self, device: torch.device) -> Sequences:
        tags = None if self.tags is None else self.tags.to(device)
        return replace(self, tokens=self.tokens.to(device), tags=tags)

    def _collate(self, ranges: Tensor) -> tuple[Tokens, Tensor | None]:
        """Build the ids, and the tags (or None), of `ranges` (B, 4) on the device of the text.

        Example: A has the ids a b, B the id c. With T = 7:

            position  0      1  2  3      4  5      6
            ids       [CLS]  a  b  [SEP]  c  [SEP]  [PAD]
            segments  0      0  0  0      1  1      0
        """
        device = self.tokens.device
        lengths = _count_tokens(ranges)
        total = to_device(lengths, device)[:, None]
        position = torch.arange(int(lengths.max()), device=device)
        source, in_text, after_a = _lay_out(to_device(ranges, device), position)
        ids = self.tokens[source].long()
        ids = torch.where(in_text, ids, self._special_ids(position, total))
        segments = (after_a & (position < total)).long()
        documents = (position < total).long()
        tags = None
        if self.tags is not None:
            tags = torch.where(in_text, self.tags[source].long(), IGNORED)
        padded = bool(lengths.min() < lengths.max())
        return Tokens(ids, segments, documents, packed=False, padded=padded), tags

    def _special_ids(self, position: Tensor, total: Tensor) -> Tensor:
        """(B, T): [CLS] at position 0, [SEP] before `total`, the sequence's length, then [PAD]."""
        tokenizer = self.spec.tokenizer
        after_start = torch.where(position < total, tokenizer.sep, tokenizer.pad)
        return torch.where(position == 0, tokenizer.cls, after_start)


def _lay_out(ranges: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lay out `ranges` (B, 4) as [CLS] A [SEP] B [SEP] at each `position` (T,).

    Returns:
        The index (B, T) of the token to take from the text, 0 at special tokens; whether the
        position is in A or B, (B, T) bool; and whether it is after A and its [SEP], (B, T) bool.
    """
    a, a_end, b, b_end = (column[:, None] for column in ranges.unbind(1))
    a_length, b_length = a_end - a, b_end - b
    b_start = 2 + a_length
    after_a = position >= b_start
    in_a = (position >= 1) & (position <= a_length)
    in_b = after_a & (position < b_start + b_length)
    from_b = torch.where(in_b, b + position - b_start, 0)
    source = torch.where(in_a, a + position - 1, from_b)
    return source, in_a | in_b, after_a


def _count_tokens(ranges: Tensor) -> Tensor:
    """(N,) number of tokens of `ranges` (N, 4), special tokens included."""
    a, a_end, b, b_end = ranges.unbind(1)
    return 2 + a_end - a + torch.where(b_end > b, b_end - b + 1, 0)


def concatenate_texts(texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Concatenate the ids of texts: (S,) int32, and their offsets (N + 1,), the end included."""
    lengths = np.fromiter((len(text) for text in texts), np.int64, len(texts))
    offsets = np.concatenate([[0], lengths.cumsum()])
    ids = np.fromiter((number for text in texts for number in text), np.int32, int(offsets[-1]))
    return torch.from_numpy(ids), torch.from_numpy(offsets)


def trim_ranges(ranges: Tensor, length: int) -> Tensor:
    """Shorten ranges (N, 4) to fit `length` tokens, special tokens included.

    The longer of A and B loses its last token until both fit, as in BERT's fine-tuning code.
    """
    a, a_end, b, b_end = ranges.unbind(1)
    a_length, b_length = a_end - a, b_end - b
    room = torch.where(b_length > 0, length - 3, length - 2)
    # A keeps the larger of half of the room and what B leaves of it; on ties B is cut first.
    a_kept = torch.minimum(a_length, torch.maximum((room + 1) // 2, room - b_length))
    b_kept = torch.minimum(b_length, room - a_kept)
    return torch.stack([a, a + a_kept, b, b + b_kept], dim=1)


def build_labeled(
    first: Sequence[Sequence[int]],
    second: Sequence[Sequence[int]] | None,
    labels: Tensor | None,
    classes: tuple[str, ...],
    spec: TextSpec,
) -> Sequences:
    """Build examples of the ids of single texts, or of pairs, cut to the length of `spec`."""
    tokens, offsets = concatenate_texts([*first, *(second or ())])
    count = len(first)
    starts, ends = offsets[:-1], offsets[1:]
    if second is None:
        zeros = torch.zeros(count, dtype=torch.int64)
        ranges = torch.stack([starts, ends, zeros, zeros], dim=1)
    else:
        columns = [starts[:count], ends[:count], starts[count:], ends[count:]]
        ranges = torch.stack(columns, dim=1)
    return Sequences(tokens, trim_ranges(ranges, spec.length), labels, classes, spec)


# ---------------------------------------------------------------- documents


@dataclass(frozen=True)
class Documents(Examples):
    """Documents of sentences to pretrain on. As an example, a document is cut to its beginning."""

    tokens: Tensor
    """(S,) int32, possibly mapped from a file."""
    sentences: Tensor
    """(M + 1,) start of each sentence in `tokens`, and the end of the last."""
    documents: Tensor
    """(D + 1,) start of each document in `sentences`, and the end of the last."""
    spec: TextSpec
    chosen: Tensor = None  # type: ignore[assignment]
    """(N,) indices of the documents to use; default: all."""
    folder: Path | None = None
    """Where pairs and sentences are kept for later runs; None: they are built in memory."""
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
        yield from self.truncate().batches(indices, device)

    def truncate(self) -> Sequences:
        """Return the beginning of each document, cut to the length of a sequence."""
        start, end = self._spans(self.chosen)
        zeros = torch.zeros_like(start)
        ranges = torch.stack([start, end, zeros, zeros], dim=1)
        return Sequences(self.tokens, trim_ranges(ranges, self.spec.length), None, (), self.spec)

    def split(self) -> Sequences:
        """Return each sentence that is not empty, cut to the length of a sequence."""
        key = ("sentences", SENTENCES_VERSION, self.spec.length)
        ranges = torch.from_numpy(self._keep_table("sentences", key, 4, self._generate_sentences))
        return Sequences(self.tokens, ranges, None, (), self.spec)

    def _generate_sentences(self) -> Iterator[np.ndarray]:
        """Yield the ranges (n, 4) of the sentences of `PART` documents at a time.

        Example: two documents have the sentences [3, 5) and [8, 9). `counts` is 2 1, `shifts` is
        3 6, how much further a sentence is than the number of those before it, and `places` is
        3 4 8.
        """
        for chosen in self.chosen.split(PART):
            first, last = self.documents[chosen], self.documents[chosen + 1]
            counts = last - first
            shifts = first - (counts.cumsum(0) - counts)
            places = torch.arange(int(counts.sum())) + shifts.repeat_interleave(counts)
            start, end = self.sentences[places], self.sentences[places + 1]
            zeros = torch.zeros_like(start)
            ranges = torch.stack([start, end, zeros, zeros], dim=1)[end > start]
            yield trim_ranges(ranges, self.spec.length).numpy()

    def _spans(self, documents: Tensor) -> tuple[Tensor, Tensor]:
        """Start and end in `tokens`, (N,) each, of documents (N,)."""
        first, last = self.documents[documents], self.documents[documents + 1]
        return self.sentences[first], self.sentences[last]

    def count_tokens(self) -> int:
        """Return the number of tokens of all chosen documents."""
        start, end = self._spans(self.chosen)
        return int((end - start).sum())

    def count_unigrams(self) -> Tensor:
        """(V,) how often each entry of the vocabulary occurs."""
        counts = torch.zeros(self.spec.vocab, dtype=torch.int64)
        for part in self.chosen.split(16):  # few: each may have a million tokens
            starts, ends = (bound.tolist() for bound in self._spans(part))
            text = torch.cat(
                [self.tokens[start:end] for start, end in zip(starts, ends, strict=True)]
            )
            counts += text.bincount(minlength=self.spec.vocab)
        return counts

    def build_pairs(self, dupes: int, seed: int, random: float = 0.5) -> Sequences:
        """Build BERT's pairs of segments, labeled 0 if B continues A and 1 if B is random.

        As in create_pretraining_data.py (Devlin et al., NAACL 2019):

        - Sentences of a document are gathered up to a target length. For a tenth of the pairs it is
          a shorter, random one.
        - They are divided at a random place. For a share `random` of the pairs, and whenever there
          is only one sentence, B comes from a random place of another document, and the sentences
          left after A are used for the next pair. With `random` 0 this never happens, and a single
          sentence stays alone.
        - Pairs that are too long lose tokens at a random end of the longer part.

        Deviation: the target is drawn for each pair instead of once per document, so that a long
        document has pairs of both kinds.

        Args:
            dupes: Number of passes over all documents, each with new divisions.
            seed: Seed of all draws.
            random: Share of pairs with a random B.

        Raises:
            UserError: There is a single document, but B should come from another.
        """
        if random and len(self) < 2:
            raise UserError(
                "pairs of segments draw the second from another document, and there is only one "
                "(of the corpus, or of the tenth of its documents that is held out): separate "
                "documents (by a blank line in .txt files), or set pretext.nsp to false and "
                "pretext.pairs to next or drop"
            )
        key = (PAIRS_VERSION, self.spec.length, dupes, seed, random)
        pairs = self._keep_table("pairs", key, 5, lambda: self._generate_pairs(dupes, seed, random))
        table = torch.from_numpy(pairs)
        classes = ("next", "random")
        return Sequences(self.tokens, table[:, :4], table[:, 4], classes, self.spec)

    def _keep_table(
        self, name: str, key: tuple[Any, ...], columns: int, generate: Callable[[], Any]
    ) -> np.ndarray:
        """Return what `generate` yields, parts of a table (N, columns) int64, as one array.

        With a folder it is mapped from a file, so that memory need not hold the table of a large
        corpus and a resumed run need not build it again. `key` and the chosen documents determine
        the content.
        """
        if self.folder is None:
            return np.concatenate(list(generate()))
        digest = hashlib.sha256(np.ascontiguousarray(self.chosen.numpy()).data)
        digest.update(repr(key).encode())
        file = self.folder / f"{name}-{digest.hexdigest()[:16]}"
        sums = file.with_suffix(".sums")
        if not are_intact(sums, [file.name]):
            with locked(file):
                if not are_intact(sums, [file.name]):
                    with replacing(file) as temporary, open(temporary, "wb") as parts:
                        for part in generate():
                            parts.write(part.tobytes())  # `tofile` does not report a full disk
                    write_sums(sums, {file.name: checksum(file)})
        return np.memmap(file, np.int64, "c").reshape(-1, columns)

    def _generate_pairs(self, dupes: int, seed: int, random: float) -> Iterator[np.ndarray]:
        """Yield ranges and labels, (n, 5) at a time.

        Raises:
            UserError: There are no pairs.
        """
        builder = _PairBuilder(
            self.chosen.numpy(),
            self.sentences.numpy(),
            self.documents.numpy(),
            self.spec.length - 3,
            random,
            np.random.default_rng([seed, 0x6273]),
        )
        buffer, is_empty = array("q"), True  # an array takes a tenth of the memory of tuples
        for _ in range(dupes):
            for document in builder.order:
                for pair in builder.draw_pairs(document):
                    buffer.extend(pair)
                if len(buffer) >= BUFFERED:
                    yield np.frombuffer(buffer, np.int64).reshape(-1, 5)
                    buffer, is_empty = array("q"), False
        if buffer:
            yield np.frombuffer(buffer, np.int64).reshape(-1, 5)
        elif is_empty:
            raise UserError(
                "the corpus holds no sentences; write one per line, and a blank line between "
                "documents"
            )

    def pack(self, dupes: int = 1) -> Packed:
        """Cut the concatenation of all documents into full sequences.

        Each of the `dupes` passes cuts at other places.
        """
        return Packed.cut(self, dupes)


@dataclass
class _PairBuilder:
    """Draws pairs of segments; see `Documents.build_pairs`.

    `sentences` and `documents` are those of `Documents`.
    """

    order: np.ndarray
    """The documents that B is drawn from."""
    sentences: np.ndarray
    documents: np.ndarray
    room: int
    """Tokens of both segments, at most."""
    random_share: float
    draw: np.random.Generator

    def draw_pairs(self, document: int) -> Iterator[tuple[int, int, int, int, int]]:
        """Draw the pairs of a document: the ranges of A and B, and 1 if B is random, else 0.

        Sentences [start, end) of the document are gathered, A is [start, cut), and B is [cut, end)
        or random. If B is random, the next pair starts at `cut`.
        """
        first, final = self.documents[document : document + 2].tolist()
        bounds = self.sentences[first : final + 1].tolist()  # ints are faster than numpy's numbers
        start = end = 0
        target = self._draw_target()
        while end < final - first:
            end += 1
            if end < final - first and bounds[end] - bounds[start] < target:
                continue
            cut = end
            if end - start > 1:
                cut = start + 1 + int(self.draw.integers(end - start - 1))
            a = (bounds[start], bounds[cut])
            is_random = self.random_share > 0 and (
                cut == end or self.draw.random() < self.random_share
            )
            if is_random:
                b = self._draw_second(document, max(1, target - (a[1] - a[0])))
                end = cut
            else:
                b = (bounds[cut], bounds[end])
            if a[1] > a[0] and (b[1] > b[0] or not self.random_share):
                yield (*self._shorten(a, b), int(is_random))
            start, target = end, self._draw_target()

    def _draw_second(self, document: int, wanted: int) -> tuple[int, int]:
        """Draw whole sentences of `wanted` tokens or fewer, at least one, of another document."""
        other = document
        for _ in range(10):
            other = int(self.order[self.draw.integers(len(self.order))])
            if other != document:
                break
        first, last = int(self.documents[other]), int(self.documents[other + 1])
        first += int(self.draw.integers(last - first))
        goal = self.sentences[first] + wanted
        end = min(last, first + int(self.sentences[first:last].searchsorted(goal)))
        return int(self.sentences[first]), int(self.sentences[max(end, first + 1)])

    def _draw_target(self) -> int:
        """Draw the number of tokens to gather."""
        if self.draw.random() < SHORT_SHARE:
            return int(self.draw.integers(2, self.room + 1))
        return self.room

    def _shorten(self, a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int, int, int]:
        """Remove tokens at a random end of the longer range until both fit `room`."""
        (a_start, a_end), (b_start, b_end) = a, b
        excess = max(0, a_end - a_start + b_end - b_start - self.room)
        for at_front in (self.draw.random(excess) < 0.5).tolist():
            if a_end - a_start > b_end - b_start:
                a_start, a_end = (a_start + 1, a_end) if at_front else (a_start, a_end - 1)
            else:
                b_start, b_end = (b_start + 1, b_end) if at_front else (b_start, b_end - 1)
        return a_start, a_end, b_start, b_end


@dataclass(frozen=True)
class Packed(Examples):
    """Full sequences of running text: `[CLS] ... [SEP] ... [SEP]`, a [SEP] after each document."""

    corpus: Documents
    starts: Tensor
    """(D + 1,) start of each chosen document in the running text, which has [SEP]s, and its end."""
    begins: Tensor
    """(D,) start of each chosen document in the tokens of the corpus."""
    passes: Tensor
    """(P + 1,) number of the first sequence of each pass over the text, and of all sequences."""
    chosen: Tensor | None = None
    """(N,) numbers of the sequences to use; None: all."""
    labels = None
    classes: tuple[str, ...] = ()

    @property
    def spec(self) -> TextSpec:  # type: ignore[override]
        return self.corpus.spec

    @classmethod
    def cut(cls, corpus: Documents, dupes: int) -> Packed:
        """Cut `corpus` into sequences `dupes` times, each time at different places.

        Raises:
            UserError: The corpus is shorter than one sequence.
        """
        begins, ends = corpus._spans(corpus.chosen)
        lengths = ends - begins + 1
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        width, total = corpus.spec.length - 1, int(starts[-1])
        counts = [max(0, (total - width * dupe // dupes) // width) for dupe in range(dupes)]
        passes = torch.tensor([0, *counts]).cumsum(0)
        if not any(counts):
            raise UserError(
                f"the corpus holds {total} tokens, less than one sequence of {corpus.spec.length}; "
                "add text, or lower data.length"
            )
        return cls(corpus, starts, begins, passes)

    def __len__(self) -> int:
        return int(self.passes[-1]) if self.chosen is None else len(self.chosen)

    def subset(self, indices: Tensor) -> Packed:
        chosen = indices if self.chosen is None else self.chosen[indices]
        return replace(self, chosen=chosen)

    def locate(self, indices: Tensor) -> Tensor:
        """Return the start (B,) int64 of sequences in the running text.

        They are computed when they are needed, because an epoch of a large corpus has millions.
        """
        numbers = (indices if self.chosen is None else self.chosen[indices]).long()
        number_of_pass = torch.searchsorted(self.passes, numbers, right=True) - 1
        width, dupes = self.spec.length - 1, len(self.passes) - 1
        shifts = width * number_of_pass // dupes
        return shifts + width * (numbers - self.passes[number_of_pass])

    @property
    def nbytes(self) -> int:
        return self.corpus.tokens.nbytes + self.starts.nbytes + self.begins.nbytes

    def to(self, device: torch.device) -> Packed:
        corpus = replace(self.corpus, tokens=self.corpus.tokens.to(device))
        starts, begins = self.starts.to(device), self.begins.to(device)
        return replace(self, corpus=corpus, starts=starts, begins=begins)

    def batches(self, indices: Iterable[Tensor], device: torch.device) -> Iterator[Batch]:
        for chosen in indices:
            yield Batch(self._collate(self.locate(chosen)), None).to(device)

    def _collate(self, places: Tensor) -> Tokens:
        """Build the sequences that start at `places` (B,) on the device of the text.

        Example: documents a b and c d e make the running text a b [SEP] c d e [SEP], with `starts`
        [0, 3, 7]. The sequence of length 5 at place 1 is [CLS] b [SEP] c d, of the documents
        1 1 1 2 2.
        """
        text, tokenizer = self.corpus.tokens, self.spec.tokenizer
        steps = torch.arange(self.spec.length - 1, device=text.device)
        position = to_device(places, text.device)[:, None] + steps
        document = torch.searchsorted(self.starts, position, right=True) - 1
        begins = self.begins[document]
        is_separator = position + 1 == self.starts[document + 1]
        source = torch.where(is_separator, begins, begins + position - self.starts[document])
        ids = torch.where(is_separator, tokenizer.sep, text[source].long())
        ids = F.pad(ids, (1, 0), value=tokenizer.cls)
        number = document - document[:, :1] + 1
        number = torch.cat([number[:, :1], number], dim=1)
        return Tokens(ids, torch.zeros_like(ids), number, padded=False)
