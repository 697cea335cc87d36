"""Text on the command line: user errors are one line, and interrupted work is not lost."""

import json
import logging
import math
import os
import re
import signal
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from sslrun import cli
from sslrun.data.text import base as text
from sslrun.data.text import world_sources
from sslrun.stages import reporting

RECIPE = """\
name: tiny
backbone: {name: bert-tiny, depth: 1, width: 32, positions: 128}
pretext: {name: mlm, nsp: true}
data: {name: world, documents: 60, length: 48, tokenizer: {vocab: 200}}
pretrain: {steps: 4, batch: 8, lr: 0.001, precision: fp32}
watch: {every: 1, examples: 64}
probe: {solver: sgd, sgd: {epochs: 1, batch: 16, lr: 0.01}}
finetune: {epochs: 1, batch: 16, lr: 0.001}
evaluate:
  task: {data: {name: world-sentiment, train: 32, held_out: 8}, protocols: [finetune]}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SSLRUN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SSLRUN_DATA", raising=False)
    text._train_cached.cache_clear()
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    handlers = {
        signal_number: signal.getsignal(signal_number)
        for signal_number in (signal.SIGINT, signal.SIGTERM)
    }
    yield tmp_path
    for signal_number, handler in handlers.items():
        signal.signal(signal_number, handler)
    text._train_cached.cache_clear()


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """Run a command in this process; returns stdout, or stderr if it fails as expected."""
    # A slow import of transformers would add a line of progress to the expected error.
    monkeypatch.setattr(reporting, "PLAIN_SECONDS", math.inf)

    def execute(command, *changes, code=0):
        capsys.readouterr()
        monkeypatch.setattr(
            sys, "argv", ["sslrun", command, "tiny.yaml", "--device", "cpu", *map(str, changes)]
        )
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        output = capsys.readouterr()
        assert exit_info.value.code == code, output.err
        if code:
            assert len(output.err.splitlines()) == 1, output.err
        return output.err if code else output.out

    return execute


def write(folder, name, content):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


DOCUMENTS = "".join(
    f"aa bb cc {number} .\ndd ee ff {number} .\ngg hh .\n\n" for number in range(60)
)
ROWS = "".join(
    f'{{"sentence": "aa {number}", "label": "{"xy"[number % 2]}", "score": {number}}}\n'
    for number in range(40)
)

PRETRAIN = [
    (
        "an empty corpus",
        ["data={name: text, path: empty.txt}"],
        "sslrun: empty.txt: holds no words to train a tokenizer on",
    ),
    ("no file", ["data={name: text, path: none.txt}"], "none.txt: no such file or folder"),
    ("a folder without text", ["data={name: text, path: pictures}"], "pictures: holds no text"),
    (
        "one sentence",
        ["data={name: text, path: one.txt}"],
        "there is only 1 example (for a corpus: document)",
    ),
    (
        "few documents",
        ["data={name: text, path: few.txt}"],
        "pairs of segments draw the second from another document",
    ),
    (
        "a binary file",
        ["data={name: text, path: binary.txt}"],
        "sslrun: binary.txt:1: is binary, not text",
    ),
    (
        "another encoding",
        ["data={name: text, path: latin.txt}"],
        "latin.txt: is not UTF-8 text (byte ",
    ),
    (
        "a missing column",
        ["data={name: text, path: rows.jsonl, column: body}"],
        "rows.jsonl: no column 'body'",
    ),
    (
        "too few for a sequence",
        ["data={name: text, path: few.txt}", "pretext.nsp=false", "pretext.pairs=drop"],
        "less than one sequence of 128",
    ),
    (
        "too long",
        ["data.length=200"],
        "data.length: sequences of 200 tokens are longer than the 128 positions of 'bert-tiny': "
        "lower it to 128",
    ),
    (
        "too long in an evaluation",
        ["evaluate.task.data.length=129"],
        "evaluate.task.data.length: sequences of 129 tokens are longer than the 128 positions",
    ),
    (
        "not causal",
        ["pretext=ltr"],
        "set backbone.causal: true for a bert, "
        "or take a gpt, a one-directional lstm, or pretext 'mlm'",
    ),
    ("masks on a causal one", ["backbone=gpt-tiny"], "take pretext 'ltr'"),
    ("one direction", ["pretext=bilm"], "choose one that has it: elmo, lstm"),
    (
        "layers that an evaluation reads in vain",
        ["evaluate.task.task.pool=last4"],
        "pool last4 reads 4 layers, but the backbone has 2",
    ),
    (
        "an encoder that is none",
        ["pretext=denoise", "backbone=gpt-tiny"],
        "needs an encoder that reads both sides",
    ),
    ("contradicting options", ["pretext.pairs=drop"], "nsp: true needs pairs: keep"),
    (
        "an option that says nothing",
        ["pretext.cross_documents=true"],
        "cross_documents: true needs pairs: drop",
    ),
    ("an option that is none", ["pretext.whole_word=true"], "Did you mean 'whole_words'?"),
    ("another modality", ["pretext=simclr"], "reads image data, but 'world' is text data"),
    (
        "labels as sentence order",
        ["data={name: world-sentiment, train: 64}"],
        "next-sentence prediction needs documents",
    ),
    ("no tokenizer file", ["data.tokenizer={file: none.json}"], "none.json: no such file"),
    ("no tokenizer", ["data.tokenizer={file: rows.jsonl}"], "rows.jsonl: cannot be loaded"),
    (
        "a tokenizer of another kind",
        ["data.tokenizer={file: short.txt}"],
        "this tokenizer has no [CLS], [SEP], [MASK]",
    ),
    (
        "a tokenizer's nameless corpus",
        ["data.tokenizer.corpus={documents: 50}"],
        "name a text data set, as in {name: world}",
    ),
    (
        "a tokenizer's images",
        ["data.tokenizer.corpus={name: digits}"],
        "'digits' is image data, not text",
    ),
    (
        "a tokenizer's unknown option",
        ["data.tokenizer.corpus={name: world, docs: 50}"],
        "data.tokenizer.corpus: docs: ",
    ),
    ("a tiny vocabulary", ["data.tokenizer.vocab=10"], "greater than or equal to 64"),
    ("heads", ["backbone.heads=5"], "width 32 is not a multiple of heads 5"),
    (
        "heads of a gpt",
        ["backbone={name: gpt-tiny, width: 200}", "pretext=ltr"],
        "gpt-tiny: width 200 is not a multiple of heads 3",
    ),
    (
        "heads of a decoder",
        ["backbone={name: lstm, width: 100, bidirectional: true}", "pretext=denoise"],
        "decoder of 'denoise': width 200 is not a multiple of heads 3",
    ),
    (
        "odd heads that turn",
        ["backbone={name: bert-tiny, width: 130, fast: true}"],
        "heads are 65 wide, but rotary positions need an even width",
    ),
    ("a set that is not here", ["data=corpus"], "sslrun: corpus: not on this machine"),
    ("a model that is not here", ["backbone=hf:./nowhere"], "./nowhere: can't be loaded"),
]


@pytest.fixture
def files(folder):
    write(folder, "empty.txt", "")
    write(folder, "pictures/a.png", b"x")
    write(folder, "one.txt", "aa bb cc dd .\n")
    write(folder, "few.txt", "aa bb .\ncc .\n\ndd ee .\n\nff .\n")
    write(folder, "binary.txt", b"\x00\x01\x02" * 100)
    write(folder, "latin.txt", "café\n".encode("latin-1"))
    write(folder, "rows.jsonl", ROWS)
    write(folder, "short.txt", "[PAD]\n[UNK]\naa\n")
    write(folder, "docs.txt", DOCUMENTS)
    return folder


@pytest.mark.parametrize(
    ("changes", "words"), [case[1:] for case in PRETRAIN], ids=[case[0] for case in PRETRAIN]
)
def test_an_error_before_pretraining_is_one_line(files, run, changes, words):
    error = run("pretrain", *changes, code=2)
    assert words in error
    assert not list(files.rglob("result.json"))


def test_a_signal_stops_the_reading_of_a_corpus_at_once(folder, run, monkeypatch):
    read = []

    def documents(self):
        first = not read
        for number in range(100):
            if (
                folder / "cache" / "tokens"
            ).exists():  # false while the tokenizer is trained, which happens in another thread
                read.append(number)
                if first and number == 50:
                    os.kill(os.getpid(), signal.SIGINT)
            yield [f"aa bb cc {number} ."]

    monkeypatch.setattr(world_sources.WorldCorpus, "documents", documents)
    assert "give the same command again to continue" in run("pretrain", code=130)
    assert read == [*range(51)]
    run("pretrain")
    assert read == [*range(51), *range(100)]


OWN = "evaluate.task.data={name: sentences, path: rows.jsonl"
EVALUATE = [
    (
        "a missing column",
        [f"{OWN}, first: text}}"],
        "rows.jsonl: no column 'text'; the columns are sentence, label, score",
    ),
    ("a metric that is none", ["evaluate.task.task.metric=bleu"], "should be 'accuracy', 'f1'"),
    (
        "a metric that does not fit",
        ["evaluate.task.task.metric=spearman"],
        "spearman is for numbers",
    ),
    (
        "f1 of three",
        ["evaluate.task.data={name: world-entailment, train: 60}", "evaluate.task.task.metric=f1"],
        "take macro_f1",
    ),
    (
        "no such task",
        ["evaluate.task.data.name=world-sentimant"],
        "Did you mean 'world-sentiment'?",
    ),
    ("no such head", ["evaluate.task.task.name=sentence"], "Did you mean 'sentences'?"),
    (
        "neighbours of spans",
        ["evaluate.task.data={name: world-span, train: 16}", "evaluate.task.protocols=[knn]"],
        "knn needs one vector",
    ),
    (
        "numbers that are words",
        [f"{OWN}, label: sentence, regression: true}}"],
        "row 0: its sentence is not a number: 'aa 0'",
    ),
    (
        "a class that train lacks",
        ["evaluate.task.data={name: sentences, path: odd}"],
        "split 'test', row 1: its label is no class of train",
    ),
    (
        "layers that are not there",
        ["evaluate.task.task.pool=last4"],
        "pool last4 reads 4 layers, but the backbone has 2",
    ),
    ("two readouts", ["evaluate.task.task={pool: mean, bilstm: 1}"], "leave out pool or bilstm"),
    (
        "no room for passages",
        ["evaluate.task.data={name: world-span, train: 16, length: 8}"],
        "leave no room beside a question",
    ),
    (
        "no file",
        ["evaluate.task.data={name: sentences, path: none.csv}"],
        "none.csv: should be a file, or a folder",
    ),
    (
        "a kind of file",
        ["evaluate.task.data={name: sentences, path: docs.txt}"],
        "docs.txt: should end with one of .parquet",
    ),
    (
        "a corpus has no labels",
        ["evaluate.task.data={name: text, path: docs.txt}"],
        "no labels to learn from",
    ),
    (
        "a broken table",
        ["evaluate.task.data={name: sentences, path: broken.parquet}"],
        "broken.parquet: cannot be read as parquet",
    ),
]


@pytest.mark.parametrize(
    ("changes", "words"), [case[1:] for case in EVALUATE], ids=[case[0] for case in EVALUATE]
)
def test_an_error_in_an_evaluation_is_one_line(files, run, changes, words):
    write(files, "odd/train.csv", "sentence,label\n" + "aa,x\nbb,y\n" * 20)
    write(files, "odd/test.csv", "sentence,label\naa,x\nbb,z\n")
    write(files, "broken.parquet", b"PAR1")
    changes = [*changes, "pretext=null"]
    command = "knn" if any("knn" in case for case in changes) else "finetune"
    assert words in run(command, *changes, code=2)
    assert not list(files.rglob("result.json"))


def test_pretraining_reports_losses_and_floor_and_saves_its_tokenizer(folder, run):
    path = folder / run("pretrain").strip()
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    watched = json.loads((path / "result.json").read_text())["watched"]
    assert {"held_out_loss", "held_out_nsp_loss", "held_out_mlm_accuracy", "floor"} <= set(watched)
    assert any({"mlm_loss", "nsp_loss"} <= set(record) for record in records)
    assert 3 < watched["floor"] < watched["held_out_loss"]
    saved = path / "tokenizer.json"
    assert json.loads(saved.read_text())["model"]["type"] == "WordPiece"
    # Other stages read the weights with the recipe's tokenizer only.
    run("finetune")
    (result,) = folder.glob("runs/tiny/finetune-*/result.json")
    assert json.loads(result.read_text())["metrics"]["test"].keys() == {
        "accuracy",
        "macro_f1",
        "matthews",
        "f1",
    }
    other_corpus = ["data.seed=3", "data.documents=90", "--from", path]
    assert "was trained with another tokenizer than the recipe's" in run(
        "finetune", *other_corpus, code=2
    )
    run("finetune", *other_corpus[:2], f"data.tokenizer={{file: {saved}}}", *other_corpus[2:])
    smaller_vocabulary = ["data.tokenizer.vocab=150", "--from", path]
    assert "was trained with another tokenizer" in run("finetune", *smaller_vocabulary, code=2)
    # Pretraining on another corpus starts from these weights, with their tokenizer only.
    run("pretrain", *other_corpus[:2], f"data.tokenizer={{file: {saved}}}", *other_corpus[2:])
    assert "was trained with another tokenizer" in run("pretrain", *smaller_vocabulary, code=2)


def test_a_weight_file_without_a_tokenizer_must_have_its_vocabulary_size(folder, run):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=300,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=128,
        max_position_embeddings=128,
    )
    torch.manual_seed(77)  # another seed than the one of `scratch`
    transformers.BertModel(config).save_pretrained(folder / "theirs")
    weights = folder / "theirs" / "model.safetensors"
    assert "in 'bert-tiny' as configured" in run("finetune", "--from", weights, code=2)
    from sslrun.data.text.tokenizer import blank_tokenizer

    blank_tokenizer(300).save(folder / "theirs")
    named = f"data.tokenizer={{file: {folder}/theirs/tokenizer.json}}"
    assert "finetune" in run("finetune", named, "--from", weights)
    encoder = [named, "backbone=hf:./theirs", "pretext=null"]
    assert "probe" in run("probe", *encoder)
    embeddings = []
    for protocol in (
        "finetune",
        "scratch",
    ):  # finetune loads the weights; scratch only the architecture
        run(protocol, *encoder, "finetune.lr=1e-9", "--runs", protocol)
        (path,) = folder.glob(f"{protocol}/tiny/*/backbone.safetensors")
        embeddings.append(load_file(path)["encoder.embeddings.word_embeddings.weight"])
    expected = load_file(weights)["embeddings.word_embeddings.weight"]
    assert [bool((tensor - expected).abs().max() < 1e-5) for tensor in embeddings] == [True, False]


def test_answers_missing_from_their_passage_are_skipped_with_a_warning(files, run, caplog):
    rows = [
        {
            "id": f"q{number}",
            "question": "what ?",
            "context": f"it is {word} {number} .",
            "answers": {"text": [word], "answer_start": [6 + (number == 5)]},
        }
        for number, word in enumerate(["aa", "bb", "cc", "dd"] * 12)
    ]
    write(files, "spans.jsonl", "\n".join(map(json.dumps, rows)))
    with caplog.at_level(logging.WARNING):
        run("finetune", "evaluate.task.data={name: passages, path: spans.jsonl}", "pretext=null")
    assert (
        "spans.jsonl train: left out 1 question whose answer is not in the passage: q5"
        in caplog.text
    )
    (result,) = files.glob("runs/tiny/finetune-*/result.json")
    assert set(json.loads(result.read_text())["metrics"]["test"]) == {"f1", "exact_match"}


@pytest.mark.parametrize("pool", ["pooled", "mixture"])
def test_every_protocol_accepts_every_readout(folder, run, pool):
    run("pretrain")
    changes = [f"evaluate.task.task.pool={pool}", "evaluate.task.labels=[0.5]"]
    for protocol in ("knn", "probe", "lpft") if pool != "mixture" else ("probe", "lpft"):
        assert protocol in run(protocol, *changes)


# ---------------------------------------------------------------- in separate processes


PRETRAIN = ("pretrain", "tiny.yaml", "--device", "cpu", "--runs")


def weights(folder, path):
    return load_file(folder / path / "backbone.safetensors")


def test_a_killed_pretraining_on_text_continues_to_the_same_bits(folder, sslrun, start_sslrun):
    changes = ["pretrain.steps=40", "watch.checkpoint=1.0e-6"]
    whole = sslrun(*PRETRAIN, "runs", *changes, cwd=folder).stdout.strip()
    process = start_sslrun(*PRETRAIN, "other", *changes, cwd=folder)
    process.wait_for(folder, "other/tiny/*/checkpoint/step-0000000[1-9]?")
    os.kill(process.pid, signal.SIGKILL)
    assert process.finish().returncode == -signal.SIGKILL
    resumed, stderr = sslrun(*PRETRAIN, "other", *changes, cwd=folder)[1:]
    assert re.search(r"continues after step [1-3]\d", stderr)
    expected, actual = weights(folder, whole), weights(folder, resumed.strip())
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


def test_a_distant_step_is_reached_without_reading_the_data_before_it():
    from sslrun.data.source import sources
    from sslrun.training import loop
    from sslrun.training.order import indices

    options = sources["world"].Options(documents=60, length=48, tokenizer={"vocab": 200})
    pairs = sources["world"](options).load("train").build_pairs(1, 0)
    drawn = []

    def batches(indices):
        for batch_indices in indices:
            drawn.append(batch_indices)
            yield batch_indices

    schedule = loop.Schedule(steps=10_000_000, batch=8, lr=0.1)
    order = indices(pairs, schedule, 0, 9_999_999, 10_000_000)
    start = time.monotonic()
    (batch,) = pairs.batches(batches(order), torch.device("cpu"))
    assert len(drawn) == 1
    assert len(batch.inputs.ids) == 8
    assert time.monotonic() - start < 1


def test_two_processes_learn_the_same_text_weights_as_one_without_a_pooler(
    folder, sslrun, start_ranks
):
    # Full sequences give each process the same number of targets, and static masks depend on the
    # sequence only.
    changes = [
        "pretext.nsp=false",
        "pretext.pairs=drop",
        "pretext.masking=static",
        "backbone.dropout=0",
        "pretrain.steps=3",
    ]
    alone = sslrun(*PRETRAIN, "runs", *changes, cwd=folder).stdout.strip()
    ranks = start_ranks(*PRETRAIN, "together", *changes, cwd=folder)
    together, other = (rank.finish() for rank in ranks)
    assert together.returncode == other.returncode == 0, together.stderr + other.stderr
    expected, actual = weights(folder, alone), weights(folder, together.stdout.strip())
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-4, atol=1e-5)
