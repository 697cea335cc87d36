"""Text sources: token files, and tables of sentences, pairs, passages and tags."""

import csv
import json
import logging
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from sslrun.data.source import sources
from sslrun.data.splits import load_splits
from sslrun.data.text import base as text
from sslrun.data.text import corpora
from sslrun.data.text.corpora import token_file
from sslrun.data.text.sequences import IGNORED
from sslrun.data.text.tokenizer import SPECIALS, Tokenizer, build_wordpiece
from sslrun.errors import UserError

WORDS = ["aa", "bb", "cc", "dd", "##x", ".", "is", "what", "?", "-"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SSLRUN_CACHE", str(tmp_path / "cache"))
    text._train_cached.cache_clear()
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIALS, *WORDS]))
    yield
    text._train_cached.cache_clear()


def source(name, tmp_path, **options):
    cls = sources[name]
    return cls(
        cls.Options(**{"tokenizer": {"file": tmp_path / "vocab.txt"}, "length": 16, **options})
    )


def tokenizer():
    return Tokenizer(
        build_wordpiece(True, {entry: number for number, entry in enumerate([*SPECIALS, *WORDS])})
    )


def ids(*words):
    return [[*SPECIALS, *WORDS].index(word) for word in words]


def documents(count=40, seed=0):
    draw = random.Random(seed)
    return [
        [
            " ".join(draw.choices(["aa", "bb", "ccx"], k=draw.randint(0, 9)))
            for _ in range(draw.randint(1, 5))
        ]
        for _ in range(count)
    ]


def expected(documents_):
    sentences = tokenizer().encode([sentence for document in documents_ for sentence in document])
    ends = np.cumsum([len(sentence_) for sentence_ in sentences])
    return (
        [number for sentence_ in sentences for number in sentence_],
        [0, *ends],
        [0, *np.cumsum([len(d) for d in documents_])],
    )


# ---------------------------------------------------------------- token files


def test_a_token_file_holds_every_sentence_and_is_mapped(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "PIECE", 50)
    texts = documents()
    tokens = token_file(tmp_path / "tokens", lambda: texts, tokenizer())
    assert [ids.tolist() for ids in tokens] == [list(map(int, ids)) for ids in expected(texts)]
    assert (tmp_path / "tokens" / "tokens").stat().st_size == 4 * len(tokens[0])
    maps = Path("/proc/self/maps").read_text()
    assert str(tmp_path / "tokens" / "tokens") in maps

    def never():
        raise AssertionError("read again")

    again = token_file(tmp_path / "tokens", never, tokenizer())
    assert all(torch.equal(a, b) for a, b in zip(tokens, again, strict=True))


@pytest.mark.parametrize("stop", [0, 1, 17, 39])
def test_a_killed_token_file_resumes(tmp_path, monkeypatch, stop):
    monkeypatch.setattr(corpora, "PIECE", 50)
    texts, read = documents(), []

    def killed():
        for number, document in enumerate(texts):
            if number == stop:
                raise KeyboardInterrupt
            yield document

    with pytest.raises(KeyboardInterrupt):
        token_file(tmp_path / "tokens", killed, tokenizer())
    # Bytes that a crash wrote after the last progress record are truncated.
    with open(tmp_path / "tokens" / "tokens", "ab") as file:
        file.write(b"half a piece")
    progress = tmp_path / "tokens" / "progress.json"
    done = json.loads(progress.read_text())["counts"]["documents"] if progress.exists() else 0
    assert stop - 8 < done <= stop
    encode = Tokenizer.encode
    monkeypatch.setattr(
        Tokenizer, "encode", lambda self, texts: read.extend(texts) or encode(self, texts)
    )
    tokens = token_file(tmp_path / "tokens", lambda: texts, tokenizer())
    assert read == [sentence for document in texts[done:] for sentence in document]
    assert [ids.tolist() for ids in tokens] == [list(map(int, ids)) for ids in expected(texts)]


def test_memory_holds_one_piece_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "PIECE", 300)
    monkeypatch.setattr(corpora, "LONGEST", 5)
    path = tmp_path / "one.txt"
    path.write_text(
        "aa bb ccx dd .\n" * 5000
    )  # without a blank line there is one document, split by length only
    encode, sizes = Tokenizer.encode, []
    monkeypatch.setattr(
        Tokenizer,
        "encode",
        lambda self, texts: sizes.append(sum(map(len, texts))) or encode(self, texts),
    )
    corpus = source("text", tmp_path, path=path).load("train")
    assert len(corpus) == 1000
    assert corpus.count_tokens() == 6 * 5000
    assert max(sizes) < 300 + 5 * 15


