"""Text layouts: BERT's segment pairs, packed documents, truncated pairs, and batches."""

import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sslrun import files
from sslrun.data.specs import TextSpec
from sslrun.data.text import sequences
from sslrun.data.text.sequences import (
    IGNORED,
    Documents,
    Sequences,
    build_labeled,
    concatenate_texts,
    trim_ranges,
)
from sslrun.data.text.tokenizer import blank_tokenizer
from sslrun.errors import UserError

VOCAB = 2000
TOKENIZER = blank_tokenizer(VOCAB)
CPU = torch.device("cpu")


def corpus(documents, length=32):
    """Return documents with sentences of these lengths; every token is a new number from 10 on."""
    lengths = torch.tensor([size for document in documents for size in document])
    sentences = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    starts = torch.cat(
        [
            torch.zeros(1, dtype=torch.int64),
            torch.tensor([len(document) for document in documents]).cumsum(0),
        ]
    )
    tokens = torch.arange(10, 10 + int(sentences[-1]), dtype=torch.int32)
    return Documents(tokens, sentences, starts, TextSpec(TOKENIZER, length))


def document_of(documents, place):
    """Return the document of each position in the tokens."""
    ends = documents.sentences[documents.documents[1:]]
    return torch.searchsorted(ends, place.contiguous(), right=True)


def batch(examples):
    (only,) = examples.batches([torch.arange(len(examples))], CPU)
    return only


# ---------------------------------------------------------------- batches


def test_texts_become_sequences_as_in_bert():
    spec = TextSpec(TOKENIZER, 16)
    pairs = build_labeled(
        [[10, 11], [12], []], [[13], [14, 15, 16], []], torch.tensor([1, 0, 1]), ("a", "b"), spec
    )
    tokens, labels = batch(pairs)
    c, s, p = TOKENIZER.cls, TOKENIZER.sep, TOKENIZER.pad
    assert tokens.ids.tolist() == [
        [c, 10, 11, s, 13, s, p],
        [c, 12, s, 14, 15, 16, s],
        [c, s, p, p, p, p, p],
    ]
    assert tokens.segments.tolist() == [[0, 0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1, 1], [0] * 7]
    assert tokens.real.tolist() == [[True] * 6 + [False], [True] * 7, [True] * 2 + [False] * 5]
    assert labels.tolist() == [1, 0, 1]
    (second,) = pairs.subset(torch.tensor([2, 1])).batches([torch.tensor([1])], CPU)
    assert second.inputs.ids.tolist() == [[c, 12, s, 14, 15, 16, s]]
    single = build_labeled([[10, 11]], None, None, (), spec)
    assert batch(single).inputs.ids.tolist() == [[c, 10, 11, s]]
    assert batch(single).labels is None


def test_tags_stay_with_their_tokens():
    tokens, offsets = concatenate_texts([[10, 11], [12]])
    none = torch.zeros(2, dtype=torch.int64)
    ranges = torch.stack([offsets[:-1], offsets[1:], none, none], dim=1)
    sequences_ = Sequences(
        tokens, ranges, None, ("x", "y"), TextSpec(TOKENIZER, 16), torch.tensor([1, IGNORED, 0])
    )
    assert batch(sequences_).labels.tolist() == [
        [IGNORED, 1, IGNORED, IGNORED],
        [IGNORED, 0, IGNORED, IGNORED],
    ]


def one_by_one(first, second, length):
    """Return BERT's fine-tuning `_truncate_seq_pair`, token by token."""
    while first + second > length - (3 if second else 2):
        if first > second:
            first -= 1
        else:
            second -= 1
    return first, second


