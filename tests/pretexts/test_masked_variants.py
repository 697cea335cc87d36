"""GPT-BERT, ELECTRA, masked diffusion and SimCSE: losses against their formulas, in float64."""

import pytest
import torch

from sslrun.backbones import build_backbone, token_head
from sslrun.data.examples import Batch
from sslrun.data.specs import TextSpec
from sslrun.data.text.sequences import IGNORED, Documents, Tokens, build_labeled
from sslrun.data.text.tokenizer import blank_tokenizer
from sslrun.errors import UserError
from sslrun.pretexts.base import pretexts
from sslrun.pretexts.diffusion import spread_rates
from sslrun.pretexts.language import following
from sslrun.pretexts.mocov3 import match

VOCAB = 60
SPEC = TextSpec(blank_tokenizer(VOCAB), 48)
SHAPE = {"depth": 2, "width": 16, "heads": 2, "positions": 48, "dropout": 0.0}


def build(name, backbone="bert-tiny", shape=SHAPE, **options):
    torch.manual_seed(0)
    cls = pretexts[name]
    return cls(cls.Options(**options), build_backbone(backbone, shape, SPEC)).double()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def texts(lengths=(40, 30, 22, 9)):
    """Return a batch of padded sequences of random words."""
    draw = generator(1)
    words = [torch.randint(5, VOCAB, (n,), generator=draw).tolist() for n in lengths]
    (batch,) = build_labeled(words, None, None, (), SPEC).batches(
        [torch.arange(len(lengths))], torch.device("cpu")
    )
    return batch


def packed():
    """Return a batch of packed sequences, each with several documents."""
    lengths = torch.tensor([0, 20, 3, 40, 10, 5, 60, 8, 9, 30])
    starts = lengths.cumsum(0)
    ids = torch.randint(5, VOCAB, (int(starts[-1]),), generator=generator(2), dtype=torch.int32)
    corpus = Documents(ids, starts, torch.arange(len(lengths)), SPEC).pack()
    (batch,) = corpus.batches([torch.arange(len(corpus))], torch.device("cpu"))
    return batch


def log_probs(pretext, features):
    """Log-probabilities of BERT's head, written out."""
    head, table = pretext.head, pretext.backbone.embedding
    x = torch.nn.functional.gelu(features @ head.dense.weight.T + head.dense.bias)
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-12).sqrt()
    return (x @ table.T + head.bias).log_softmax(-1)


# ---------------------------------------------------------------- GPT-BERT


@pytest.mark.parametrize("make", [texts, packed])
def test_hidden_tokens_are_predicted_at_the_place_before_them(make):
    batch, pretext = make(), build("gpt-bert", rate=0.3, mask=1.0, replace=0.0)
    whole = pretext._hide_next(batch.inputs, generator(), 0.3)
    rows, columns = (whole.targets != IGNORED).nonzero().unbind(1)
    places = whole.places[rows, columns]
    assert len(rows) > 20
    assert torch.equal(whole.targets[rows, columns], batch.inputs.ids[rows, places + 1])
    assert (whole.tokens.ids[rows, places + 1] == SPEC.tokenizer.mask).all()
    documents = batch.inputs.documents
    assert torch.equal(documents[rows, places], documents[rows, places + 1])


def test_the_gpt_bert_loss_weights_both_parts_by_their_sequences():
    batch, pretext = texts(), build("gpt-bert", causal=0.3)
    views = pretext.views(batch, generator(3))
    assert (len(views.causal.ids), len(views.masked.tokens.ids)) == (1, 3)
    output = pretext(views)
    features = pretext.backbone(views.masked.tokens).tokens
    terms = [
        -log_probs(pretext, features[row, place])[target]
        for row in range(3)
        for place, target in zip(views.masked.places[row], views.masked.targets[row], strict=True)
        if target != IGNORED
    ]
    masked = torch.stack(terms).mean().item()
    scores, after = (
        log_probs(pretext, pretext.backbone(views.causal).tokens),
        following(views.causal),
    )
    terms = [-scores[0, place, after[0, place]] for place in (after[0] != IGNORED).nonzero()]
    causal = torch.cat(terms).mean().item()
    assert output.metrics["masked_loss"].item() == pytest.approx(masked, rel=1e-6)
    assert output.metrics["causal_loss"].item() == pytest.approx(causal, rel=1e-6)
    assert output.loss.item() == pytest.approx(0.75 * masked + 0.25 * causal, rel=1e-6)
    counts = [len(build("gpt-bert", causal=share).views(batch, generator()).causal.ids)
              for share in (0.01, 0.5, 0.99)]  # fmt: skip
    assert counts == [1, 2, 3]
    alone = Batch(batch.inputs.subset(torch.arange(1)), None)
    assert set(pretext(pretext.views(alone, generator())).metrics) == {
        "masked_loss", "masked_accuracy"}  # fmt: skip
    assert pretext.held_out(batch, generator()).keys() >= {"held_out_loss", "held_out_causal_loss"}


