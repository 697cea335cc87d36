"""Text sources: corpora to pretrain on, and labelled sentences, pairs, passages and words."""

from __future__ import annotations

import csv
import fcntl
import hashlib
import itertools
import json
import logging
import math
import os
import re
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field, ValidationError
from torch import Tensor

from sslrun.data.examples import Batch, InputSpec
from sslrun.data.images import cache_root
from sslrun.data.sequences import IGNORED, Documents, Sequences, TextSpec, Tokens, flat, labelled, trimmed
from sslrun.data.sources import Source, sources
from sslrun.data.splits import TEST_FRACTION, VAL_FRACTION, carve
from sslrun.data.stores import Hub, HubStore, Split, TableStore, fingerprint, no_bars
from sslrun.data.tokenizer import Tokenizer, TokenizerOptions, blank_tokenizer, load_tokenizer, train_wordpiece
from sslrun.data.world import World
from sslrun.errors import UserError
from sslrun.registry import Options

log = logging.getLogger(__name__)

ROWS_AT_ONCE = 1000
"""Rows of a table that are read at once."""
PIECE = 4_000_000
"""Characters tokenized between two writes of the cache, and the end of a document."""
LONGEST = 10_000
"""Sentences of a document; what goes on longer is more than one, that memory needn't hold it all."""


class TextOptions(Options):
    """What all sets of text have in common."""

    length: int = Field(128, ge=8, le=8192)
    """Tokens of a sequence at most, with its special ones."""
    tokenizer: TokenizerOptions = TokenizerOptions()
    """Default in an evaluation: that of the recipe's `data`."""


