"""Pretext tasks on text: masking, losses against their formulas, and attention boundaries."""

import math

import pytest
import torch
import torch.nn.functional as F

from sslrun.backbones import build_backbone, token_head
from sslrun.backbones.token_head import TokenHead
from sslrun.data.examples import Batch
from sslrun.data.specs import TextSpec
from sslrun.data.text.sequences import IGNORED, Documents, Tokens, build_labeled
from sslrun.data.text.tokenizer import SPECIALS, Tokenizer, blank_tokenizer, build_wordpiece
from sslrun.errors import UserError
from sslrun.pretexts.base import pretexts
from sslrun.pretexts.language import entropy, following, preceding

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


def build_pretext(name, backbone="bert", length=128, tokenizer=TOKENIZER, **options):
    torch.manual_seed(0)
    kind, shape = BACKBONES[backbone]
    cls = pretexts[name]
    return cls(cls.Options(**options), build_backbone(kind, shape, TextSpec(tokenizer, length)))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pairs(lengths=((60, 65), (30, 5), (3, 2), (1, 1)), seed=1):
    """Return a batch of segment pairs of random words, padded to the longest pair."""
    draw = torch.Generator().manual_seed(seed)
    words = [
        [torch.randint(5, VOCAB, (n,), generator=draw).tolist() for n in side]
        for side in zip(*lengths, strict=True)
    ]
    labels = torch.arange(len(lengths)) % 2
    (batch,) = build_labeled(*words, labels, ("next", "random"), TextSpec(TOKENIZER, 256)).batches(
        [torch.arange(len(lengths))], torch.device("cpu")
    )
    return batch


def packed(lengths=(20, 3, 40, 10, 5, 60, 8, 9, 30), length=64, seed=2):
    """Return a batch of packed sequences, each with several documents."""
    draw = torch.Generator().manual_seed(seed)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    ids = torch.randint(5, VOCAB, (int(starts[-1]),), generator=draw, dtype=torch.int32)
    corpus = Documents(
        ids, starts, torch.arange(len(lengths) + 1), TextSpec(TOKENIZER, length)
    ).pack()
    (batch,) = corpus.batches([torch.arange(len(corpus))], torch.device("cpu"))
    assert (batch.inputs.documents.amax(dim=1) > 1).all()
    return batch


def unpadded(ids):
    return Batch(Tokens(ids, torch.zeros_like(ids), torch.ones_like(ids)), None)


# ---------------------------------------------------------------- masking


def test_the_number_of_masked_tokens_is_pythons_round_at_every_length():
    # In float32, 0.15 * 190 is above 28.5 and would round to 29.
    ids = torch.randint(5, VOCAB, (512, 512), generator=generator())
    lengths = torch.arange(1, 513)
    real = (torch.arange(512) < lengths[:, None]).long()
    views = build_pretext("mlm").views(
        Batch(Tokens(ids, torch.zeros_like(ids), real), None), generator()
    )
    assert (views.targets != IGNORED).sum(dim=1).tolist() == [
        max(1, round(n * 0.15)) for n in lengths.tolist()
    ]


@pytest.mark.parametrize("rate", [0.15, 0.4])
def test_each_sequence_has_exactly_the_rate_masked_and_no_special_token(rate):
    batch, mlm = pairs(), build_pretext("mlm", rate=rate)
    for seed in range(20):
        views = mlm.views(batch, generator(seed))
        is_target = views.targets != IGNORED
        # BERT masks max(1, round(len(tokens) * rate)). The length includes special tokens, but
        # only words can be masked.
        token_counts = batch.inputs.real.sum(dim=1).tolist()
        word_counts = (batch.inputs.ids >= len(SPECIALS)).sum(dim=1).tolist()
        expected = [
            min(max(1, round(tokens * rate)), words)
            for tokens, words in zip(token_counts, word_counts, strict=True)
        ]
        assert is_target.sum(dim=1).tolist() == expected
        truth = batch.inputs.ids.gather(1, views.places)
        assert torch.equal(views.targets[is_target], truth[is_target])
        assert (views.targets[is_target] >= len(SPECIALS)).all()
        assert all(
            len(set(row[real].tolist())) == real.sum()
            for row, real in zip(views.places, is_target, strict=True)
        )
        changed = views.tokens.ids != batch.inputs.ids
        chosen = torch.zeros_like(changed).scatter(1, views.places, is_target)
        assert not (changed & ~chosen).any()


