"""Corpora: documents of sentences to pretrain on, streamed from where they lie into files of tokens."""

from __future__ import annotations

import itertools
import json
import os
import re
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sslrun.data.cache import cache_root, digest_of, locked
from sslrun.data.source import sources
from sslrun.data.stores import FileStore, Hub, Split, fingerprint
from sslrun.data.text.base import (
    PublishedText,
    TextCard,
    TextOptions,
    TextSource,
    cell,
    register_published,
    with_columns,
)
from sslrun.data.text.sequences import Documents, flat
from sslrun.data.text.tokenizer import Tokenizer
from sslrun.errors import UserError
from sslrun.files import replacing

ROWS_AT_ONCE = 1000
"""Rows of a table that are read at once."""
PIECE = 4_000_000
"""Characters tokenized between two writes of the cache, and the end of a document."""
LONGEST = 10_000
"""Sentences of a document; what goes on longer is more than one, that memory needn't hold it all."""


class Corpus(TextSource):
    """Documents of sentences, without labels."""

    splits: tuple[Split, ...] = ("train",)

    @abstractmethod
    def documents(self) -> Iterator[list[str]]:
        """Every document, sentence by sentence."""

    def texts(self) -> Iterator[str]:
        return (sentence for document in self.documents() for sentence in document)

    def load(self, split: Split) -> Documents:
        tokenizer = self.spec.tokenizer
        folder = cache_root() / "tokens" / digest_of([TOKENS_VERSION, self.name, self.content(), tokenizer.digest])
        tokens, sentences, documents = token_file(folder, self._watched, tokenizer)
        if len(documents) < 2:
            raise UserError(f"{self.title}: holds no text")
        return Documents(tokens, sentences, documents, self.spec, folder=folder)

    def _watched(self) -> Iterator[list[str]]:
        """The documents, told to whoever watches their progress; how many there will be is known at the end."""
        number = 0
        for number, document in enumerate(self.documents(), start=1):
            yield document
            if self.progress and number % 100 == 0:
                self.progress(self.title, number, 0)
        if self.progress:
            self.progress(self.title, number, number)


