"""Tokenizers: deterministic training, saving and loading, errors."""

import json
import subprocess
import sys

import pytest
import torch

from sslrun.backbones import build_backbone, load_into, save_backbone
from sslrun.data.source import sources
from sslrun.data.specs import TextSpec
from sslrun.data.text import base as text
from sslrun.data.text.tokenizer import (
    SPECIALS,
    Tokenizer,
    TokenizerOptions,
    build_wordpiece,
    load_tokenizer,
    train_wordpiece,
)
from sslrun.data.text.world import World
from sslrun.errors import UserError

TEXTS = [sentence for document in World(0).documents(60) for sentence in document]
VOCABULARY = [*SPECIALS, "un", "##want", "##ed", "runn", "##ing", "a", ","]


def trained(vocab=200, lowercase=True, texts=TEXTS):
    return train_wordpiece(lambda: texts, vocab, lowercase)


@pytest.fixture
def by_hand(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    return load_tokenizer(TokenizerOptions(file=tmp_path / "vocab.txt"))


def test_training_a_tokenizer_is_deterministic_across_processes():
    # With many equally frequent pairs, the order of a hash table would show.
    code = (
        "from sslrun.data.text.tokenizer import train_wordpiece\n"
        "from sslrun.data.text.world import World\n"
        "texts = [each for document in World(0).documents(60) for each in document]\n"
        "print(train_wordpiece(lambda: texts, 200, True).digest)"
    )
    other = subprocess.check_output([sys.executable, "-c", code], text=True).strip()
    assert trained().digest == trained().digest == other


def test_a_trained_tokenizer_covers_its_texts_within_its_size():
    tokenizer = trained()
    assert tokenizer.vocab == 200
    assert tokenizer.strings[: len(SPECIALS)] == list(SPECIALS)
    assert (
        (tokenizer.pad, tokenizer.unk, tokenizer.cls, tokenizer.sep, tokenizer.mask)
        == tokenizer.specials
        == (0, 1, 2, 3, 4)
    )
    assert all(tokenizer.unk not in ids for ids in tokenizer.encode(TEXTS))
    assert tokenizer.decode(tokenizer.encode([TEXTS[0]])[0]) == TEXTS[0].replace(" .", ".")
    assert trained(64).vocab == 64
    assert len(trained(64).encode(TEXTS)[0]) > len(tokenizer.encode(TEXTS)[0])


def test_words_are_split_greedily_by_the_longest_entry_as_in_bert(by_hand):
    (ids,) = by_hand.encode(["Únwanted, running XY"])
    assert [VOCABULARY[token] for token in ids] == [
        "un",
        "##want",
        "##ed",
        ",",
        "runn",
        "##ing",
        "[UNK]",
    ]
    assert by_hand.continues.tolist() == [each.startswith("##") for each in VOCABULARY]
    ((ids, places),) = by_hand.offsets(["Únwanted, a"])
    assert places == [(0, 2), (2, 6), (6, 8), (8, 9), (10, 11)]
    ((_, owners),) = by_hand.encode_words([["unwanted", "a,", "running"]])
    assert owners == [0, 0, 0, 1, 1, 2, 2]


def test_case_is_kept_only_if_configured():
    assert trained(lowercase=True, texts=["Anna anna"] * 9).encode(["ANNA"]) == [
        trained(lowercase=True, texts=["Anna anna"] * 9).encode(["anna"])[0]
    ]
    cased = trained(lowercase=False, texts=["Anna anna"] * 9)
    assert cased.encode(["Anna"]) != cased.encode(["anna"])


def test_a_saved_tokenizer_loads_equal(tmp_path, by_hand):
    tokenizer = trained()
    tokenizer.save(tmp_path)
    again = load_tokenizer(TokenizerOptions(file=tmp_path / "tokenizer.json"))
    assert again == tokenizer
    assert hash(again) == hash(tokenizer)
    assert again != by_hand
    assert [path.name for path in tmp_path.iterdir() if path.name != "vocab.txt"] == [
        "tokenizer.json"
    ]


def test_transformers_reads_a_saved_tokenizer(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = trained()
    tokenizer.save(tmp_path)
    reference = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json")
    )
    assert reference(TEXTS[:5], add_special_tokens=False)["input_ids"] == tokenizer.encode(
        TEXTS[:5]
    )


def test_a_loaded_tokenizer_neither_pads_nor_truncates(tmp_path):
    core = build_wordpiece(True, {entry: number for number, entry in enumerate(VOCABULARY)})
    core.enable_padding(length=50)
    core.enable_truncation(2)
    core.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(TokenizerOptions(file=tmp_path / "tokenizer.json"))
    assert len(tokenizer.encode(["a , a , a"])[0]) == 5


def test_a_vocabulary_file_has_one_entry_per_line_and_covers_every_id(tmp_path):
    # A duplicate entry keeps its later id. Characters at which splitlines ends a line are
    # entries.
    lines = [*SPECIALS, "a", "a", "\u2028", "b"]
    for end in ("\n", "\r\n"):
        (tmp_path / "vocab.txt").write_bytes("".join(line + end for line in lines).encode())
        tokenizer = load_tokenizer(TokenizerOptions(file=tmp_path / "vocab.txt"))
        assert tokenizer.encode(["a b"]) == [[6, 8]]
        assert tokenizer.vocab == len(tokenizer.strings) == len(tokenizer.continues) == 9


def test_invalid_tokenizers_are_errors(tmp_path):
    with pytest.raises(UserError, match="holds no words"):
        trained(texts=["", "  "])
    (tmp_path / "few.txt").write_text("[PAD]\n[UNK]\na\n")
    with pytest.raises(
        UserError, match=r"few.txt: this tokenizer has no \[CLS\], \[SEP\], \[MASK\]"
    ):
        load_tokenizer(TokenizerOptions(file=tmp_path / "few.txt"))
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(UserError, match=r"broken.json: cannot be loaded") as error:
        load_tokenizer(TokenizerOptions(file=tmp_path / "broken.json"))
    assert "\n" not in str(error.value)
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)))
    with pytest.raises(UserError, match=r"binary.txt: cannot be loaded"):
        load_tokenizer(TokenizerOptions(file=tmp_path / "binary.txt"))
    for wrong, words in (
        ({"file": tmp_path / "few.txt", "hub": "me/mine"}, "not both"),
        ({"file": tmp_path / "none.json"}, "no such file"),
        (
            {"file": tmp_path / "few.txt", "sha256": "0" * 64},
            "has changed since this recipe was resolved",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            TokenizerOptions(**wrong)


def test_a_large_corpus_is_sampled(monkeypatch):
    texts = ["cat dog", "fish bird"] * 20
    size = sum(map(len, texts))
    monkeypatch.setattr("sslrun.data.text.tokenizer.LARGEST_SAMPLE", size)
    assert {"dog", "bird"} <= set(trained(texts=texts).strings)
    monkeypatch.setattr("sslrun.data.text.tokenizer.LARGEST_SAMPLE", size - 1)
    sampled = trained(texts=texts)
    assert sampled == trained(texts=texts[::2])
    assert "bird" not in sampled.strings


def test_texts_that_are_encoded_in_parts_are_the_same(monkeypatch):
    tokenizer = trained()
    texts = ["the cat sat", "", "a dog ran", "so", "the the"]
    at_once = tokenizer.encode(texts)
    monkeypatch.setattr("sslrun.data.text.tokenizer.AT_ONCE", 2)
    assert tokenizer.encode(texts) == at_once
    assert tokenizer.encode([]) == []


def test_another_file_of_the_same_name_is_another_run(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(VOCABULARY))
    before = TokenizerOptions(file=path)
    path.write_text("\n".join([*VOCABULARY, "b"]))
    assert TokenizerOptions(file=path).sha256 != before.sha256


def test_a_tokenizer_is_trained_once_and_then_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("SSLRUN_CACHE", str(tmp_path))
    text._train_cached.cache_clear()
    calls = []
    monkeypatch.setattr(
        text,
        "train_wordpiece",
        lambda *arguments: calls.append(arguments) or train_wordpiece(*arguments),
    )
    cls = sources["world"]
    for lowercase in (True, True, False):
        text._train_cached.cache_clear()
        options = cls.Options(documents=40, tokenizer={"vocab": 150, "lowercase": lowercase})
        assert cls(options).spec.vocab == 150
    assert len(calls) == 2
    text._train_cached.cache_clear()


def test_an_evaluation_takes_the_tokenizer_of_the_recipes_data(tmp_path, monkeypatch):
    monkeypatch.setenv("SSLRUN_CACHE", str(tmp_path))
    text._train_cached.cache_clear()
    world = sources["world"].Options(documents=40, length=32, tokenizer={"vocab": 150})
    task = sources["world-sentiment"]
    shared = task.inherit_options({"name": "world", **world.model_dump(mode="json")}, {})
    assert shared["length"] == 32
    shared_spec = task(task.Options(**shared)).spec
    assert shared_spec.tokenizer == sources["world"](world).spec.tokenizer
    assert task(task.Options(tokenizer={"vocab": 150})).spec.tokenizer != shared_spec.tokenizer
    text._train_cached.cache_clear()


def test_weights_of_another_tokenizer_are_rejected(tmp_path):
    own, other = trained(), Tokenizer(trained(texts=TEXTS[::-1][:100]).core)
    assert own.vocab == other.vocab
    small = {"depth": 1, "width": 16, "heads": 1, "positions": 32}
    torch.manual_seed(0)
    backbone = build_backbone("bert-tiny", small, TextSpec(own, 16))
    save_backbone(tmp_path / "backbone.safetensors", backbone)
    again = build_backbone("bert-tiny", small, TextSpec(own, 16))
    load_into(again, tmp_path / "backbone.safetensors")
    assert all(
        torch.equal(a, b)
        for a, b in zip(backbone.state_dict().values(), again.state_dict().values(), strict=True)
    )
    with pytest.raises(
        UserError, match=r"another tokenizer.*data.tokenizer to its own: \{file: .*tokenizer.json\}"
    ):
        load_into(
            build_backbone("bert-tiny", small, TextSpec(other, 16)),
            tmp_path / "backbone.safetensors",
        )


def test_the_digest_depends_on_the_content():
    content = json.loads(trained().core.to_str())
    content["model"]["vocab"] = dict(reversed(content["model"]["vocab"].items()))
    assert Tokenizer(type(trained().core).from_str(json.dumps(content))) == trained()