def test_every_position_is_masked_equally_often():
    batch, mlm = (
        unpadded(torch.randint(5, VOCAB, (400, 40), generator=generator(3))),
        build_pretext("mlm"),
    )
    counts = torch.zeros(40)
    for seed in range(20):
        views = mlm.views(batch, generator(seed))
        counts += torch.bincount(views.places[views.targets != IGNORED], minlength=40)
    expected = 20 * 400 * 6 / 40
    assert (counts - expected).abs().max() < 5 * expected**0.5


def test_of_the_targets_80_percent_become_mask_10_are_random_and_10_stay():
    batch, mlm = (
        unpadded(torch.randint(5, VOCAB, (2000, 40), generator=generator(3))),
        build_pretext("mlm"),
    )
    views = mlm.views(batch, generator())
    is_target = views.targets != IGNORED
    shown = views.tokens.ids.gather(1, views.places)[is_target]
    truth = views.targets[is_target]
    count = int(is_target.sum())
    assert count == 2000 * 6
    masked = shown == TOKENIZER.mask
    error = 4 * (0.25 / count) ** 0.5
    # A random word may be [MASK] or the word itself, as in BERT's code.
    assert masked.float().mean().item() == pytest.approx(0.8 + 0.1 / VOCAB, abs=error)
    assert (shown == truth).float().mean().item() == pytest.approx(0.1 + 0.1 / VOCAB, abs=error)
    random = shown[~masked & (shown != truth)]
    assert len(random.unique()) > 0.9 * VOCAB
    half_masked = build_pretext("mlm", mask=0.5, replace=0.5).views(batch, generator())
    half_shown = half_masked.tokens.ids.gather(1, half_masked.places)[
        half_masked.targets != IGNORED
    ]
    assert (half_shown == TOKENIZER.mask).float().mean().item() == pytest.approx(0.5, abs=0.02)
    assert (half_shown == half_masked.targets[half_masked.targets != IGNORED]).float().mean() < 0.03


def test_dynamic_masks_differ_per_draw_and_static_masks_per_sequence():
    batch = pairs()
    dynamic, static = build_pretext("mlm"), build_pretext("mlm", masking="static")
    drawn, redrawn = (dynamic.views(batch, generator(seed)).tokens.ids for seed in (0, 1))
    assert not torch.equal(drawn, redrawn)
    assert torch.equal(drawn, dynamic.views(batch, generator(0)).tokens.ids)
    one, other = (static.views(batch, generator(seed)) for seed in (0, 1))
    assert torch.equal(one.tokens.ids, other.tokens.ids)
    assert torch.equal(one.targets, other.targets)
    is_target = one.targets != IGNORED
    assert is_target.sum(dim=1).tolist() == [19, 6, 1, 1]
    # A sequence has the same mask in every batch, and other sequences have other masks.
    # The rates stay the same.
    many = unpadded(torch.randint(5, VOCAB, (2000, 40), generator=generator(3)))
    views = static.views(many, generator())
    alone = static.views(unpadded(many.inputs.ids[7:8]), generator())
    assert torch.equal(alone.tokens.ids[0], views.tokens.ids[7])
    assert not torch.equal(views.places[0], views.places[1])
    is_target = views.targets != IGNORED
    assert (views.tokens.ids == TOKENIZER.mask).sum() / is_target.sum() == pytest.approx(
        0.801, abs=0.02
    )
    counts = torch.bincount(views.places[is_target], minlength=40).float()
    assert (counts - 300).abs().max() < 5 * 300**0.5
    # The mask is independent of the padding, which depends on the longest sequence of the batch.
    short, long = (
        static.views(pairs(((30, 5), lengths)), generator()).tokens.ids[0]
        for lengths in ((30, 10), (30, 80))
    )
    assert len(short) < len(long)
    assert torch.equal(short[:38], long[:38])


