"""Corpora: documents of sentences to pretrain on, streamed from their source into token files."""

from __future__ import annotations

import itertools
import json
import os
import re
import zlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from sslrun.data.cache import cache_root, digest_key, locked
from sslrun.data.source import sources
from sslrun.data.stores import FileStore, Hub, Split, find_files, fingerprint
from sslrun.data.text.base import (
    PublishedText,
    TextCard,
    TextOptions,
    TextSource,
    cell_text,
    check_columns,
    register_published,
)
from sslrun.data.text.sequences import Documents, concatenate_texts
from sslrun.data.text.tokenizer import Tokenizer
from sslrun.errors import UserError
from sslrun.files import SUMS, are_intact, checksum, replacing, write_sums

ROWS_AT_ONCE = 1000
"""Number of table rows to read at a time."""
PIECE = 4_000_000
"""Characters to tokenize between two writes of the cache; a document is always finished."""
LONGEST_LINE = 100_000
"""Maximum number of characters in a line of a .txt file. The time to train a tokenizer grows with
the square of the longest word."""
LONGEST = 10_000
"""Maximum number of sentences in a document; longer ones are divided, to bound memory use."""


class Corpus(TextSource):
    """Documents of sentences, without labels."""

    splits: tuple[Split, ...] = ("train",)

    @abstractmethod
    def documents(self) -> Iterator[list[str]]:
        """Yield every document as a list of sentences."""

    def texts(self) -> Iterator[str]:
        return (sentence for document in self.documents() for sentence in document)

    def load(self, split: Split) -> Documents:
        folder = self.folder
        parts = token_file(folder, self._report_documents, self.spec.tokenizer)
        tokens, sentences, documents = parts
        if len(documents) < 2:
            raise UserError(f"{self.title}: holds no text; is it the right file or folder?")
        return Documents(tokens, sentences, documents, self.spec, folder=folder)

    @property
    def folder(self) -> Path:
        """The folder of the cache that holds the tokens."""
        key = [TOKENS_VERSION, self.name, self.content(), self.spec.tokenizer.digest]
        return cache_root() / "tokens" / digest_key(key)

    def _report_documents(self) -> Iterator[list[str]]:
        """Yield the documents and report progress; the total is reported only at the end."""
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
    """Return the tokens of all documents, mapped from files in `folder` that are written once.

    The files are written in pieces: memory holds one piece, and a call after an interrupted one
    resumes at the last complete piece. Damaged files are written again; to find them takes about a
    second for 300 million tokens, once per process.

    Returns:
        Tokens (S,), starts of sentences (M + 1,), and starts of documents (D + 1,).
    """
    if not are_intact(folder / SUMS, PARTS):
        with locked(folder):
            if not are_intact(folder / SUMS, PARTS):
                (folder / SUMS).unlink(missing_ok=True)
                folder.mkdir(exist_ok=True)
                _write_tokens(folder, documents, tokenizer)
    tokens, sentences, starts = (
        _map_file(folder / name, kind) for name, (kind, _) in PARTS.items()
    )
    return tokens, sentences, starts


TOKENS_VERSION = 3
"""Raise it when the content of the files changes."""
PARTS: dict[str, tuple[np.dtype, int]] = {
    "tokens": (np.dtype(np.int32), 0),
    "sentences": (np.dtype(np.int64), 1),
    "documents": (np.dtype(np.int64), 1),
}
"""File name -> type of its numbers, and number of zeros it begins with.

tokens: the ids. sentences: starts in tokens, and the end. documents: starts in sentences, and the
end.
"""


def _map_file(path: Path, kind: np.dtype) -> Tensor:
    count = path.stat().st_size // kind.itemsize
    if count == 0:
        return torch.from_numpy(np.zeros(0, kind))
    # Mode c: torch wants writable memory; nothing is written, and a write would not reach the file.
    return torch.from_numpy(np.memmap(path, kind, "c", shape=(count,)))