def test_another_text_or_tokenizer_makes_another_token_file(tmp_path):
    path = tmp_path / "some.txt"
    path.write_text("aa bb\ncc\n\ndd .\n")
    corpus = source("text", tmp_path, path=path).load("train")
    assert corpus.tokens.tolist() == ids("aa", "bb", "cc", "dd", ".")
    assert corpus.sentences.tolist() == [0, 2, 3, 5]
    assert corpus.documents.tolist() == [0, 2, 3]
    path.write_text("dd dd\n\n\n\naa\n")
    again = source("text", tmp_path, path=path).load("train")
    assert again.tokens.tolist() == ids("dd", "dd", "aa")
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIALS, *reversed(WORDS)]))
    assert (
        source("text", tmp_path, path=path).load("train").tokens.tolist() != again.tokens.tolist()
    )


def test_building_a_token_file_reports_progress(tmp_path):
    path = tmp_path / "some.txt"
    path.write_text("aa bb\n\n" * 250)
    calls = []
    for _ in range(2):  # the second time it is cached
        options = sources["text"].Options(path=path, tokenizer={"file": tmp_path / "vocab.txt"})
        sources["text"](options, lambda *arguments: calls.append(arguments)).load("train")
    assert calls == [(str(path), 100, 0), (str(path), 200, 0), (str(path), 250, 250)]


def test_a_corpus_is_divided_by_documents(tmp_path):
    path = tmp_path / "some.txt"
    path.write_text("".join(f"{'aa ' * number}\n\n" for number in range(1, 21)))
    splits = load_splits(
        "text", sources["text"].Options(path=path, tokenizer={"file": tmp_path / "vocab.txt"})
    )
    assert len(splits.val) >= 1
    assert len(splits.train) + len(splits.val) <= 20
    assert not set(splits.train.chosen.tolist()) & set(splits.val.chosen.tolist())


def test_sentences_are_lines_or_split_at_punctuation(tmp_path):
    rows = [
        'One two. Three? "Four" five! six.',
        'He said "Go." Then (at noon.) he left.',
        "line one\nline two\n\nline three",
        "",
        None,
    ]
    (tmp_path / "rows.jsonl").write_text(
        "\n".join(json.dumps({"text": row, "n": 1}) for row in rows)
    )
    documents_ = list(source("text", tmp_path, path=tmp_path / "rows.jsonl").documents())
    assert documents_ == [
        ["One two.", "Three?", '"Four" five! six.'],
        ['He said "Go."', "Then (at noon.) he left."],
        ["line one", "line two", "line three"],
    ]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b"", "empty.txt: holds no text"),
        ("blank.txt", b"\n \n\n", "blank.txt: holds no text"),
        ("zero.txt", b"aa\n\0\0bb\n", r"zero.txt:2: is binary, not text"),
        (
            "latin.txt",
            "aa\ncaf\xe9\n".encode("latin-1"),
            r"latin.txt: is not UTF-8 text \(byte \d+\)",
        ),
        ("rows.jsonl", b'{"body": "aa"}\n', r"rows.jsonl: no column 'text'; the columns are body"),
        ("rows.json", b"{", r"rows.json: cannot be read as json"),
        (
            "lists.jsonl",
            b'{"text": ["aa", "bb"]}\n',
            r"lists.jsonl: column 'text' holds values of type list, not text",
        ),
    ],
)
def test_invalid_corpora_are_errors(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words) as error:
        source("text", tmp_path, path=tmp_path / name).load("train")
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- sentences and pairs


ROWS = [
    ("aa bb", "cc", "yes", 0.5),
    ("cc", "dd .", "no", 2.0),
    ("dd", "", "yes", 1.0),
    ("aa", "bb", "no", 5.0),
] * 3


