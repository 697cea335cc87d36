"""Attentive probing: both pools against loops, masks, caching and refusals."""

import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from sslrun.backbones.base import Features
from sslrun.errors import UserError
from sslrun.protocols.attentive import (
    AttentiveHead,
    AttentiveOptions,
    CrossAttentionPool,
    EfficientPool,
    largest_divisor,
)
from sslrun.recipe import Sweep, parse
from sslrun.recipe.places import Located
from sslrun.stages.bench import CellBench
from sslrun.stages.context import Context
from sslrun.stages.reporting import Reporter
from sslrun.stages.sweep import Plan, work
from sslrun.training.device import compute

VIT = {"name": "vit-tiny", "patch": 4, "width": 24, "heads": 3, "depth": 1}
SHORT = {"steps": 4, "batch": 16, "epochs": None, "precision": "fp32"}


def tokens(count=3, length=7, width=12):
    return torch.randn(count, length, width, generator=torch.Generator().manual_seed(0))


def pools():
    torch.manual_seed(0)
    built = [CrossAttentionPool(12, 2, 3), EfficientPool(12, 4)]
    for pool in built:
        for parameter in pool.parameters():
            nn.init.normal_(parameter, std=0.4)
        pool.eval()
    return built


def test_efficient_pooling_equals_a_loop_over_queries():
    _, pool = pools()
    x = tokens()
    pooled = pool(x, None) * (1 + 1e-6) ** 0.5  # batch norm has its initial statistics
    for b in range(3):
        values = x[b] @ pool.values.weight.T
        for query in range(4):
            scores = torch.stack([x[b, t] @ pool.queries[query] for t in range(7)]) / math.sqrt(12)
            share = slice(3 * query, 3 * query + 3)
            expected = scores.softmax(0) @ values[:, share]
            torch.testing.assert_close(pooled[b, share], expected)


def test_the_cross_attention_block_equals_torchs_attention():
    pool, _ = pools()
    x = tokens()
    attention = nn.MultiheadAttention(12, 3, batch_first=True)
    attention.in_proj_weight, attention.in_proj_bias = pool.attn.qkv.weight, pool.attn.qkv.bias
    attention.out_proj.weight, attention.out_proj.bias = pool.attn.proj.weight, pool.attn.proj.bias
    queries = pool.queries.expand(3, -1, -1)
    memory = pool.norm1(x)
    attended = queries + attention(queries, memory, memory)[0]
    expected = attended + pool.mlp(pool.norm2(attended))
    torch.testing.assert_close(pool(x, None), expected.mean(dim=1))


@pytest.mark.parametrize("pool", pools(), ids=["block", "efficient"])
def test_padding_is_not_read_and_the_order_of_tokens_does_not_matter(pool):
    x = tokens()
    padded = torch.cat([x, 100 * tokens(3, 2)], dim=1)
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[:, 7:] = False
    expected = pool(x, None)
    torch.testing.assert_close(pool(padded, mask), expected)
    torch.testing.assert_close(pool(x.flip(1), None), expected)


def test_weights_sum_to_one():
    _, pool = pools()
    weights = pool.weights(tokens(), None)
    assert weights.shape == (3, 4, 7)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 4))


