"""Text backbones: equal to transformers' own, read out where something is seen, blind to padding."""

import pytest
import torch

from sslrun.backbones import build_backbone, load_into, save_backbone
from sslrun.backbones.lstm import reverse_real
from sslrun.backbones.text import gather_tokens, last_real
from sslrun.data.examples import Batch
from sslrun.data.specs import TextSpec
from sslrun.data.text.sequences import Tokens
from sslrun.data.text.tokenizer import blank_tokenizer
from sslrun.errors import UserError
from sslrun.pretexts.base import pretexts

VOCAB = 120
SPEC = TextSpec(blank_tokenizer(VOCAB), 24)
SMALL = {"depth": 3, "width": 32, "heads": 4, "positions": 40}
ALL = {
    "bert-tiny": {"depth": 2, "width": 32, "heads": 4},
    "gpt-tiny": {"depth": 2, "width": 32},
    "lstm": {"width": 16},
    "elmo": {"width": 16},
}


def tokens(sizes=(24, 9, 2), first=(10, 8, 1), seed=0, longest=None):
    """Sequences of so many real tokens, of which so many are of the first segment."""
    longest = longest or max(sizes)
    ids = torch.randint(
        5, VOCAB, (len(sizes), longest), generator=torch.Generator().manual_seed(seed)
    )
    place = torch.arange(longest)
    real = place < torch.tensor(sizes)[:, None]
    segments = (place >= torch.tensor(first)[:, None]) & real
    return Tokens(torch.where(real, ids, 0), segments.long(), real.long(), packed=False)


def made(name, spec=SPEC, **options):
    torch.manual_seed(0)
    return build_backbone(name, {**ALL.get(name, {}), **options}, spec).eval()


