"""WordPiece tokenizers: trained on a corpus, or loaded from a file or the hub."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator
from tokenizers import Tokenizer as Core
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from sslrun.data.specs import TOKENIZER
from sslrun.errors import UserError
from sslrun.files import replacing, require_file
from sslrun.hub import NAME as HUB_NAME
from sslrun.hub import reach_hub
from sslrun.registry import Options

LARGEST_ID = 2**22
"""Largest id of an entry; backbones have a vector for every id up to the largest."""
AT_ONCE = 4096
"""Texts to encode at a time; the library takes about 200 bytes for a token until all are done."""
LARGEST_SAMPLE = 2**30
"""Largest number of characters to train a tokenizer on."""
SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class TokenizerOptions(Options):
    """Choice of the tokenizer: from a file, from the hub, or trained."""

    vocab: int = Field(8192, ge=64)
    """Maximum size of a trained vocabulary; BERT's has 30,522 entries."""
    lowercase: bool = True
    """Lowercase and remove accents, as BERT's uncased models; ignored with a tokenizer.json."""
    file: Path | None = None
    """A tokenizer.json or a WordPiece vocab.txt to use unchanged."""
    hub: str | None = Field(None, pattern=rf"^{HUB_NAME}(/{HUB_NAME})?$")
    """Name of a model on the Hugging Face hub whose tokenizer.json to use."""
    corpus: dict[str, Any] | None = None
    """Data set to train the tokenizer on, with its options; default: the recipe's `data`. Of more
    than a billion characters, a part is read, spread over the set."""
    sha256: str | None = None
    """SHA-256 of `file`; filled in, so that a changed file of the same name gives another run."""

    @model_validator(mode="after")
    def _one_source(self) -> TokenizerOptions:
        if self.file and self.hub:
            raise ValueError("choose file or hub, not both")
        if self.file:
            try:
                require_file(self.file)
                digest = hashlib.sha256(self.file.read_bytes()).hexdigest()
            except OSError as error:
                raise ValueError(f"{self.file}: cannot be read ({error.strerror})") from None
            except UserError as error:
                raise ValueError(str(error)) from None
            if self.sha256 not in (None, digest):
                raise ValueError(
                    f"{self.file}: has changed since this recipe was resolved; remove sha256 to "
                    "use the new file"
                )
            object.__setattr__(self, "sha256", digest)
        return self


class Tokenizer:
    """Encoder of text to ids. Tokenizers of the same content are equal.

    Raises:
        UserError: `core` lacks one of BERT's special tokens.
    """

    def __init__(self, core: Core) -> None:
        self.core = core
        core.no_padding()
        core.no_truncation()
        vocabulary = core.get_vocab()
        missing = [special for special in SPECIALS if special not in vocabulary]
        if missing:
            raise UserError(
                f"this tokenizer has no {', '.join(missing)}; use a WordPiece tokenizer like BERT's"
            )
        if (largest := max(vocabulary.values())) > LARGEST_ID:
            raise UserError(
                f"this tokenizer has the id {largest}, but at most {LARGEST_ID} is read"
            )
        self.pad, self.unk, self.cls, self.sep, self.mask = map(vocabulary.__getitem__, SPECIALS)

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(self.core.to_str().encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    @cached_property
    def vocab(self) -> int:
        """The highest id plus one; more than the number of entries if a file repeats an entry."""
        return 1 + max(self.core.get_vocab().values())

    @property
    def specials(self) -> tuple[int, ...]:
        return (self.pad, self.unk, self.cls, self.sep, self.mask)

    @cached_property
    def strings(self) -> list[str]:
        """The entries of the vocabulary, by id; "" for an unused id."""
        by_id = {number: entry for entry, number in self.core.get_vocab().items()}
        return [by_id.get(number, "") for number in range(self.vocab)]

    @cached_property
    def continues(self) -> Tensor:
        """(V,) bool: entries that continue a word, such as ##ing."""
        return torch.tensor([entry.startswith("##") for entry in self.strings])

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode each text to ids, without special tokens."""
        ids: list[list[int]] = []
        for start in range(0, len(texts), AT_ONCE):
            part = list(texts[start : start + AT_ONCE])
            encoded = self.core.encode_batch_fast(part, add_special_tokens=False)
            ids += [text.ids for text in encoded]
        return ids

    def offsets(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Encode each text to ids, and to the span of characters [start, end) of each id."""
        encoded = self.core.encode_batch(list(texts), add_special_tokens=False)
        return [(text.ids, text.offsets) for text in encoded]

    def encode_words(
        self, sentences: Sequence[Sequence[str]]
    ) -> list[tuple[list[int], list[int | None]]]:
        """Encode sentences of words to ids, and to the index of the word of each id."""
        encoded = self.core.encode_batch(
            [list(words) for words in sentences], is_pretokenized=True, add_special_tokens=False
        )
        return [(sentence.ids, sentence.word_ids) for sentence in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        return str(self.core.decode(list(ids), skip_special_tokens=False))

    def until_end(self, ids: Sequence[int]) -> Sequence[int]:
        """Return the ids before the first [SEP]; all of them if there is none."""
        return ids[: ids.index(self.sep)] if self.sep in ids else ids

    def save(self, folder: Path) -> None:
        """Write tokenizer.json, which transformers can read."""
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / TOKENIZER) as temporary:
            self.core.save(str(temporary))


def build_wordpiece(lowercase: bool, vocab: dict[str, int] | None = None) -> Core:
    """Build a WordPiece model with BERT's normalization and splitting of words.

    Devlin et al., NAACL 2019.
    """
    core = Core(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=100))
    core.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    return core