class TextSource(Source):
    """A set of text. Reads its rows, and makes ids of them by the tokenizer that the options name."""

    Options = TextOptions
    modality = "text"
    task = "sentences"

    @cached_property
    def spec(self) -> TextSpec:
        return TextSpec(tokenizer_of(self.options.tokenizer, self), self.options.length)

    @classmethod
    def shared_with(cls, data: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """The length, and the tokenizer: what was trained on one vocabulary can't read another's ids."""
        tokenizer = {**data["tokenizer"], **(given.get("tokenizer") or {})}
        if not any(tokenizer[key] for key in ("file", "hub", "corpus")):
            tokenizer["corpus"] = {key: value for key, value in data.items() if key not in ("tokenizer", "length")}
        return {"length": given.get("length", data["length"]), "tokenizer": tokenizer}

    def sketch(self, count: int) -> tuple[InputSpec, Batch]:
        length, vocab = self.options.length, self.options.tokenizer.vocab
        ids = torch.randint(5, vocab, (count, length))
        ones = torch.ones_like(ids)
        return TextSpec(blank_tokenizer(vocab), length), Batch(Tokens(ids, ones - 1, ones), None)

    @property
    def title(self) -> str:
        """What messages call it."""
        return self.name

    @abstractmethod
    def texts(self) -> Iterator[str]:
        """The training split's texts, to train a tokenizer on."""

    @abstractmethod
    def content(self) -> Any:
        """What tells the training split from another of the same name and options: part of every cache's key."""


def tokenizer_of(options: TokenizerOptions, source: TextSource) -> Tokenizer:
    """The tokenizer that the options name; a trained one is kept in the cache."""
    if options.file or options.hub:
        return load_tokenizer(options)
    if options.corpus is not None:
        source = _corpus(options.corpus)
    return _trained(
        source.name, source.options.model_dump_json(exclude={"tokenizer", "length"}), options.vocab, options.lowercase
    )


def _corpus(given: Mapping[str, Any]) -> TextSource:
    """The set that a tokenizer is trained on, by its name and options."""
    name = given.get("name")
    if name is None:
        raise UserError("data.tokenizer.corpus: name a set of text, as {name: world}")
    cls: Any = sources[str(name)]
    if cls.modality != "text":
        raise UserError(f"data.tokenizer.corpus: '{name}' is {cls.modality} data, not text")
    try:
        return cls(cls.Options.model_validate({key: value for key, value in given.items() if key != "name"}))
    except ValidationError as error:
        wrong = error.errors()[0]
        raise UserError(f"data.tokenizer.corpus: {'.'.join(map(str, wrong['loc']))}: {wrong['msg']}") from None


@lru_cache(maxsize=8)
def _trained(name: str, options: str, vocab: int, lowercase: bool) -> Tokenizer:
    cls: Any = sources[name]
    source: TextSource = cls(cls.Options.model_validate_json(options))
    key = [TRAINER_VERSION, name, options, vocab, lowercase, source.content()]
    folder = cache_root() / "tokenizers" / _digest(key)
    with locked(folder):
        if not (folder / "tokenizer.json").exists():
            train_wordpiece(source.texts, vocab, lowercase, source.title).save(folder)
        return load_tokenizer(TokenizerOptions(file=folder / "tokenizer.json"))


TRAINER_VERSION = 2
"""Raised when the same texts make another tokenizer."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time works in `folder`; the others wait."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


# ---------------------------------------------------------------- corpora


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
        folder = cache_root() / "tokens" / _digest([TOKENS_VERSION, self.name, self.content(), tokenizer.digest])
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
                _write_tokens(folder, documents, tokenizer)
    tokens, sentences, starts = (_mapped(folder / name, kind) for name, (kind, _) in PARTS.items())
    return tokens, sentences, starts


TOKENS_VERSION = 2
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
                done[name] += len(values)
            temporary = folder / ".progress"
            temporary.write_text(json.dumps(done))
            os.replace(temporary, progress)
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


@sources.register("world")
class WorldCorpus(Corpus):
    """A small world told in English: made by a generator, no download. See `sslrun.data.world`."""

    class Options(TextOptions):
        documents: int = Field(12_000, ge=2)
        """Documents; some 45 words each."""
        seed: int = Field(0, ge=0)
        """Of the generator."""

    def content(self) -> Any:
        return WORLD_VERSION

    def documents(self) -> Iterator[list[str]]:
        return iter(World(self.options.seed).documents(self.options.documents))

    @classmethod
    def count(cls) -> int | None:
        return None


WORLD_VERSION = 4
"""Raised when the generator tells something else by the same seed."""


@dataclass(frozen=True)
class TextCard:
    """A published set of text, as it lies on the hub."""

    about: str
    hub: Hub | None
    """None: it can't be loaded from there."""
    columns: tuple[str, ...] = ("text",)
    """The columns read, in the order of the kind of set."""
    label: str | None = None
    regression: bool = False
    rows: Literal["documents", "articles", "sentences"] = "documents"
    """What the rows of a corpus are: documents; lines of articles, each begun by its title; or sentences."""


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


def _folders(name: str) -> list[Path]:
    """Where a published set may lie on this machine."""
    return [Path(root).expanduser() / name for root in (os.environ.get("SSLRUN_DATA"), "data") if root]


def _published(name: str, card: TextCard) -> TableStore:
    """The set's store: of a local folder where there is one."""
    for folder in _folders(name):
        if folder.is_dir():
            return FileStore(folder, card.label)
    remedy = f"Put it at data/{name}, or set SSLRUN_DATA; see `sslrun show data {name}`"
    if card.hub is None:
        raise UserError(f"{name}: not on this machine, and not on the hub in a form that can be read. {remedy}")
    return HubStore(name, card.hub, remedy, label=card.label)


class FileStore(TableStore):
    """Files of a table: `<path>/train.parquet` (or .csv, .tsv, .json, .jsonl) or parts `train-*.parquet`, test and val;
    or one file."""

    FORMATS: ClassVar = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json"}

    def __init__(self, path: Path, label: str | None = None) -> None:
        super().__init__(str(path), None, label)
        self.path = path

    @property
    def splits(self) -> tuple[Split, ...]:
        return tuple(self._files)

    def identity(self, split: Split) -> Any:
        return fingerprint([str(each) for each in self._parts(split)])

    def table(self, split: Split) -> Any:
        import datasets

        parts = self._parts(split)
        file = parts[0]
        more: dict[str, Any] = {}
        if file.suffix in (".csv", ".tsv"):  # an empty cell is nothing; "None", "NA" and "null" are words
            more = {"keep_default_na": False, "na_values": [""]}
        if file.suffix == ".tsv":  # without quotes, as GLUE's: a lone one would swallow the lines up to the next
            more |= {"sep": "\t", "quoting": csv.QUOTE_NONE}
        try:
            with no_bars():
                return datasets.load_dataset(
                    self.FORMATS[file.suffix], data_files=[str(each) for each in parts], split="train",
                    cache_dir=str(cache_root() / "tables"), **more,
                )  # fmt: skip
        except Exception as error:  # pandas, Arrow and datasets each have their own
            cause = " ".join(str(error.__cause__ or error).split())[:200]
            if "corresponds to no data" in cause or not any(each.stat().st_size for each in parts):
                raise UserError(f"{file}: holds no rows") from None
            raise UserError(f"{file}: can't be read as {self.FORMATS[file.suffix]}: {cause}") from None

    def _parts(self, split: Split) -> list[Path]:
        if split not in self._files:
            there = ", ".join(each[0].name for each in self._files.values())
            raise UserError(
                f"{self.path}: holds {there} alone, and nothing to {'train on' if split == 'train' else split}"
            )
        return self._files[split]

    @cached_property
    def _files(self) -> dict[Split, list[Path]]:
        if self.path.is_file():
            if self.path.suffix not in self.FORMATS:
                raise UserError(f"{self.path}: should end with one of {', '.join(self.FORMATS)}")
            return {"train": [self.path]}
        spellings: dict[Split, tuple[str, ...]] = {
            "train": ("train",), "val": ("validation", "val", "dev"), "test": ("test",)
        }  # fmt: skip
        found: dict[Split, list[Path]] = {
            split: files
            for split, names in spellings.items()
            for name in names
            for suffix in self.FORMATS
            if (files := [*self.path.glob(f"{name}{suffix}")] or sorted(self.path.glob(f"{name}-*{suffix}")))
        }
        if not found:
            raise UserError(f"{self.path}: should be a file, or a folder with train{{{','.join(self.FORMATS)}}}")
        if "test" not in found and "val" in found:
            found["test"] = found.pop("val")
        return found


class TableCorpus(Corpus):
    """A corpus in a column of a table; lines of a cell are sentences, or else sentences are found by punctuation."""

    card: ClassVar[TextCard]

    @cached_property
    def store(self) -> TableStore:
        return _published(self.name, self.card)

    def content(self) -> Any:
        identity = self.store.identity("train")
        return [identity, "articles"] if self.card.rows == "articles" else identity

    def documents(self) -> Iterator[list[str]]:
        table = self.store.table("train")
        column = self.card.columns[0]
        if column not in table.column_names:
            raise UserError(f"{self.title}: no column '{column}'; there is {', '.join(table.column_names)}")
        rows = (
            _cell(text, self.title, column) for batch in table.iter(batch_size=ROWS_AT_ONCE) for text in batch[column]
        )
        return _gathered(rows) if self.card.rows == "sentences" else _documents(rows, self.card.rows == "articles")

    @classmethod
    def describe(cls) -> dict[str, str]:
        return _described(cls.name, cls.card)


def _described(name: str, card: TextCard) -> dict[str, str]:
    places = ", ".join(f"{'found' if each.is_dir() else 'not found'} at {each}" for each in _folders(name))
    hub = f"https://huggingface.co/datasets/{card.hub.repository}" if card.hub else "not there"
    return {"hub": hub, "looked for": f"{places}; then on the hub"}


SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]?[A-Z0-9])")
BOOK_SENTENCES = 200
"""Sentences that make a document where the corpus has one a row and marks no documents."""


