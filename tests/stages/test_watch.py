"""Pretraining on text: the held-out loss, its floor, and a warning at the floor."""

import math

import pytest
import torch

from sslrun.backbones import build_backbone
from sslrun.data.source import sources
from sslrun.data.splits import load_splits
from sslrun.data.text import base as text
from sslrun.pretexts.base import pretexts
from sslrun.recipe import Watch
from sslrun.stages.watch import Watcher
from sslrun.training.device import compute


@pytest.fixture
def splits(tmp_path, monkeypatch):
    monkeypatch.setenv("SSLRUN_CACHE", str(tmp_path))
    text._train_cached.cache_clear()
    yield load_splits(
        "world", sources["world"].Options(documents=150, length=32, tokenizer={"vocab": 250})
    )
    text._train_cached.cache_clear()


def build(splits, name="mlm", backbone="bert-tiny", **options):
    torch.manual_seed(0)
    network = build_backbone(backbone, {"depth": 1, "width": 64, "dropout": 0.0}, splits.spec)
    return pretexts[name](pretexts[name].Options(**options), network)


def watcher(splits, pretext):
    return Watcher(splits, pretext, Watch(examples=64), compute("cpu"), 0)


def test_the_floor_is_the_unigram_entropy_of_the_training_text(splits):
    pretext = build(splits, "ltr", "gpt-tiny")
    counts = torch.cat(
        [
            splits.train.tokens[
                splits.train.sentences[splits.train.documents[number]] : splits.train.sentences[
                    splits.train.documents[number + 1]
                ]
            ]
            for number in splits.train.chosen.tolist()
        ]
    ).bincount()
    shares = [count / int(counts.sum()) for count in counts.tolist() if count]
    assert watcher(splits, pretext).floor == pytest.approx(-sum(p * math.log(p) for p in shares))


def test_a_loss_at_the_floor_gives_a_warning_and_one_below_it_does_not(splits):
    pretext = build(splits)
    check = watcher(splits, pretext).check
    early = check(pretext, 0.1)
    assert early.record["held_out_loss"] > early.record["floor"]
    assert early.warning is None
    late = check(pretext, 0.5)
    assert late.record == early.record
    assert "is not clearly below" in late.warning
    assert f"{late.record['floor']:.2f}" in late.warning
    assert "repeated lines" in late.warning
    for share, is_warned in ((0.98, True), (0.96, False)):
        pretext.held_out = lambda *_, loss=share * late.record["floor"]: {
            "held_out_loss": torch.tensor(loss)
        }
        report = check(pretext, 0.5)
        assert report.record["held_out_loss"] == pytest.approx(share * late.record["floor"])
        assert (report.warning is not None) == is_warned


def test_every_evaluation_uses_the_same_held_out_targets(splits):
    one, other = build(splits, rate=0.15), build(splits, rate=0.5, nsp=True)
    other.backbone.load_state_dict(one.backbone.state_dict())
    other.head.load_state_dict(one.head.state_dict())
    first, second = (
        watcher(splits, pretext).check(pretext, 0.0).record for pretext in (one, other)
    )
    assert first["held_out_loss"] == pytest.approx(second["held_out_loss"], rel=1e-6)
    assert {"held_out_nsp_loss", "held_out_nsp_accuracy"} == set(second) - set(first)


@pytest.mark.parametrize("name", ["ltr", "denoise", "bilm", "gpt-bert", "diffusion"])
def test_every_pretext_on_text_has_a_held_out_loss(splits, name):
    if name == "bilm":
        torch.manual_seed(0)
        pretext = pretexts[name](
            pretexts[name].Options(), build_backbone("elmo", {"width": 16}, splits.spec)
        )
    else:
        pretext = build(splits, name, "gpt-tiny" if name == "ltr" else "bert-tiny")
    record = watcher(splits, pretext).check(pretext, 0.0).record
    assert record["held_out_loss"] == pytest.approx(math.log(splits.spec.vocab), rel=0.2)
    assert record["floor"] > 3