def train_wordpiece(
    texts: Callable[[], Iterable[str]], vocab: int, lowercase: bool, title: str = "the corpus"
) -> Tokenizer:
    """Train a WordPiece vocabulary of at most `vocab` entries.

    The same texts give the same vocabulary. The library alone does not ensure this: it numbers
    one-letter pieces in the order of a hash table, which differs between processes, and breaks ties
    between pairs by these numbers. Therefore the texts are read twice: a first training without
    merges finds the one-letter pieces, and a second receives them in order.

    Of texts with more than `LARGEST_SAMPLE` characters in total, only each second (or third, and
    so on) is read, because training takes about 750 bytes for every different word.

    Raises:
        UserError: The texts hold no words; `title` names them in the message.
    """
    core = build_wordpiece(lowercase)
    stride = -(-sum(map(len, texts())) // LARGEST_SAMPLE) or 1

    def sample() -> Iterable[str]:
        return itertools.islice(texts(), None, None, stride)

    letters = sorted(
        entry for entry in _train_entries(core, sample(), 1, []) if entry.startswith("##")
    )
    entries = _train_entries(core, sample(), vocab, letters)
    if len(entries) <= len(SPECIALS):
        raise UserError(f"{title}: holds no words to train a tokenizer on")
    trained = build_wordpiece(lowercase, entries)
    trained.add_special_tokens(list(SPECIALS))
    return Tokenizer(trained)


def _train_entries(
    core: Core, texts: Iterable[str], vocab: int, first: list[str]
) -> dict[str, int]:
    """Train entries and their ids: special tokens, then those of `first`, then the others."""
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab, special_tokens=[*SPECIALS, *first], show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    return core.get_vocab()


def load_tokenizer(options: TokenizerOptions) -> Tokenizer:
    """Load the tokenizer of `file` or `hub`.

    Raises:
        UserError: It cannot be loaded, or lacks BERT's special tokens.
    """
    where = options.file or options.hub
    try:
        if options.hub:
            reach_hub()
            core = Core.from_pretrained(options.hub)
        elif str(options.file).endswith(".txt"):
            assert options.file is not None
            # Not splitlines: an entry may be a character at which it would end a line.
            lines = options.file.read_text(encoding="utf-8").rstrip("\n").split("\n")
            vocabulary = {entry: number for number, entry in enumerate(lines)}
            core = build_wordpiece(options.lowercase, vocabulary)
        else:
            core = Core.from_file(str(options.file))
    except Exception as error:  # the library raises bare Exceptions
        cause = " ".join(str(error).split())[:200]
        raise UserError(f"tokenizer {where}: cannot be loaded: {cause}") from None
    try:
        return Tokenizer(core)
    except UserError as error:
        raise UserError(f"tokenizer {where}: {error}") from None


def blank_tokenizer(vocab: int) -> Tokenizer:
    """Build a tokenizer of `vocab` meaningless entries, to size networks without data."""
    entries = [*SPECIALS, *(f"w{number}" for number in range(vocab - len(SPECIALS)))]
    return Tokenizer(build_wordpiece(True, {entry: number for number, entry in enumerate(entries)}))