def token_file(
    folder: Path, documents: Callable[[], Iterable[list[str]]], tokenizer: Tokenizer
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (S,), starts of sentences and of documents, mapped from files in `folder`, which are made once.

    Made in pieces: memory holds one of them, and a second call goes on where a killed one stopped.
    """
    if not (folder / "complete").exists():
        with locked(folder):
            if not (folder / "complete").exists():
                folder.mkdir(exist_ok=True)
                _write_tokens(folder, documents, tokenizer)
    tokens, sentences, starts = (_mapped(folder / name, kind) for name, (kind, _) in PARTS.items())
    return tokens, sentences, starts


TOKENS_VERSION = 3
"""Raised when the files hold something else."""
PARTS: dict[str, tuple[np.dtype, int]] = {
    "tokens": (np.dtype(np.int32), 0), "sentences": (np.dtype(np.int64), 1), "documents": (np.dtype(np.int64), 1)
}  # fmt: skip
"""Files of a token file, each with what it holds (ids; where each sentence and each document starts, with the end), and
how many numbers, 0, it begins with."""


def _mapped(path: Path, kind: np.dtype) -> Tensor:
    count = path.stat().st_size // kind.itemsize
    # Mode c: torch wants what it may write to; nothing does, and nothing would reach the file.
    return torch.from_numpy(np.memmap(path, kind, "c", shape=(count,)) if count else np.zeros(0, kind))


def _write_tokens(folder: Path, documents: Callable[[], Iterable[list[str]]], tokenizer: Tokenizer) -> None:
    progress = folder / "progress.json"
    done: dict[str, int] = json.loads(progress.read_text()) if progress.exists() else dict.fromkeys(PARTS, 0)
    with ExitStack() as stack:
        files = {name: stack.enter_context(open(folder / name, "ab")) for name in PARTS}
        for name, file in files.items():
            kind, first = PARTS[name]
            file.truncate((first + done[name]) * kind.itemsize)  # a new file it fills up with zeros
        for piece in _pieces(documents(), skip=done["documents"]):
            tokens, offsets = flat(tokenizer.encode([sentence for document in piece for sentence in document]))
            new = {
                "tokens": tokens.numpy(),
                "sentences": offsets[1:].numpy() + done["tokens"],
                "documents": np.cumsum([len(document) for document in piece]) + done["sentences"],
            }
            for name, values in new.items():
                files[name].write(values.astype(PARTS[name][0]).tobytes())
                files[name].flush()
                os.fsync(files[name].fileno())  # before it is said to be there
                done[name] += len(values)
            with replacing(progress) as temporary:
                temporary.write_text(json.dumps(done))
    (folder / "complete").touch()


def _pieces(documents: Iterable[list[str]], skip: int) -> Iterator[list[list[str]]]:
    piece: list[list[str]] = []
    size = 0
    for number, document in enumerate(documents):
        if number >= skip:
            piece.append(document)
            size += sum(map(len, document))
        if size >= PIECE:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece


CORPORA = {
    "corpus": TextCard(
        "3,190 English documents, 4.8 million words: a folder with train.parquet, one sentence a line.", None
    ),
    "wikitext-103": TextCard(
        "Good and featured articles of Wikipedia, 103 million words. Merity et al., ICLR 2017.",
        Hub("Salesforce/wikitext", {"train": "train"}, config="wikitext-103-raw-v1"),
        rows="articles",
    ),
    "wikipedia": TextCard(
        "All of English Wikipedia, 2023; half of BERT's corpus and more.",
        Hub("wikimedia/wikipedia", {"train": "train"}, config="20231101.en"),
        rows="passages",
    ),
    "bookcorpus": TextCard(
        "Unpublished novels, one sentence a row. Zhu et al., ICCV 2015.",
        # Its main branch has a script, which `datasets` no longer runs; this one has what the script makes.
        Hub(
            "bookcorpus/bookcorpus",
            {"train": "train"},
            revision="refs/convert/parquet",
            files={"train": "plain_text/train/*.parquet"},
        ),
        rows="sentences",
    ),
}


class PublishedCorpus(PublishedText, Corpus):
    """A corpus in a column of a table; lines of a cell are sentences, or else sentences are found by punctuation."""

    splits = ("train",)

    def content(self) -> Any:
        identity = self.store.identity("train")
        return identity if self.card.rows == "documents" else [identity, self.card.rows]

    def documents(self) -> Iterator[list[str]]:
        column = self.card.columns[0]
        table = self.table("train", column)
        rows: Iterator[str] = (
            cell(text, self.title, column) for batch in table.iter(batch_size=ROWS_AT_ONCE) for text in batch[column]
        )
        match self.card.rows:
            case "sentences":
                return _gathered(rows)
            case "articles":
                rows = _articles(rows)
            case "passages":
                rows = _passages(rows)
        return _documents(rows)


SENTENCE_END = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"')\]]))\s+(?=[\"'(\[]?[A-Z0-9])")
PASSAGE = re.compile(r"[.!?:][\"')\]]*$")
"""How a line ends that is no heading and no item of a list."""
BOOK_SENTENCES = 200
"""Sentences that make a document where the corpus has one a row and marks no documents."""


def _gathered(sentences: Iterable[str]) -> Iterator[list[str]]:
    """Documents of as many sentences as `BOOK_SENTENCES`."""
    rest = iter(sentences)
    while document := list(itertools.islice(rest, BOOK_SENTENCES)):
        yield document


def _documents(rows: Iterable[str]) -> Iterator[list[str]]:
    """The sentences of each row; of empty ones none."""
    for row in rows:
        lines = [line.strip() for line in row.splitlines() if line.strip()]
        if len(lines) <= 1 or max(map(len, lines)) > 400:  # paragraphs, not sentences
            lines = [sentence for line in lines for sentence in SENTENCE_END.split(line)]
        if lines:
            yield lines


def _passages(rows: Iterable[str]) -> Iterator[str]:
    """Articles without headings and lists: "only the text passages", as Devlin et al. (2019, 3.1) took of Wikipedia."""
    for row in rows:
        yield "\n".join(line for line in row.splitlines() if PASSAGE.search(line.rstrip()))


def _articles(rows: Iterable[str]) -> Iterator[str]:
    """Whole articles of WikiText, whose rows are paragraphs and headings. `= Title =` begins one, `= = Section = =` does
    not; neither is kept: BERT's corpus has no headings."""
    lines: list[str] = []
    for row in rows:
        line = row.strip()
        heading = line.startswith("= ") and line.endswith(" =")
        if lines and ((heading and not line.startswith("= = ")) or len(lines) == LONGEST):
            yield "\n".join(lines)
            lines = []
        if line and not heading:
            lines.append(line)
    if lines:
        yield "\n".join(lines)


register_published(PublishedCorpus, CORPORA)


@sources.register("wikipedia-books")
class WikipediaBooks(Corpus):
    """BERT's corpus (Devlin et al. 2019): all of English Wikipedia, then BookCorpus."""

    @cached_property
    def parts(self) -> list[Corpus]:
        return [sources[name](self.options) for name in ("wikipedia", "bookcorpus")]  # type: ignore[misc]

    def content(self) -> Any:
        return [each.content() for each in self.parts]

    def documents(self) -> Iterator[list[str]]:
        return itertools.chain.from_iterable(each.documents() for each in self.parts)


@sources.register("text")
class TextFiles(Corpus):
    """Your own text: .txt files (one sentence a line, a blank line between documents) or tables with a text column."""

    class Options(TextOptions):
        path: Path
        """A .txt file or a table, or a folder of such files."""
        column: str = "text"
        """Column of the documents in a table, one document per row."""

    @property
    def title(self) -> str:
        return str(self.options.path)

    def content(self) -> Any:
        return fingerprint([str(each) for each in self._files])

    @cached_property
    def _files(self) -> list[Path]:
        path = self.options.path
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        kinds = (".txt", *FileStore.FORMATS)
        found = [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.suffix in kinds)
        if not found:
            raise UserError(f"{path}: holds no text ({', '.join(kinds)})")
        return found

    def documents(self) -> Iterator[list[str]]:
        for file in self._files:
            if file.suffix in FileStore.FORMATS:
                column = self.options.column
                table = with_columns(FileStore(file).table("train"), str(file), column)
                rows = (cell(each, str(file), column) for each in table[column])
                yield from _documents(rows)
            else:
                yield from _text_file(file)


def _text_file(file: Path) -> Iterator[list[str]]:
    document: list[str] = []
    try:
        with open(file, encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if "\0" in line:
                    raise UserError(f"{file}:{number}: is binary, not text: remove the file from the folder")
                if line.strip():
                    document.append(line.strip())
                if document and (not line.strip() or len(document) == LONGEST):
                    yield document
                    document = []
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}: is not UTF-8 text (byte {error.start}): convert it, or remove it from the folder"
        ) from None
    if document:
        yield document