def test_pairs_are_truncated_as_in_bert():
    cases = [(a, b) for a in (1, 5, 6, 7, 14, 30, 31) for b in (0, 1, 6, 7, 15, 31)]
    for length in (13, 14, 32):
        ranges = torch.tensor([(100, 100 + a, 500, 500 + b) for a, b in cases])
        trimmed = trim_ranges(ranges, length)
        kept = list(
            zip(
                (trimmed[:, 1] - trimmed[:, 0]).tolist(),
                (trimmed[:, 3] - trimmed[:, 2]).tolist(),
                strict=True,
            )
        )
        assert kept == [one_by_one(a, b, length) for a, b in cases]
        assert torch.equal(trimmed[:, ::2], ranges[:, ::2])


# ---------------------------------------------------------------- documents


def test_a_subset_has_the_chosen_documents_only():
    documents = corpus([[3], [4, 5], [6]])
    assert documents.count_tokens() == 18
    some = documents.subset(torch.tensor([2, 0]))
    assert (len(some), some.count_tokens()) == (2, 9)
    assert len(documents.subset(torch.empty(0, dtype=torch.int64))) == 0
    assert batch(some).inputs.ids[0, 1:4].tolist() == [22, 23, 24]
    counts = some.count_unigrams()
    assert counts.nonzero()[:, 0].tolist() == [10, 11, 12, *range(22, 28)]
    assert counts.sum() == 9
    long = corpus([[40, 3], [2]])
    assert batch(long).inputs.ids.shape == (2, 32)


# ---------------------------------------------------------------- pairs


DOCUMENTS = [[6, 9, 4, 11, 7, 5, 8, 3, 10, 6][: 4 + number % 7] for number in range(60)]


def test_pairs_follow_the_procedure_of_bert():
    documents = corpus(DOCUMENTS)
    pairs = documents.build_pairs(dupes=8, seed=0)
    a, a_end, b, b_end = pairs.ranges.unbind(1)
    assert (a_end > a).all()
    assert (b_end > b).all()
    assert ((a_end - a) + (b_end - b)).max() == 29
    same = document_of(documents, a) == document_of(documents, b)
    random = pairs.labels == 1
    assert pairs.classes == ("next", "random")
    assert same[~random].all()
    assert not same[random].any()
    assert (b[~random] >= a_end[~random]).all()
    # Without truncation, B begins where A ends, at a sentence boundary.
    whole = ~random & (a_end == b)
    assert whole.sum() > 0.5 * (~random).sum()
    assert torch.isin(b[whole], documents.sentences).all()
    assert torch.equal(document_of(documents, a), document_of(documents, a_end - 1))


def test_without_random_pairs_each_document_is_used_once():
    documents = corpus([*DOCUMENTS, [5]])
    pairs = documents.build_pairs(dupes=1, seed=0, random=0.0)
    assert not pairs.labels.any()
    a, a_end, b, b_end = pairs.ranges.unbind(1)
    assert (a_end > a).all()
    alone = b == b_end
    assert alone.any()  # a sentence that cannot be split
    assert torch.equal(document_of(documents, a[~alone]), document_of(documents, b[~alone]))
    uses = torch.zeros(len(documents.tokens))
    for start, end in [
        *zip(a.tolist(), a_end.tolist(), strict=True),
        *zip(b.tolist(), b_end.tolist(), strict=True),
    ]:
        uses[start:end] += 1
    assert uses.max() == 1
    assert uses.mean() > 0.85
    # One document is enough.
    assert len(documents.subset(torch.tensor([0])).build_pairs(1, 0, random=0.0)) > 0


def test_sentences_unused_by_a_random_pair_are_used_next():
    documents = corpus(DOCUMENTS)
    pairs = documents.build_pairs(dupes=1, seed=0)
    uses = torch.zeros(len(documents.tokens))
    for (a, a_end, b, b_end), random in zip(
        pairs.ranges.tolist(), pairs.labels.tolist(), strict=True
    ):
        uses[a:a_end] += 1
        if not random:
            uses[b:b_end] += 1
    # Every token occurs once in A or in A's continuation, except truncated ones.
    assert uses.max() == 1
    assert uses.mean() > 0.85