def test_one_network_reads_from_the_left_or_from_both_sides():
    backbone = build("gpt-bert").backbone.eval()
    tokens = packed().inputs
    changed = tokens._replace(ids=tokens.ids.clone())
    changed.ids[:, 30] = (tokens.ids[:, 30] + 1) % VOCAB
    before = (tokens.documents == tokens.documents[:, 30:31]) & (torch.arange(48) < 30)
    for causal in (False, True):
        one, other = (backbone(each._replace(causal=causal)).tokens for each in (tokens, changed))
        assert ((one - other)[before].abs().amax(dim=1) > 0).all() == (not causal)
    left = build_backbone("bert-tiny", {**SHAPE, "causal": True}, SPEC).double().eval()
    left.load_state_dict(backbone.state_dict())
    causal = backbone(tokens._replace(causal=True))
    assert torch.equal(causal.tokens, left(tokens).tokens)
    assert torch.equal(causal.read, left(tokens).read)


@pytest.mark.parametrize(
    ("backbone", "shape", "words"),
    [
        ("gpt-tiny", {"positions": 48}, "take pretext 'ltr', or a backbone that is not causal"),
        ("lstm", {"width": 8, "bidirectional": True}, "choose one that has it: bert-base"),
    ],
)
def test_gpt_bert_needs_a_backbone_of_both_kinds(backbone, shape, words):
    with pytest.raises(UserError, match=words):
        build("gpt-bert", backbone, shape)


# ---------------------------------------------------------------- ELECTRA


@pytest.mark.parametrize("fast", [False, True])
def test_the_electra_loss_equals_its_formula(fast):
    batch, pretext = texts(), build("electra", shape={**SHAPE, "fast": fast}, weight=7.0, rate=0.3)
    views = pretext.views(batch, generator(3))
    output = pretext(views)
    masked, chosen = views.masked, views.masked.targets != IGNORED
    assert ((masked.tokens.ids == batch.inputs.ids) | (masked.tokens.ids == 4)).all()
    generator_, table = pretext.generator, pretext.backbone.token_embed.weight
    scores = generator_.head(generator_(pretext.backbone, masked), table).log_softmax(-1)
    mlm = -scores[chosen].gather(1, masked.targets[chosen][:, None]).mean().item()
    ids = batch.inputs.ids.clone()
    for row, slot in chosen.nonzero().tolist():
        reached = scores[row, slot].exp().float().cumsum(0)
        drawn = int((reached <= views.noise[row, slot]).sum())
        ids[row, masked.places[row, slot]] = drawn
    replaced, real = ids != batch.inputs.ids, batch.inputs.real
    features = pretext.backbone(batch.inputs._replace(ids=ids)).tokens
    first, _, last = pretext.detector
    hidden = torch.nn.functional.gelu(features @ first.weight.T + first.bias)
    odds = (hidden @ last.weight.T + last.bias)[..., 0].sigmoid()
    terms = torch.where(replaced, odds.log(), (1 - odds).log())[real]
    assert 0 < replaced.sum() <= chosen.sum()
    assert output.metrics["generator_loss"].item() == pytest.approx(mlm, rel=1e-6)
    assert output.metrics["detection_loss"].item() == pytest.approx(-terms.mean().item(), rel=1e-5)
    assert output.loss.item() == pytest.approx(mlm - 7 * terms.mean().item(), rel=1e-5)
    share = replaced.sum() / real.sum()
    assert output.metrics["replaced"].item() == pytest.approx(share.item())
    assert pretext.generator.blocks[0].attn.qkv.weight.shape == (12, 4)  # a quarter of the width
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in generator_.parameters())
    assert pretext.kept is pretext.backbone
    assert pretext.floor(None) is None


