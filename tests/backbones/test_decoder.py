"""The decoder: its cache, beam search against all sequences, and what it has learned to write."""

import itertools

import pytest
import torch

from sslrun.backbones import build_backbone
from sslrun.backbones.decoder import Decoder, previous_tokens
from sslrun.backbones.search import Search, beam_search
from sslrun.backbones.text import embedding_of
from sslrun.backbones.transformer import Block as TransformerBlock
from sslrun.backbones.transformer import BlockStyle, Cache, Stack, initialize
from sslrun.data.specs import TextSpec
from sslrun.data.text.sequences import IGNORED, Tokens
from sslrun.data.text.tokenizer import blank_tokenizer

VOCAB, LENGTH = 16, 12
TOKENIZER = blank_tokenizer(VOCAB)
CPU = torch.device("cpu")
SMALL = {"depth": 1, "width": 64, "heads": 2, "positions": 16, "dropout": 0.0}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build(depth=2, **options):
    """Build an encoder and a decoder whose random predictions are far from uniform."""
    torch.manual_seed(0)
    backbone = build_backbone("bert-tiny", {**SMALL, **options}, TextSpec(TOKENIZER, LENGTH))
    decoder = Decoder(backbone, depth, "test")
    initialize(decoder.blocks, 0.2)
    torch.nn.init.normal_(decoder.head.dense.weight, std=0.3)
    table = torch.nn.init.normal_(torch.empty(VOCAB, 64), std=0.3).double()
    return decoder.double().eval(), table


def memories(count=32):
    """Encoder outputs (B, 7, 64), and a mask (B, 1, 1, 7) that hides the end of half of them."""
    mask = torch.ones(count, 1, 1, 7, dtype=torch.bool)
    mask[::2, ..., 5:] = False
    return draw(count, 7, 64), mask


def search_without_cache(decoder, table, memory, mask, search):
    rows = torch.arange(len(memory)).repeat_interleave(search.beams)

    def next_token(prefixes, origin):
        x = decoder(prefixes, memory[rows], table, memory_mask=mask[rows])
        return decoder.log_probs(x[:, -1], table)

    with torch.no_grad():
        return beam_search(next_token, len(memory), TOKENIZER, search, CPU)


# ---------------------------------------------------------------- the cache


@pytest.mark.parametrize("rotary", [None, 10_000.0])
@pytest.mark.parametrize("parts", [(1,) * 8, (3, 1, 4)])
def test_tokens_given_in_parts_equal_all_at_once(rotary, parts):
    torch.manual_seed(0)
    style = BlockStyle(rotary=rotary)
    stack = Stack(TransformerBlock(16, 2, style, cross=True) for _ in range(2)).double()
    x, memory = draw(3, 8, 16), draw(3, 5, 16, seed=1)
    whole = stack(x, causal=True, memory=memory)
    cache = Cache()
    pieces = [
        stack(part, causal=True, memory=memory, cache=cache) for part in x.split(parts, dim=1)
    ]
    assert cache.length == 8
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-12, atol=1e-12)
    assert torch.equal(stack(x, causal=True, memory=memory, cache=Cache()), whole)


@pytest.mark.parametrize("beams", [1, 4])
def test_decoding_with_a_cache_equals_without_bit_for_bit(beams):
    (decoder, table), (memory, mask) = build(), memories()
    search = Search(beams, longest=LENGTH)
    cached = decoder.generate(memory, table, mask, TOKENIZER, search)
    assert torch.equal(cached, search_without_cache(decoder, table, memory, mask, search))
    assert len({tuple(row) for row in cached.tolist()}) > 16  # they differ
    assert (cached == TOKENIZER.sep).any()


def test_padding_of_the_memory_changes_nothing():
    (decoder, table), (memory, mask) = build(), memories(8)
    search = Search(2, longest=LENGTH)
    changed = memory.clone()
    changed[::2, 5:] = 9.0
    assert torch.equal(
        decoder.generate(memory, table, mask, TOKENIZER, search),
        decoder.generate(changed, table, mask, TOKENIZER, search),
    )


# ---------------------------------------------------------------- search


@torch.no_grad()
def test_greedy_decoding_equals_a_beam_of_one():
    (decoder, table), (memory, mask) = build(), memories(8)
    for penalty in (0.0, 1.0):
        written = decoder.generate(
            memory, table, mask, TOKENIZER, Search(1, penalty, longest=LENGTH)
        )
        for row, ids in enumerate(written.tolist()):
            prefix = [TOKENIZER.cls]
            while len(prefix) <= LENGTH and prefix[-1] != TOKENIZER.sep:
                x = decoder(
                    torch.tensor([prefix]), memory[row : row + 1], table, None, mask[row : row + 1]
                )
                scores = decoder.log_probs(x[0, -1], table)
                scores[TOKENIZER.pad] = -torch.inf
                prefix.append(int(scores.argmax()))
            assert ids[: len(prefix) - 1] == prefix[1:]
            assert set(ids[len(prefix) - 1 :]) <= {TOKENIZER.pad}