def test_dupes_multiply_the_number_of_sequences():
    sentences = torch.arange(0, 601, 6)
    corpus = Documents(
        torch.arange(600, dtype=torch.int32) % 90 + 5,
        sentences,
        torch.arange(0, 101, 10),
        TextSpec(TOKENIZER, 32),
    )
    once, thrice = (
        build_pretext("mlm", dupes=dupes, length=32).arrange(corpus, 0) for dupes in (1, 3)
    )
    assert len(thrice) > 2.5 * len(once)
    assert len(build_pretext("mlm", dupes=3, pairs="drop", length=32).arrange(corpus, 0)) > 2.5 * (
        600 // 32
    )


def test_whole_word_masking_never_splits_a_word():
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
            piece
            for index in torch.randint(4, (40,), generator=draw).tolist()
            for piece in words[index]
        ]
        rows.append([tokenizer.cls, *row[:62], tokenizer.sep])
    ids = torch.tensor(rows)
    mlm = build_pretext("mlm", tokenizer=tokenizer, whole_words=True, mask=1.0, replace=0.0)
    views = mlm.views(unpadded(ids), generator())
    chosen = torch.zeros_like(ids, dtype=torch.bool).scatter(
        1, views.places, views.targets != IGNORED
    )
    begins = ~tokenizer.continues[ids]
    word = begins.cumsum(dim=1)
    split_words = 0
    for row in range(len(ids)):
        for number in word[row].unique().tolist():
            split_words += len(set(chosen[row][word[row] == number].tolist())) > 1
    assert split_words == 0
    counts = chosen.sum(dim=1)
    assert counts.max() == round(64 * 0.15)
    assert (counts == 10).float().mean() > 0.9  # shorter words fill what remains
    assert chosen[:, 1:-4].float().mean(dim=0).std() < 0.05
    # Sequences of single-piece words have the usual number of targets.
    single = mlm.views(unpadded(torch.full((4, 40), 5)), generator())
    assert (single.targets != IGNORED).sum(dim=1).tolist() == [6] * 4
    # If the only word exceeds the budget, there are no targets and the loss is 0.
    lone = torch.tensor([[tokenizer.cls, 10, 11, 11, 11, tokenizer.sep]])
    assert mlm(mlm.views(unpadded(lone), generator())).loss.item() == 0


# ---------------------------------------------------------------- losses


def test_the_masked_loss_equals_its_formula_and_is_computed_at_targets_only(monkeypatch):
    mlm, batch = build_pretext("mlm").double(), pairs()
    shapes = []
    views = mlm.views(batch, generator())
    original = TokenHead.loss
    monkeypatch.setattr(
        TokenHead,
        "loss",
        lambda self, x, *arguments: shapes.append(x.shape) or original(self, x, *arguments),
    )
    output = mlm(views)
    assert shapes == [(4, round(128 * 0.15), 16)]
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
    # The head has no output matrix: it uses the embedding. The softmax gives a gradient to words
    # that do not occur in the text, too.
    assert [name for name, _ in head.named_parameters()] == [
        "bias",
        "dense.weight",
        "dense.bias",
        "norm.weight",
        "norm.bias",
    ]
    output.loss.backward()
    assert (mlm.backbone.token_embed.weight.grad.abs().sum(dim=1) > 0).all()


