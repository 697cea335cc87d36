"""Text backbones: equal to the models of transformers, pooling, independence of padding."""

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


def tokens(lengths=(24, 9, 2), first_segment=(10, 8, 1), seed=0, width=None):
    """Return a batch of sequences with the given numbers of real and of first-segment tokens."""
    width = width or max(lengths)
    ids = torch.randint(
        5, VOCAB, (len(lengths), width), generator=torch.Generator().manual_seed(seed)
    )
    place = torch.arange(width)
    real = place < torch.tensor(lengths)[:, None]
    segments = (place >= torch.tensor(first_segment)[:, None]) & real
    return Tokens(torch.where(real, ids, 0), segments.long(), real.long(), packed=False)


def build(name, spec=SPEC, **options):
    torch.manual_seed(0)
    return build_backbone(name, {**ALL.get(name, {}), **options}, spec).eval()


def randomized(module):
    """Add noise to every parameter, norms and biases included, so that no two are alike."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module.eval()


# ---------------------------------------------------------------- transformers


def transformers_bert(causal=False, head=False):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=40,
        is_decoder=causal,
    )
    return randomized(
        transformers.BertForPreTraining(config) if head else transformers.BertModel(config)
    )


def test_bert_equals_transformers_bert_and_converts_both_ways(tmp_path):
    reference, ours = transformers_bert(), build("bert-tiny", **SMALL)
    ours.load_state_dict(ours.own_names(reference.state_dict()))
    batch = tokens()
    with torch.no_grad():
        features = ours(batch)
        expected = reference(
            batch.ids,
            attention_mask=batch.real.long(),
            token_type_ids=batch.segments,
            output_hidden_states=True,
        )
    assert len(features.layers) == len(expected.hidden_states) == 4
    for layer, expected_layer in zip(features.layers, expected.hidden_states, strict=True):
        torch.testing.assert_close(
            layer[batch.real], expected_layer[batch.real], rtol=1e-5, atol=1e-5
        )
    torch.testing.assert_close(features.pooled, expected.pooler_output, rtol=1e-5, atol=1e-5)
    exported = randomized(build("bert-tiny", **SMALL)).to_transformers()
    reloaded = transformers_bert()
    reloaded.load_state_dict(exported, strict=True)
    imported = build("bert-tiny", **SMALL)
    imported.load_state_dict(imported.own_names(reloaded.state_dict()))
    assert all(
        torch.equal(tensor, imported.to_transformers()[name]) for name, tensor in exported.items()
    )


def test_the_masked_language_model_gives_transformers_logits():
    from sslrun.pretexts.base import pretexts

    reference = transformers_bert(head=True)
    ours = build("bert-tiny", **SMALL)
    ours.load_state_dict(ours.own_names(reference.state_dict()))
    mlm = pretexts["mlm"](pretexts["mlm"].Options(nsp=True), ours)
    head = reference.cls.predictions
    mlm.head.dense.load_state_dict(head.transform.dense.state_dict())
    mlm.head.norm.load_state_dict(head.transform.LayerNorm.state_dict())
    mlm.head.bias.data = head.bias.data
    mlm.nsp.load_state_dict(reference.cls.seq_relationship.state_dict())
    batch = tokens()
    with torch.no_grad():
        features = ours(batch)
        expected = reference(
            batch.ids, attention_mask=batch.real.long(), token_type_ids=batch.segments
        )
        scores = mlm.head(features.tokens, ours.embedding)
    torch.testing.assert_close(
        scores[batch.real], expected.prediction_logits[batch.real], rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(
        mlm.nsp(features.pooled), expected.seq_relationship_logits, rtol=1e-5, atol=1e-5
    )


def test_causal_bert_equals_transformers_decoder():
    reference, ours = transformers_bert(causal=True), build("bert-tiny", **SMALL, causal=True)
    ours.load_state_dict(ours.own_names(reference.state_dict()))
    batch = tokens()
    with torch.no_grad():
        expected = reference(
            batch.ids, attention_mask=batch.real.long(), token_type_ids=batch.segments
        ).last_hidden_state
        torch.testing.assert_close(
            ours(batch).tokens[batch.real], expected[batch.real], rtol=1e-5, atol=1e-5
        )


def test_gpt_equals_transformers_gpt2_and_converts_both_ways():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=128, n_layer=2, n_head=2, n_positions=40
    )
    reference, ours = (
        randomized(transformers.GPT2LMHeadModel(config)),
        build("gpt-tiny", width=128, positions=40),
    )
    ours.load_state_dict(ours.own_names(reference.state_dict()))
    batch = tokens()
    with torch.no_grad():
        features = ours(batch)
        expected = reference(batch.ids, attention_mask=batch.real.long(), output_hidden_states=True)
        scores = features.tokens @ ours.embedding.T
    for layer, expected_layer in zip(features.layers, expected.hidden_states, strict=True):
        torch.testing.assert_close(
            layer[batch.real], expected_layer[batch.real], rtol=1e-5, atol=1e-5
        )
    torch.testing.assert_close(
        scores[batch.real], expected.logits[batch.real], rtol=1e-5, atol=1e-5
    )
    model = transformers.GPT2Model(config)
    model.load_state_dict(ours.to_transformers(), strict=True)
    with torch.no_grad():
        expected_layer = model.eval()(batch.ids, attention_mask=batch.real.long()).last_hidden_state
    torch.testing.assert_close(
        expected_layer[batch.real], features.tokens[batch.real], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("legacy", [False, True])
def test_a_transformers_checkpoint_file_loads_unchanged(tmp_path, legacy):
    reference = transformers_bert(head=True)
    reference.save_pretrained(tmp_path)
    if legacy:  # parameter names of early releases, in a pickle
        state = {
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            ): tensor
            for name, tensor in reference.state_dict().items()
        }
        torch.save(state, tmp_path / "pytorch_model.bin")
    path = tmp_path / ("pytorch_model.bin" if legacy else "model.safetensors")
    ours = build("bert-tiny", **SMALL)
    load_into(ours, path)
    assert torch.equal(ours.token_embed.weight, reference.bert.embeddings.word_embeddings.weight)
    with pytest.raises(UserError, match=r"token_embed.weight.*in 'bert-tiny' as configured"):
        load_into(build("bert-tiny", TextSpec(blank_tokenizer(VOCAB + 1), 24), **SMALL), path)


def test_a_transformers_encoder_loads_from_a_folder(tmp_path):
    reference = transformers_bert()
    reference.save_pretrained(tmp_path)
    ours = build("hf", model=str(tmp_path))
    batch = tokens()
    with torch.no_grad():
        features = ours(batch)
        expected = reference(
            batch.ids,
            attention_mask=batch.real.long(),
            token_type_ids=batch.segments,
            output_hidden_states=True,
        )
    assert torch.equal(features.tokens, expected.last_hidden_state)
    assert all(
        torch.equal(a, b) for a, b in zip(features.layers, expected.hidden_states, strict=True)
    )
    mean = torch.stack(
        [
            row[real].mean(dim=0)
            for row, real in zip(expected.last_hidden_state, batch.real, strict=True)
        ]
    )
    torch.testing.assert_close(features.pooled, mean)
    assert (ours.width, ours.depth) == (32, 4)
    fresh = build("hf", model=str(tmp_path), pretrained=False).state_dict()
    assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == {
        n: tensor.shape for n, tensor in fresh.items()
    }
    assert not torch.equal(fresh["encoder.pooler.dense.weight"], reference.pooler.dense.weight)
    # Packed documents do not attend to each other.
    packed = batch._replace(documents=torch.where(batch.segments > 0, 2, batch.documents))
    bert = build("bert-tiny", **SMALL)
    bert.load_state_dict(bert.own_names(reference.state_dict()))
    with torch.no_grad():
        torch.testing.assert_close(
            ours(packed).tokens[batch.real], bert(packed).tokens[batch.real], rtol=1e-5, atol=1e-5
        )
    with pytest.raises(UserError, match="has 120 embeddings, but the tokenizer has 121 entries"):
        build("hf", TextSpec(blank_tokenizer(VOCAB + 1), 24), model=str(tmp_path))
    with pytest.raises(UserError, match="can't be loaded") as error:
        build("hf", model=str(tmp_path / "nowhere"))
    assert "\n" not in str(error.value)
    with pytest.raises(
        UserError,
        match="sequences of 41 tokens are longer than its 40 positions",
    ):
        build("hf", TextSpec(blank_tokenizer(VOCAB), 41), model=str(tmp_path))
    # The embedding has more rows than the vocabulary: the head scores vocabulary entries only.
    smaller_vocabulary = TextSpec(blank_tokenizer(VOCAB - 20), 24)
    mlm = pretexts["mlm"](
        pretexts["mlm"].Options(), build("hf", smaller_vocabulary, model=str(tmp_path))
    )
    ids = batch.ids.clamp_max(VOCAB - 21)
    views = mlm.views(Batch(batch._replace(ids=ids), None), torch.Generator().manual_seed(0))
    assert mlm(views).loss.isfinite()
    assert mlm.head(features.tokens, mlm.backbone.embedding).shape == (3, 24, VOCAB - 20)


def test_a_left_to_right_transformers_model_is_causal(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=2, n_positions=24
    )
    randomized(transformers.GPT2Model(config)).save_pretrained(tmp_path / "gpt")
    ours, batch = build("hf", model=str(tmp_path / "gpt")), tokens()
    assert ours.causal
    assert ours(batch).read.tolist() == [23, 8, 1]
    packed = batch._replace(documents=torch.where(batch.segments > 0, 2, batch.documents))
    changed = packed._replace(ids=packed.ids.clone())
    changed.ids[0, 15] = 5 + (packed.ids[0, 15] - 4) % (VOCAB - 5)
    with torch.no_grad():
        differs = (ours(packed).tokens[0] != ours(changed).tokens[0]).any(dim=1)
    assert differs.tolist() == [position >= 15 for position in range(24)]
    with pytest.raises(UserError, match="reads only one: take pretext 'ltr'"):
        pretexts["mlm"](pretexts["mlm"].Options(), ours)
    encoder_decoder = transformers.T5Config(
        vocab_size=VOCAB, d_model=32, d_ff=64, num_layers=1, num_heads=2, d_kv=16
    )
    transformers.T5Model(encoder_decoder).save_pretrained(tmp_path / "t5")
    with pytest.raises(UserError, match="is not an encoder of text alone: You must specify"):
        build("hf", model=str(tmp_path / "t5"))


# ---------------------------------------------------------------- all backbones


@pytest.mark.parametrize("name", [*ALL, "causal", "fast", "both"])
def test_padding_changes_nothing(name):
    extra = {
        "causal": {"causal": True},
        "fast": {"fast": True},
        "both": {"bidirectional": True},
    }.get(name, {})
    backbone = build(
        {"causal": "bert-tiny", "fast": "bert-tiny", "both": "lstm"}.get(name, name), **extra
    )
    batch = tokens()
    with torch.no_grad():
        features = backbone(batch)
        assert len(features.layers) == backbone.depth
        assert features.pooled.shape == (3, backbone.width)
        assert features.tokens.shape == (3, 24, backbone.width)
        assert torch.equal(features.mask, batch.real)
        for row, length in enumerate((24, 9, 2)):
            alone = backbone(
                batch.map(lambda tensor, row=row, length=length: tensor[row : row + 1, :length])
            )
            torch.testing.assert_close(alone.pooled[0], features.pooled[row], rtol=1e-4, atol=1e-5)
            for layer, padded_layer in zip(alone.layers, features.layers, strict=True):
                torch.testing.assert_close(
                    layer[0], padded_layer[row, :length], rtol=1e-4, atol=1e-5
                )
    grouped = [tensor for layer in backbone.layers() for tensor in layer]
    assert {id(tensor) for tensor in grouped} == {id(tensor) for tensor in backbone.parameters()}
    assert len(grouped) == len(list(backbone.parameters()))


@pytest.mark.parametrize(
    ("name", "options"), [("bert-tiny", {"causal": True}), ("gpt-tiny", {}), ("lstm", {})]
)
def test_a_causal_backbone_pools_at_its_last_real_token(name, options):
    """The first position of a causal model sees one token only, so it cannot represent a text."""
    backbone, batch = build(name, **options), tokens()
    other = tokens(seed=1)
    other.ids[:, 0] = batch.ids[:, 0]
    assert backbone.causal
    with torch.no_grad():
        one, two = backbone(batch), backbone(other)
    assert one.read.tolist() == [23, 8, 1]
    torch.testing.assert_close(one.tokens[:, 0], two.tokens[:, 0])
    assert ((one.pooled - two.pooled).abs().amax(dim=1) > 1e-3).all()
    if name == "bert-tiny":
        expected = torch.tanh(backbone.pooler(one.tokens[torch.arange(3), one.read]))
        torch.testing.assert_close(one.pooled, expected)


def test_bert_pools_at_its_first_token():
    backbone, batch = build("bert-tiny"), tokens()
    with torch.no_grad():
        features = backbone(batch)
        torch.testing.assert_close(
            features.pooled, torch.tanh(backbone.pooler(features.tokens[:, 0]))
        )
    assert features.read.tolist() == [0, 0, 0]
    assert not backbone.causal


def test_bert_initializes_with_the_configured_deviations():
    default, configured = build("bert-tiny"), build("bert-tiny", std=0.125, word_std=0.1)
    linear_names = [
        name for name, module in configured.named_modules() if isinstance(module, torch.nn.Linear)
    ]
    assert linear_names
    for model, std, word_std in ((default, 0.02, 0.02), (configured, 0.125, 0.1)):
        for name in linear_names:
            assert model.get_submodule(name).weight.std().item() == pytest.approx(std, rel=0.05), (
                name
            )
        assert model.token_embed.weight.std().item() == pytest.approx(word_std, rel=0.05)
        for embed in (model.position_embed, model.segment_embed):
            assert embed.weight.std().item() == pytest.approx(0.02, rel=0.3)


def test_the_fast_block_has_no_biases_and_rotary_positions():
    fast = build("bert-tiny", fast=True)
    assert not [name for name, _ in fast.blocks.named_parameters() if name.endswith("bias")]
    assert fast.position_embed is None
    ids = torch.tensor([[7, 8, 9, 10]])
    ones = torch.ones_like(ids)
    with torch.no_grad():
        forward, backward = (
            fast(Tokens(order, ones - 1, ones)).tokens for order in (ids, ids.flip(1))
        )
    assert (
        forward - backward.flip(1)
    ).abs().max() > 1e-4  # without positions, reversal would change nothing
    with pytest.raises(UserError, match="no counterpart"):
        fast.to_transformers()


def test_two_in_three_layers_attend_to_a_window():
    torch.manual_seed(0)
    model = build("bert-tiny", fast=True, norm="rms", window=4, depth=2).eval()
    assert isinstance(model.final_norm, torch.nn.RMSNorm)
    ids = torch.randint(5, 50, (2, 12))
    real = torch.ones_like(ids)
    real[1, 5:] = 0  # its last paddings are far from text
    weights = model.attention(Tokens(ids, ids * 0, real, packed=False))  # of the second layer
    places = torch.arange(12)
    near = (places[:, None] - places).abs() <= 2
    assert torch.equal(weights[0] > 0, near.expand_as(weights[0]))
    assert (weights[1, :, :5, 5:] == 0).all()
    wide = build("bert-tiny", fast=True, window=4, depth=4).eval()
    masks = wide._masks(
        Tokens(ids, ids * 0, torch.ones_like(ids), packed=False, padded=False), False
    )
    assert [mask is None for mask in masks] == [True, False, False, True]
    features = model(Tokens(ids, ids * 0, real, packed=False)).tokens
    assert features.isfinite().all()
    whole = build("bert-tiny", fast=True, norm="rms", window=24, depth=2).eval()
    plain = build("bert-tiny", fast=True, norm="rms", depth=2).eval()
    whole.load_state_dict(plain.state_dict())
    tokens = Tokens(ids, ids * 0, torch.ones_like(ids))
    torch.testing.assert_close(whole(tokens).tokens, plain(tokens).tokens)
    with pytest.raises(UserError, match="no counterpart of window: 4"):
        build("bert-tiny", window=4).to_transformers()


def test_elmo_reads_characters():
    backbone = build("elmo")
    with pytest.raises(NotImplementedError):
        _ = backbone.embedding
    ids = torch.tensor([[7, 8, 7]])
    embedded = backbone.embed(Tokens(ids, ids, ids))
    assert torch.equal(embedded[0, 0], embedded[0, 2])
    assert not torch.equal(embedded[0, 0], embedded[0, 1])
    assert (
        bytes(backbone.characters[7].tolist()).rstrip(b"\0").decode() == SPEC.tokenizer.strings[7]
    )
    # The number of parameters does not depend on the size of the vocabulary.
    large = build("elmo", TextSpec(blank_tokenizer(5000), 24))
    assert sum(parameter.numel() for parameter in large.parameters()) == sum(
        parameter.numel() for parameter in backbone.parameters()
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
def test_saved_weights_load_unchanged(tmp_path, name):
    backbone = randomized(build(name))
    save_backbone(tmp_path / "backbone.safetensors", backbone)
    loaded = build(name)
    load_into(loaded, tmp_path / "backbone.safetensors")
    batch = tokens()
    with torch.no_grad():
        assert torch.equal(loaded(batch).pooled, backbone(batch).pooled)


def test_too_long_sequences_and_indivisible_heads_are_rejected():
    for name in ("bert-tiny", "gpt-tiny"):
        with pytest.raises(
            UserError, match=f"{name}: sequences of 24 tokens are longer than its 16 positions"
        ):
            build(name, positions=16)
    with pytest.raises(UserError, match="width 32 is not a multiple of heads 5"):
        build("bert-tiny", heads=5)


@pytest.mark.parametrize("name", ["bert-tiny", "gpt-tiny", "lstm"])
def test_packed_and_padded_hints_do_not_change_features(name):
    network = build(name).eval()
    for batch in (tokens(), tokens(lengths=(9, 9), first_segment=(3, 9))):
        padded = not batch.real.all()
        known, unknown = (
            batch._replace(packed=False, padded=padded),
            batch._replace(packed=True, padded=True),
        )
        assert (known.attendable() is None) == (not padded)
        with torch.no_grad():
            features, expected = network(known), network(unknown)
        torch.testing.assert_close(features.pooled, expected.pooled)
        torch.testing.assert_close(features.tokens[batch.real], expected.tokens[batch.real])
