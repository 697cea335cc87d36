"""Pairs of texts: the small world's two grammars, own tables, and targets as ids."""

import pytest

from sslrun.data.source import sources
from sslrun.data.splits import load_splits
from sslrun.data.text.sequences import IGNORED
from sslrun.data.text.tokenizer import blank_tokenizer
from sslrun.data.text.translation import target_ids
from sslrun.data.text.world import VERBS, World
from sslrun.errors import UserError


def test_the_source_determines_the_target_and_its_verb_is_last():
    pairs = World(0).examples("translation", "train", 4000)
    assert pairs == World(0).examples("translation", "train", 4000)
    targets = {}
    for source, target in pairs:
        assert targets.setdefault(source, target) == target
        *words, verb, stop = target.split()
        assert (verb in VERBS, stop) == (True, ".")
        assert not set(words) & set(VERBS)
    assert len(targets) > 3000
    assert not {source for source, _ in World(0).examples("translation", "test", 500)} & set(
        targets
    )


def test_several_wordings_have_one_target():
    pairs = World(0).examples("translation", "train", 4000)
    sources_of = {}
    for source, target in pairs:
        sources_of.setdefault(target, set()).add(source)
    several = [texts for texts in sources_of.values() if len(texts) > 1]
    assert len(several) > 100
    assert any(
        any("was lost by" in text for text in texts) and any(" lost the" in text for text in texts)
        for texts in several
    )


def test_targets_end_with_a_separator_and_are_cut():
    tokenizer = blank_tokenizer(30)
    sep = tokenizer.sep
    ids = target_ids([[7, 8], [9], list(range(10, 20))], tokenizer, 4)
    assert ids.tolist() == [[7, 8, sep, IGNORED], [9, sep, IGNORED, IGNORED], [10, 11, 12, sep]]


def own(path, **options):
    source = sources["translation-pairs"]
    values = {"path": path, "length": 16, "tokenizer": {"vocab": 64}, **options}
    return load_splits("translation-pairs", source.Options.model_validate(values))


@pytest.mark.parametrize(("suffix", "separator"), [("csv", ","), ("tsv", "\t")])
def test_a_table_of_pairs_becomes_sources_and_targets(tmp_path, suffix, separator):
    rows = [
        ("de", "en"),
        *[(f"der Ball {letter}", f"the ball {letter}") for letter in "abcdefghij"],
    ]
    path = tmp_path / f"pairs.{suffix}"
    path.write_text("".join(f"{separator.join(row)}\n" for row in rows))
    splits = own(path, source="de", target="en")
    assert splits.spec.tokenizer.decode(splits.train.tokens[:2].tolist()).startswith("der")
    row = int(splits.train.rows[0])
    text = splits.spec.tokenizer.until_end(splits.train.labels[0].tolist())
    assert splits.spec.tokenizer.decode(text) == splits.train.extra[row]


def test_mistakes_are_one_line(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("source,target\na b,c d\ne f,\n")
    with pytest.raises(UserError, match=r"row 1: column 'target' is empty"):
        _ = own(path).train
    with pytest.raises(UserError, match=r"no column 'en'; the columns are source, target"):
        _ = own(path, target="en").train
