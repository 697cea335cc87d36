"""CoNLL files: sentences, columns, splits, and errors with file and line."""

import pytest

from sslrun.data.source import sources
from sslrun.data.splits import load_splits
from sslrun.data.text.tokenizer import SPECIALS
from sslrun.errors import UserError

TEXT = """-DOCSTART- -X- O

Aa NNP B-PER
bb VB O

-DOCSTART- -X- O
cc\tNN\tB-LOC
"""


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("SSLRUN_CACHE", str(tmp_path / "cache"))
    vocabulary = tmp_path / "vocabulary"
    vocabulary.mkdir()
    (vocabulary / "vocab.txt").write_text("\n".join([*SPECIALS, "aa", "bb", "cc"]))

    def build(path, **options):
        cls = sources["conll-files"]
        tokenizer = {"file": vocabulary / "vocab.txt"}
        return cls(cls.Options(path=path, tokenizer=tokenizer, length=16, **options))

    return build


def write(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_reads_words_and_tags_of_a_file(tmp_path, source):
    file = write(tmp_path / "names.conll", TEXT)
    assert source(file).splits == ("train",)
    assert source(file).words("train") == ([["Aa", "bb"], ["cc"]], [["B-PER", "O"], ["B-LOC"]])
    examples = source(file).load("train")
    assert examples.classes == ("B-LOC", "B-PER", "O")
    assert len(examples) == 2


def test_reads_columns_by_number(tmp_path, source):
    file = write(tmp_path / "names.txt", TEXT)
    tags = source(file, tag_column=2).words("train")[1]
    assert tags == [["NNP", "VB"], ["NN"]]
    words = source(file, word_column=3, tag_column=1).words("train")[0]
    assert words == [["B-PER", "O"], ["B-LOC"]]


def test_reads_the_splits_of_a_folder(tmp_path, source):
    folder = tmp_path / "names"
    write(folder / "train.txt", "aa B-X\nbb O\n")
    write(folder / "valid.conll", "bb O\n")
    write(folder / "test.txt", "cc B-X\n\nbb O\n")
    names = source(folder)
    assert names.splits == ("train", "val", "test")
    assert names.words("val") == ([["bb"]], [["O"]])
    assert len(names.load("test")) == 2


def test_carves_missing_splits_from_one_file(tmp_path, source):
    file = write(tmp_path / "names.conll", "aa B-X\nbb O\n\n" * 40)
    splits = load_splits("conll-files", source(file).options)
    assert len(splits.train) + len(splits.val) + len(splits.test) == 40
    assert min(len(splits.val), len(splits.test)) > 0


def test_tests_on_the_validation_split_if_there_is_no_test_split(tmp_path, source):
    write(tmp_path / "names" / "train.txt", "aa B-X\n")
    write(tmp_path / "names" / "val.txt", "bb B-X\n")
    names = source(tmp_path / "names")
    assert names.splits == ("train", "test")
    assert names.words("test") == ([["bb"]], [["B-X"]])


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("aa O\n\nbb\n", {}, r"names.conll:3: lacks column 2 \(it has 1\)"),
        ("aa O\n", {"tag_column": 4}, r"names.conll:1: lacks column 4 \(it has 2\)"),
        ("\n-DOCSTART- O\n", {}, r"names.conll: has no words"),
    ],
)
def test_reports_lines_that_do_not_fit(tmp_path, source, text, options, message):
    file = write(tmp_path / "names.conll", text)
    with pytest.raises(UserError, match=message):
        source(file, **options).load("train")


def test_reports_files_that_cannot_be_read(tmp_path, source):
    with pytest.raises(UserError, match=r"none.conll: no such file or folder"):
        source(tmp_path / "none.conll").load("train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: should hold train.conll or train.txt"):
        source(tmp_path / "empty").load("train")
    (tmp_path / "latin.conll").write_bytes(b"caf\xe9 O\n")
    with pytest.raises(UserError, match=r"latin.conll: is not UTF-8 text \(byte 3\)"):
        source(tmp_path / "latin.conll").load("train")
