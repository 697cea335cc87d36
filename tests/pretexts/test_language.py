"""Pretext tasks on text: what is hidden and what is asked for, losses against their formulas, and who sees whom."""

import math

import pytest
import torch
import torch.nn.functional as F

from sslrun.backbones import build_backbone
from sslrun.data.examples import Batch
from sslrun.data.specs import TextSpec
from sslrun.data.text.sequences import IGNORED, Documents, Tokens, build_labeled
from sslrun.data.text.tokenizer import SPECIALS, Tokenizer, blank_tokenizer, build_wordpiece
from sslrun.errors import UserError
from sslrun.pretexts import language
from sslrun.pretexts.base import pretexts
from sslrun.pretexts.language import TokenHead, entropy, following, preceding

VOCAB = 100
TOKENIZER = blank_tokenizer(VOCAB)
SMALL = {"depth": 2, "width": 16, "heads": 2, "positions": 256, "dropout": 0.0}
BACKBONES = {
    "bert": ("bert-tiny", SMALL),
    "causal": ("bert-tiny", {**SMALL, "causal": True}),
    "fast": ("bert-tiny", {**SMALL, "fast": True}),
    "gpt": ("gpt-tiny", {"depth": 2, "width": 16, "positions": 256, "dropout": 0.0}),
    "lstm": ("lstm", {"width": 16, "depth": 1, "dropout": 0.0}),
    "both": ("lstm", {"width": 16, "depth": 2, "dropout": 0.0, "bidirectional": True}),
    "elmo": ("elmo", {"width": 16, "dropout": 0.0}),
}


def made(name, backbone="bert", length=128, tokenizer=TOKENIZER, **options):
    torch.manual_seed(0)
    kind, shape = BACKBONES[backbone]
    cls = pretexts[name]
    return cls(cls.Options(**options), build_backbone(kind, shape, TextSpec(tokenizer, length)))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pairs(lengths=((60, 65), (30, 5), (3, 2), (1, 1)), seed=1):
    """A batch of pairs of segments of random words, padded to the longest."""
    draw = torch.Generator().manual_seed(seed)
    words = [
        [torch.randint(5, VOCAB, (n,), generator=draw).tolist() for n in side]
        for side in zip(*lengths, strict=True)
    ]
    labels = torch.arange(len(lengths)) % 2
    (found,) = build_labeled(*words, labels, ("next", "random"), TextSpec(TOKENIZER, 256)).batches(
        [torch.arange(len(lengths))], torch.device("cpu")
    )
    return found


def packed(lengths=(20, 3, 40, 10, 5, 60, 8, 9, 30), length=64, seed=2):
    """Sequences of several documents."""
    draw = torch.Generator().manual_seed(seed)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    ids = torch.randint(5, VOCAB, (int(starts[-1]),), generator=draw, dtype=torch.int32)
    corpus = Documents(
        ids, starts, torch.arange(len(lengths) + 1), TextSpec(TOKENIZER, length)
    ).pack()
    (found,) = corpus.batches([torch.arange(len(corpus))], torch.device("cpu"))
    assert (found.inputs.documents.amax(dim=1) > 1).all()
    return found


def plain(ids):
    return Batch(Tokens(ids, torch.zeros_like(ids), torch.ones_like(ids)), None)


# ---------------------------------------------------------------- masking


def test_the_number_chosen_is_pythons_at_every_length():
    # In float32 0.15 * 190 is above 28.5, and 29 would be chosen.
    ids = torch.randint(5, VOCAB, (512, 512), generator=generator())
    lengths = torch.arange(1, 513)
    real = (torch.arange(512) < lengths[:, None]).long()
    views = made("mlm").views(Batch(Tokens(ids, torch.zeros_like(ids), real), None), generator())
    assert (views.targets != IGNORED).sum(dim=1).tolist() == [
        max(1, round(n * 0.15)) for n in lengths.tolist()
    ]