def _write_tokens(
    folder: Path, documents: Callable[[], Iterable[list[str]]], tokenizer: Tokenizer
) -> None:
    """Write the files of `PARTS`, from the last complete piece on."""
    progress = folder / "progress.json"
    done, sums = _read_progress(folder)
    with ExitStack() as stack:
        files = {name: stack.enter_context(_open_part(folder / name, done[name])) for name in PARTS}
        for piece in _gather_pieces(documents(), skip=done["documents"]):
            tokens, offsets = concatenate_texts(tokenizer.encode(list(itertools.chain(*piece))))
            sentence_ends = offsets[1:].numpy() + done["tokens"]
            document_ends = np.cumsum([len(document) for document in piece]) + done["sentences"]
            parts = {"tokens": tokens.numpy(), "sentences": sentence_ends}
            for name, numbers in {**parts, "documents": document_ends}.items():
                sums[name] = _append_numbers(files[name], numbers, sums[name])
            done["tokens"] += len(tokens)
            done["sentences"] += len(sentence_ends)
            done["documents"] += len(document_ends)
            with replacing(progress) as temporary:
                temporary.write_text(json.dumps({"counts": done, "sums": sums}))
    write_sums(folder / SUMS, sums)


def _read_progress(folder: Path) -> tuple[dict[str, int], dict[str, int]]:
    """Read how many numbers each file of `PARTS` holds, and its checksum.

    If the files are damaged, they begin again.
    """
    try:
        progress = json.loads((folder / "progress.json").read_text())
        counts, sums = progress["counts"], progress["sums"]
        if all(_prefix_checksum(folder / name, counts[name]) == sums[name] for name in PARTS):
            return counts, sums
    except (OSError, ValueError, KeyError, TypeError):
        pass
    zeros = {name: bytes(first * kind.itemsize) for name, (kind, first) in PARTS.items()}
    return dict.fromkeys(PARTS, 0), {name: zlib.crc32(first) for name, first in zeros.items()}


def _prefix_checksum(path: Path, done: int) -> int:
    """The checksum of the first `done` numbers of a file of `PARTS`."""
    kind, first = PARTS[path.name]
    return checksum(path, (first + done) * kind.itemsize)


def _open_part(path: Path, done: int) -> BinaryIO:
    """Open a file of `PARTS` for appending, cut to its first `done` numbers."""
    file = open(path, "ab")  # noqa: SIM115 (the caller closes it)
    kind, first = PARTS[path.name]
    file.truncate((first + done) * kind.itemsize)  # fills a new file with zeros
    return file


def _append_numbers(file: BinaryIO, values: np.ndarray, checksum_before: int) -> int:
    """Append `values` to a file of `PARTS`, wait until they are on the disk; return its checksum.

    progress.json may count them only then.
    """
    kind, _ = PARTS[Path(file.name).name]
    content = values.astype(kind).tobytes()
    file.write(content)
    file.flush()
    os.fsync(file.fileno())
    return zlib.crc32(content, checksum_before)


def _gather_pieces(documents: Iterable[list[str]], skip: int) -> Iterator[list[list[str]]]:
    """Yield lists of documents of about `PIECE` characters, without the first `skip` documents."""
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
        "3,190 English documents, 4.8 million words: train.parquet with one sentence per line.",
        None,
    ),
    "wikitext-103": TextCard(
        "Good and featured articles of Wikipedia, 103 million words. Merity et al., ICLR 2017.",
        Hub("Salesforce/wikitext", {"train": "train"}, config="wikitext-103-raw-v1"),
        rows="articles",
    ),
    "wikipedia": TextCard(
        "All of English Wikipedia, 2023; a superset of the Wikipedia part of BERT's corpus.",
        Hub("wikimedia/wikipedia", {"train": "train"}, config="20231101.en"),
        rows="passages",
    ),
    "bookcorpus": TextCard(
        "Unpublished novels, one sentence per row. Zhu et al., ICCV 2015.",
        # `datasets` no longer runs the script on its main branch; this branch has the output.
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
    """A corpus in a column of a table.

    The lines of a cell are its sentences; paragraphs are split into sentences at punctuation.
    """

    splits = ("train",)

    def content(self) -> Any:
        identity = self.store.identity("train")
        return identity if self.card.rows == "documents" else [identity, self.card.rows]

    def documents(self) -> Iterator[list[str]]:
        column = self.card.columns[0]
        table = self.table("train", column)
        rows: Iterator[str] = (
            cell_text(text, self.title, column)
            for batch in table.iter(batch_size=ROWS_AT_ONCE)
            for text in batch[column]
        )
        match self.card.rows:
            case "sentences":
                return _gather_sentences(rows)
            case "articles":
                rows = _join_articles(rows)
            case "passages":
                rows = _keep_passages(rows)
        return _split_documents(rows)


SENTENCE_END = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"')\]]))\s+(?=[\"'(\[]?[A-Z0-9])")
PASSAGE = re.compile(r"[.!?:][\"')\]]*$")
"""End of a line that is neither a heading nor a list item."""
BOOK_SENTENCES = 200
"""Sentences per document if the corpus has one sentence per row and does not mark documents."""


