"""CoNLL files: columns, blank lines, document marks, folders, and the line of every mistake."""

import pytest
import torch

from sslrun.data.source import sources
from sslrun.data.splits import load_splits
from sslrun.data.text.conll import read_conll
from sslrun.data.text.tokenizer import SPECIALS
from sslrun.errors import UserError
from sslrun.tasks.base import tasks

CONLL2003 = """-DOCSTART- -X- O O

aa NNP I-NP B-PER
bb VBZ I-VP O

-DOCSTART- -X- O O

cc NNP I-NP B-LOC
cc NNP I-NP I-LOC
"""


def write(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def source(tmp_path, path, **options):
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join([*SPECIALS, "aa", "bb", "cc"]))
    cls = sources["conll-files"]
    return cls(cls.Options(path=path, tokenizer={"file": vocabulary}, length=16, **options))


def test_first_column_holds_words_and_last_holds_tags(tmp_path):
    words, tags = read_conll(write(tmp_path / "train.conll", CONLL2003))
    assert words == [["aa", "bb"], ["cc", "cc"]]
    assert tags == [["B-PER", "O"], ["B-LOC", "I-LOC"]]


def test_columns_are_chosen_by_number(tmp_path):
    file = write(tmp_path / "train.txt", CONLL2003)
    assert read_conll(file, tags=2)[1] == [["NNP", "VBZ"], ["NNP", "NNP"]]
    assert read_conll(file, words="last", tags=1)[0] == [["B-PER", "O"], ["B-LOC", "I-LOC"]]


def test_document_mark_ends_a_sentence_without_a_blank_line(tmp_path):
    file = write(tmp_path / "train.conll", "aa O\n-DOCSTART- O\nbb O\n")
    assert read_conll(file)[0] == [["aa"], ["bb"]]


def test_tabs_separate_columns_and_words_may_hold_spaces(tmp_path):
    text = "\ufeff1\tNew York\tB-LOC\r\n2\t\u00a0\tO\r\n \r\n\r\n1\taa\tO"
    words, tags = read_conll(write(tmp_path / "train.tsv", text), words=2)
    assert words == [["New York", "\u00a0"], ["aa"]]
    assert tags == [["B-LOC", "O"], ["O"]]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("aa O\nbb\n", {}, "train.conll:2: has 1 column, the lines above have 2"),
        ("aa O\n\nbb NN O\n", {}, "train.conll:3: has 3 columns, the lines above have 2"),
        ("\naa\n", {}, "train.conll:2: words and tags are both read from column 1 of 1"),
        ("aa O\n", {"tag_column": 4}, "train.conll:1: has 2 columns, but tag_column is 4"),
        ("aa\tO\n\tO\n", {}, "train.conll:2: has an empty word or tag"),
        ("\n-DOCSTART- O\n", {}, "train.conll: holds no sentences"),
    ],
)
def test_mistakes_name_file_and_line(tmp_path, text, options, message):
    file = write(tmp_path / "train.conll", text)
    with pytest.raises(UserError) as error:
        source(tmp_path, file, **options).load("train")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_file_of_another_encoding_is_an_error(tmp_path):
    file = tmp_path / "train.conll"
    file.write_bytes("café O\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"train.conll: is not UTF-8 text \(byte 3\)"):
        read_conll(file)


@pytest.mark.parametrize("column", [0, -1, "middle"])
def test_columns_are_counted_from_one(tmp_path, column):
    with pytest.raises(ValueError, match="tag_column"):
        source(tmp_path, tmp_path / "train.conll", tag_column=column)


def test_folder_has_splits(tmp_path):
    folder = tmp_path / "tagged"
    for name, word in (("train.conll", "aa"), ("dev.txt", "bb"), ("test.tsv", "cc")):
        write(folder / name, f"{word}\tB-X\n")
    data = source(tmp_path, folder)
    assert set(data.splits) == {"train", "val", "test"}
    assert [data.words(split)[0] for split in ("train", "val", "test")] == [
        [["aa"]],
        [["bb"]],
        [["cc"]],
    ]
    (folder / "test.tsv").unlink()
    assert set(source(tmp_path, folder).splits) == {"train", "test"}


def test_folder_without_train_or_with_two_is_an_error(tmp_path):
    folder = tmp_path / "tagged"
    write(folder / "test.conll", "aa O\n")
    with pytest.raises(UserError, match=r"tagged: should hold a file train\{.conll,.txt,.tsv\}"):
        source(tmp_path, folder).check_available()
    write(folder / "train.conll", "aa O\n")
    write(folder / "train.txt", "aa O\n")
    with pytest.raises(UserError, match=r"both train.conll and train.txt are the train split"):
        source(tmp_path, folder).check_available()
    with pytest.raises(UserError, match="no such file or folder"):
        source(tmp_path, tmp_path / "missing").check_available()
    with pytest.raises(UserError, match=r"should end with one of .conll, .txt, .tsv"):
        source(tmp_path, write(tmp_path / "train.csv", "aa,O\n")).check_available()


def test_other_sources_point_to_conll(tmp_path):
    cls = sources["words"]
    file = write(tmp_path / "train.conll", CONLL2003)
    with pytest.raises(UserError, match="use the data set conll-files"):
        cls(cls.Options(path=file)).load("train")


def test_tokenizer_is_trained_on_the_words_of_train(tmp_path, monkeypatch):
    monkeypatch.setenv("SSLRUN_CACHE", str(tmp_path / "cache"))
    cls = sources["conll-files"]
    file = write(tmp_path / "train.conll", CONLL2003.replace("aa", "zebra"))
    data = cls(cls.Options(path=file, tokenizer={"vocab": 64}))
    assert "z" in data.spec.tokenizer.strings
    assert data.load("train").classes == ("B-LOC", "B-PER", "I-LOC", "I-PER", "O")


def test_tags_of_a_file_are_learned_and_scored(tmp_path):
    lines = ["aa B-X\nbb O\n", "bb O\ncc B-Y\n"] * 20
    file = write(tmp_path / "train.conll", "\n".join(lines))
    splits = load_splits("conll-files", source(tmp_path, file).options)
    test = splits.test
    assert 0 < len(test) < 40
    task = tasks["tagging"](tasks["tagging"].Options(), test.spec, test.classes)
    (batch,) = test.batches([torch.arange(len(test))], torch.device("cpu"))
    outputs = torch.nn.functional.one_hot(batch.labels.clamp_min(0), len(test.classes)).float()
    assert task.score(outputs, test)["f1"] == 100
    assert task.score(outputs.roll(1, dims=-1), test)["f1"] < 100
