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


def test_a_digest_depends_on_values_but_not_on_key_order():
    assert digest_key({"a": 1, "b": [2]}) == digest_key({"b": [2], "a": 1})
    assert digest_key({"a": 1}) != digest_key({"a": 2})


def test_a_cache_entry_is_built_by_one_process_at_a_time(tmp_path):
    built = []

    def make():
        with locked(tmp_path / "folder" / "thing"):
            if not built:
                time.sleep(0.2)
                built.append(threading.get_ident())

    threads = [threading.Thread(target=make) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1


@pytest.mark.parametrize(
    "full",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        Exception("No space left on device (os error 28)"),
    ],
    ids=["python's", "tokenizers'"],
)
def test_a_full_disk_names_the_cache_and_not_the_run(tmp_path, full):
    said = (
        rf"{re.escape(str(tmp_path))}: cannot be written .*No space left.*: "
        "set SSLRUN_CACHE to another"
    )
    with pytest.raises(UserError, match=said), locked(tmp_path / "thing"):
        raise full


def test_other_errors_are_raised_unchanged(tmp_path):
    for error in (UserError("this"), ValueError("that")):
        with pytest.raises(type(error), match=str(error)), locked(tmp_path / "thing"):
            raise error


def test_text_sets_name_the_remedy_for_an_unwritable_cache(tmp_path, monkeypatch):
    corpus = world()
    documents = corpus.load("train")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SSLRUN_CACHE", str(tmp_path / "file"))
    remedy = r"cannot be written.*set SSLRUN_CACHE"
    with pytest.raises(UserError, match=remedy):  # tokens of an existing tokenizer
        corpus.load("train")
    with pytest.raises(UserError, match=remedy):
        replace(documents, folder=tmp_path / "file" / "tokens").build_pairs(1, seed=0)
    text._train_cached.cache_clear()
    with pytest.raises(UserError, match=remedy):
        world().load("train")


def test_a_second_call_reads_the_cache_entry():
    corpus = world()
    documents = list(corpus.documents())
    first = token_file(cache_root() / "tokens" / "x", lambda: documents, corpus.spec.tokenizer)
    again = token_file(
        cache_root() / "tokens" / "x", lambda: pytest.fail("built again"), corpus.spec.tokenizer
    )
    assert all(a.equal(b) for a, b in zip(first, again, strict=True))