def test_next_sentence_prediction_is_added_and_reported_separately():
    mlm, batch = build_pretext("mlm", nsp=True).double(), pairs()
    views = mlm.views(batch, generator())
    output = mlm(views)
    pooled = mlm.backbone(views.tokens).pooled
    scores = pooled @ mlm.nsp.weight.T + mlm.nsp.bias
    expected = -(scores.log_softmax(dim=1)[torch.arange(4), batch.labels]).mean().item()
    assert output.metrics["nsp_loss"].item() == pytest.approx(expected, rel=1e-6)
    parts = output.metrics["mlm_loss"] + output.metrics["nsp_loss"]
    assert output.loss.item() == pytest.approx(parts.item(), rel=1e-6)
    assert set(output.metrics) == {"mlm_loss", "mlm_accuracy", "nsp_loss", "nsp_accuracy"}
    # Without the NSP loss, the pair layout stays unless `pairs: drop` removes it. RoBERTa
    # (arXiv:1907.11692) suspects that BERT's ablation kept it.
    plain_mlm = build_pretext("mlm")
    assert plain_mlm.nsp is None
    assert set(plain_mlm(views).metrics) == {"mlm_loss", "mlm_accuracy"}
    corpus = Documents(
        torch.arange(600, dtype=torch.int32) % 90 + 5,
        torch.arange(0, 601, 6),
        torch.arange(0, 101, 10),
        TextSpec(TOKENIZER, 32),
    )
    kept, dropped = (
        build_pretext("mlm", pairs=pairs, length=32).arrange(corpus, 0)
        for pairs in ("keep", "drop")
    )
    assert torch.equal(
        kept.ranges, build_pretext("mlm", nsp=True, length=32).arrange(corpus, 0).ranges
    )
    assert type(dropped).__name__ == "Packed"


def test_the_held_out_loss_uses_15_percent_masking_and_excludes_nsp():
    batch = pairs()
    reference = build_pretext("mlm").eval()
    views = reference.views(batch, generator(3))
    mlm = build_pretext("mlm", rate=0.4, nsp=True).eval()
    mlm.backbone.load_state_dict(reference.backbone.state_dict())
    mlm.head.load_state_dict(reference.head.state_dict())
    held_out = mlm.held_out(batch, generator(3))
    assert held_out["held_out_loss"].item() == pytest.approx(reference(views).loss.item(), rel=1e-6)
    assert {"held_out_mlm_accuracy", "held_out_nsp_loss", "held_out_nsp_accuracy"} < set(held_out)


def test_the_floor_is_the_unigram_entropy():
    corpus = Documents(
        torch.tensor([5] * 4 + [6] * 2 + [7] * 2, dtype=torch.int32),
        torch.tensor([0, 4, 8]),
        torch.arange(3),
        TextSpec(TOKENIZER, 16),
    )
    assert build_pretext("ltr", "gpt").floor(corpus) == pytest.approx(1.5 * math.log(2))
    assert build_pretext("mlm", mask=1.0, replace=0.0).floor(corpus) == pytest.approx(
        1.5 * math.log(2)
    )
    assert (
        build_pretext("mlm").floor(build_labeled([[5]], None, None, (), TextSpec(TOKENIZER, 16)))
        is None
    )


