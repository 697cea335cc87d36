"""What all sets of text have in common: a length, a tokenizer, and where a published set lies."""

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
"""Raised when the same texts make another tokenizer."""


class TextOptions(Options):
    """What all sets of text have in common."""

    length: int = Field(128, ge=8, le=8192)
    """Tokens of a sequence at most, with its special ones."""
    tokenizer: TokenizerOptions = TokenizerOptions()
    """Default in an evaluation: that of the recipe's `data`."""


class TextSource(Source):
    """A set of text. Reads its rows, and makes ids of them by the tokenizer that the options name."""

    Options = TextOptions
    gives = TextSpec
    task = "sentences"

    @cached_property
    def spec(self) -> TextSpec:
        return TextSpec(tokenizer_of(self.options.tokenizer, self), self.options.length)

    @classmethod
    def inherit_options(cls, data: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
        """Take the length and the tokenizer of `data`: a network reads only the ids that it was trained on."""
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
    if not issubclass(cls.gives, TextSpec):
        raise UserError(f"data.tokenizer.corpus: '{name}' is {cls.gives.kind} data, not text")
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
    folder = cache_root() / "tokenizers" / digest_of(key)
    with locked(folder):
        if not (folder / "tokenizer.json").exists():
            train_wordpiece(source.texts, vocab, lowercase, source.title).save(folder)
        return load_tokenizer(TokenizerOptions(file=folder / "tokenizer.json"))


class TableText(TextSource):
    """A set whose texts lie in columns of a table."""

    @property
    @abstractmethod
    def store(self) -> TableStore:
        """Where the table lies."""

    @property
    def splits(self) -> tuple[Split, ...]:
        return self.store.splits

    @property
    def title(self) -> str:
        return self.store.name

    def content(self) -> Any:
        return self.store.identity("train")

    def table(self, split: Split, *columns: str) -> Any:
        """The split as a `datasets.Dataset`. UserError: it can't be had, has no rows, or not those columns."""
        table = with_columns(self.store.table(split), self.title, *columns)
        if len(table) == 0:
            raise UserError(f"{self.title}: split '{split}' has no rows")
        return table


def with_columns(table: Any, name: str, *columns: str) -> Any:
    """The table, called `name`. UserError: it has not those columns."""
    for column in columns:
        if column not in table.column_names:
            raise UserError(f"{name}: no column '{column}'; there is {', '.join(table.column_names)}")
    return table


def cell(value: Any, name: str, column: str) -> str:
    """A cell's text; numbers are texts too, and nothing is an empty one."""
    if value is not None and not isinstance(value, str | int | float):
        raise UserError(f"{name}: column '{column}' holds {type(value).__name__}s, not text")
    return "" if value is None else str(value)


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
    rows: Literal["documents", "passages", "articles", "sentences"] = "documents"
    """What the rows of a corpus are: documents; articles with headings and lists among their passages; lines of articles,
    each begun by its title; or sentences."""


class PublishedText(TableText):
    """A published set: in SSLRUN_DATA/<name> or data/<name>, or on the hub."""

    card: ClassVar[TextCard]

    @cached_property
    def store(self) -> TableStore:
        folder = find_local_folder(self.name)
        if folder is not None:
            return FileStore(folder, self.card.label)
        remedy = explain_download(self.name, self.name)
        if self.card.hub is None:
            raise UserError(
                f"{self.name}: not on this machine, and not on the hub in a form that can be read. {remedy}"
            )
        return HubStore(self.name, self.card.hub, remedy, label=self.card.label)

    @classmethod
    def describe(cls) -> dict[str, str]:
        hub = f"https://huggingface.co/datasets/{cls.card.hub.repository}" if cls.card.hub else "not there"
        return {"hub": hub, "searched": f"{describe_local_folders(cls.name)}; then the hub"}


def register_published(kind: type[PublishedText], cards: Mapping[str, TextCard]) -> None:
    """Make a source of each card, of that kind, known by its name."""
    for name, card in cards.items():
        sources.register(name)(
            type(name, (kind,), {"__doc__": card.about, "__module__": kind.__module__, "card": card})
        )