@pytest.mark.parametrize("rate", [0.15, 0.4])
def test_exactly_the_rate_is_chosen_of_each_sequence_and_never_special_tokens(rate):
    batch, mlm = pairs(), made("mlm", rate=rate)
    for seed in range(20):
        views = mlm.views(batch, generator(seed))
        told = views.targets != IGNORED
        # As BERT's max(1, round(len(tokens) * rate)), special tokens counted, as far as there are
        # words.
        sizes = batch.inputs.real.sum(dim=1).tolist()
        words = (batch.inputs.ids >= len(SPECIALS)).sum(dim=1).tolist()
        wanted = [
            min(max(1, round(size * rate)), word) for size, word in zip(sizes, words, strict=True)
        ]
        assert told.sum(dim=1).tolist() == wanted
        truth = batch.inputs.ids.gather(1, views.places)
        assert torch.equal(views.targets[told], truth[told])
        assert (views.targets[told] >= len(SPECIALS)).all()
        assert all(
            len(set(row[keep].tolist())) == keep.sum()
            for row, keep in zip(views.places, told, strict=True)
        )
        changed = views.tokens.ids != batch.inputs.ids
        chosen = torch.zeros_like(changed).scatter(1, views.places, told)
        assert not (changed & ~chosen).any()


def test_every_word_is_chosen_equally_often():
    batch, mlm = plain(torch.randint(5, VOCAB, (400, 40), generator=generator(3))), made("mlm")
    counts = torch.zeros(40)
    for seed in range(20):
        views = mlm.views(batch, generator(seed))
        counts += torch.bincount(views.places[views.targets != IGNORED], minlength=40)
    expected = 20 * 400 * 6 / 40
    assert (counts - expected).abs().max() < 5 * expected**0.5


def test_of_the_chosen_80_become_mask_10_another_and_10_stay():
    batch, mlm = plain(torch.randint(5, VOCAB, (2000, 40), generator=generator(3))), made("mlm")
    views = mlm.views(batch, generator())
    told = views.targets != IGNORED
    new = views.tokens.ids.gather(1, views.places)[told]
    truth = views.targets[told]
    count = int(told.sum())
    assert count == 2000 * 6
    masked = new == TOKENIZER.mask
    error = 4 * (0.25 / count) ** 0.5
    # A random word may be [MASK] or the word itself, as in BERT's code.
    assert masked.float().mean().item() == pytest.approx(0.8 + 0.1 / VOCAB, abs=error)
    assert (new == truth).float().mean().item() == pytest.approx(0.1 + 0.1 / VOCAB, abs=error)
    random = new[~masked & (new != truth)]
    assert len(random.unique()) > 0.9 * VOCAB
    given = made("mlm", mask=0.5, replace=0.5).views(batch, generator())
    kept = given.tokens.ids.gather(1, given.places)[given.targets != IGNORED]
    assert (kept == TOKENIZER.mask).float().mean().item() == pytest.approx(0.5, abs=0.02)
    assert (kept == given.targets[given.targets != IGNORED]).float().mean() < 0.03


def test_dynamic_masks_differ_each_time_and_static_ones_only_by_sequence():
    batch = pairs()
    dynamic, static = made("mlm"), made("mlm", masking="static")
    first, second = (dynamic.views(batch, generator(seed)).tokens.ids for seed in (0, 1))
    assert not torch.equal(first, second)
    assert torch.equal(first, dynamic.views(batch, generator(0)).tokens.ids)
    one, other = (static.views(batch, generator(seed)) for seed in (0, 1))
    assert torch.equal(one.tokens.ids, other.tokens.ids)
    assert torch.equal(one.targets, other.targets)
    told = one.targets != IGNORED
    assert told.sum(dim=1).tolist() == [19, 6, 1, 1]
    # The same sequence in another batch is masked alike; another sequence is not; shares are the
    # same.
    twice = plain(torch.randint(5, VOCAB, (2000, 40), generator=generator(3)))
    views = static.views(twice, generator())
    alone = static.views(plain(twice.inputs.ids[7:8]), generator())
    assert torch.equal(alone.tokens.ids[0], views.tokens.ids[7])
    assert not torch.equal(views.places[0], views.places[1])
    told = views.targets != IGNORED
    assert (views.tokens.ids == TOKENIZER.mask).sum() / told.sum() == pytest.approx(0.801, abs=0.02)
    counts = torch.bincount(views.places[told], minlength=40).float()
    assert (counts - 300).abs().max() < 5 * 300**0.5
    # Nor does it matter how far a sequence is padded, which its batch's longest says.
    near, far = (
        static.views(pairs(((30, 5), long)), generator()).tokens.ids[0]
        for long in ((30, 10), (30, 80))
    )
    assert len(near) < len(far)
    assert torch.equal(near[:38], far[:38])