@pytest.mark.parametrize("penalty", [0.0, 0.6, 2.0])
def test_a_beam_that_holds_all_hypotheses_finds_the_best_of_all_sequences(penalty):
    tokenizer, longest = blank_tokenizer(7), 3
    # Log-probabilities by length and by the last token, for 5 examples.
    table = draw(5, longest, 7, 7).mul(2).log_softmax(dim=-1)
    table[..., tokenizer.pad] = -torch.inf
    beams = 7**longest
    rows = torch.arange(5).repeat_interleave(beams)

    def next_token(prefixes, origin):
        return table[rows, prefixes.shape[1] - 1, prefixes[:, -1]]

    written = beam_search(next_token, 5, tokenizer, Search(beams, penalty, longest), CPU)

    def score(example, ids):
        before, total = tokenizer.cls, 0.0
        for place, token in enumerate(ids):
            total += table[example, place, before, token].item()
            before = token
        return total / ((5 + len(ids)) / 6) ** penalty  # Wu et al. (2016), equation 14

    def is_complete(ids):
        ends = tokenizer.sep in ids
        return ids.index(tokenizer.sep) == len(ids) - 1 if ends else len(ids) == longest

    sequences = [
        ids
        for length in range(1, longest + 1)
        for ids in itertools.product(range(7), repeat=length)
        if tokenizer.pad not in ids and is_complete(ids)
    ]
    for example in range(5):
        best = max(sequences, key=lambda ids: score(example, ids))
        assert [token for token in written[example].tolist() if token != tokenizer.pad] == [*best]


def test_a_higher_penalty_prefers_longer_sequences():
    (decoder, table), (memory, mask) = build(), memories(16)
    lengths = [
        (
            decoder.generate(memory, table, mask, TOKENIZER, Search(8, penalty, LENGTH))
            != TOKENIZER.pad
        )
        .sum()
        .item()
        for penalty in (0.0, 3.0)
    ]
    assert lengths[0] < lengths[1]


# ---------------------------------------------------------------- training


def test_the_decoder_learns_from_the_previous_targets_alone():
    targets = torch.tensor([[7, 8, TOKENIZER.sep, IGNORED], [9, TOKENIZER.sep, IGNORED, IGNORED]])
    ids = previous_tokens(targets, TOKENIZER)
    cls, sep, pad = TOKENIZER.cls, TOKENIZER.sep, TOKENIZER.pad
    assert ids.tolist() == [[cls, 7, 8, sep], [cls, 9, sep, pad]]
    decoder, table = build()
    memory, _ = memories(2)
    x = decoder(ids, memory, table)
    later = ids.clone()
    later[:, 2:] = 11
    assert torch.equal(decoder(later, memory, table)[:, :2], x[:, :2])
    later[:, 0] = 11
    assert not torch.allclose(decoder(later, memory, table)[:, 1], x[:, 1])


def reversals(count, seed):
    """Sequences of 2 to 4 random tokens to read, and the same backwards to write."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 5, (count,), generator=generator)
    words = torch.randint(5, VOCAB, (count, 4), generator=generator)
    ids = torch.full((count, 6), TOKENIZER.pad)
    targets = torch.full((count, 5), IGNORED)
    for row, length in enumerate(lengths.tolist()):
        text = words[row, :length]
        ids[row, : length + 2] = torch.tensor([TOKENIZER.cls, *text.tolist(), TOKENIZER.sep])
        targets[row, : length + 1] = torch.tensor([*text.flip(0).tolist(), TOKENIZER.sep])
    real = (ids != TOKENIZER.pad).long()
    return Tokens(ids, torch.zeros_like(ids), real, packed=False), targets


def test_what_it_writes_is_more_likely_than_perturbed_texts():
    torch.manual_seed(0)
    spec = TextSpec(TOKENIZER, LENGTH)
    backbone = build_backbone("bert-tiny", {**SMALL, "std": 0.1}, spec)
    decoder = Decoder(backbone, 1, "test")
    initialize(decoder.blocks, 0.1)
    parameters = [*backbone.parameters(), *decoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=0.003)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.003, total_steps=180)

    def encode(tokens):
        return backbone(tokens).tokens, embedding_of(backbone), tokens.real[:, None, None]

    for step in range(180):
        tokens, targets = reversals(32, 100 + step)
        memory, shared, mask = encode(tokens)
        ids = previous_tokens(targets, TOKENIZER)
        loss, _ = decoder.loss(decoder(ids, memory, shared, None, mask), shared, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    backbone.eval()
    decoder.eval()
    tokens, truth = reversals(20, 0)
    with torch.no_grad():
        memory, shared, mask = encode(tokens)
        written = decoder.generate(memory, shared, mask, TOKENIZER, Search(longest=LENGTH))
        right = [
            TOKENIZER.until_end(ours) == TOKENIZER.until_end(true)
            for ours, true in zip(written.tolist(), truth.tolist(), strict=True)
        ]
        assert sum(right) >= 16  # it has learned to reverse

        def losses(row, texts):
            """Teacher-forced losses of texts (N, T) for one source."""
            rows = torch.full((len(texts),), row)
            x = decoder(previous_tokens(texts, TOKENIZER), memory[rows], shared, None, mask[rows])
            scores = decoder.log_probs(x, shared)
            return -scores.gather(2, texts[..., None])[..., 0].mean(dim=1)

        generator = torch.Generator().manual_seed(1)
        for row, ids in enumerate(written.tolist()):
            text = torch.tensor([*TOKENIZER.until_end(ids), TOKENIZER.sep])
            perturbed = text.repeat(100, 1)
            places = torch.randint(0, len(text) - 1, (100, 1), generator=generator)
            shift = torch.randint(1, VOCAB - 5, (100, 1), generator=generator)
            other = (perturbed.gather(1, places) - 5 + shift) % (VOCAB - 5) + 5
            perturbed.scatter_(1, places, other)
            assert losses(row, text[None])[0] <= losses(row, perturbed).min()