def test_berts_corpus_is_wikipedia_followed_by_the_books(tmp_path, monkeypatch):
    monkeypatch.setenv("SSLRUN_DATA", str(tmp_path))
    rows = {
        "wikipedia": ["aa bb. Cc dd.\n\nReferences\n", "dd dd."],
        "bookcorpus": ["aa", *["cc aa"] * corpora.BOOK_SENTENCES],
    }
    for name, texts in rows.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in texts)
        )
    both = source("wikipedia-books", tmp_path)
    documents_ = list(both.documents())
    assert documents_[:2] == [["aa bb.", "Cc dd."], ["dd dd."]]
    assert [len(document) for document in documents_[2:]] == [corpora.BOOK_SENTENCES, 1]
    assert both.load("train").count_tokens() == 6 + 3 + 1 + 2 * corpora.BOOK_SENTENCES
    before = both.content()
    (tmp_path / "bookcorpus" / "train.jsonl").write_text('{"text": "aa"}\n')
    assert source("wikipedia-books", tmp_path).content() != before


def test_rows_of_wikitext_are_lines_of_articles(tmp_path, monkeypatch):
    monkeypatch.setenv("SSLRUN_DATA", str(tmp_path))
    rows = [
        "",
        " = Aa = \n",
        "",
        " Bb cc . Dd = 2 . \n",
        " = = Cc = = \n",
        "",
        " Cc . \n",
        " = Dd = \n",
        " = = Aa = = \n",
        " = Bb = \n",
        " Aa bb . \n",
        None,
    ]
    (tmp_path / "wikitext-103").mkdir()
    (tmp_path / "wikitext-103" / "train.jsonl").write_text(
        "".join(json.dumps({"text": row}) + "\n" for row in rows)
    )
    wikitext = source("wikitext-103", tmp_path)
    assert list(wikitext.documents()) == [["Bb cc . Dd = 2 .", "Cc ."], ["Aa bb ."]]
    assert len(wikitext.load("train")) == 2


def test_a_table_may_have_several_files(tmp_path, monkeypatch):
    monkeypatch.setenv("SSLRUN_DATA", str(tmp_path))
    (tmp_path / "wikipedia").mkdir()
    for number, sentence in enumerate(("aa bb .", "cc dd .")):
        (tmp_path / "wikipedia" / f"train-0000{number}-of-00002.jsonl").write_text(
            json.dumps({"text": sentence})
        )
    wikipedia = source("wikipedia", tmp_path)
    assert list(wikipedia.documents()) == [["aa bb ."], ["cc dd ."]]
    before = wikipedia.content()
    (tmp_path / "wikipedia" / "train-00001-of-00002.jsonl").write_text(json.dumps({"text": "dd"}))
    assert source("wikipedia", tmp_path).content() != before


@pytest.fixture(params=["csv", "tsv", "json", "jsonl", "parquet"])
def table(request, tmp_path):
    path = tmp_path / f"rows.{request.param}"
    names = ("left", "right", "verdict", "score")
    if request.param in ("csv", "tsv"):
        with open(path, "w", newline="") as file:
            writer = csv.writer(file, delimiter="\t" if request.param == "tsv" else ",")
            writer.writerows([names, *ROWS])
    elif request.param == "parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(
            pyarrow.table(dict(zip(names, map(list, zip(*ROWS, strict=True)), strict=True))), path
        )
    else:
        rows = [dict(zip(names, row, strict=True)) for row in ROWS]
        path.write_text(
            json.dumps(rows) if request.param == "json" else "\n".join(map(json.dumps, rows))
        )
    return path


def test_columns_of_any_table_can_be_named(tmp_path, table):
    options = {"path": table, "first": "left", "second": "right", "label": "verdict"}
    examples = source("sentences", tmp_path, **options).load("train")
    assert examples.classes == ("no", "yes")
    assert examples.labels.tolist() == [1, 0, 1, 0] * 3
    (batch,) = examples.batches([torch.arange(3)], torch.device("cpu"))
    c, s, p = ids("[CLS]", "[SEP]", "[PAD]")
    a, b, cc, d, dot = ids("aa", "bb", "cc", "dd", ".")
    assert batch.inputs.ids.tolist() == [
        [c, a, b, s, cc, s],
        [c, cc, s, d, dot, s],
        [c, d, s, p, p, p],
    ]
    numbers = source(
        "sentences", tmp_path, path=table, first="right", label="score", regression=True
    ).load("train")
    assert numbers.labels.tolist() == [0.5, 2.0, 1.0, 5.0] * 3
    assert numbers.classes == ()
    with pytest.raises(
        UserError, match="no column 'lable'; the columns are left, right, verdict, score"
    ):
        source("sentences", tmp_path, path=table, first="left", label="lable").load("train")


