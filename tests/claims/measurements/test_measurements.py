"""Measurements: attention and LSTM guesses, broken-off texts, entropy, options."""

import re

import pytest
import torch

from sslrun.backbones import build_backbone
from sslrun.claims.measurements.base import measurements
from sslrun.claims.measurements.guess import (
    MODELS,
    Gaps,
    TruncatedMlm,
    encode_sentence,
    entropy,
    predict,
)
from sslrun.claims.measurements.speed import replace_layers
from sslrun.data.examples import Batch
from sslrun.data.specs import TextSpec
from sslrun.data.text.sequences import Tokens
from sslrun.data.text.tokenizer import blank_tokenizer
from sslrun.errors import UserError
from sslrun.pretexts.ltr import Ltr

SPEC = TextSpec(blank_tokenizer(50), 12)


def tokens(count=4, length=12, seed=0):
    ids = torch.randint(5, 50, (count, length), generator=torch.Generator().manual_seed(seed))
    return Tokens(ids, torch.zeros_like(ids), torch.ones_like(ids))


def model(row):
    torch.manual_seed(0)
    cls = MODELS[row]
    backbone = build_backbone(
        "bert-tiny", {"causal": cls is Ltr, "positions": 16, "width": 64, "heads": 2}, SPEC
    )
    return cls(cls.Options(), backbone).eval()


def test_the_lstm_token_by_token_equals_the_whole_lstm():
    torch.manual_seed(0)
    fused = build_backbone(
        "lstm", {"width": 8, "depth": 2, "bidirectional": True, "dropout": 0.0}, SPEC
    )
    torch.manual_seed(0)
    stepwise = replace_layers(
        build_backbone(
            "lstm", {"width": 8, "depth": 2, "bidirectional": True, "dropout": 0.0}, SPEC
        )
    )
    batch = tokens()
    torch.testing.assert_close(stepwise(batch).tokens, fused(batch).tokens)
    stepwise(batch).tokens.square().sum().backward()
    assert all(
        parameter.grad is not None and parameter.grad.abs().sum() > 0
        for parameter in stepwise.ahead.parameters()
    )


def test_tokens_to_the_right_change_only_the_masked_prediction():
    gaps = Gaps(tokens(), torch.tensor([3, 4, 5, 6]))
    changed = Gaps(gaps.tokens._replace(ids=gaps.tokens.ids.clone()), gaps.position)
    changed.tokens.ids[:, -1] = 7  # far to the right
    cpu = torch.device("cpu")
    for row in MODELS:
        near, far = (predict(model(row), sentences, 2, cpu) for sentences in (gaps, changed))
        torch.testing.assert_close(near, far)  # out of reach for both
        near, far = (predict(model(row), sentences, None, cpu) for sentences in (gaps, changed))
        assert torch.allclose(near, far) == (row == "left to right")
        hidden = predict(model(row), gaps, 0, cpu)
        assert torch.allclose(hidden, near, atol=1e-5) == (row == "left to right")
        torch.testing.assert_close(near.exp().sum(1), torch.ones(4))


def test_half_of_the_texts_are_truncated_at_the_mask():
    pretext = model("masked")
    assert isinstance(pretext, TruncatedMlm)
    masked = pretext.views(Batch(tokens(400), None), torch.Generator().manual_seed(0))
    lengths = masked.tokens.real.sum(dim=1)
    assert 0.4 < (lengths < 12).float().mean() < 0.6
    assert lengths.min() >= 2
    chosen = masked.targets >= 0
    assert chosen.any(dim=1).all()
    assert (masked.places < lengths[:, None])[chosen].all()


def test_entropy_of_uniform_and_certain_predictions():
    log = torch.tensor([[0.25] * 4, [1 - 3e-9, 1e-9, 1e-9, 1e-9]]).log()
    assert entropy(log).tolist() == pytest.approx([torch.tensor(4.0).log().item(), 0.0], abs=1e-6)


def test_a_sentence_with_a_gap_ends_without_separator():
    gaps = encode_sentence("w1 w2 ___ w3", SPEC)
    tokenizer = SPEC.tokenizer
    assert gaps.position.tolist() == [3]
    assert gaps.tokens.ids[0, [0, 3]].tolist() == [tokenizer.cls, tokenizer.mask]
    assert gaps.tokens.ids[0, -1] != tokenizer.sep
    with pytest.raises(
        UserError, match=r"has 22 tokens, but sequences have at most 12; raise data\.length"
    ):
        encode_sentence("w1 " * 20 + "___", SPEC)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("guess", {"sentences": ["no gap"]}, "should have one gap"),
        ("guess", {"sentences": ["a ___", "b ___"]}, "should be the same up to the gap"),
        ("guess", {"data": {"name": "wrld"}}, "Did you mean 'world'?"),
        ("convolution", {"kernels": [1, 2]}, "a kernel of 2 should be odd"),
        ("convolution", {"kernels": [13]}, "no larger than the images (11)"),
        ("distortion", {"features": 40}, "features < span < dimensions - features"),
        ("distortion", {"span": 90}, "features < span < dimensions - features"),
        ("distortion", {"examples": 39}, "39 examples don't span 40 dimensions"),
    ],
)
def test_invalid_options_are_errors(name, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        measurements[name].Options(**options)