def _gathered(sentences: Iterable[str]) -> Iterator[list[str]]:
    """Documents of as many sentences as `BOOK_SENTENCES`."""
    rest = iter(sentences)
    while document := list(itertools.islice(rest, BOOK_SENTENCES)):
        yield document


def _documents(rows: Iterable[str], articles: bool = False) -> Iterator[list[str]]:
    """The sentences of each row, or of each article whose lines the rows are; of empty ones none."""
    for row in _articles(rows) if articles else rows:
        lines = [line.strip() for line in row.splitlines() if line.strip()]
        if len(lines) <= 1 or max(map(len, lines)) > 400:  # paragraphs, not sentences
            lines = [sentence for line in lines for sentence in SENTENCE_END.split(line)]
        if lines:
            yield lines


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


for _name, _card in CORPORA.items():
    sources.register(_name)(
        type(_name, (TableCorpus,), {"__doc__": _card.about, "__module__": __name__, "card": _card})
    )


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
    """Text of one's own: .txt files (one sentence a line, a blank line between documents) or tables with a text column."""

    class Options(TextOptions):
        path: Path
        """A file, or a folder of files."""
        column: str = "text"
        """Of tables: the column that holds a document a row."""

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
                table = FileStore(file).table("train")
                if self.options.column not in table.column_names:
                    raise UserError(
                        f"{file}: no column '{self.options.column}'; there is {', '.join(table.column_names)}"
                    )
                rows = (_cell(each, str(file), self.options.column) for each in table[self.options.column])
                yield from _documents(rows)
            else:
                yield from _text_file(file)


def _text_file(file: Path) -> Iterator[list[str]]:
    document: list[str] = []
    try:
        with open(file, encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if "\0" in line:
                    raise UserError(f"{file}:{number}: is no text but binary: take it out of the folder")
                if line.strip():
                    document.append(line.strip())
                if document and (not line.strip() or len(document) == LONGEST):
                    yield document
                    document = []
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}: is no UTF-8 text (byte {error.start}): convert it, or take it out of the folder"
        ) from None
    if document:
        yield document


# ---------------------------------------------------------------- labelled sentences and pairs


class SentenceRows(NamedTuple):
    """A split's texts."""

    first: Sequence[str]
    second: Sequence[str] | None
    labels: Tensor | None
    classes: tuple[str, ...]


class SentenceSource(TextSource):
    """Single texts, or pairs, each with a class (or, without classes, with a number)."""

    task = "sentences"

    @abstractmethod
    def rows(self, split: Split) -> SentenceRows: ...

    def texts(self) -> Iterator[str]:
        rows = self.rows("train")
        yield from rows.first
        yield from rows.second or ()

    def load(self, split: Split) -> Sequences:
        rows, encode = self.rows(split), self.spec.tokenizer.encode
        second = None if rows.second is None else encode(rows.second)
        return labelled(encode(rows.first), second, rows.labels, rows.classes, self.spec)