def test_half_of_the_divisible_pairs_are_consecutive():
    # With sentences of 5 tokens and room for 29, a random pair always has several sentences to
    # split.
    pairs = corpus([[5] * 400] * 6).build_pairs(dupes=6, seed=1)
    assert pairs.labels.float().mean().item() == pytest.approx(0.5, abs=0.03)
    lengths = (pairs.ranges[:, 1] - pairs.ranges[:, 0]) + (pairs.ranges[:, 3] - pairs.ranges[:, 2])
    assert (lengths < 28).float().mean().item() == pytest.approx(sequences.SHORT_SHARE, abs=0.05)
    places = (pairs.ranges[:, 1] - pairs.ranges[:, 0]) // 5
    assert set(places.tolist()) >= {1, 2, 3, 4}
    # A single sentence cannot be split, so its second segment is always random.
    assert corpus([[7]] * 5).build_pairs(2, 0).labels.tolist() == [1] * 10


def test_long_pairs_lose_tokens_at_either_end_of_the_longer_part():
    pairs = corpus([[60], [60], [60]]).build_pairs(dupes=40, seed=0)
    a, a_end, b, b_end = pairs.ranges.unbind(1)
    assert set((a_end - a).tolist()) | set((b_end - b).tolist()) <= {14, 15}
    starts = (a % 60).float()
    assert starts.mean().item() == pytest.approx(
        (60 - 14.5) / 2, abs=2
    )  # tokens are removed equally often at the front and at the back


def test_each_dupe_has_new_pairs_that_depend_on_the_seed():
    documents = corpus(DOCUMENTS)
    twice = documents.build_pairs(2, 3)
    assert torch.equal(twice.ranges, documents.build_pairs(2, 3).ranges)
    once = len(documents.build_pairs(1, 3))
    assert torch.equal(twice.ranges[:once], documents.build_pairs(1, 3).ranges)
    assert not torch.equal(twice.ranges[once:][:50], twice.ranges[:50])
    assert not torch.equal(documents.build_pairs(1, 4).ranges[:50], twice.ranges[:50])


@pytest.mark.parametrize("at_once", [20, 10**6])
def test_pairs_are_cached_if_the_corpus_has_a_folder(tmp_path, monkeypatch, at_once):
    plain = corpus(DOCUMENTS)
    expected = plain.build_pairs(2, 3)
    monkeypatch.setattr(sequences, "BUFFERED", at_once)
    cached = replace(plain, folder=tmp_path)
    layouts = [
        cached.build_pairs(2, 3),
        cached.build_pairs(2, 4),
        cached.build_pairs(1, 3),
        cached.subset(torch.arange(30)).build_pairs(2, 3),
    ]
    assert len([path for path in tmp_path.iterdir() if not path.suffix]) == 4
    assert torch.equal(layouts[0].ranges, expected.ranges)
    assert torch.equal(plain.build_pairs(2, 3).ranges, expected.ranges)
    kept = next(path for path in tmp_path.iterdir() if path.stat().st_size == 8 * 5 * len(expected))
    assert str(kept) in Path("/proc/self/maps").read_text()
    monkeypatch.setattr(Documents, "_generate_pairs", None)
    again = [
        cached.build_pairs(2, 3),
        cached.build_pairs(2, 4),
        cached.build_pairs(1, 3),
        cached.subset(torch.arange(30)).build_pairs(2, 3),
    ]
    for one, other in zip(layouts, again, strict=True):
        assert torch.equal(one.ranges, other.ranges)
        assert torch.equal(one.labels, other.labels)


def test_a_table_is_never_held_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(sequences, "BUFFERED", 2000)
    monkeypatch.setattr(files, "BLOCK", 2000)
    monkeypatch.setattr(sequences, "PART", 50)
    documents = replace(corpus(DOCUMENTS * 20), folder=tmp_path)
    for build, columns in ((lambda: documents.build_pairs(2, 3), 5), (documents.split, 4)):
        tracemalloc.start()
        try:
            table = build()
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < len(table) * columns * 8 / 2
        assert table.rows is None
        assert table.lengths.dtype == torch.int32
        assert torch.equal(table.lengths, sequences._count_tokens(table.ranges).int())