def _gather_sentences(sentences: Iterable[str]) -> Iterator[list[str]]:
    """Yield documents of `BOOK_SENTENCES` sentences."""
    rest = iter(sentences)
    while document := list(itertools.islice(rest, BOOK_SENTENCES)):
        yield document


def _split_documents(rows: Iterable[str]) -> Iterator[list[str]]:
    """Yield the sentences of each row; skip empty rows."""
    for row in rows:
        lines = [line.strip() for line in row.splitlines() if line.strip()]
        if len(lines) <= 1 or max(map(len, lines)) > 400:  # paragraphs, not sentences
            lines = [sentence for line in lines for sentence in SENTENCE_END.split(line)]
        if lines:
            yield lines


def _keep_passages(rows: Iterable[str]) -> Iterator[str]:
    """Remove headings and lists from articles.

    Devlin et al. (NAACL 2019, section 3.1) extract "only the text passages" of Wikipedia.
    """
    for row in rows:
        yield "\n".join(line for line in row.splitlines() if PASSAGE.search(line.rstrip()))


def _join_articles(rows: Iterable[str]) -> Iterator[str]:
    """Join rows of WikiText, paragraphs and headings, to whole articles.

    `= Title =` begins an article and `= = Section = =` does not. Headings are removed, as BERT's
    corpus has none.
    """
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
    """BERT's corpus (Devlin et al., NAACL 2019): all of English Wikipedia, then BookCorpus."""

    @cached_property
    def parts(self) -> list[Corpus]:
        return [sources[name](self.options) for name in ("wikipedia", "bookcorpus")]  # type: ignore[misc]

    def content(self) -> Any:
        return [part.content() for part in self.parts]

    def documents(self) -> Iterator[list[str]]:
        return itertools.chain.from_iterable(part.documents() for part in self.parts)


@sources.register("text")
class TextFiles(Corpus):
    """Your own text: .txt files, or tables with a text column.

    A .txt file has one sentence per line and a blank line between documents.
    """

    class Options(TextOptions):
        path: Path
        """A file, or a folder of files."""
        column: str = "text"
        """Column of a table that holds one document per row."""

    @property
    def title(self) -> str:
        return str(self.options.path)

    def content(self) -> Any:
        return fingerprint([str(file) for file in self._files])

    @cached_property
    def _files(self) -> list[Path]:
        path = self.options.path
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        kinds = (".txt", *FileStore.FORMATS)
        if path.is_file():
            return [path]
        files = sorted(map(Path, find_files(path, kinds)))
        if not files:
            raise UserError(f"{path}: holds no text ({', '.join(kinds)})")
        return files

    def documents(self) -> Iterator[list[str]]:
        for file in self._files:
            if file.suffix in FileStore.FORMATS:
                column = self.options.column
                table = check_columns(FileStore(file).table("train"), str(file), column)
                rows = (cell_text(value, str(file), column) for value in table[column])
                yield from _split_documents(rows)
            else:
                yield from _read_text_file(file)


def _read_text_file(file: Path) -> Iterator[list[str]]:
    """Yield the documents of a .txt file.

    Raises:
        UserError: The file is not UTF-8 text.
    """
    document: list[str] = []
    try:
        with open(file, encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if "\0" in line:
                    raise UserError(
                        f"{file}:{number}: is binary, not text; remove it from the folder"
                    )
                if len(line) > LONGEST_LINE:
                    raise UserError(
                        f"{file}:{number}: has {len(line):,} characters, but at most "
                        f"{LONGEST_LINE:,} are read: write one sentence per line"
                    )
                if line.strip():
                    document.append(line.strip())
                if document and (not line.strip() or len(document) == LONGEST):
                    yield document
                    document = []
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}: is not UTF-8 text (byte {error.start}); convert it, or remove it from the "
            "folder"
        ) from None
    if document:
        yield document