def test_an_attentive_head_finds_a_class_that_one_token_shows_and_the_mean_hides():
    """One of 16 tokens shows the class, beside noise that the mean cannot tell from it."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (400,), generator=generator)
    x = torch.randn(400, 16, 12, generator=generator)
    places = torch.randint(16, (400,), generator=generator)
    x[torch.arange(400), places, 0] = 4.0  # marks the token
    x[torch.arange(400), places, 1] = 2.0 * (2 * labels - 1)
    mean = x.mean(dim=1)
    solution = torch.linalg.lstsq(mean[:200], (2.0 * labels - 1)[:200, None]).solution
    linear = ((mean[200:] @ solution)[:, 0] > 0).long()
    for pool in (CrossAttentionPool(12, 1, 1), EfficientPool(12, 4)):
        torch.manual_seed(0)
        head = AttentiveHead(pool, nn.Linear(12, 2))
        optimizer = torch.optim.AdamW(head.parameters(), lr=0.01)
        for _ in range(150):
            outputs = head(Features(x[:200, 0], x[:200]))
            nn.functional.cross_entropy(outputs, labels[:200]).backward()
            optimizer.step()
            optimizer.zero_grad()
        head.eval()
        found = head(Features(x[200:, 0], x[200:])).argmax(dim=1)
        accuracy = (found == labels[200:]).float().mean()
        assert accuracy > (linear == labels[200:]).float().mean() + 0.1
        assert accuracy > 0.9


def recipe(backbone=VIT, labels=(0.1,), **options):
    return {
        "name": "tiny",
        "backbone": backbone,
        "data": {"name": "digits", "size": 8},
        "attentive": {**SHORT, **options},
        "evaluate": {
            "digits": {
                "protocols": ["attentive"],
                "labels": list(labels),
                "task": {"augmentation": {}},
            }
        },
    }


def read(source):
    return parse(Located(source, {(): "tiny.yaml:1"}))


def run(folder, source):
    plan = Plan.of(Sweep(name="tiny", rows={"tiny": read(source)}), folder)
    context = Context(folder, compute("cpu"), Reporter(quiet=True))
    failures = work([plan], context)
    assert not failures, failures
    (cell,) = (cell for _, cell in plan.cells)
    return cell, context


@pytest.mark.parametrize("backbone", [VIT, {"name": "resnet18", "channels": 4, "stem": "small"}])
def test_cached_tokens_give_what_passes_through_the_backbone_give(tmp_path, backbone, monkeypatch):
    results = []
    for index, most in enumerate((2**31, 0)):
        monkeypatch.setattr("sslrun.protocols.attentive.CACHED", most)
        cell, _ = run(tmp_path / str(index), recipe(backbone, augment=False, block=bool(index)))
        results.append(cell.run.result)
    assert results[0]["labelled"] == results[1]["labelled"] == 120
    monkeypatch.setattr("sslrun.protocols.attentive.CACHED", 2**31)
    cached, _ = run(tmp_path / "2", recipe(backbone, augment=False, block=True))
    assert cached.run.result["metrics"] == results[1]["metrics"]


def test_cached_tokens_are_those_of_the_labeled_examples(tmp_path):
    cell, context = run(tmp_path, recipe(augment=False))
    bench = CellBench(cell, context)
    kept = bench.tokens("train", 2**31)
    assert kept is not None
    assert len(kept) == 120
    (batch,) = bench.examples("train").batches([torch.arange(120)], torch.device("cpu"))
    with torch.inference_mode():
        expected = bench.backbone().eval()(batch.inputs / 255).tokens
    torch.testing.assert_close(kept.inputs, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(kept.labels, batch.labels)
    assert bench.tokens("train", kept.inputs.nbytes - 1) is None
    assert bench.tokens("train", kept.inputs.nbytes) is not None


def test_only_the_head_learns_and_it_is_kept(tmp_path):
    cell, _ = run(tmp_path, recipe())
    head = load_file(cell.run.path / "head.safetensors")
    assert {name.split(".")[0] for name in head} == {"pool", "linear"}
    assert head["linear.weight"].abs().sum() > 0  # it began at zero
    assert set(cell.run.result["metrics"]) == {"val", "test"}


def test_text_is_read_with_its_mask(tmp_path):
    source = {
        "name": "tiny",
        "backbone": {"name": "gpt-tiny", "width": 32, "depth": 1, "positions": 32},
        "data": {"name": "world", "length": 32},
        "attentive": {**SHORT, "block": False},
        "evaluate": {"world-sentiment": {"protocols": ["attentive"], "labels": [0.05]}},
    }
    cell, _ = run(tmp_path, source)
    assert 0 <= cell.run.result["metrics"]["test"]["accuracy"] <= 100


def test_impossible_options_are_refused():
    with pytest.raises(UserError, match="heads go with block: true"):
        read(recipe(block=False, heads=2))
    with pytest.raises(UserError, match=r"'attentive' as configured needs .*'tokens'"):
        read(recipe({"name": "mlp"}))
    source = recipe({"name": "bert-tiny"})
    source["data"] = {"name": "world"}
    source["evaluate"] = {"world-tagging": {"protocols": ["attentive"]}}
    with pytest.raises(UserError, match="attentive needs one output per example"):
        read(source)


@pytest.mark.parametrize(("option", "value"), [("queries", 7), ("heads", 5)])
def test_a_count_that_does_not_divide_the_width_is_refused_before_training(tmp_path, option, value):
    source = recipe(block=option == "heads", **{option: value})
    plan = Plan.of(Sweep(name="tiny", rows={"tiny": read(source)}), tmp_path)
    (cell,) = (cell for _, cell in plan.cells)
    context = Context(tmp_path, compute("cpu"), Reporter(quiet=True))
    with pytest.raises(UserError, match=rf"attentive\.{option}: {value} does not divide"):
        cell.execute(context)


def test_defaults_are_the_papers():
    options = AttentiveOptions()
    assert (options.optimizer, options.schedule, options.epochs) == ("adamw", "cosine", 20)
    assert AttentiveOptions(steps=5).epochs is None
    assert largest_divisor(768, 32) == 32
    assert largest_divisor(150, 32) == 30
