"""WordPiece tokenizers: trained on a corpus, or loaded; saved beside what was trained with them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator
from tokenizers import Tokenizer as Core
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from sslrun.errors import UserError
from sslrun.files import replacing
from sslrun.hub import hub_or_offline
from sslrun.registry import Options

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class TokenizerOptions(Options):
    """Options of the tokenizer: from a file, from the hub, or otherwise trained."""

    vocab: int = Field(8192, ge=64)
    """Maximum size of a trained vocabulary; BERT's has 30,522 entries."""
    lowercase: bool = True
    """Train on lowercase text without accents, as in BERT's uncased models."""
    file: Path | None = None
    """Path of a tokenizer.json or a WordPiece vocab.txt to load instead of training one."""
    hub: str | None = Field(None, pattern=r"^[\w.-]+(/[\w.-]+)?$")
    """Name of a model on the Hugging Face hub; its tokenizer.json is loaded."""
    corpus: dict[str, Any] | None = None
    """Data set to train the tokenizer on, with its options; default: the recipe's `data`."""
    sha256: str | None = None
    """SHA-256 digest of `file`; filled in automatically, so that a changed file makes a new run."""

    @model_validator(mode="after")
    def _one_source(self) -> TokenizerOptions:
        if self.file and self.hub:
            raise ValueError("give file or hub, not both")
        if self.file:
            try:
                found = hashlib.sha256(self.file.read_bytes()).hexdigest()
            except OSError as error:
                raise ValueError(f"{self.file}: can't be read ({error.strerror})") from None
            if self.sha256 not in (None, found):
                raise ValueError(f"{self.file}: is not the file that this recipe was resolved with")
            object.__setattr__(self, "sha256", found)
        return self


class Tokenizer:
    """Text to ids. Equal to another of the same content."""

    def __init__(self, core: Core) -> None:
        self.core = core
        core.no_padding()
        core.no_truncation()
        vocabulary = core.get_vocab()
        missing = [each for each in SPECIALS if each not in vocabulary]
        if missing:
            raise UserError(f"this tokenizer has no {', '.join(missing)}: take a WordPiece one, as BERT's")
        self.pad, self.unk, self.cls, self.sep, self.mask = (vocabulary[each] for each in SPECIALS)

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(self.core.to_str().encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    @cached_property
    def vocab(self) -> int:
        """One more than the highest id: of a file that names an entry twice, more than there are entries."""
        return 1 + max(self.core.get_vocab().values())

    @property
    def specials(self) -> tuple[int, ...]:
        return (self.pad, self.unk, self.cls, self.sep, self.mask)

    @cached_property
    def strings(self) -> list[str]:
        """Every entry of the vocabulary, by id."""
        by_id = {number: entry for entry, number in self.core.get_vocab().items()}
        return [by_id.get(number, "") for number in range(self.vocab)]

    @cached_property
    def continues(self) -> Tensor:
        """(V,) bool: entries that go on with a word which another began."""
        return torch.tensor([each.startswith("##") for each in self.strings])

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without specials."""
        return [each.ids for each in self.core.encode_batch_fast(list(texts), add_special_tokens=False)]

    def offsets(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Ids of each text, and where in it (first character, one past the last) each lies."""
        return [(each.ids, each.offsets) for each in self.core.encode_batch(list(texts), add_special_tokens=False)]

    def encode_words(self, sentences: Sequence[Sequence[str]]) -> list[tuple[list[int], list[int | None]]]:
        """Ids of sentences given as words, and which word each belongs to."""
        encoded = self.core.encode_batch(
            [list(each) for each in sentences], is_pretokenized=True, add_special_tokens=False
        )
        return [(each.ids, each.word_ids) for each in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        return str(self.core.decode(list(ids), skip_special_tokens=False))

    def save(self, folder: Path) -> None:
        """Write tokenizer.json, as transformers reads it."""
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / "tokenizer.json") as temporary:
            self.core.save(str(temporary))


def wordpiece(lowercase: bool, vocab: dict[str, int] | None = None) -> Core:
    """A WordPiece model with BERT's normalization and splitting of words (Devlin et al. 2019)."""
    core = Core(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=100))
    core.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    return core


def train_wordpiece(
    texts: Callable[[], Iterable[str]], vocab: int, lowercase: bool, title: str = "the corpus"
) -> Tokenizer:
    """A WordPiece vocabulary of `vocab` entries at most, from the texts, which are gone through twice; the same texts
    make the same vocabulary. UserError: they, of this `title`, hold no words.

    The library numbers the pieces of one letter in the order of a hash table, another in every process, and equally
    frequent pairs are joined in the order of their numbers. So a first training without any joining finds those pieces,
    and a second one is given them in order.
    """
    core = wordpiece(lowercase)
    letters = sorted(each for each in _trained(core, texts(), 1, []) if each.startswith("##"))
    entries = _trained(core, texts(), vocab, letters)
    if len(entries) <= len(SPECIALS):
        raise UserError(f"{title}: holds no words to train a tokenizer on")
    made = wordpiece(lowercase, entries)
    made.add_special_tokens(list(SPECIALS))
    return Tokenizer(made)


def _trained(core: Core, texts: Iterable[str], vocab: int, first: list[str]) -> dict[str, int]:
    """Entries and their ids: special ones, those given, then the rest."""
    trainer = trainers.WordPieceTrainer(vocab_size=vocab, special_tokens=[*SPECIALS, *first], show_progress=False)
    core.train_from_iterator(texts, trainer)
    return core.get_vocab()


def load_tokenizer(options: TokenizerOptions) -> Tokenizer:
    """The tokenizer of `file` or `hub`. UserError: it can't be had, or is no WordPiece tokenizer."""
    where = options.file or options.hub
    try:
        if options.hub:
            hub_or_offline()
            core = Core.from_pretrained(options.hub)
        elif str(options.file).endswith(".txt"):
            assert options.file is not None
            # Not by splitlines: an entry may be a character that it ends a line at.
            lines = options.file.read_text(encoding="utf-8").rstrip("\n").split("\n")
            core = wordpiece(options.lowercase, {entry: number for number, entry in enumerate(lines)})
        else:
            core = Core.from_file(str(options.file))
    except Exception as error:  # the library raises bare Exceptions
        raise UserError(f"tokenizer {where}: can't be loaded: {' '.join(str(error).split())[:200]}") from None
    try:
        return Tokenizer(core)
    except UserError as error:
        raise UserError(f"tokenizer {where}: {error}") from None


def blank_tokenizer(vocab: int) -> Tokenizer:
    """One of so many entries that mean nothing: to size networks without data."""
    entries = [*SPECIALS, *(f"w{number}" for number in range(vocab - len(SPECIALS)))]
    return Tokenizer(wordpiece(True, {entry: number for number, entry in enumerate(entries)}))
