"""Local attention by blocks: equal to masked attention, in padded, packed and causal sequences."""

import pytest
import torch

from sslrun.backbones import attention, bert, build_backbone
from sslrun.backbones.attention import attend, attend_locally, make_band
from sslrun.backbones.base import backbones
from sslrun.backbones.transformer import rotate
from sslrun.data.specs import TextSpec
from sslrun.data.text.sequences import Tokens
from sslrun.data.text.tokenizer import blank_tokenizer
from sslrun.training.flops import flop_counter

PADDED = torch.tensor([[1] * 23, [1] * 9 + [0] * 14, [1] + [0] * 22])
PACKED = torch.tensor(
    [[1] * 7 + [2] * 1 + [3] * 15, [1] * 20 + [2] * 3, [1] * 5 + [2] * 4 + [0] * 14]
)


def draw(length, count=3, **options):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(3, 2, length, 4, generator=generator, requires_grad=True, **options)
        for _ in range(count)
    ]


def near_mask(documents, reach, causal):
    places = torch.arange(documents.shape[1])
    distances = places - places[:, None]  # from a query to a key
    near = (distances.abs() <= reach) & ((distances <= 0) | (not causal))
    return (near & (documents[:, :, None] == documents[:, None]))[:, None]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("reach", [1, 4, 5, 23, 40])
@pytest.mark.parametrize("documents", [PADDED, PACKED, PADDED[:, :20]])
def test_local_attention_equals_masked_attention(documents, reach, causal):
    q, k, v = draw(documents.shape[1], dtype=torch.float64)
    local = attend_locally(q, k, v, make_band(documents, reach, causal))
    masked = attend(q, k, v, near_mask(documents, reach, causal))
    torch.testing.assert_close(local, masked, rtol=1e-12, atol=1e-12)
    weights = torch.randn(masked.shape, dtype=torch.float64)
    gradients = torch.autograd.grad((local * weights).sum(), (q, k, v))
    expected = torch.autograd.grad((masked * weights).sum(), (q, k, v))
    for gradient, value in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, value, rtol=1e-12, atol=1e-12)


def test_a_band_by_hand():
    mask = make_band(torch.ones(1, 5, dtype=torch.int64), 2).mask
    assert mask.shape == (3, 1, 2, 6)
    assert mask[1, 0].int().tolist() == [[1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 0]]
    # The last block holds token 4 and a filler, which attends to fillers alone.
    assert mask[2, 0].int().tolist() == [[1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]]


def test_the_products_of_local_attention_grow_linearly():
    flops = []
    for length in (128, 256):
        tensors = draw(length)
        with flop_counter() as counter:
            attend_locally(*tensors, make_band(torch.ones(3, length), 8)).sum().backward()
        flops.append(counter.get_total_flops())
    with flop_counter() as counter:
        attend(*tensors).sum().backward()
    assert flops[1] == 2 * flops[0] > 0
    assert flops[1] * 256 == counter.get_total_flops() * 24


def test_dropout_of_local_attention_keeps_the_mean():
    documents = torch.ones(3, 24)
    q, k, _ = draw(24)
    torch.manual_seed(0)
    mixed = attend_locally(q, k, torch.ones(3, 2, 24, 4), make_band(documents, 4), dropout=0.5)
    assert mixed.std() > 0.1
    assert mixed.mean().item() == pytest.approx(1, abs=0.1)


def test_bfloat16_is_computed_in_float32_on_cpus():
    q, k, v = (x.bfloat16() for x in draw(23))
    band = make_band(PACKED, 4)
    local = attend_locally(q, k, v, band)
    torch.testing.assert_close(local, attend_locally(q.float(), k.float(), v.float(), band))


@pytest.mark.parametrize("documents", [PADDED, PACKED])
@pytest.mark.parametrize("causal", [False, True])
def test_a_model_with_a_window_is_the_same_by_blocks_and_masked(documents, causal, monkeypatch):
    torch.manual_seed(0)
    options = {"fast": True, "window": 6, "depth": 3, "width": 32, "heads": 2, "causal": causal}
    model = build_backbone("bert-tiny", options, TextSpec(blank_tokenizer(50), 23))
    model.eval()
    ids = torch.randint(5, 50, documents.shape)
    tokens = Tokens(ids, ids * 0, documents, packed=documents is PACKED)
    results = []
    for blocks in (attention.MIN_BLOCKS, 100):
        monkeypatch.setattr(bert, "MIN_BLOCKS", blocks)
        features = model(tokens).tokens[tokens.real]
        model.zero_grad()
        features.square().sum().backward()
        gradients = [block.attn.qkv.weight.grad.clone() for block in model.blocks]
        results.append([features.detach(), *gradients])
    assert isinstance(model._masks(tokens, causal)[1], torch.Tensor)
    monkeypatch.undo()
    assert isinstance(model._masks(tokens, causal)[1], attention.Band)
    for by_blocks, masked in zip(*results, strict=True):
        torch.testing.assert_close(by_blocks, masked, rtol=1e-4, atol=1e-4)


def test_layers_that_attend_to_all_have_a_base_of_their_own():
    spec = TextSpec(blank_tokenizer(50), 23)
    options = {"fast": True, "window": 6, "theta": 160_000, "depth": 4, "width": 32, "heads": 2}
    blocks = build_backbone("bert-tiny", options, spec).blocks
    assert [block.attn.rotary for block in blocks] == [160_000, 10_000, 10_000, 160_000]
    rotated = rotate(torch.ones(1, 1, 2, 4), base=100)[0, 0, 1]
    angles = torch.tensor([1.0, 0.1])  # at position 1: 1, and 100 to the power of -1 / 2
    torch.testing.assert_close(rotated[:2], angles.cos() - angles.sin())
    torch.testing.assert_close(rotated[2:], angles.sin() + angles.cos())
    with pytest.raises(ValueError, match="need fast: true"):
        backbones["bert-tiny"].Options(theta=160_000)