def test_no_gradient_of_detection_reaches_the_generator_through_the_draw():
    pretext = build("electra")
    views = pretext.views(texts(), generator())
    loss, metrics = pretext(views)
    assert loss.item() == pytest.approx(
        metrics["generator_loss"].item() + 50 * metrics["detection_loss"].item(), rel=1e-6
    )
    with_detection = torch.autograd.grad(loss, list(pretext.generator.parameters()))
    pretext.options = pretext.options.model_copy(update={"weight": 1e-9})
    without = torch.autograd.grad(pretext(views).loss, list(pretext.generator.parameters()))
    for one, other in zip(with_detection, without, strict=True):
        torch.testing.assert_close(one, other)


def test_tokens_are_drawn_with_their_probabilities(monkeypatch):
    head = build("electra").generator.head.float()
    x, table = torch.randn(1, 4), torch.randn(VOCAB, 16)
    expected = head(x, table).softmax(-1)[0]
    noise = torch.rand(40_000, generator=generator())
    monkeypatch.setattr(token_head, "CPU_SCORES", 999 * VOCAB)
    drawn = head.draw(x.expand(40_000, 4), table, noise)
    shares = drawn.bincount(minlength=VOCAB) / 40_000
    assert (shares - expected).abs().max() < 5 * (expected.max() / 40_000).sqrt()
    assert head.draw(x, table, torch.tensor([1 - 2**-24])).max() < VOCAB


# ---------------------------------------------------------------- masked diffusion


def test_rates_are_spread_over_the_unit_interval():
    rates = torch.stack(
        [spread_rates(8, generator(seed), torch.device("cpu")) for seed in range(500)]
    )
    cells = ((rates - 1e-3) / (1 - 1e-3) * 8).floor().long()
    assert (cells.sort(dim=1).values == torch.arange(8)).all()
    assert rates.mean(dim=0) == pytest.approx(torch.full((8,), 0.5005), abs=0.06)  # in any order
    assert rates.max() <= 1


