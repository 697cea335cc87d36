"""Base classes of text data sets: options, tokenizer, tables, and published sets."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, ValidationError

from sslrun.data.cache import cache_root, digest_of, locked
from sslrun.data.examples import Batch
from sslrun.data.source import Source, sources
from sslrun.data.specs import InputSpec, TextSpec
from sslrun.data.stores import (
    FileStore,
    Hub,
    HubStore,
    Split,
    TableStore,
    describe_local_folders,
    explain_download,
    find_local_folder,
)
from sslrun.data.text.sequences import Tokens
from sslrun.data.text.tokenizer import Tokenizer, TokenizerOptions, blank_tokenizer, load_tokenizer, train_wordpiece
from sslrun.errors import UserError
from sslrun.registry import Options

TRAINER_VERSION = 3
"""Increase it when the same texts yield a different tokenizer."""


class TextOptions(Options):
    """Options shared by all text data sets."""

    length: int = Field(128, ge=8, le=8192)
    """Maximum number of tokens per sequence, including [CLS] and [SEP]."""
    tokenizer: TokenizerOptions = TokenizerOptions()
    """The tokenizer. Default in an evaluation: the tokenizer of the recipe's `data`."""


class TextSource(Source):
    """A text data set. Read its rows and encode them with the configured tokenizer."""

    Options = TextOptions
    gives = TextSpec
    task = "sentences"

    @cached_property
    def spec(self) -> TextSpec:
        return TextSpec(tokenizer_of(self.options.tokenizer, self), self.options.length)

    @classmethod
    def inherit_options(cls, data: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
        """Take the length and the tokenizer of `data`, because a network reads only the ids that it was trained on."""
        tokenizer = {**data["tokenizer"], **(options.get("tokenizer") or {})}
        if not any(tokenizer[key] for key in ("file", "hub", "corpus")):
            own = {key: value for key, value in data.items() if key != "name"}
            parsed = sources[data["name"]].Options.model_validate(own)  # a run's hash covers no defaults
            tokenizer["corpus"] = {"name": data["name"], **parsed.non_defaults(exclude={"tokenizer", "length"})}
        return {"length": options.get("length", data["length"]), "tokenizer": tokenizer}

    def sketch(self, count: int) -> tuple[InputSpec, Batch]:
        length, vocab = self.options.length, self.options.tokenizer.vocab
        ids = torch.randint(5, vocab, (count, length))
        ones = torch.ones_like(ids)
        return TextSpec(blank_tokenizer(vocab), length), Batch(Tokens(ids, ones - 1, ones), None)

    @property
    def title(self) -> str:
        """The name of the data set in messages."""
        return self.name

    @abstractmethod
    def texts(self) -> Iterator[str]:
        """Yield the texts of the training split, to train a tokenizer on."""

    @abstractmethod
    def content(self) -> Any:
        """Return JSON values that change when the training split changes: part of the key of every cache."""


def tokenizer_of(options: TokenizerOptions, source: TextSource) -> Tokenizer:
    """Return the configured tokenizer; a trained one is kept in the cache."""
    if options.file or options.hub:
        return load_tokenizer(options)
    if options.corpus is not None:
        source = _corpus(options.corpus)
    return _trained(
        source.name, source.options.model_dump_json(exclude={"tokenizer", "length"}), options.vocab, options.lowercase
    )


def _corpus(settings: Mapping[str, Any]) -> TextSource:
    """Return the data set that a tokenizer is trained on, from its name and options."""
    name = settings.get("name")
    if name is None:
        raise UserError("data.tokenizer.corpus: name a set of text, as {name: world}")
    cls: Any = sources[str(name)]
    if not issubclass(cls.gives, TextSpec):
        raise UserError(f"data.tokenizer.corpus: '{name}' is {cls.gives.kind} data, not text")
    try:
        return cls(cls.Options.model_validate({key: value for key, value in settings.items() if key != "name"}))
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"data.tokenizer.corpus: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


@lru_cache(maxsize=8)
def _trained(name: str, options: str, vocab: int, lowercase: bool) -> Tokenizer:
    cls: Any = sources[name]
    source: TextSource = cls(cls.Options.model_validate_json(options))
    key = [TRAINER_VERSION, name, options, vocab, lowercase, source.content()]
    folder = cache_root() / "tokenizers" / digest_of(key)
    with locked(folder):
        if not (folder / "tokenizer.json").exists():
            train_wordpiece(source.texts, vocab, lowercase, source.title).save(folder)
        return load_tokenizer(TokenizerOptions(file=folder / "tokenizer.json"))


class TableText(TextSource):
    """A data set whose texts are columns of a table."""

    @property
    @abstractmethod
    def store(self) -> TableStore:
        """The store that reads the table."""

    @property
    def splits(self) -> tuple[Split, ...]:
        return self.store.splits

    @property
    def title(self) -> str:
        return self.store.name

    def content(self) -> Any:
        return self.store.identity("train")

    def table(self, split: Split, *columns: str) -> Any:
        """Return the split as a `datasets.Dataset`.

        Raises:
            UserError: The split cannot be read, has no rows, or lacks one of the columns.
        """
        table = with_columns(self.store.table(split), self.title, *columns)
        if len(table) == 0:
            raise UserError(f"{self.title}: split '{split}' has no rows")
        return table


def with_columns(table: Any, name: str, *columns: str) -> Any:
    """Return the table. Raises UserError, which begins with `name`, if it lacks one of the columns."""
    for column in columns:
        if column not in table.column_names:
            raise UserError(f"{name}: no column '{column}'; there is {', '.join(table.column_names)}")
    return table


def cell(value: Any, name: str, column: str) -> str:
    """Return a cell as text: numbers are converted, and a missing value is empty text.

    Raises:
        UserError: The cell holds something else.
    """
    if value is not None and not isinstance(value, str | int | float):
        raise UserError(
            f"{name}: column '{column}' holds values of type {type(value).__name__}, not text: name a column of texts"
        )
    return "" if value is None else str(value)


@dataclass(frozen=True)
class TextCard:
    """A published text data set and its place on the hub."""

    about: str
    hub: Hub | None
    """None: it cannot be loaded from the hub."""
    columns: tuple[str, ...] = ("text",)
    """The columns to read, in the order that the kind of data set expects."""
    label: str | None = None
    regression: bool = False
    rows: Literal["documents", "passages", "articles", "sentences"] = "documents"
    """What a row of a corpus is: `documents`: a document; `passages`: an article with headings and lists
    among its passages; `articles`: a line of an article, which begins with its title; `sentences`: a
    sentence."""


class PublishedText(TableText):
    """A published data set, in SSLRUN_DATA/<name>, in data/<name>, or on the hub."""

    card: ClassVar[TextCard]

    @cached_property
    def store(self) -> TableStore:
        folder = find_local_folder(self.name)
        if folder is not None:
            return FileStore(folder, self.card.label)
        remedy = explain_download(self.name, self.name)
        if self.card.hub is None:
            raise UserError(f"{self.name}: not on this machine, and the hub has no copy that can be loaded. {remedy}")
        return HubStore(self.name, self.card.hub, remedy, label=self.card.label)

    @classmethod
    def describe(cls) -> dict[str, str]:
        hub = f"https://huggingface.co/datasets/{cls.card.hub.repository}" if cls.card.hub else "not available"
        return {"hub": hub, "searched": f"{describe_local_folders(cls.name)}; then the hub"}


def register_published(kind: type[PublishedText], cards: Mapping[str, TextCard]) -> None:
    """Register a source class, a subclass of `kind`, for each card."""
    for name, card in cards.items():
        sources.register(name)(
            type(name, (kind,), {"__doc__": card.about, "__module__": kind.__module__, "card": card})
        )
