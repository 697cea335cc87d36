"""Base classes of text data sets: sequence length, tokenizer, and location of published sets."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, ValidationError

from sslrun.data.cache import cache_root, digest_key, locked
from sslrun.data.examples import Batch
from sslrun.data.source import Source, SourceOptions, sources
from sslrun.data.specs import TOKENIZER, InputSpec, TextSpec
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
from sslrun.data.text.tokenizer import (
    Tokenizer,
    TokenizerOptions,
    blank_tokenizer,
    load_tokenizer,
    train_wordpiece,
)
from sslrun.errors import UserError
from sslrun.files import SUMS, are_intact, checksum, write_sums

TRAINER_VERSION = 4
"""Raise it when the same texts would train a different tokenizer."""
NOT_TEXTS = {"tokenizer", "length", *SourceOptions.model_fields}
"""Options of a set that do not change the texts that a tokenizer is trained on."""


class TextOptions(SourceOptions):
    """Options shared by all text data sets."""

    length: int = Field(128, ge=8, le=8192)
    """Maximum number of tokens in a sequence, special tokens included."""
    tokenizer: TokenizerOptions = TokenizerOptions()
    """Tokenizer of the texts; default in an evaluation: the tokenizer of the recipe's `data`."""


class TextSource(Source):
    """A text data set. It reads rows and encodes them with the tokenizer from its options."""

    version = 2  # batches of similar lengths are drawn from an eighth of an epoch
    Options = TextOptions
    gives = TextSpec
    task = "sentences"

    @cached_property
    def spec(self) -> TextSpec:
        return TextSpec(load_tokenizer_for(self.options.tokenizer, self), self.options.length)

    @classmethod
    def inherit_options(cls, data: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
        """Take the length and the tokenizer of `data`.

        A backbone that was trained on one vocabulary cannot read the ids of another.
        """
        tokenizer = {**data["tokenizer"], **(options.get("tokenizer") or {})}
        if not any(tokenizer[key] for key in ("file", "hub", "corpus")):
            own = {key: value for key, value in data.items() if key != "name"}
            parsed = sources[data["name"]].Options.model_validate(own)
            # Only what differs from the defaults: a run's hash covers no defaults.
            corpus = parsed.non_defaults(exclude=NOT_TEXTS)
            tokenizer["corpus"] = {"name": data["name"], **corpus}
        return {"length": options.get("length", data["length"]), "tokenizer": tokenizer}

    def sketch(self, count: int) -> tuple[InputSpec, Batch]:
        length, vocab = self.options.length, self.options.tokenizer.vocab
        ids = torch.randint(5, vocab, (count, length))
        ones = torch.ones_like(ids)
        return TextSpec(blank_tokenizer(vocab), length), Batch(Tokens(ids, ones - 1, ones), None)

    @property
    def title(self) -> str:
        """Name of the set in messages."""
        return self.name

    @abstractmethod
    def texts(self) -> Iterator[str]:
        """Yield the texts of the training split, to train a tokenizer."""

    @abstractmethod
    def content(self) -> Any:
        """Return JSON values that identify the content of the training split.

        They are part of every cache key: a set with the same name and options but other content
        gets other caches.
        """


def load_tokenizer_for(options: TokenizerOptions, source: TextSource) -> Tokenizer:
    """Load the tokenizer that `options` name, or train it and keep it in the cache."""
    if options.file or options.hub:
        return load_tokenizer(options)
    if options.corpus is not None:
        source = _build_corpus(options.corpus)
    # How the set is encoded and split does not change its texts.
    source_options = source.options.model_dump_json(exclude=NOT_TEXTS)
    return _train_cached(source.name, source_options, options.vocab, options.lowercase)


def _build_corpus(settings: Mapping[str, Any]) -> TextSource:
    """Build the data set that a tokenizer is trained on, from its name and options."""
    name = settings.get("name")
    if name is None:
        raise UserError(
            "data.tokenizer.corpus: has no name; name a text data set, as in {name: world}"
        )
    cls: Any = sources[str(name)]
    if not issubclass(cls.gives, TextSpec):
        raise UserError(f"data.tokenizer.corpus: '{name}' is {cls.gives.kind} data, not text")
    options = {key: value for key, value in settings.items() if key != "name"}
    try:
        return cls(cls.Options.model_validate(options))
    except ValidationError as error:
        first = error.errors()[0]
        option = ".".join(map(str, first["loc"]))
        raise UserError(f"data.tokenizer.corpus: {option}: {first['msg']}") from None


@lru_cache(maxsize=8)
def _train_cached(name: str, options: str, vocab: int, lowercase: bool) -> Tokenizer:
    cls: Any = sources[name]
    source: TextSource = cls(cls.Options.model_validate_json(options))
    key = [TRAINER_VERSION, name, options, vocab, lowercase, source.content()]
    folder = cache_root() / "tokenizers" / digest_key(key)
    with locked(folder):
        if not are_intact(folder / SUMS, [TOKENIZER]):
            train_wordpiece(source.texts, vocab, lowercase, source.title).save(folder)
            write_sums(folder / SUMS, {TOKENIZER: checksum(folder / TOKENIZER)})
        return load_tokenizer(TokenizerOptions(file=folder / TOKENIZER))


class TableText(TextSource):
    """A text data set stored in the columns of a table."""

    @property
    @abstractmethod
    def store(self) -> TableStore:
        """Where the table is stored."""

    @property
    def splits(self) -> tuple[Split, ...]:
        return self.store.splits

    @property
    def title(self) -> str:
        return self.store.name

    def content(self) -> Any:
        return self.store.identity("train")

    def table(self, split: Split, *columns: str) -> Any:
        """Load the split as a `datasets.Dataset`.

        Raises:
            UserError: The split is missing, has no rows, or lacks one of `columns`.
        """
        table = check_columns(self.store.table(split), self.title, *columns)
        if len(table) == 0:
            raise UserError(f"{self.title}: split '{split}' has no rows")
        return table


def check_columns(table: Any, name: str, *columns: str) -> Any:
    """Return `table` after a check that it has all of `columns`; `name` is its name in messages.

    Raises:
        UserError: A column is missing.
    """
    for column in columns:
        if column not in table.column_names:
            present = ", ".join(table.column_names)
            raise UserError(f"{name}: no column '{column}'; the columns are {present}")
    return table


def cell_text(value: Any, name: str, column: str) -> str:
    """Return a table cell as text: numbers are printed, an empty cell gives "".

    Raises:
        UserError: The cell holds neither text nor a number.
    """
    if value is not None and not isinstance(value, str | int | float):
        raise UserError(
            f"{name}: column '{column}' holds values of type {type(value).__name__}, not text; "
            "choose a column of texts"
        )
    return "" if value is None else str(value)


@dataclass(frozen=True)
class TextCard:
    """Description of a published text data set: where it is on the hub, and its columns."""

    about: str
    hub: Hub | None
    """None if the hub does not have it in a form that can be read."""
    columns: tuple[str, ...] = ("text",)
    """The columns to read, in the order that the kind of data set expects."""
    label: str | None = None
    regression: bool = False
    rows: Literal["documents", "passages", "articles", "sentences"] = "documents"
    """What one row of a corpus is.

    documents: a document. passages: an article with headings and lists between its passages.
    articles: a line of an article, whose first line is its title. sentences: a sentence.
    """


class PublishedText(TableText):
    """A published set, in SSLRUN_DATA/<name>, in data/<name>, or on the hub."""

    card: ClassVar[TextCard]

    @cached_property
    def store(self) -> TableStore:
        folder = find_local_folder(self.name)
        if folder is not None:
            return FileStore(folder, self.card.label)
        remedy = explain_download(self.name, self.name)
        if self.card.hub is None:
            raise UserError(
                f"{self.name}: not on this machine, and the hub has no copy that can be loaded. "
                f"{remedy}"
            )
        return HubStore(self.name, self.card.hub, remedy, label=self.card.label)

    @classmethod
    def describe(cls) -> dict[str, str]:
        hub = "not available"
        if cls.card.hub:
            hub = f"https://huggingface.co/datasets/{cls.card.hub.repository}"
        return {"hub": hub, "searched": f"{describe_local_folders(cls.name)}; then the hub"}


def register_published(kind: type[PublishedText], cards: Mapping[str, TextCard]) -> None:
    """Register a subclass of `kind` for each card, under the name of the card."""
    for name, card in cards.items():
        attributes = {"__doc__": card.about, "__module__": kind.__module__, "card": card}
        sources.register(name)(type(name, (kind,), attributes))