class TableSentences(SentenceSource):
    """Texts in one or two columns of a table, and the class in another."""

    @property
    @abstractmethod
    def store(self) -> TableStore: ...

    @property
    @abstractmethod
    def columns(self) -> tuple[tuple[str, ...], str, bool]:
        """The columns of the texts, that of the label, and whether it is a number to predict."""

    @property
    def splits(self) -> tuple[Split, ...]:
        return self.store.splits

    def content(self) -> Any:
        return self.store.identity("train")

    def rows(self, split: Split) -> SentenceRows:
        table = self.store.table(split)
        texts, label, regression = self.columns
        for column in (*texts, label):
            if column not in table.column_names:
                raise UserError(f"{self.store.name}: no column '{column}'; there is {', '.join(table.column_names)}")
        if len(table) == 0:
            raise UserError(f"{self.store.name}: split '{split}' has no rows")
        if regression:
            labels = torch.tensor(self._numbers(table[label], label, split), dtype=torch.float32)
            classes: tuple[str, ...] = ()
        else:
            labels, classes = self.store.labels(table, label, split)
        first, *rest = ([_cell(each, self.store.name, column) for each in table[column]] for column in texts)
        return SentenceRows(first, rest[0] if rest else None, labels, classes)

    def _numbers(self, values: Iterable[Any], label: str, split: Split) -> list[float]:
        found = list(values)
        for at, value in enumerate(found):
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise UserError(f"{self.store.name}: split '{split}', row {at}: its {label} is no number: {value!r}")
        return found


def _cell(value: Any, name: str, column: str) -> str:
    """A cell's text; numbers are texts too, and nothing is an empty one."""
    if value is not None and not isinstance(value, str | int | float):
        raise UserError(f"{name}: column '{column}' holds {type(value).__name__}s, not text")
    return "" if value is None else str(value)


class PublishedSentences(TableSentences):
    """A published set: in SSLRUN_DATA/<name> or data/<name>, or on the hub."""

    card: ClassVar[TextCard]

    @cached_property
    def store(self) -> TableStore:
        return _published(self.name, self.card)

    @property
    def columns(self) -> tuple[tuple[str, ...], str, bool]:
        return self.card.columns, self.card.label or "label", self.card.regression

    @classmethod
    def describe(cls) -> dict[str, str]:
        return _described(cls.name, cls.card)


def _glue(name: str, test: str = "validation") -> Hub:
    """Labels of GLUE's test splits are secret: models are tested on its development splits."""
    return Hub("nyu-mll/glue", {"train": "train", "test": test}, config=name)


SENTENCES = {
    "mnli": TextCard("Does the premise entail the hypothesis? Williams et al., NAACL 2018; matched.", _glue("mnli", "validation_matched"), ("premise", "hypothesis")),
    "qnli": TextCard("Does the sentence answer the question? Made from SQuAD; Wang et al., GLUE, 2019.", _glue("qnli"), ("question", "sentence")),
    "mrpc": TextCard("Are the sentences paraphrases? Dolan and Brockett 2005.", _glue("mrpc"), ("sentence1", "sentence2")),
    "sst2": TextCard("Is the review positive? Socher et al., EMNLP 2013.", _glue("sst2"), ("sentence",)),
    "qqp": TextCard("Are the questions the same? Quora 2017.", _glue("qqp"), ("question1", "question2")),
    "rte": TextCard("Does the first sentence entail the second? Dagan et al. 2006 and on.", _glue("rte"), ("sentence1", "sentence2")),
    "cola": TextCard("Is the sentence grammatical? Warstadt et al. 2019.", _glue("cola"), ("sentence",)),
    "stsb": TextCard("How similar are the sentences, from 0 to 5? Cer et al. 2017.", _glue("stsb"), ("sentence1", "sentence2"), regression=True),
    "wnli": TextCard("Does the sentence with the pronoun resolved follow? Levesque et al. 2012.", _glue("wnli"), ("sentence1", "sentence2")),
    "mnli-mismatched": TextCard("MNLI's other genres, of which none is trained on: a shifted test set for mnli.", Hub("nyu-mll/glue", {"test": "validation_mismatched"}, config="mnli"), ("premise", "hypothesis")),
    "hans": TextCard("Where word overlap misleads: a shifted test set for mnli. McCoy et al., ACL 2019.", Hub("jhu-cogsci/hans", {"test": "validation"}, revision="refs/convert/parquet", files={"validation": "plain_text/validation/*.parquet"}), ("premise", "hypothesis")),
    "movie_reviews": TextCard("Whole film reviews, positive or not: a shifted test set for sst2. Pang and Lee, ACL 2004.", None, ("sentence",)),
    "product_reviews": TextCard("Sentences of reviews of products: a shifted test set for sst2. Hu and Liu, KDD 2004.", None, ("sentence",)),
    "sick": TextCard("Does the premise entail the hypothesis? Marelli et al., LREC 2014.", None, ("premise", "hypothesis")),
}  # fmt: skip