def test_a_folder_has_splits_and_a_class_of_test_must_be_one_of_train(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    for name, labels in (("train", "abab"), ("dev", "ab"), ("test", "ba")):
        (folder / f"{name}.csv").write_text(
            "sentence,label\n" + "".join(f"aa,{label}\n" for label in labels)
        )
    sentences = source("sentences", tmp_path, path=folder)
    assert set(sentences.splits) == {"train", "val", "test"}
    assert sentences.load("test").labels.tolist() == [1, 0]
    (folder / "test.csv").write_text("sentence,label\naa,a\naa,c\n")
    with pytest.raises(UserError, match="split 'test', row 1: its label is no class of train"):
        source("sentences", tmp_path, path=folder).load("test")
    (folder / "train.csv").unlink()
    with pytest.raises(
        UserError, match=r"set: holds only dev.csv, test.csv, and nothing to train on"
    ):
        source("sentences", tmp_path, path=folder).load("train")
    assert source("sentences", tmp_path, path=folder).load("test").classes == (
        "a",
        "c",
    )  # a test set needs no other split
    for name in ("dev", "test"):
        (folder / f"{name}.csv").unlink()
    with pytest.raises(UserError, match=r"set: should be a file, or a folder with train"):
        source("sentences", tmp_path, path=folder).load("train")


def test_a_label_outside_the_declared_classes_is_an_error(tmp_path):
    import datasets
    import pyarrow.parquet

    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    schema = features.arrow_schema.with_metadata(
        {"huggingface": json.dumps({"info": {"features": features.to_dict()}})}
    )
    table = pyarrow.table({"sentence": ["aa"] * 3, "label": [0, 1, 2]}, schema=schema)
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(UserError, match="split 'train', row 2: its label is no class of train"):
        source("sentences", tmp_path, path=tmp_path / "rows.parquet").load("train")


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        (
            [{"sentence": "aa", "label": None}, {"sentence": "bb", "label": "x"}],
            {},
            "row 0: has no label",
        ),
        ([{"sentence": "aa", "label": "x"}] * 2, {}, "has only one class, 'x'"),
        (
            [{"sentence": ["aa"], "label": "x"}, {"sentence": ["b"], "label": "y"}],
            {},
            "column 'sentence' holds values of type list",
        ),
        (
            [{"sentence": "aa", "label": 0.5}, {"sentence": "b", "label": 1.5}],
            {},
            "holds float values, not classes",
        ),
        (
            [{"sentence": "aa", "label": "high"}],
            {"regression": True},
            "row 0: its label is not a number: 'high'",
        ),
        (
            [{"sentence": "a", "label": 1.0}, {"sentence": "b", "label": None}],
            {"regression": True},
            "row 1: its label",
        ),
        ([{"label": "x"}], {}, "no column 'sentence'"),
    ],
)
def test_unsuitable_tables_are_errors(tmp_path, rows, options, words):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=words) as error:
        source("sentences", tmp_path, path=tmp_path / "rows.jsonl", **options).load("train")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["none.csv", "none.jsonl", "none.json", "heads.csv"])
def test_tables_without_rows_are_errors(tmp_path, name):
    (tmp_path / name).write_text("sentence,label\n" if name == "heads.csv" else "")
    with pytest.raises(UserError, match=f"{name}: holds no rows"):
        source("sentences", tmp_path, path=tmp_path / name).load("train")


def test_numbers_and_empty_cells_are_read_as_text(tmp_path):
    (tmp_path / "rows.jsonl").write_text(
        '{"sentence": 12, "label": 0}\n{"sentence": null, "label": 1}\n'
    )
    examples = source("sentences", tmp_path, path=tmp_path / "rows.jsonl").load("train")
    assert (examples.ranges[:, 1] - examples.ranges[:, 0]).tolist() == [1, 0]


def test_null_like_words_and_single_quotes_are_read_as_text(tmp_path):
    texts = ["None", "NA", "null", "nan", '"aa', "bb", 'cc "dd']
    (tmp_path / "rows.tsv").write_text(
        "sentence\tlabel\n"
        + "".join(f"{text}\t{number % 2}\n" for number, text in enumerate(texts))
    )
    sentences = source("sentences", tmp_path, path=tmp_path / "rows.tsv")
    assert list(sentences.rows("train").first) == texts
    (tmp_path / "rows.csv").write_text('sentence,label\nNA,0\n"aa, ""bb""\ncc",1\n,0\n')
    assert list(source("sentences", tmp_path, path=tmp_path / "rows.csv").rows("train").first) == [
        "NA",
        'aa, "bb"\ncc',
        "",
    ]