def shaken(module):
    """The module with every parameter random, norms and biases too, that none can be mistaken for another."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module.eval()


# ---------------------------------------------------------------- transformers


def their_bert(causal=False, head=False):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=40, is_decoder=causal,
    )  # fmt: skip
    return shaken(
        transformers.BertForPreTraining(config) if head else transformers.BertModel(config)
    )


def test_bert_is_transformers_bert_with_its_weights_both_ways(tmp_path):
    theirs, ours = their_bert(), made("bert-tiny", **SMALL)
    ours.load_state_dict(ours.own_names(theirs.state_dict()))
    given = tokens()
    with torch.no_grad():
        found = ours(given)
        told = theirs(
            given.ids,
            attention_mask=given.real.long(),
            token_type_ids=given.segments,
            output_hidden_states=True,
        )
    assert len(found.layers) == len(told.hidden_states) == 4
    for mine, its in zip(found.layers, told.hidden_states, strict=True):
        torch.testing.assert_close(mine[given.real], its[given.real], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.pooled, told.pooler_output, rtol=1e-5, atol=1e-5)
    back = shaken(made("bert-tiny", **SMALL)).to_transformers()
    expected = their_bert()
    expected.load_state_dict(back, strict=True)
    again = made("bert-tiny", **SMALL)
    again.load_state_dict(again.own_names(expected.state_dict()))
    assert all(torch.equal(each, again.to_transformers()[name]) for name, each in back.items())


def test_the_masked_language_model_gives_transformers_logits():
    from sslrun.pretexts.base import pretexts

    theirs = their_bert(head=True)
    ours = made("bert-tiny", **SMALL)
    ours.load_state_dict(ours.own_names(theirs.state_dict()))
    mlm = pretexts["mlm"](pretexts["mlm"].Options(nsp=True), ours)
    head = theirs.cls.predictions
    mlm.head.dense.load_state_dict(head.transform.dense.state_dict())
    mlm.head.norm.load_state_dict(head.transform.LayerNorm.state_dict())
    mlm.head.bias.data = head.bias.data
    mlm.nsp.load_state_dict(theirs.cls.seq_relationship.state_dict())
    given = tokens()
    with torch.no_grad():
        found = ours(given)
        told = theirs(given.ids, attention_mask=given.real.long(), token_type_ids=given.segments)
        scores = mlm.head(found.tokens, ours.embedding)
    torch.testing.assert_close(
        scores[given.real], told.prediction_logits[given.real], rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(
        mlm.nsp(found.pooled), told.seq_relationship_logits, rtol=1e-5, atol=1e-5
    )


def test_causal_bert_is_transformers_decoder():
    theirs, ours = their_bert(causal=True), made("bert-tiny", **SMALL, causal=True)
    ours.load_state_dict(ours.own_names(theirs.state_dict()))
    given = tokens()
    with torch.no_grad():
        told = theirs(
            given.ids, attention_mask=given.real.long(), token_type_ids=given.segments
        ).last_hidden_state
        torch.testing.assert_close(
            ours(given).tokens[given.real], told[given.real], rtol=1e-5, atol=1e-5
        )


def test_gpt_is_transformers_gpt2_with_its_weights_both_ways():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=128, n_layer=2, n_head=2, n_positions=40
    )
    theirs, ours = (
        shaken(transformers.GPT2LMHeadModel(config)),
        made("gpt-tiny", width=128, positions=40),
    )
    ours.load_state_dict(ours.own_names(theirs.state_dict()))
    given = tokens()
    with torch.no_grad():
        found = ours(given)
        told = theirs(given.ids, attention_mask=given.real.long(), output_hidden_states=True)
        scores = found.tokens @ ours.embedding.T
    for mine, its in zip(found.layers, told.hidden_states, strict=True):
        torch.testing.assert_close(mine[given.real], its[given.real], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores[given.real], told.logits[given.real], rtol=1e-5, atol=1e-5)
    model = transformers.GPT2Model(config)
    model.load_state_dict(ours.to_transformers(), strict=True)
    with torch.no_grad():
        its = model.eval()(given.ids, attention_mask=given.real.long()).last_hidden_state
    torch.testing.assert_close(its[given.real], found.tokens[given.real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("older", [False, True])
def test_a_checkpoint_of_transformers_loads_as_it_lies_on_disk(tmp_path, older):
    theirs = their_bert(head=True)
    theirs.save_pretrained(tmp_path)
    if older:  # names of the first releases, in a pickle
        state = {
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            ): each
            for name, each in theirs.state_dict().items()
        }
        torch.save(state, tmp_path / "pytorch_model.bin")
    path = tmp_path / ("pytorch_model.bin" if older else "model.safetensors")
    ours = made("bert-tiny", **SMALL)
    load_into(ours, path)
    assert torch.equal(ours.token_embed.weight, theirs.bert.embeddings.word_embeddings.weight)
    with pytest.raises(UserError, match=r"token_embed.weight.*in 'bert-tiny' as configured"):
        load_into(made("bert-tiny", TextSpec(blank_tokenizer(VOCAB + 1), 24), **SMALL), path)


def test_any_encoder_of_transformers_from_a_folder(tmp_path):
    theirs = their_bert()
    theirs.save_pretrained(tmp_path)
    ours = made("hf", model=str(tmp_path))
    given = tokens()
    with torch.no_grad():
        found = ours(given)
        told = theirs(
            given.ids,
            attention_mask=given.real.long(),
            token_type_ids=given.segments,
            output_hidden_states=True,
        )
    assert torch.equal(found.tokens, told.last_hidden_state)
    assert all(torch.equal(a, b) for a, b in zip(found.layers, told.hidden_states, strict=True))
    mean = torch.stack(
        [
            row[real].mean(dim=0)
            for row, real in zip(told.last_hidden_state, given.real, strict=True)
        ]
    )
    torch.testing.assert_close(found.pooled, mean)
    assert (ours.width, ours.depth) == (32, 4)
    fresh = made("hf", model=str(tmp_path), pretrained=False).state_dict()
    assert {name: each.shape for name, each in ours.state_dict().items()} == {
        n: each.shape for n, each in fresh.items()
    }
    assert not torch.equal(fresh["encoder.pooler.dense.weight"], theirs.pooler.dense.weight)
    # Packed documents see no other.
    packed = given._replace(documents=torch.where(given.segments > 0, 2, given.documents))
    bert = made("bert-tiny", **SMALL)
    bert.load_state_dict(bert.own_names(theirs.state_dict()))
    with torch.no_grad():
        torch.testing.assert_close(
            ours(packed).tokens[given.real], bert(packed).tokens[given.real], rtol=1e-5, atol=1e-5
        )
    with pytest.raises(UserError, match="has 120 embeddings, but the tokenizer has 121 entries"):
        made("hf", TextSpec(blank_tokenizer(VOCAB + 1), 24), model=str(tmp_path))
    with pytest.raises(UserError, match="can't be loaded") as error:
        made("hf", model=str(tmp_path / "nowhere"))
    assert "\n" not in str(error.value)
    with pytest.raises(
        UserError,
        match="sequences of 41 tokens are longer than its 40 positions",
    ):
        made("hf", TextSpec(blank_tokenizer(VOCAB), 41), model=str(tmp_path))
    # A table of more rows than there are entries: what names tokens has no scores for the others.
    fewer = TextSpec(blank_tokenizer(VOCAB - 20), 24)
    mlm = pretexts["mlm"](pretexts["mlm"].Options(), made("hf", fewer, model=str(tmp_path)))
    ids = given.ids.clamp_max(VOCAB - 21)
    views = mlm.views(Batch(given._replace(ids=ids), None), torch.Generator().manual_seed(0))
    assert mlm(views).loss.isfinite()
    assert mlm.head(found.tokens, mlm.backbone.embedding).shape == (3, 24, VOCAB - 20)


def test_a_model_of_transformers_that_reads_left_to_right_is_a_causal_one(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=2, n_positions=24
    )
    shaken(transformers.GPT2Model(config)).save_pretrained(tmp_path / "gpt")
    ours, given = made("hf", model=str(tmp_path / "gpt")), tokens()
    assert ours.causal
    assert ours(given).read.tolist() == [23, 8, 1]
    packed = given._replace(documents=torch.where(given.segments > 0, 2, given.documents))
    changed = packed._replace(ids=packed.ids.clone())
    changed.ids[0, 15] = 5 + (packed.ids[0, 15] - 4) % (VOCAB - 5)
    with torch.no_grad():
        differs = (ours(packed).tokens[0] != ours(changed).tokens[0]).any(dim=1)
    assert differs.tolist() == [place >= 15 for place in range(24)]
    with pytest.raises(UserError, match="reads only one: take pretext 'ltr'"):
        pretexts["mlm"](pretexts["mlm"].Options(), ours)
    two = transformers.T5Config(
        vocab_size=VOCAB, d_model=32, d_ff=64, num_layers=1, num_heads=2, d_kv=16
    )
    transformers.T5Model(two).save_pretrained(tmp_path / "t5")
    with pytest.raises(UserError, match="is not an encoder of text alone: You must specify"):
        made("hf", model=str(tmp_path / "t5"))


# ---------------------------------------------------------------- what all have in common


@pytest.mark.parametrize("name", [*ALL, "causal", "fast", "both"])
def test_padding_changes_nothing(name):
    extra = {
        "causal": {"causal": True},
        "fast": {"fast": True},
        "both": {"bidirectional": True},
    }.get(name, {})
    backbone = made(
        {"causal": "bert-tiny", "fast": "bert-tiny", "both": "lstm"}.get(name, name), **extra
    )
    given = tokens()
    with torch.no_grad():
        found = backbone(given)
        assert len(found.layers) == backbone.depth
        assert found.pooled.shape == (3, backbone.width)
        assert found.tokens.shape == (3, 24, backbone.width)
        assert torch.equal(found.mask, given.real)
        for row, size in enumerate((24, 9, 2)):
            alone = backbone(given.map(lambda each, row=row, size=size: each[row : row + 1, :size]))
            torch.testing.assert_close(alone.pooled[0], found.pooled[row], rtol=1e-4, atol=1e-5)
            for one, many in zip(alone.layers, found.layers, strict=True):
                torch.testing.assert_close(one[0], many[row, :size], rtol=1e-4, atol=1e-5)
    grouped = [each for layer in backbone.layers() for each in layer]
    assert {id(each) for each in grouped} == {id(each) for each in backbone.parameters()}
    assert len(grouped) == len(list(backbone.parameters()))


@pytest.mark.parametrize(
    ("name", "options"), [("bert-tiny", {"causal": True}), ("gpt-tiny", {}), ("lstm", {})]
)
def test_a_causal_backbone_is_read_at_its_last_real_token(name, options):
    """The first position sees nothing: pooled there, all texts would look alike."""
    backbone, given = made(name, **options), tokens()
    other = tokens(seed=1)
    other.ids[:, 0] = given.ids[:, 0]
    assert backbone.causal
    with torch.no_grad():
        one, two = backbone(given), backbone(other)
    assert one.read.tolist() == [23, 8, 1]
    torch.testing.assert_close(one.tokens[:, 0], two.tokens[:, 0])
    assert ((one.pooled - two.pooled).abs().amax(dim=1) > 1e-3).all()
    if name == "bert-tiny":
        expected = torch.tanh(backbone.pooler(one.tokens[torch.arange(3), one.read]))
        torch.testing.assert_close(one.pooled, expected)


def test_bert_is_read_at_its_first_token():
    backbone, given = made("bert-tiny"), tokens()
    with torch.no_grad():
        found = backbone(given)
        torch.testing.assert_close(found.pooled, torch.tanh(backbone.pooler(found.tokens[:, 0])))
    assert found.read.tolist() == [0, 0, 0]
    assert not backbone.causal


def test_bert_starts_with_the_deviations_it_is_given():
    papers, wide = made("bert-tiny"), made("bert-tiny", std=0.125, word_std=0.1)
    maps = [name for name, each in wide.named_modules() if isinstance(each, torch.nn.Linear)]
    assert maps
    for model, std, word_std in ((papers, 0.02, 0.02), (wide, 0.125, 0.1)):
        for name in maps:
            assert model.get_submodule(name).weight.std().item() == pytest.approx(std, rel=0.05), (
                name
            )
        assert model.token_embed.weight.std().item() == pytest.approx(word_std, rel=0.05)
        for embed in (model.position_embed, model.segment_embed):
            assert embed.weight.std().item() == pytest.approx(0.02, rel=0.3)


def test_the_fast_block_has_no_biases_and_knows_positions_by_distance():
    fast = made("bert-tiny", fast=True)
    assert not [name for name, _ in fast.blocks.named_parameters() if name.endswith("bias")]
    assert fast.position_embed is None
    ids = torch.tensor([[7, 8, 9, 10]])
    ones = torch.ones_like(ids)
    with torch.no_grad():
        straight, turned = (
            fast(Tokens(each, ones - 1, ones)).tokens for each in (ids, ids.flip(1))
        )
    assert (
        straight - turned.flip(1)
    ).abs().max() > 1e-4  # a bag of words would be the same both ways
    with pytest.raises(UserError, match="no counterpart"):
        fast.to_transformers()


def test_elmo_reads_characters():
    backbone = made("elmo")
    with pytest.raises(NotImplementedError):
        _ = backbone.embedding
    ids = torch.tensor([[7, 8, 7]])
    embedded = backbone.embed(Tokens(ids, ids, ids))
    assert torch.equal(embedded[0, 0], embedded[0, 2])
    assert not torch.equal(embedded[0, 0], embedded[0, 1])
    assert (
        bytes(backbone.characters[7].tolist()).rstrip(b"\0").decode() == SPEC.tokenizer.strings[7]
    )
    # An LSTM has as many weights as its layers say, however large the vocabulary.
    large = made("elmo", TextSpec(blank_tokenizer(5000), 24))
    assert sum(p.numel() for p in large.parameters()) == sum(
        p.numel() for p in backbone.parameters()
    )


def test_helpers_by_hand():
    real = torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    x = torch.arange(6).view(2, 3, 1)
    assert last_real(real).tolist() == [2, 0]
    assert reverse_real(x, real)[..., 0].tolist() == [[2, 1, 0], [3, 4, 5]]
    assert torch.equal(reverse_real(reverse_real(x, real), real), x)
    assert gather_tokens(x, torch.tensor([2, 0]))[..., 0].tolist() == [2, 3]
    assert gather_tokens(x, torch.tensor([[2, 1], [0, 0]]))[..., 0].tolist() == [[2, 1], [3, 3]]


@pytest.mark.parametrize("name", [*ALL])
def test_weights_go_through_a_file(tmp_path, name):
    backbone = shaken(made(name))
    save_backbone(tmp_path / "backbone.safetensors", backbone)
    again = made(name)
    load_into(again, tmp_path / "backbone.safetensors")
    given = tokens()
    with torch.no_grad():
        assert torch.equal(again(given).pooled, backbone(given).pooled)


def test_sequences_longer_than_the_positions_and_odd_heads_are_refused():
    for name in ("bert-tiny", "gpt-tiny"):
        with pytest.raises(
            UserError, match=f"{name}: sequences of 24 tokens are longer than its 16 positions"
        ):
            made(name, positions=16)
    with pytest.raises(UserError, match="width 32 is not a multiple of heads 5"):
        made("bert-tiny", heads=5)


@pytest.mark.parametrize("name", ["bert-tiny", "gpt-tiny", "lstm"])
def test_what_is_known_of_a_batch_changes_no_feature(name):
    network = made(name).eval()
    for given in (tokens(), tokens(sizes=(9, 9), first=(3, 9))):
        padded = not given.real.all()
        known, unknown = (
            given._replace(packed=False, padded=padded),
            given._replace(packed=True, padded=True),
        )
        assert (known.attendable() is None) == (not padded)
        with torch.no_grad():
            one, other = network(known), network(unknown)
        torch.testing.assert_close(one.pooled, other.pooled)
        torch.testing.assert_close(one.tokens[given.real], other.tokens[given.real])
