"""Minimal pairs: the small world's are impossible, files are checked, and models are compared."""

import itertools
import json

import pytest
import torch

from sslrun import cli
from sslrun.data.source import sources
from sslrun.data.text.world import World
from sslrun.errors import UserError
from sslrun.pretexts.base import pretexts
from sslrun.protocols.base import protocols, unsupported
from sslrun.tasks.base import tasks


def pairs_of(name, **options):
    cls = sources[name]
    return cls(cls.Options(**options))


def test_bad_sentences_of_the_small_world_are_impossible_and_good_ones_are_not():
    pairs = pairs_of("world-pairs").pairs()
    prefixes = set()
    for document in World(0).documents(8_000):
        for sentence in document:
            said = sentence.split(" , ")[-1]  # without the opening of a reply
            prefixes |= set(itertools.accumulate(said.split(), "{} {}".format))
    assert {pair.phenomenon for pair in pairs} == {
        "agreement", "articles", "participles", "word order"}  # fmt: skip
    for pair in pairs:
        good, bad = pair.good.split(), pair.bad.split()
        assert len(good) == len(bad)
        # No sentence goes on like the bad one after the first word that differs, and the next.
        end = 2 + [one == other for one, other in zip(good, bad, strict=True)].index(False)
        assert " ".join(good[:end]) in prefixes, pair
        assert " ".join(bad[:end]) not in prefixes, pair
    assert pairs == pairs_of("world-pairs").pairs()
    assert pairs != pairs_of("world-pairs", seed=1).pairs()


def test_files_of_pairs_are_read_in_turn_with_their_phenomena(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("sentence_good,sentence_bad,UID\na b,b a,order\nc d,d c,verbs\ne f,f e,order\n")
    options = {"good": "sentence_good", "bad": "sentence_bad", "tokenizer": {"vocab": 64}}
    examples = pairs_of("minimal-pairs", path=path, phenomenon="UID", **options).load("test")
    tokenizer = examples.spec.tokenizer
    (batch,) = examples.batches([torch.arange(6)], torch.device("cpu"))
    texts = [tokenizer.decode([i for i in row if i >= 5]) for row in batch.inputs.ids.tolist()]
    assert texts == ["a b", "b a", "c d", "d c", "e f", "f e"]
    assert examples.classes == ("order", "verbs")
    assert examples.labels.tolist() == [0, 0, 1, 1, 0, 0]
    task = tasks["minimal-pairs"](tasks["minimal-pairs"].Options(), examples.spec, ())
    scores = torch.tensor([-1.0, -2, -2, -1, -3, -3])
    assert task.by_phenomenon(scores, examples) == {"order": 50.0, "verbs": 0.0}
    assert task.score(scores, examples) == {"accuracy": 25.0}
    assert pairs_of("minimal-pairs", path=path, **options).load("test").classes == ("pairs",)


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        ("a b,a b\n", {}, "row 0: 'good' and 'bad' should hold two different sentences"),
        ("a b,\n", {}, "row 0: 'good' and 'bad' should hold two different sentences"),
        ("a b,b a\n", {"phenomenon": "UID"}, "no column 'UID'"),
        ("a b,b a\n" + "a " * 20 + ",b\n", {"length": 8}, "row 1: a sentence has 22 tokens"),
    ],
)
def test_mistakes_in_a_file_of_pairs_are_one_line(rows, options, words, tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("good,bad\n" + rows)
    with pytest.raises(UserError, match=words):
        pairs_of("minimal-pairs", path=path, tokenizer={"vocab": 64}, **options).load("test")


def test_zero_shot_and_other_protocols_refuse_each_others_tasks():
    pairs, sentences = tasks["minimal-pairs"], tasks["sentences"]
    assert unsupported("zero-shot", pairs, pairs.Options()) is None
    assert "take task: minimal-pairs" in unsupported("zero-shot", sentences, sentences.Options())
    assert "take zero-shot" in unsupported("probe", pairs, pairs.Options())
    assert [name for name in pretexts if pretexts[name].can_score] == [
        "diffusion", "gpt-bert", "ltr", "mlm"]  # fmt: skip
    with pytest.raises(UserError, match="'electra' does not: take diffusion, gpt-bert, ltr, mlm"):
        protocols["zero-shot"](protocols["zero-shot"].Options()).check_pretext(pretexts["electra"])


RECIPE = """\
name: pairs
backbone: {name: bert-tiny, depth: 1, width: 32, heads: 2, positions: 24, std: 0.2, causal: true}
pretext: {name: ltr, pairs: drop}
data: {name: world, length: 24, documents: 300, tokenizer: {vocab: 200}}
pretrain: {steps: 60, batch: 32, lr: 0.01, warmup: 0, precision: fp32, compile: "off"}
watch: {every: 100, examples: 64}
evaluate:
  pairs: {data: {name: world-pairs, pairs: 20}, protocols: [zero-shot]}
"""


def test_a_trained_language_model_prefers_right_sentences(tmp_path, monkeypatch):
    recipe = tmp_path / "pairs.yaml"
    recipe.write_text(RECIPE)
    words = ["sweep", str(recipe), "--runs", str(tmp_path / "runs"), "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["sslrun", *words])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    assert exit_info.value.code == 0
    (path,) = (tmp_path / "runs").rglob("*zero-shot*/result.json")
    result = json.loads(path.read_text())
    by_phenomenon = result["accuracy_by_phenomenon"]
    mean = sum(by_phenomenon.values()) / 4
    assert result["metrics"]["test"]["accuracy"] == pytest.approx(mean)
    assert mean > 65, by_phenomenon