# ---------------------------------------------------------------- passages


def passages(tmp_path, rows, name="train"):
    folder = tmp_path / "passages"
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def row(offset, context, answer, start, question="what is ?"):
    answers = (
        {"text": [answer], "answer_start": [start]} if answer else {"text": [], "answer_start": []}
    )
    return {"id": f"q{offset}", "question": question, "context": context, "answers": answers}


def test_answers_missing_from_the_passage_are_named_and_skipped(tmp_path, caplog):
    contexts = [f"{'aa ' * number}bb" for number in range(1, 31)]
    rows = [
        row(number, context, "bb", context.index("bb") - (number in (3, 7)), "what ?")
        for number, context in enumerate(contexts)
    ]
    folder = passages(tmp_path, rows)
    passages(tmp_path, rows[:5], "validation")
    loaded = source("passages", tmp_path, path=folder, length=48)
    with caplog.at_level(logging.WARNING):
        train = loaded.load("train")
    messages = [record.getMessage() for record in caplog.records]
    wrong = [
        name
        for name in ("q3", "q7")
        if name in {question.id for question in loaded.questions("train")}
    ]
    assert len(messages) == 1
    assert f"left out {len(wrong)} question" in messages[0]
    assert all(name in messages[0] for name in wrong)
    assert len(train.extra.rows) == len(loaded.questions("train")) - len(wrong)
    # All questions are scored, as in the official evaluation.
    assert [question.id for question in loaded.load("test").extra.rows] == [
        f"q{number}" for number in range(5)
    ]


def test_missing_splits_are_carved_by_passage(tmp_path):
    contexts = [f"{'aa ' * number}bb cc dd" for number in range(40)]
    rows = [
        row(f"{number}-{n}", context, "bb", context.index("bb"))
        for number, context in enumerate(contexts)
        for n in (0, 1)
    ]
    folder = passages(tmp_path, rows)
    loaded = source("passages", tmp_path, path=folder, length=12, stride=3)
    sides = {
        split: {question.context for question in loaded.questions(split)}
        for split in ("train", "val", "test")
    }
    assert {split: len(contexts) for split, contexts in sides.items()} == {
        "train": 27,
        "val": 3,
        "test": 10,
    }
    assert not sides["train"] & (sides["val"] | sides["test"])
    assert not sides["val"] & sides["test"]
    splits = load_splits("passages", loaded.options)
    ids_by_split = {
        split: {question.id for question in getattr(splits, split).extra.rows}
        for split in ("train", "val", "test")
    }
    assert sum(map(len, ids_by_split.values())) == len(set().union(*ids_by_split.values())) == 80


def test_one_passage_is_too_few_for_a_held_out_split(tmp_path):
    row = {
        "question": "who ?",
        "context": "aa bb",
        "answers": {"text": ["aa"], "answer_start": [0]},
    }
    (tmp_path / "rows.jsonl").write_text("\n".join([json.dumps(row)] * 3))
    with pytest.raises(UserError, match=r"rows.jsonl: has too few passages to hold some out"):
        source("passages", tmp_path, path=tmp_path / "rows.jsonl").load("train")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"question": "what", "context": "aa"}], "no column 'answers'; the columns are"),
        (
            [{**row(0, "aa", "aa", 0), "answers": "aa"}],
            "row 0: question and context should be text",
        ),
        ([{**row(0, "aa", "aa", 0), "question": 3}], "row 0: question and context should be text"),
        (
            [{**row(0, "aa", "aa", 0), "answers": {"text": ["aa", "a"], "answer_start": [0]}}],
            "lists of equal length",
        ),
        (
            [row(0, "aa bb", "cc", 0), row(1, "bb", "cc", 0)],
            "has no question whose answer is in its passage",
        ),
    ],
)
def test_invalid_passages_are_errors(tmp_path, rows, words):
    for name in ("train", "validation", "test"):
        folder = passages(tmp_path, rows, name)
    with pytest.raises(UserError, match=words) as error:
        source("passages", tmp_path, path=folder).load("train")
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- tags


def tags(tmp_path, rows):
    path = tmp_path / "tags.jsonl"
    path.write_text("\n".join(json.dumps({"tokens": words, "tags": tags}) for words, tags in rows))
    return source("words", tmp_path, path=path)