@pytest.mark.parametrize("scores", [2**23, 7 * VOCAB])
def test_the_diffusion_loss_equals_its_formula(scores, monkeypatch):
    monkeypatch.setattr(token_head, "CPU_SCORES", scores)
    batch, pretext = texts(), build("diffusion")
    views = pretext.views(batch, generator(3))
    ids, mask = batch.inputs.ids, SPEC.tokenizer.mask
    hidden = views.tokens.ids == mask
    assert torch.equal(views.targets != IGNORED, hidden)
    assert not (hidden & ((ids < 5) | ~batch.inputs.real)).any()
    assert torch.equal(torch.where(hidden, views.targets, views.tokens.ids), ids)
    features = pretext.backbone(views.tokens).tokens
    head = pretext.head
    x = head.norm(torch.nn.functional.gelu(head.dense(features)))
    raw = x @ pretext.backbone.embedding.T + head.bias
    raw[..., mask] = float("-inf")
    terms = raw.log_softmax(-1).gather(2, ids[..., None])[..., 0]
    total = -(terms * hidden / (1 / views.weights)).masked_fill(~hidden, 0).sum()
    loss, metrics = pretext(views)
    words = 40 + 30 + 22 + 9
    assert loss.item() == pytest.approx(total.item() / words, rel=1e-5)
    assert metrics["nats_per_token"].item() == loss.item()
    parameters = [*head.parameters(), pretext.backbone.embedding]
    for one, other in zip(
        torch.autograd.grad(loss, parameters, retain_graph=True),
        torch.autograd.grad(total / words, parameters),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_the_bound_of_a_model_that_knows_frequencies_is_their_entropy():
    """In expectation over rates and masks, the loss of a constant prediction is its entropy."""
    pretext = build("diffusion")
    shares = torch.rand(VOCAB, generator=generator()).double()
    shares[:5] = 0
    shares /= shares.sum()
    with torch.no_grad():
        pretext.head.norm.weight.zero_()
        pretext.head.bias.copy_(shares.log().clamp_min(-1e9))
    ids = torch.multinomial(shares, 400 * 40, True, generator=generator()).view(400, 40)
    batch = Batch(Tokens(ids, torch.zeros_like(ids), torch.ones_like(ids)), None)
    losses = [pretext(pretext.views(batch, generator(seed))).loss.item() for seed in range(3)]
    assert sum(losses) / 3 == pytest.approx(pretext.without_context(shares), rel=0.02)


# ---------------------------------------------------------------- SimCSE


def test_the_simcse_loss_equals_its_formula_and_both_readings_learn():
    pretext = build("simcse", shape={**SHAPE, "dropout": 0.5}, temperature=0.2)
    views = pretext.views(texts(), generator())
    assert torch.equal(views.ids[:4], views.ids[4:])
    torch.manual_seed(3)
    loss, metrics = pretext(views)
    torch.manual_seed(3)
    z = torch.tanh(pretext.backbone(views).tokens[:, 0] @ pretext.head[0].weight.T)
    terms, hits = [], 0
    for i in range(4):
        cosines = torch.stack([z[i] @ z[4 + j] / z[i].norm() / z[4 + j].norm() for j in range(4)])
        terms.append(-(cosines / 0.2).log_softmax(0)[i])
        hits += int(cosines.argmax() == i)
    assert loss.item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-5)
    assert metrics["accuracy"].item() == pytest.approx(hits / 4)
    first, second = torch.randn(2, 4, 3, requires_grad=True)
    gradients = torch.autograd.grad(match(first, second, 0.2)[0], (first, second))
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_simcse_reads_each_sentence_of_a_corpus_and_needs_dropout():
    sentences = torch.tensor([0, 3, 3, 70, 75, 80])
    corpus = Documents(
        torch.arange(80, dtype=torch.int32) % 50 + 5, sentences, torch.tensor([0, 3, 4, 5]), SPEC
    ).subset(torch.tensor([0, 2]))
    pretext = build("simcse", shape={**SHAPE, "dropout": 0.1})
    # The empty sentence is left out, and the long one cut to 48 tokens with [CLS] and [SEP].
    assert pretext.arrange(corpus, 0).ranges[:, :2].tolist() == [[0, 3], [3, 49], [75, 80]]
    labeled = build_labeled([[5]], None, None, (), SPEC)
    assert pretext.arrange(labeled, 0) is labeled
    with pytest.raises(UserError, match=r"has none: set backbone.dropout: 0.1"):
        build("simcse")


# ---------------------------------------------------------------- log-likelihoods


@pytest.mark.parametrize("name", ["mlm", "gpt-bert"])
def test_pseudo_likelihoods_hide_one_token_at_a_time(name):
    batch, pretext = texts((9, 5)), build(name).eval()
    shift = int(name == "gpt-bert")
    for row, count in enumerate((9, 5)):
        total = 0.0
        for place in range(1, count + 1):
            tokens = batch.inputs.subset(torch.tensor([row]))
            target = tokens.ids[0, place].item()
            tokens.ids[0, place] = SPEC.tokenizer.mask
            features = pretext.backbone(tokens).tokens[0, place - shift]
            total += log_probs(pretext, features)[target].item()
        assert pretext.score_texts(batch.inputs)[row].item() == pytest.approx(total, rel=1e-5)


def test_likelihoods_of_a_causal_model_are_products_of_conditionals():
    batch = texts((9, 5))
    pretext = build("ltr", shape={**SHAPE, "causal": True}).eval()
    scores = log_probs(pretext, pretext.backbone(batch.inputs).tokens)
    for row, count in enumerate((9, 5)):
        total = sum(
            scores[row, place - 1, batch.inputs.ids[row, place]].item()
            for place in range(1, count + 1)
        )
        assert pretext.score_texts(batch.inputs)[row].item() == pytest.approx(total, rel=1e-5)