def test_the_masked_floor_accounts_for_visible_targets():
    shares = torch.tensor([0.0, 0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    joint = torch.zeros(
        5, 6, dtype=torch.float64
    )  # (true token, shown token); the last column is [MASK]
    joint[:, 5] = 0.8 * shares
    joint[:, :5] = 0.1 * shares.diag() + 0.1 * shares[:, None] / 5
    best = -torch.xlogy(joint, joint / joint.sum(dim=0)).sum().item()
    assert build_pretext("mlm").without_context(shares) == pytest.approx(best)
    assert best < entropy(shares)


def test_the_denoising_floor_counts_sentinels_and_separator():
    pretext = build_pretext("denoise", rate=0.3, span=3.0)
    hidden = round(0.3 * (pretext.backbone.spec.length - 2))
    counts = torch.tensor([hidden / 2, hidden / 2, round(hidden / 3), 1.0])
    assert pretext.without_context(torch.tensor([0.5, 0.5])) == pytest.approx(
        entropy(counts / counts.sum()), rel=1e-6
    )


def test_the_loss_is_the_mean_over_targets_and_zero_without_targets():
    head, x = TokenHead(5, 7, None), torch.randn(2, 3, 5, generator=generator())
    log_probabilities = head(x, None).log_softmax(-1)
    targets = torch.tensor(
        [
            [1, IGNORED, int(log_probabilities[0, 2].argmax())],
            [IGNORED, IGNORED, int(log_probabilities[1, 2].argmin())],
        ]
    )
    loss, right = head.loss(x, None, targets)
    total = (
        log_probabilities[0, 0, 1] + log_probabilities[0, 2].max() + log_probabilities[1, 2].min()
    )
    assert loss.item() == pytest.approx(-total.item() / 3, rel=1e-5)
    assert right.item() == pytest.approx((1 + int(log_probabilities[0, 0].argmax() == 1)) / 3)
    assert head.loss(x, None, torch.full((2, 3), IGNORED))[0].item() == 0


@pytest.mark.parametrize("tied", [False, True])
def test_a_loss_computed_in_chunks_equals_the_whole(tied, monkeypatch):
    head = TokenHead(5, 7, 4 if tied else None)
    table = torch.randn(7, 4, generator=generator(2), requires_grad=True) if tied else None
    targets = torch.randint(0, 7, (4, 6), generator=generator(1))
    targets[0, :5] = IGNORED

    def loss_and_gradients(scores):
        monkeypatch.setattr(token_head, "CPU_SCORES", scores)
        x = torch.randn(4, 6, 5, generator=generator(), requires_grad=True)
        loss, right = head.loss(x, table, targets)
        leaves = [x, *head.parameters(), *([table] if tied else [])]
        return loss, right, *torch.autograd.grad(loss, leaves)

    for whole, part in zip(loss_and_gradients(7 * 24), loss_and_gradients(7 * 5), strict=True):
        torch.testing.assert_close(whole, part)
    with torch.autocast("cpu", torch.bfloat16):
        for whole, part in zip(loss_and_gradients(7 * 24), loss_and_gradients(7 * 5), strict=True):
            torch.testing.assert_close(whole, part, rtol=0.05, atol=0.05)


# ---------------------------------------------------------------- left to right and bidirectional


@pytest.mark.parametrize("backbone", ["causal", "gpt", "lstm"])
def test_ltr_features_depend_on_no_later_token(backbone):
    ltr = build_pretext("ltr", backbone).eval()
    ids = torch.randint(5, VOCAB, (1, 12), generator=generator(1))
    for place in (0, 5, 11):
        features, embedded = embed_with_gradient(ltr.backbone, unpadded(ids).inputs)
        features.tokens[
            0, place, :3
        ].sum().backward()  # the sum over a layer norm's whole output has no gradient
        assert [bool(gradient.abs().sum() > 0) for gradient in embedded.grad[0]] == [
            position <= place for position in range(12)
        ]


def embed_with_gradient(backbone, tokens):
    """Return a backbone's features and its embedded tokens (B, T, E) with retained gradient."""
    kept = []
    handle = backbone.token_embed.register_forward_hook(
        lambda module, inputs, output: kept.append(output) or output.retain_grad()
    )
    features = backbone(tokens)
    handle.remove()
    return features, kept[0]


def test_ltr_predicts_every_token_except_each_documents_first():
    batch = pairs()
    real = batch.inputs.real
    targets = following(batch.inputs)
    ids = batch.inputs.ids
    for row in range(4):
        size = int(real[row].sum())
        assert targets[row].tolist() == [
            *ids[row, 1:size].tolist(),
            *[IGNORED] * (ids.shape[1] - size + 1),
        ]
    views = packed().inputs
    targets, previous = following(views), preceding(views)
    last = F.pad(views.documents.diff(dim=1) != 0, (0, 1), value=True)
    assert torch.equal(targets == IGNORED, last)
    assert torch.equal(targets[~last], views.ids[:, 1:][~last[:, :-1]])
    first = F.pad(last[:, :-1], (1, 0), value=True)
    assert torch.equal(previous == IGNORED, first)
    assert torch.equal(previous[~first], views.ids[:, :-1][~first[:, 1:]])


def test_the_ltr_loss_equals_its_formula():
    ltr, batch = build_pretext("ltr", "causal").double(), pairs()
    output = ltr(ltr.views(batch, generator()))
    scores = ltr.head(ltr.backbone(batch.inputs).tokens, ltr.backbone.embedding).log_softmax(-1)
    targets = following(batch.inputs)
    terms = [
        -scores[row, position, targets[row, position]]
        for row, position in (targets != IGNORED).nonzero().tolist()
    ]
    assert len(terms) == int(batch.inputs.real.sum()) - 4
    assert output.loss.item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-6)


@pytest.mark.parametrize("backbone", ["both", "elmo"])
def test_each_half_of_a_bidirectional_lm_sees_one_side(backbone):
    bilm = build_pretext("bilm", backbone).eval()
    ids = torch.randint(5, VOCAB, (1, 10), generator=generator(1))
    changed = ids.clone()
    changed[0, 6] = (ids[0, 6] - 4) % 90 + 5
    one, other = (
        bilm.backbone(unpadded(tokens).inputs).tokens[0].chunk(2, dim=-1)
        for tokens in (ids, changed)
    )
    differs = [(a - b).abs().sum(dim=1) > 0 for a, b in zip(one, other, strict=True)]
    assert differs[0].tolist() == [position >= 6 for position in range(10)]
    assert differs[1].tolist() == [position <= 6 for position in range(10)]
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
def test_documents_attend_to_each_other_only_with_cross_documents(name, backbone):
    batch = packed()
    for crossing in (False, True):
        pretext = build_pretext(name, backbone, pairs="drop", cross_documents=crossing).eval()
        tokens = pretext.tokens(batch)
        features, embedded = embed_with_gradient(pretext.backbone, tokens)
        row = 0
        first = batch.inputs.documents[row] == 1
        features.tokens[row][~first][:, :3].sum().backward()
        assert bool(embedded.grad[row][first].abs().sum() > 0) == crossing
        assert embedded.grad[row][~first].abs().sum() > 0


def test_packed_lstm_states_equal_those_of_single_documents():
    backbone = build_pretext("bilm", "both").backbone.eval()
    tokens = packed().inputs
    whole = backbone(tokens)
    row = 1
    for number in tokens.documents[row].unique().tolist():
        place = tokens.documents[row] == number
        alone = backbone(unpadded(tokens.ids[row, place][None]).inputs)
        for a, b in zip(whole.layers, alone.layers, strict=True):
            torch.testing.assert_close(a[row, place], b[0])


# ---------------------------------------------------------------- encoder and decoder


def undo_corruption(corrupted, target):
    """Return the text before corruption: replace each [MASK] by the target's tokens for it."""
    spans = []
    for token in target:
        if token == TOKENIZER.mask:
            spans.append([])
        else:
            spans[-1].append(token)
    text = []
    for token in corrupted:
        text += spans.pop(0) if token == TOKENIZER.mask else [token]
    assert not spans
    return text


@pytest.mark.parametrize("make", [pairs, packed])
@pytest.mark.parametrize("shape", [{}, {"rate": 0.5, "span": 1.0}, {"rate": 0.3, "span": 6.0}])
def test_denoising_input_and_target_rebuild_the_text(make, shape):
    batch, denoise = make(), build_pretext("denoise", **shape)
    for seed in range(10):
        views = denoise.views(batch, generator(seed))
        for row in range(len(batch.inputs.ids)):
            corrupted = views.tokens.ids[row][views.tokens.real[row]].tolist()
            target = views.targets[row][views.targets[row] != IGNORED].tolist()
            assert target[-1] == TOKENIZER.sep
            assert (
                undo_corruption(corrupted, target[:-1])
                == batch.inputs.ids[row][batch.inputs.real[row]].tolist()
            )
            assert corrupted.count(TOKENIZER.sep) == (batch.inputs.ids[row] == TOKENIZER.sep).sum()
        documents, decoder_ids = views.documents, views.decoder_ids
        begins = documents.diff(dim=1, prepend=torch.zeros_like(documents[:, :1])) != 0
        inside = (documents > 0) & ~begins
        assert (decoder_ids[begins & (documents > 0)] == TOKENIZER.cls).all()
        assert torch.equal(decoder_ids[inside], views.targets.roll(1, dims=1)[inside])
        output = denoise(views)
        assert output.loss.isfinite()
        output.loss.backward()


def test_denoising_spans_have_t5s_rate_and_length():
    batch, denoise = (
        unpadded(torch.randint(5, VOCAB, (200, 100), generator=generator(3))),
        build_pretext("denoise"),
    )
    views = denoise.views(batch, generator())
    marks = (views.tokens.ids == TOKENIZER.mask).sum(dim=1)
    assert marks.tolist() == [5] * 200
    assert (views.tokens.real.sum(dim=1) == 100 - 15 + 5).all()
    starts = torch.stack([(row == TOKENIZER.mask).nonzero()[:, 0] for row in views.tokens.ids])
    assert starts[:, :-1].float().std(dim=0).min() > 5  # the last span ends the sequence, as in T5


def test_the_decoder_sees_its_documents_text_and_its_own_past():
    denoise = build_pretext("denoise").eval()
    views = denoise.views(packed(), generator())
    row = next(row for row in range(len(views.decoder_ids)) if views.documents[row].max() > 1)
    scores = []
    handle = denoise.decoder.head.dense.register_forward_hook(
        lambda module, inputs, output: scores.append(inputs[0])
    )
    kept = []
    denoise.decoder.blocks[0].register_forward_pre_hook(
        lambda module, inputs: kept.append(inputs[0]) or inputs[0].retain_grad()
    )
    encoded = []
    denoise.backbone.token_embed.register_forward_hook(
        lambda module, inputs, output: encoded.append(output) or output.retain_grad()
    )
    denoise(views)
    handle.remove()
    documents = views.documents[row]
    second = (documents == documents.max()).nonzero()[:, 0]
    place = int(second[min(1, len(second) - 1)])
    scores[0][row, place, :3].sum().backward()
    sees_decoder = kept[0].grad[row].abs().sum(dim=1) > 0
    assert sees_decoder.tolist() == [
        bool(documents[position] == documents[place]) and position <= place
        for position in range(len(documents))
    ]
    sees_encoder = encoded[0].grad[row].abs().sum(dim=1) > 0
    assert torch.equal(sees_encoder, views.tokens.documents[row] == documents[place])


def test_encoder_decoder_and_softmax_share_one_embedding():
    denoise = build_pretext("denoise")
    assert sum(tuple(parameter.shape) == (VOCAB, 16) for parameter in denoise.parameters()) == 1
    loss = denoise(denoise.views(packed(), generator())).loss
    loss.backward()
    assert (
        denoise.backbone.embedding.grad.abs().sum(dim=1) > 0
    ).all()  # the softmax reaches every row
    other = build_pretext(
        "denoise", "both"
    )  # embeddings of half the feature width need a table of their own
    assert other.decoder.table.weight.shape == (VOCAB, 32)


# ---------------------------------------------------------------- all pretexts


FITTING = [
    ("mlm", "bert"),
    ("mlm", "both"),
    ("mlm", "elmo"),
    ("ltr", "causal"),
    ("ltr", "gpt"),
    ("ltr", "lstm"),
    ("bilm", "elmo"),
    ("denoise", "bert"),
    ("denoise", "fast"),
]


@pytest.mark.parametrize(("name", "backbone"), FITTING)
def test_every_pretext_on_text_learns_and_its_views_follow_from_the_generator(name, backbone):
    pretext, batch = build_pretext(name, backbone), packed() if name != "mlm" else pairs()
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
            leaf
            for leaf in torch.utils._pytree.tree_leaves(views)
            if isinstance(leaf, torch.Tensor)
        ]

    tensor_pairs = zip(tensors(again), tensors(pretext.views(batch, generator(7))), strict=True)
    assert all(torch.equal(a, b) for a, b in tensor_pairs)


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
def test_a_pretext_rejects_a_backbone_with_unsuitable_attention(name, backbone, options, words):
    with pytest.raises(UserError, match=words):
        build_pretext(name, backbone, **options)


def test_class_labels_are_not_used_as_sentence_order():
    texts = build_labeled(
        [[5], [6]], None, torch.tensor([0, 1]), ("sorry", "glad"), TextSpec(TOKENIZER, 16)
    )
    assert build_pretext("mlm").arrange(texts, 0) is texts
    with pytest.raises(UserError, match="needs documents of several sentences"):
        build_pretext("mlm", nsp=True).arrange(texts, 0)
    for options in ({"nsp": True, "pairs": "drop"}, {"mask": 0.8, "replace": 0.3}):
        with pytest.raises(ValueError, match=r"needs pairs: keep|together 1 at most"):
            pretexts["mlm"].Options(**options)