for _name, _card in SENTENCES.items():
    _tags = {"__doc__": _card.about, "__module__": __name__, "card": _card}
    sources.register(_name)(type(_name, (PublishedSentences,), _tags))


@sources.register("sentences")
class OwnSentences(TableSentences):
    """Labelled sentences or pairs of one's own: a CSV, TSV, JSON or parquet file, or a folder with train, val, test."""

    class Options(TextOptions):
        path: Path
        """A file, or a folder of files."""
        first: str = "sentence"
        """The column of the text, or of the first one of a pair."""
        second: str | None = None
        """The column of the second one of a pair."""
        label: str = "label"
        """The column of the class."""
        regression: bool = False
        """The label is a number to predict, not a class."""

    @cached_property
    def store(self) -> TableStore:
        return FileStore(self.options.path, self.options.label)

    @property
    def columns(self) -> tuple[tuple[str, ...], str, bool]:
        given = self.options
        return (given.first, given.second) if given.second else (given.first,), given.label, given.regression


class WorldOptions(TextOptions):
    train: int = Field(1500, ge=8)
    """Training examples."""
    held_out: int = Field(500, ge=8)
    """Examples of validation, and twice as many of test."""
    seed: int = Field(0, ge=0)
    """Of the generator."""


class WorldTask(TextSource):
    """A task of the small world."""

    Options = WorldOptions
    splits: tuple[Split, ...] = ("train", "val", "test")

    def content(self) -> Any:
        return WORLD_VERSION

    def drawn(self, split: Split) -> list[Any]:
        counts = {"train": self.options.train, "val": self.options.held_out, "test": 2 * self.options.held_out}
        return World(self.options.seed).examples(self.name.removeprefix("world-"), split, counts[split])


class WorldSentences(WorldTask, SentenceSource):
    """A task of the small world with a class a sentence or pair."""

    labels: ClassVar[tuple[str, ...]]

    def rows(self, split: Split) -> SentenceRows:
        *texts, labels = zip(*self.drawn(split), strict=True)
        return SentenceRows(texts[0], texts[1] if len(texts) > 1 else None, torch.tensor(labels), self.labels)


@sources.register("world-entailment")
class WorldEntailment(WorldSentences):
    """Does the hypothesis follow from the premise, may it be, or can't it? Of the small world, as MNLI."""

    labels = ("entailment", "neutral", "contradiction")


@sources.register("world-questions")
class WorldQuestions(WorldSentences):
    """Does the sentence answer the question? Of the small world, as QNLI."""

    labels = ("answer", "no answer")


@sources.register("world-paraphrase")
class WorldParaphrase(WorldSentences):
    """Do the sentences say the same? Of the small world, as MRPC."""

    labels = ("different", "same")


@sources.register("world-sentiment")
class WorldSentiment(WorldSentences):
    """Is whom it happened to glad of it? Of the small world, as SST-2."""

    labels = ("sorry", "glad")


# ---------------------------------------------------------------- answers in passages


class SpanRow(NamedTuple):
    """A question about a passage."""

    id: str
    question: str
    context: str
    answers: tuple[tuple[str, int], ...]
    """Each right answer and the character where it starts; none: it can't be answered."""


class SpanSet(NamedTuple):
    """What scores answers: the questions, and what their windows are."""

    rows: list[SpanRow]
    question: Tensor
    """(W,) the question of each window."""
    passage: Tensor
    """(W,) the place in the sequence where the window's passage starts."""
    characters: Tensor
    """(W, T, 2) where in the context each token of the passage starts and ends; -1 elsewhere."""
    best: Tensor
    """(W, T) whether no other window gives the token more context."""


class SpanSource(TextSource):
    """Questions whose answer is a span of a passage. Long passages become several windows, each an example."""

    task = "span"

    class Options(TextOptions):
        question_length: int = Field(64, ge=4)
        """Tokens of a question at most, as in BERT."""
        stride: int = Field(128, ge=1)
        """Tokens between the starts of two windows of a passage, as in BERT; less where windows are shorter."""

    @abstractmethod
    def questions(self, split: Split) -> list[SpanRow]: ...

    def texts(self) -> Iterator[str]:
        rows = self.questions("train")
        yield from dict.fromkeys(row.context for row in rows)
        yield from (row.question for row in rows)

    def load(self, split: Split) -> Sequences:
        rows, dropped = _answerable(self.questions(split), training=split == "train")
        if not rows:
            raise UserError(f"{self.title}: split '{split}' has no question whose answer is in its passage")
        if dropped:
            more = ", ..." if len(dropped) > 3 else ""
            log.warning(
                "%s %s: left out %d question%s whose answer is not in the passage: %s",
                self.title,
                split,
                len(dropped),
                "s" if len(dropped) > 1 else "",
                ", ".join(dropped[:3]) + more,
            )
        return windows(rows, self.spec, self.options.question_length, self.options.stride)