@pytest.mark.parametrize("at_once", [2, 1000])
def test_sentences_are_those_of_each_document_in_turn(tmp_path, monkeypatch, at_once):
    monkeypatch.setattr(sequences, "PART", at_once)
    documents = corpus([[3, 0, 2], [4], [40, 1], [5]]).subset(torch.tensor([2, 3, 0]))
    cached = replace(documents, folder=tmp_path)
    spans = [(9, 39), (49, 50), (50, 55), (0, 3), (3, 5)]  # 40 tokens are cut to 30
    for sentences in (documents.split(), cached.split(), cached.split()):
        assert sentences.ranges.tolist() == [[start, end, 0, 0] for start, end in spans]
    assert str(next(tmp_path.glob("sentences-*[!s]"))) in Path("/proc/self/maps").read_text()


def test_pairs_stay_among_the_chosen_documents():
    chosen = corpus(DOCUMENTS).subset(torch.tensor([3, 7, 20]))
    ranges = chosen.build_pairs(3, 0).ranges
    assert set(document_of(chosen, ranges[:, [0, 2]]).flatten().tolist()) == {3, 7, 20}
    with pytest.raises(UserError, match=r"there is only one .*blank line"):
        chosen.subset(torch.tensor([0])).build_pairs(1, 0)


# ---------------------------------------------------------------- packed


def test_packed_documents_are_contiguous_text_with_separators():
    documents = corpus([[3, 2], [4], [20], [1]], length=8)
    tokens = batch(documents.pack()).inputs
    sep = TOKENIZER.sep
    text = [10, 11, 12, 13, 14, sep, 15, 16, 17, 18, sep, *range(19, 39), sep, 39, sep]
    assert tokens.ids[:, 0].tolist() == [TOKENIZER.cls] * 4
    assert tokens.ids[:, 1:].flatten().tolist() == text[:28]
    assert tokens.documents[0].tolist() == [1] * 7 + [2]
    # A new document begins after each separator and nowhere else; the first one of a sequence
    # has number 1.
    assert torch.equal(tokens.documents.diff(dim=1)[:, 1:] == 1, tokens.ids[:, 1:-1] == sep)
    assert (tokens.documents[:, :2] == 1).all()
    assert tokens.real.all()
    assert not tokens.segments.any()


def test_packed_dupes_have_other_offsets_and_subsets_select_sequences():
    packed = corpus([[5, 6]] * 30, length=16).pack(dupes=3)
    places = packed.locate(torch.arange(len(packed), dtype=torch.int32))
    cuts = [torch.arange(shift, 30 * 12 - 14, 15) for shift in (0, 5, 10)]
    assert torch.equal(places, torch.cat(cuts))
    starts = places % 15
    assert set(starts.tolist()) == {0, 5, 10}
    tokens = batch(packed).inputs
    part = batch(packed.subset(torch.tensor([4, 1]))).inputs
    assert torch.equal(part.ids, tokens.ids[[4, 1]])
    chosen = corpus([[5], [7], [9]] * 9, length=8).subset(torch.tensor([1, 2, 5]))
    assert batch(chosen.pack()).inputs.ids[0, 1:].tolist() == list(range(15, 22))
    with pytest.raises(UserError, match=r"holds 6 tokens, less than one sequence of 16"):
        corpus([[5]], length=16).pack()


def test_attention_stays_within_a_document():
    tokens = batch(corpus([[3], [3], [9]], length=10).pack()).inputs
    allowed = tokens.attendable()[0, 0]
    same = tokens.documents[0][:, None] == tokens.documents[0]
    assert torch.equal(allowed, same)
    assert 0 < allowed.sum() < allowed.numel()