def test_the_first_piece_of_a_word_has_its_tag(tmp_path):
    tagged = tags(tmp_path, [(["aaxx", "bb", "cc"], ["B-X", "O", "B-Y"]), (["dd"], ["O"])]).load(
        "train"
    )
    assert tagged.classes == ("B-X", "B-Y", "O")
    (batch,) = tagged.batches([torch.arange(2)], torch.device("cpu"))
    assert batch.inputs.ids[0, 1:-1].tolist() == ids("aa", "##x", "##x", "bb", "cc")
    assert batch.labels.tolist() == [
        [IGNORED, 0, IGNORED, IGNORED, 2, 1, IGNORED],
        [IGNORED, 2, *[IGNORED] * 5],
    ]
    assert tagged.extra.tags == [["B-X", "O", "B-Y"], ["O"]]


def test_a_word_without_tokens_keeps_its_position(tmp_path):
    from sslrun.tasks.base import tasks

    tagged = tags(
        tmp_path, [(["aa", "\u200b", "", "bb"], ["B-X", "O", "O", "B-Y"]), (["cc"], ["O"])]
    ).load("train")
    (batch,) = tagged.batches([torch.arange(2)], torch.device("cpu"))
    assert batch.labels[0].tolist() == [IGNORED, 0, 2, 2, 1, IGNORED]
    task = tasks["tagging"](tasks["tagging"].Options(), tagged.spec, tagged.classes)
    outputs = torch.nn.functional.one_hot(batch.labels.clamp_min(0), 3).float()
    assert task.score(outputs, tagged)["f1"] == 100


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([(["aa", "bb"], ["O"]), (["aa"], ["B-X"])], "row 0: has 2 words but 1 tags"),
        ([("aa bb", "O O")], "column 'tokens' should hold lists"),
        ([(["aa"], "O")], "column 'tags' should hold lists"),
        (
            [(["aa"], ["O"]), (None, None)],
            "split 'train', row 1: column 'tokens' should hold lists",
        ),
        (
            [(["aa", "bb"], ["S-PER", "O"]), (["aa", "bb"], ["B-LOC", "I-LOC"])],
            "the tag 'S-PER' is not O and does not begin",
        ),
    ],
)
def test_invalid_tags_are_errors(tmp_path, rows, words):
    with pytest.raises(UserError, match=words):
        tags(tmp_path, rows).load("train")


def test_an_entity_may_be_longer_in_test_than_any_of_its_kind_in_train(tmp_path):
    folder = tmp_path / "tagged"
    folder.mkdir()
    for name, tags in (("train", ["B-X", "I-X", "B-Y", "O"]), ("test", ["B-Y", "I-Y", "O", "O"])):
        (folder / f"{name}.jsonl").write_text(json.dumps({"tokens": ["aa"] * 4, "tags": tags}))
    test = source("words", tmp_path, path=folder).load("test")
    assert test.classes == ("B-X", "B-Y", "I-X", "I-Y", "O")
    assert next(test.batches([torch.tensor([0])], torch.device("cpu"))).labels[
        0, 1:-1
    ].tolist() == [1, 3, 4, 4]


def test_a_tag_missing_from_train_is_an_error(tmp_path):
    folder = tmp_path / "tagged"
    folder.mkdir()
    for name, tag in (("train", "B-X"), ("test", "B-Z")):
        (folder / f"{name}.jsonl").write_text(
            json.dumps({"tokens": ["aa", "bb"], "tags": [tag, "O"]})
        )
    with pytest.raises(UserError, match="split 'test' has the tag 'B-Z', which train lacks"):
        source("words", tmp_path, path=folder).load("test")


def test_the_sets_of_the_world_need_no_download():
    for name, task in (
        ("world-entailment", "sentences"),
        ("world-questions", "sentences"),
        ("world-paraphrase", "sentences"),
        ("world-sentiment", "sentences"),
        ("world-span", "span"),
        ("world-tagging", "tagging"),
    ):
        cls = sources[name]
        tokenizer = {"vocab": 150, "corpus": {"name": "world", "documents": 40}}
        world_set = cls(cls.Options(train=20, held_out=8, length=64, tokenizer=tokenizer))
        assert cls.task == task
        sizes = [len(world_set.load(split)) for split in ("train", "val", "test")]
        assert sizes >= [20, 8, 16]