def _answerable(rows: list[SpanRow], training: bool) -> tuple[list[SpanRow], list[str]]:
    """The questions that can be learned from, and the names of the others."""
    if not training:
        return rows, []
    sound = [all(row.context[at : at + len(text)] == text for text, at in row.answers) for row in rows]
    return [row for row, good in zip(rows, sound, strict=True) if good], [
        row.id for row, good in zip(rows, sound, strict=True) if not good
    ]


def windows(rows: list[SpanRow], spec: TextSpec, question_length: int, stride: int) -> Sequences:
    """Every question with every window of its passage: labels (W, 2) are the first and last place of its first answer,
    or 0 and 0, [CLS], where the window does not hold it (BERT's run_squad.py trains on those as well)."""
    contexts = list(dict.fromkeys(row.context for row in rows))
    number = {context: at for at, context in enumerate(contexts)}
    encoded = spec.tokenizer.offsets(contexts)
    questions = [ids[:question_length] for ids in spec.tokenizer.encode([row.question for row in rows])]
    tokens, offsets = flat([*(ids for ids, _ in encoded), *questions])
    ranges, labels, owner, passage, characters, best = [], [], [], [], [], []
    for at, (row, question) in enumerate(zip(rows, questions, strict=True)):
        which = number[row.context]
        places = encoded[which][1]
        room = spec.length - 3 - len(question)
        if room < 1:
            raise UserError(
                f"sequences of {spec.length} leave no room beside a question: raise length, or lower question_length"
            )
        starts = _window_starts(len(places), room, min(stride, max(1, room // 2)))
        answer = _token_span(places, row.answers[0]) if row.answers else None
        spans = [(start, min(start + room, len(places))) for start in starts]
        for start, end in spans:
            begins = len(question) + 2
            ranges.append(
                (
                    *(int(offsets[len(contexts) + at + more]) for more in (0, 1)),
                    int(offsets[which]) + start,
                    int(offsets[which]) + end,
                )
            )
            inside = answer is not None and start <= answer[0] and answer[1] < end
            labels.append((answer[0] - start + begins, answer[1] - start + begins) if inside and answer else (0, 0))
            owner.append(at)
            passage.append(begins)
            where = torch.full((spec.length, 2), -1, dtype=torch.int32)
            where[begins : begins + end - start] = torch.tensor(places[start:end], dtype=torch.int32).reshape(-1, 2)
            characters.append(where)
            most = torch.zeros(spec.length, dtype=torch.bool)
            most[begins : begins + end - start] = (
                torch.tensor(
                    [
                        _context(place, start, end)
                        == max(_context(place, *span) for span in spans if span[0] <= place < span[1])
                        for place in range(start, end)
                    ]
                )
                if len(spans) > 1
                else True
            )
            best.append(most)
    extra = SpanSet(rows, torch.tensor(owner), torch.tensor(passage), torch.stack(characters), torch.stack(best))
    return Sequences(tokens, torch.tensor(ranges), torch.tensor(labels), (), spec, extra=extra)


def _window_starts(count: int, room: int, stride: int) -> list[int]:
    starts = [0]
    while starts[-1] + room < count:
        starts.append(starts[-1] + min(room, stride))
    return starts


def _context(place: int, start: int, end: int) -> float:
    """How much context a window gives a token: the lesser side, and a little for the window's length (run_squad.py)."""
    return min(place - start, end - 1 - place) + 0.01 * (end - start)


def _token_span(places: list[tuple[int, int]], answer: tuple[str, int]) -> tuple[int, int] | None:
    """First and last token that an answer touches."""
    text, start = answer
    touched = [at for at, (begin, end) in enumerate(places) if begin < start + len(text) and end > start]
    return (touched[0], touched[-1]) if touched else None


@sources.register("world-span")
class WorldSpans(WorldTask, SpanSource):
    """Which words of the passage answer the question? Of the small world, as SQuAD."""

    class Options(WorldOptions, SpanSource.Options):
        pass

    def questions(self, split: Split) -> list[SpanRow]:
        return [
            SpanRow(f"{split}-{at}", question, passage, ((answer, start),))
            for at, (question, passage, answer, start) in enumerate(self.drawn(split))
        ]


class TableSpans(SpanSource):
    """Questions in a table with SQuAD's columns: id, question, context, answers {text, answer_start}."""

    @property
    @abstractmethod
    def store(self) -> TableStore: ...

    splits: tuple[Split, ...] = ("train", "val", "test")

    def content(self) -> Any:
        return self.store.identity("train")

    @property
    def title(self) -> str:
        return self.store.name

    def questions(self, split: Split) -> list[SpanRow]:
        """A split that the set lacks is carved from train by passages: what a window shows of one is not told twice."""
        if split != "train" and split in self.store.splits:
            return self._read(split)
        rows = self._read("train")
        for held_out, share in (("test", TEST_FRACTION), ("val", VAL_FRACTION)):
            if held_out in self.store.splits:
                continue
            passages = list(dict.fromkeys(row.context for row in rows))
            if len(passages) < 2:
                raise UserError(
                    f"{self.title}: has too few passages to hold some out: add passages, or a file of a {held_out} split"
                )
            held = {passages[at] for at in carve(len(passages), share)[1].tolist()}
            if split == held_out:
                return [row for row in rows if row.context in held]
            rows = [row for row in rows if row.context not in held]
        return rows

    def _read(self, split: Split) -> list[SpanRow]:
        table = self.store.table(split)
        missing = sorted({"question", "context", "answers"} - set(table.column_names))
        if missing:
            raise UserError(f"{self.title}: no column '{missing[0]}'; there is {', '.join(table.column_names)}")
        return [self._row(split, at, row) for at, row in enumerate(table)]

    def _row(self, split: Split, at: int, row: Mapping[str, Any]) -> SpanRow:
        try:
            answers = tuple(zip(row["answers"]["text"], map(int, row["answers"]["answer_start"]), strict=True))
            return SpanRow(str(row.get("id", at)), row["question"].strip(), row["context"] + "", answers)
        except (AttributeError, KeyError, TypeError, ValueError):
            raise UserError(
                f"{self.title}: split '{split}', row {at}: question and context should be text, answers "
                "{text: [...], answer_start: [...]}, as many of one as of the other"
            ) from None


SPANS = {
    "squad": TextCard("Answers in paragraphs of Wikipedia. Rajpurkar et al., EMNLP 2016.", Hub("rajpurkar/squad", {"train": "train", "test": "validation"})),
    "squad2": TextCard("SQuAD with questions that have no answer. Rajpurkar et al., ACL 2018.", Hub("rajpurkar/squad_v2", {"train": "train", "test": "validation"})),
}  # fmt: skip


class PublishedSpans(TableSpans):
    """A published set: in SSLRUN_DATA/<name> or data/<name>, or on the hub."""

    card: ClassVar[TextCard]

    @cached_property
    def store(self) -> TableStore:
        return _published(self.name, self.card)

    @classmethod
    def describe(cls) -> dict[str, str]:
        return _described(cls.name, cls.card)


for _name, _card in SPANS.items():
    sources.register(_name)(
        type(_name, (PublishedSpans,), {"__doc__": _card.about, "__module__": __name__, "card": _card})
    )


@sources.register("passages")
class OwnSpans(TableSpans):
    """Questions about passages of one's own, in SQuAD's columns: a JSON or parquet file, or a folder of them."""

    class Options(SpanSource.Options):
        path: Path
        """A file, or a folder of files."""

    @cached_property
    def store(self) -> TableStore:
        return FileStore(self.options.path)


# ---------------------------------------------------------------- tagged words


class TagSet(NamedTuple):
    """What scores tags: those of all words, and where they stand."""

    tags: list[list[str]]
    """Of each sentence, also of words that were cut off."""


class TagSource(TextSource):
    """Sentences of words, each with a tag: of entities BIO, or else any, as parts of speech."""

    task = "tagging"

    @abstractmethod
    def words(self, split: Split) -> tuple[list[list[str]], list[list[str]]]:
        """Words and their tags, sentence by sentence."""

    def texts(self) -> Iterator[str]:
        return (" ".join(words) for words in self.words("train")[0])

    @cached_property
    def tags(self) -> tuple[str, ...]:
        """Those of train; and of each kind of entity in it the tag that begins it and the one that goes on, which another
        split may have though train does not (in CoNLL-2000 I-LST)."""
        found = {tag for tags in self.words("train")[1] for tag in tags}
        if any(tag.startswith("I-") for tag in found):
            found |= {f"{mark}-{tag.partition('-')[2]}" for tag in found if "-" in tag for mark in "BI"}
        return tuple(sorted(found))

    def load(self, split: Split) -> Sequences:
        words, tags = self.words(split)
        if not words:
            raise UserError(f"{self.title}: split '{split}' has no rows")
        named = [tag for tag in self.tags if tag != "O"]
        strange = [tag for tag in named if not tag.startswith(("B-", "I-"))]
        if 0 < len(strange) < len(named):
            raise UserError(
                f"{self.title}: the tag '{strange[0]}' is neither O nor begins with B- or I-, as others do: entities are "
                "tagged as B-PER, I-PER, O"
            )
        number = {tag: at for at, tag in enumerate(self.tags)}
        unknown = {tag for each in tags for tag in each} - number.keys()
        if unknown:
            raise UserError(f"{self.title}: split '{split}' has the tag '{min(unknown)}', which train lacks")
        encoded = self.spec.tokenizer.encode_words(words)
        lost = [set(range(len(each))).difference(owners) for each, (_, owners) in zip(words, encoded, strict=True)]
        if any(lost):  # nothing is left of a word of control characters, and each must have a piece that speaks for it
            words = [
                ["-" if at in gone else word for at, word in enumerate(each)]
                for each, gone in zip(words, lost, strict=True)
            ]
            encoded = self.spec.tokenizer.encode_words(words)
        tokens, offsets = flat([ids for ids, _ in encoded])
        labels = [
            number[each[word]]
            if word is not None and word != before
            else IGNORED  # the first piece of a word speaks for it
            for each, (_, owners) in zip(tags, encoded, strict=True)
            for before, word in zip([-1, *owners], owners, strict=False)
        ]
        none = torch.zeros(len(words), dtype=torch.int64)
        ranges = trimmed(torch.stack([offsets[:-1], offsets[1:], none, none], dim=1), self.spec.length)
        return Sequences(tokens, ranges, None, self.tags, self.spec, torch.tensor(labels), TagSet(tags))


class TableTags(TagSource):
    """Lists of words and of their tags in two columns of a table."""

    @property
    @abstractmethod
    def store(self) -> TableStore: ...

    @property
    @abstractmethod
    def columns(self) -> tuple[str, str]: ...

    @property
    def splits(self) -> tuple[Split, ...]:
        return self.store.splits

    def content(self) -> Any:
        return self.store.identity("train")

    @property
    def title(self) -> str:
        return self.store.name

    def words(self, split: Split) -> tuple[list[list[str]], list[list[str]]]:
        table = self.store.table(split)
        words, tags = self.columns
        for column in self.columns:
            if column not in table.column_names:
                raise UserError(f"{self.title}: no column '{column}'; there is {', '.join(table.column_names)}")
            odd = next((at for at, each in enumerate(table[column]) if not isinstance(each, list)), None)
            if odd is not None:
                raise UserError(
                    f"{self.title}: split '{split}', row {odd}: column '{column}' should hold lists, one entry a word"
                )
        feature = getattr(table.features[tags], "feature", None)
        names = getattr(feature, "names", None)
        found = [[names[tag] if names else str(tag) for tag in each] for each in table[tags]]
        given = [[str(word) or "-" for word in each] for each in table[words]]
        wrong = [at for at, (a, b) in enumerate(zip(given, found, strict=True)) if len(a) != len(b)]
        if wrong:
            raise UserError(f"{self.title}: split '{split}', row {wrong[0]}: not as many tags as words")
        return given, found


TAGS = {
    "conll2000": TextCard("Chunks of phrases in Wall Street Journal text. Tjong Kim Sang and Buchholz 2000.", None, ("tokens", "tags")),
    "conll2003": TextCard("Names in Reuters news. Tjong Kim Sang and De Meulder 2003.", Hub("tomaarsen/conll2003", {"train": "train", "val": "validation", "test": "test"}), ("tokens", "ner_tags")),
}  # fmt: skip


class PublishedTags(TableTags):
    """A published set: in SSLRUN_DATA/<name> or data/<name>, or on the hub."""

    card: ClassVar[TextCard]

    @cached_property
    def store(self) -> TableStore:
        return _published(self.name, self.card)

    @property
    def columns(self) -> tuple[str, str]:
        words, tags = self.card.columns
        return words, tags

    @classmethod
    def describe(cls) -> dict[str, str]:
        return _described(cls.name, cls.card)


for _name, _card in TAGS.items():
    sources.register(_name)(
        type(_name, (PublishedTags,), {"__doc__": _card.about, "__module__": __name__, "card": _card})
    )


@sources.register("words")
class OwnTags(TableTags):
    """Tagged words of one's own: a JSON or parquet file with two columns of lists, or a folder of them."""

    class Options(TextOptions):
        path: Path
        """A file, or a folder of files."""
        words: str = "tokens"
        """The column of the words."""
        tags: str = "tags"
        """The column of their tags: of entities B-PER, I-PER, O; or others, as parts of speech."""

    @cached_property
    def store(self) -> TableStore:
        return FileStore(self.options.path)

    @property
    def columns(self) -> tuple[str, str]:
        return self.options.words, self.options.tags


@sources.register("world-tagging")
class WorldTags(WorldTask, TagSource):
    """Which words name who acts, who receives, a thing, a place or a time? Of the small world, as named entities."""

    def words(self, split: Split) -> tuple[list[list[str]], list[list[str]]]:
        words, tags = zip(*self.drawn(split), strict=True)
        return list(words), list(tags)