def test_dupes_lay_the_corpus_out_so_often():
    sentences = torch.arange(0, 601, 6)
    corpus = Documents(
        torch.arange(600, dtype=torch.int32) % 90 + 5,
        sentences,
        torch.arange(0, 101, 10),
        TextSpec(TOKENIZER, 32),
    )
    once, thrice = (made("mlm", dupes=dupes, length=32).arrange(corpus, 0) for dupes in (1, 3))
    assert len(thrice) > 2.5 * len(once)
    assert len(made("mlm", dupes=3, pairs="drop", length=32).arrange(corpus, 0)) > 2.5 * (600 // 32)


def test_whole_words_are_chosen_or_left():
    # Words of one to four pieces: a b ##b c ##c ##c d ##d ##d ##d.
    entries = [*SPECIALS, "a", "b", "##b", "c", "##c", "d", "##d"]
    tokenizer = Tokenizer(
        build_wordpiece(True, {entry: number for number, entry in enumerate(entries)})
    )
    words = [[5], [6, 7], [8, 9, 9], [10, 11, 11, 11]]
    draw = generator(5)
    rows = []
    while len(rows) < 300:
        row = [
            piece for at in torch.randint(4, (40,), generator=draw).tolist() for piece in words[at]
        ]
        rows.append([tokenizer.cls, *row[:62], tokenizer.sep])
    ids = torch.tensor(rows)
    mlm = made("mlm", tokenizer=tokenizer, whole_words=True, mask=1.0, replace=0.0)
    views = mlm.views(plain(ids), generator())
    chosen = torch.zeros_like(ids, dtype=torch.bool).scatter(
        1, views.places, views.targets != IGNORED
    )
    begins = ~tokenizer.continues[ids]
    word = begins.cumsum(dim=1)
    partly = 0
    for row in range(len(ids)):
        for number in word[row].unique().tolist():
            partly += len(set(chosen[row][word[row] == number].tolist())) > 1
    assert partly == 0
    counts = chosen.sum(dim=1)
    assert counts.max() == round(64 * 0.15)
    assert (counts == 10).float().mean() > 0.9  # shorter words fill what a long one leaves
    assert chosen[:, 1:-4].float().mean(dim=0).std() < 0.05
    # Of sequences of single pieces it chooses as many as ever.
    single = mlm.views(plain(torch.full((4, 40), 5)), generator())
    assert (single.targets != IGNORED).sum(dim=1).tolist() == [6] * 4
    # The only word does not fit: nothing is asked, and nothing breaks.
    lone = torch.tensor([[tokenizer.cls, 10, 11, 11, 11, tokenizer.sep]])
    assert mlm(mlm.views(plain(lone), generator())).loss.item() == 0


# ---------------------------------------------------------------- losses


def test_the_masked_loss_is_its_formula_and_is_computed_where_tokens_are_hidden_alone(monkeypatch):
    mlm, batch = made("mlm").double(), pairs()
    seen = []
    views = mlm.views(batch, generator())
    of = TokenHead.loss
    monkeypatch.setattr(
        TokenHead, "loss", lambda self, x, *given: seen.append(x.shape) or of(self, x, *given)
    )
    output = mlm(views)
    assert seen == [(4, round(128 * 0.15), 16)]
    head, total, count, right = mlm.head, 0.0, 0, 0
    features = mlm.backbone(views.tokens).tokens
    for row in range(4):
        for place, target in zip(
            views.places[row].tolist(), views.targets[row].tolist(), strict=True
        ):
            if target == IGNORED:
                continue
            x = head.dense.weight @ features[row, place] + head.dense.bias
            x = x * (1 + torch.erf(x / math.sqrt(2))) / 2
            x = (x - x.mean()) / (
                x.var(correction=0) + 1e-12
            ).sqrt() * head.norm.weight + head.norm.bias
            scores = mlm.backbone.token_embed.weight @ x + head.bias
            total -= (scores[target] - scores.exp().sum().log()).item()
            right += int(scores.argmax() == target)
            count += 1
    assert count == 27
    assert output.loss.item() == pytest.approx(total / count, rel=1e-6)
    assert output.metrics["mlm_loss"].item() == output.loss.item()
    assert output.metrics["mlm_accuracy"].item() == pytest.approx(right / count)
    # The head's matrix is the embedding: it has none of its own, and its gradient reaches words
    # that are nowhere in the text.
    assert [name for name, _ in head.named_parameters()] == [
        "bias",
        "dense.weight",
        "dense.bias",
        "norm.weight",
        "norm.bias",
    ]
    output.loss.backward()
    assert (mlm.backbone.token_embed.weight.grad.abs().sum(dim=1) > 0).all()


def test_next_sentence_prediction_is_added_and_told_apart():
    mlm, batch = made("mlm", nsp=True).double(), pairs()
    views = mlm.views(batch, generator())
    output = mlm(views)
    pooled = mlm.backbone(views.tokens).pooled
    scores = pooled @ mlm.nsp.weight.T + mlm.nsp.bias
    expected = -(scores.log_softmax(dim=1)[torch.arange(4), batch.labels]).mean().item()
    assert output.metrics["nsp_loss"].item() == pytest.approx(expected, rel=1e-6)
    parts = output.metrics["mlm_loss"] + output.metrics["nsp_loss"]
    assert output.loss.item() == pytest.approx(parts.item(), rel=1e-6)
    assert set(output.metrics) == {"mlm_loss", "mlm_accuracy", "nsp_loss", "nsp_accuracy"}
    # Without the loss the layout stays (as RoBERTa suspects of BERT's row) unless it is dropped as
    # well.
    plain_mlm = made("mlm")
    assert plain_mlm.nsp is None
    assert set(plain_mlm(views).metrics) == {"mlm_loss", "mlm_accuracy"}
    corpus = Documents(
        torch.arange(600, dtype=torch.int32) % 90 + 5,
        torch.arange(0, 601, 6),
        torch.arange(0, 101, 10),
        TextSpec(TOKENIZER, 32),
    )
    kept, dropped = (
        made("mlm", pairs=pairs, length=32).arrange(corpus, 0) for pairs in ("keep", "drop")
    )
    assert torch.equal(kept.ranges, made("mlm", nsp=True, length=32).arrange(corpus, 0).ranges)
    assert type(dropped).__name__ == "Packed"


def test_the_held_out_loss_is_at_15_percent_and_of_masked_words_alone():
    batch = pairs()
    expected = made("mlm").eval()
    views = expected.views(batch, generator(3))
    mlm = made("mlm", rate=0.4, nsp=True).eval()
    mlm.backbone.load_state_dict(expected.backbone.state_dict())
    mlm.head.load_state_dict(expected.head.state_dict())
    found = mlm.held_out(batch, generator(3))
    assert found["held_out_loss"].item() == pytest.approx(expected(views).loss.item(), rel=1e-6)
    assert {"held_out_mlm_accuracy", "held_out_nsp_loss", "held_out_nsp_accuracy"} < set(found)


def test_the_floor_is_what_frequencies_alone_come_to():
    corpus = Documents(
        torch.tensor([5] * 4 + [6] * 2 + [7] * 2, dtype=torch.int32),
        torch.tensor([0, 4, 8]),
        torch.arange(3),
        TextSpec(TOKENIZER, 16),
    )
    assert made("ltr", "gpt").floor(corpus) == pytest.approx(1.5 * math.log(2))
    assert made("mlm", mask=1.0, replace=0.0).floor(corpus) == pytest.approx(1.5 * math.log(2))
    assert made("mlm").floor(build_labeled([[5]], None, None, (), TextSpec(TOKENIZER, 16))) is None


def test_the_floor_of_masked_tokens_knows_that_some_are_shown():
    shares = torch.tensor([0.0, 0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    both = torch.zeros(
        5, 6, dtype=torch.float64
    )  # what stood there, what is shown (the last: [MASK])
    both[:, 5] = 0.8 * shares
    both[:, :5] = 0.1 * shares.diag() + 0.1 * shares[:, None] / 5
    best = -torch.xlogy(both, both / both.sum(dim=0)).sum().item()
    assert made("mlm").without_context(shares) == pytest.approx(best)
    assert best < entropy(shares)


def test_the_floor_of_denoising_counts_what_is_no_text():
    pretext = made("denoise", rate=0.3, span=3.0)
    cut = round(0.3 * (pretext.backbone.spec.length - 2))
    told = torch.tensor([cut / 2, cut / 2, round(cut / 3), 1.0])
    assert pretext.without_context(torch.tensor([0.5, 0.5])) == pytest.approx(
        entropy(told / told.sum()), rel=1e-6
    )


def test_a_loss_without_targets_is_nothing_and_others_are_means():
    head, x = TokenHead(5, 7, None), torch.randn(2, 3, 5, generator=generator())
    known = head(x, None).log_softmax(-1)
    targets = torch.tensor(
        [[1, IGNORED, int(known[0, 2].argmax())], [IGNORED, IGNORED, int(known[1, 2].argmin())]]
    )
    loss, right = head.loss(x, None, targets)
    wanted = known[0, 0, 1] + known[0, 2].max() + known[1, 2].min()
    assert loss.item() == pytest.approx(-wanted.item() / 3, rel=1e-5)
    assert right.item() == pytest.approx((1 + int(known[0, 0].argmax() == 1)) / 3)
    assert head.loss(x, None, torch.full((2, 3), IGNORED))[0].item() == 0


@pytest.mark.parametrize("tied", [False, True])
def test_a_loss_taken_in_parts_is_that_of_the_whole(tied, monkeypatch):
    head = TokenHead(5, 7, 4 if tied else None)
    table = torch.randn(7, 4, generator=generator(2), requires_grad=True) if tied else None
    targets = torch.randint(0, 7, (4, 6), generator=generator(1))
    targets[0, :5] = IGNORED

    def taken(scores):
        monkeypatch.setattr(language, "CPU_SCORES", scores)
        x = torch.randn(4, 6, 5, generator=generator(), requires_grad=True)
        loss, right = head.loss(x, table, targets)
        wanted = [x, *head.parameters(), *([table] if tied else [])]
        return loss, right, *torch.autograd.grad(loss, wanted)

    for whole, part in zip(taken(7 * 24), taken(7 * 5), strict=True):
        torch.testing.assert_close(whole, part)
    with torch.autocast("cpu", torch.bfloat16):
        for whole, part in zip(taken(7 * 24), taken(7 * 5), strict=True):
            torch.testing.assert_close(whole, part, rtol=0.05, atol=0.05)


# ---------------------------------------------------------------- left to right, and both ways


@pytest.mark.parametrize("backbone", ["causal", "gpt", "lstm"])
def test_left_to_right_no_gradient_comes_from_the_future(backbone):
    ltr = made("ltr", backbone).eval()
    ids = torch.randint(5, VOCAB, (1, 12), generator=generator(1))
    for place in (0, 5, 11):
        features, rows = watched(ltr.backbone, plain(ids).inputs)
        features.tokens[0, place, :3].sum().backward()  # a norm's whole output has no slope
        assert [bool(each.abs().sum() > 0) for each in rows.grad[0]] == [
            at <= place for at in range(12)
        ]


def watched(backbone, tokens):
    """A backbone's features, and the embedded tokens (B, T, E) with the gradient they will get."""
    kept = []
    handle = backbone.token_embed.register_forward_hook(
        lambda module, given, out: kept.append(out) or out.retain_grad()
    )
    features = backbone(tokens)
    handle.remove()
    return features, kept[0]


def test_left_to_right_every_token_is_asked_for_but_the_first_of_a_document():
    batch = pairs()
    real = batch.inputs.real
    asked = following(batch.inputs)
    ids = batch.inputs.ids
    for row in range(4):
        size = int(real[row].sum())
        assert asked[row].tolist() == [
            *ids[row, 1:size].tolist(),
            *[IGNORED] * (ids.shape[1] - size + 1),
        ]
    views = packed().inputs
    asked, before = following(views), preceding(views)
    last = F.pad(views.documents.diff(dim=1) != 0, (0, 1), value=True)
    assert torch.equal(asked == IGNORED, last)
    assert torch.equal(asked[~last], views.ids[:, 1:][~last[:, :-1]])
    first = F.pad(last[:, :-1], (1, 0), value=True)
    assert torch.equal(before == IGNORED, first)
    assert torch.equal(before[~first], views.ids[:, :-1][~first[:, 1:]])


def test_the_left_to_right_loss_is_its_formula():
    ltr, batch = made("ltr", "causal").double(), pairs()
    output = ltr(ltr.views(batch, generator()))
    scores = ltr.head(ltr.backbone(batch.inputs).tokens, ltr.backbone.embedding).log_softmax(-1)
    asked = following(batch.inputs)
    terms = [-scores[row, at, asked[row, at]] for row, at in (asked != IGNORED).nonzero().tolist()]
    assert len(terms) == int(batch.inputs.real.sum()) - 4
    assert output.loss.item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-6)


@pytest.mark.parametrize("backbone", ["both", "elmo"])
def test_each_half_of_a_two_directional_model_sees_one_side(backbone):
    bilm = made("bilm", backbone).eval()
    ids = torch.randint(5, VOCAB, (1, 10), generator=generator(1))
    changed = ids.clone()
    changed[0, 6] = (ids[0, 6] - 4) % 90 + 5
    one, other = (
        bilm.backbone(plain(each).inputs).tokens[0].chunk(2, dim=-1) for each in (ids, changed)
    )
    differs = [(a - b).abs().sum(dim=1) > 0 for a, b in zip(one, other, strict=True)]
    assert differs[0].tolist() == [at >= 6 for at in range(10)]
    assert differs[1].tolist() == [at <= 6 for at in range(10)]
    views = bilm.views(packed(), generator())
    output = bilm(views)
    assert output.loss.item() == pytest.approx(
        (output.metrics["forward_loss"] + output.metrics["backward_loss"]).item() / 2, rel=1e-5
    )
    _, back = bilm.backbone(views).tokens.chunk(2, dim=-1)
    expected = F.cross_entropy(
        bilm.head(back, None).flatten(0, 1), preceding(views).flatten(), ignore_index=IGNORED
    )
    assert output.metrics["backward_loss"].item() == pytest.approx(expected.item(), rel=1e-5)


# ---------------------------------------------------------------- packed documents


@pytest.mark.parametrize(
    ("name", "backbone"),
    [
        ("mlm", "bert"),
        ("mlm", "fast"),
        ("ltr", "causal"),
        ("ltr", "gpt"),
        ("ltr", "lstm"),
        ("bilm", "both"),
    ],
)
def test_documents_see_each_other_only_where_the_option_says_so(name, backbone):
    batch = packed()
    for crossing in (False, True):
        pretext = made(name, backbone, pairs="drop", cross_documents=crossing).eval()
        tokens = pretext.tokens(batch)
        features, rows = watched(pretext.backbone, tokens)
        row = 0
        first = batch.inputs.documents[row] == 1
        features.tokens[row][~first][:, :3].sum().backward()
        assert bool(rows.grad[row][first].abs().sum() > 0) == crossing
        assert rows.grad[row][~first].abs().sum() > 0


def test_packed_states_are_those_of_documents_alone():
    backbone = made("bilm", "both").backbone.eval()
    tokens = packed().inputs
    whole = backbone(tokens)
    row = 1
    for number in tokens.documents[row].unique().tolist():
        place = tokens.documents[row] == number
        alone = backbone(plain(tokens.ids[row, place][None]).inputs)
        for a, b in zip(whole.layers, alone.layers, strict=True):
            torch.testing.assert_close(a[row, place], b[0])


# ---------------------------------------------------------------- encoder and decoder


def rebuilt(short, told):
    """The text before corruption: each [MASK] of the input replaced by the tokens told after the target's."""
    spans = []
    for number in told:
        if number == TOKENIZER.mask:
            spans.append([])
        else:
            spans[-1].append(number)
    found = []
    for number in short:
        found += spans.pop(0) if number == TOKENIZER.mask else [number]
    assert not spans
    return found


@pytest.mark.parametrize("make", [pairs, packed])
@pytest.mark.parametrize("shape", [{}, {"rate": 0.5, "span": 1.0}, {"rate": 0.3, "span": 6.0}])
def test_input_and_target_make_the_text_again(make, shape):
    batch, denoise = make(), made("denoise", **shape)
    for seed in range(10):
        views = denoise.views(batch, generator(seed))
        for row in range(len(batch.inputs.ids)):
            short = views.tokens.ids[row][views.tokens.real[row]].tolist()
            told = views.targets[row][views.targets[row] != IGNORED].tolist()
            assert told[-1] == TOKENIZER.sep
            assert (
                rebuilt(short, told[:-1]) == batch.inputs.ids[row][batch.inputs.real[row]].tolist()
            )
            assert short.count(TOKENIZER.sep) == (batch.inputs.ids[row] == TOKENIZER.sep).sum()
        of, given = views.documents, views.decoder_ids
        begins = of.diff(dim=1, prepend=torch.zeros_like(of[:, :1])) != 0
        inside = (of > 0) & ~begins
        assert (given[begins & (of > 0)] == TOKENIZER.cls).all()
        assert torch.equal(given[inside], views.targets.roll(1, dims=1)[inside])
        output = denoise(views)
        assert output.loss.isfinite()
        output.loss.backward()


def test_spans_have_t5s_share_and_length():
    batch, denoise = (
        plain(torch.randint(5, VOCAB, (200, 100), generator=generator(3))),
        made("denoise"),
    )
    views = denoise.views(batch, generator())
    marks = (views.tokens.ids == TOKENIZER.mask).sum(dim=1)
    assert marks.tolist() == [5] * 200
    assert (views.tokens.real.sum(dim=1) == 100 - 15 + 5).all()
    starts = torch.stack([(row == TOKENIZER.mask).nonzero()[:, 0] for row in views.tokens.ids])
    assert (
        starts[:, :-1].float().std(dim=0).min() > 5
    )  # the last one ends the sequence, as T5's does


def test_the_decoder_sees_the_text_and_its_own_past_within_a_document():
    denoise = made("denoise").eval()
    views = denoise.views(packed(), generator())
    row = next(row for row in range(len(views.decoder_ids)) if views.documents[row].max() > 1)
    scores = []
    handle = denoise.head.dense.register_forward_hook(
        lambda module, given, out: scores.append(given[0])
    )
    kept = []
    denoise.blocks[0].register_forward_pre_hook(
        lambda module, given: kept.append(given[0]) or given[0].retain_grad()
    )
    encoded = []
    denoise.backbone.token_embed.register_forward_hook(
        lambda module, given, out: encoded.append(out) or out.retain_grad()
    )
    denoise(views)
    handle.remove()
    of = views.documents[row]
    second = (of == of.max()).nonzero()[:, 0]
    place = int(second[min(1, len(second) - 1)])
    scores[0][row, place, :3].sum().backward()
    reached = kept[0].grad[row].abs().sum(dim=1) > 0
    assert reached.tolist() == [bool(of[at] == of[place]) and at <= place for at in range(len(of))]
    read = encoded[0].grad[row].abs().sum(dim=1) > 0
    assert torch.equal(read, views.tokens.documents[row] == of[place])


def test_one_embedding_serves_encoder_decoder_and_softmax():
    denoise = made("denoise")
    assert sum(tuple(each.shape) == (VOCAB, 16) for each in denoise.parameters()) == 1
    loss = denoise(denoise.views(packed(), generator())).loss
    loss.backward()
    assert (denoise.backbone.embedding.grad.abs().sum(dim=1) > 0).all()  # of the softmax every row
    other = made("denoise", "both")  # whose embeddings are half as wide as its features
    assert other.table.weight.shape == (VOCAB, 32)


# ---------------------------------------------------------------- all of them


FITTING = [("mlm", "bert"), ("mlm", "both"), ("mlm", "elmo"), ("ltr", "causal"), ("ltr", "gpt"), ("ltr", "lstm"), ("bilm", "elmo"), ("denoise", "bert"), ("denoise", "fast")]  # fmt: skip


@pytest.mark.parametrize(("name", "backbone"), FITTING)
def test_every_pretext_on_text_learns_and_its_views_follow_from_the_generator(name, backbone):
    pretext, batch = made(name, backbone), packed() if name != "mlm" else pairs()
    optimizer = torch.optim.AdamW(pretext.parameters(), lr=0.01)
    losses = []
    while len(losses) < 12 and (not losses or losses[-1] > 0.9 * losses[0]):
        output = pretext(pretext.views(batch, generator(7)))
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.item())
        assert all(not metric.requires_grad for metric in output.metrics.values())
    assert losses[-1] < 0.95 * losses[0], losses
    again = pretext.views(batch, generator(7))

    def tensors(views):
        return [
            each
            for each in torch.utils._pytree.tree_leaves(views)
            if isinstance(each, torch.Tensor)
        ]

    pairs_of = zip(tensors(again), tensors(pretext.views(batch, generator(7))), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs_of)


@pytest.mark.parametrize(
    ("name", "backbone", "options", "words"),
    [
        ("ltr", "bert", {}, "set backbone.causal: true"),
        ("ltr", "elmo", {}, "but 'elmo' lets every token see the next one"),
        ("mlm", "gpt", {}, "take pretext 'ltr'"),
        ("mlm", "causal", {}, "take pretext 'ltr'"),
        ("bilm", "bert", {}, "choose one that has it: elmo, lstm"),
        ("bilm", "lstm", {}, "bidirectional: true"),
        ("denoise", "gpt", {}, "is causal"),
    ],
)
def test_a_pretext_refuses_a_backbone_that_would_see_the_answer_or_nothing(
    name, backbone, options, words
):
    with pytest.raises(UserError, match=words):
        made(name, backbone, **options)


def test_classes_of_a_task_are_no_sentence_order():
    texts = build_labeled(
        [[5], [6]], None, torch.tensor([0, 1]), ("sorry", "glad"), TextSpec(TOKENIZER, 16)
    )
    assert made("mlm").arrange(texts, 0) is texts
    with pytest.raises(UserError, match="needs documents of several sentences"):
        made("mlm", nsp=True).arrange(texts, 0)
    for wrong in ({"nsp": True, "pairs": "drop"}, {"mask": 0.8, "replace": 0.3}):
        with pytest.raises(ValueError, match=r"needs pairs: keep|together 1 at most"):
            pretexts["mlm"].Options(**wrong)
