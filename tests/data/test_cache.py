import errno
import re
import threading
import time
from dataclasses import replace

import pytest

from sslrun.data.cache import cache_root, digest_key, locked
from sslrun.data.source import sources
from sslrun.data.text import base as text
from sslrun.data.text.corpora import token_file
from sslrun.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SSLRUN_CACHE", str(tmp_path / "cache"))
    text._train_cached.cache_clear()
    yield
    text._train_cached.cache_clear()


def world(**options):
    cls = sources["world"]
    return cls(cls.Options(documents=20, tokenizer={"vocab": 200}, **options))


def test_a_digest_is_of_the_values_and_not_of_their_order():
    assert digest_key({"a": 1, "b": [2]}) == digest_key({"b": [2], "a": 1})
    assert digest_key({"a": 1}) != digest_key({"a": 2})


def test_one_at_a_time_makes_a_thing(tmp_path):
    made = []

    def make():
        with locked(tmp_path / "folder" / "thing"):
            if not made:
                time.sleep(0.2)
                made.append(threading.get_ident())

    threads = [threading.Thread(target=make) for _ in range(3)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(made) == 1


@pytest.mark.parametrize(
    "full",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        Exception("No space left on device (os error 28)"),
    ],
    ids=["python's", "tokenizers'"],
)
def test_a_full_disk_is_the_cache_s_and_not_the_run_s(tmp_path, full):
    said = rf"{re.escape(str(tmp_path))}: cannot be written .*No space left.*: set SSLRUN_CACHE to another"
    with pytest.raises(UserError, match=said), locked(tmp_path / "thing"):
        raise full


def test_other_errors_go_through(tmp_path):
    for error in (UserError("this"), ValueError("that")):
        with pytest.raises(type(error), match=str(error)), locked(tmp_path / "thing"):
            raise error


def test_a_set_of_text_names_the_remedy_where_the_cache_cannot_be_written(tmp_path, monkeypatch):
    corpus = world()
    documents = corpus.load("train")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SSLRUN_CACHE", str(tmp_path / "file"))
    remedy = r"cannot be written.*set SSLRUN_CACHE"
    with pytest.raises(UserError, match=remedy):  # tokens, by a tokenizer that is there
        corpus.load("train")
    with pytest.raises(UserError, match=remedy):
        replace(documents, folder=tmp_path / "file" / "tokens").build_pairs(1, seed=0)
    text._train_cached.cache_clear()
    with pytest.raises(UserError, match=remedy):
        world().load("train")


def test_a_second_call_finds_what_the_first_one_made():
    corpus = world()
    given = list(corpus.documents())
    first = token_file(cache_root() / "tokens" / "x", lambda: given, corpus.spec.tokenizer)
    again = token_file(
        cache_root() / "tokens" / "x", lambda: pytest.fail("made anew"), corpus.spec.tokenizer
    )
    assert all(a.equal(b) for a, b in zip(first, again, strict=True))
