"""Recurrent networks over text: the LSTM, and ELMo (Peters et al., NAACL 2018)."""

from __future__ import annotations

from functools import cache

import torch
from pydantic import Field
from torch import Tensor, nn

from sslrun.backbones.base import Features, backbones
from sslrun.backbones.text import TextBackbone, gather_tokens, last_real
from sslrun.data.specs import TextSpec
from sslrun.data.text.sequences import Tokens
from sslrun.registry import Options


def reverse_real(x: Tensor, real: Tensor) -> Tensor:
    """Reverse each sequence (B, T, ...) and leave its padding at the end. It is its own inverse.

    [a b c 0] -> [c b a 0]
    """
    lengths = real.sum(dim=1, keepdim=True)
    places = torch.arange(x.shape[1], device=x.device)
    source = torch.where(places < lengths, lengths - 1 - places, places)
    return x.gather(1, source.view(*source.shape, *[1] * (x.ndim - 2)).expand_as(x))


class UnpackedDocuments:
    """Move each document of packed sequences to its own row, so that no state crosses documents.

    Two sequences with documents a, b and c, of lengths (2, 1) and (3):

        [a0 a1 b0]      [a0 a1 0 ]
        [c0 c1 c2]  ->  [b0 0  0 ]
                        [c0 c1 c2]

    `row` and `place` (B, T) hold the row and the column of each token. `shape` (R, L) is the number
    of rows and the longest document.
    """

    def __init__(self, tokens: Tokens) -> None:
        self.whole = not tokens.packed
        """Whether every sequence is one document already."""
        if self.whole:
            return
        number = tokens.documents.cummax(dim=1).values  # padding belongs to the last document
        begins = number.diff(dim=1, prepend=torch.zeros_like(number[:, :1])) != 0
        begins[:, 0] = True
        place = torch.arange(number.shape[1], device=number.device)
        self.row = begins.flatten().cumsum(0).view_as(number) - 1
        self.place = place - torch.where(begins, place, 0).cummax(dim=1).values
        self.shape = (int(self.row[-1, -1]) + 1, int(self.place.max()) + 1)
        self.whole = self.shape == self.row.shape

    def rows(self, x: Tensor) -> Tensor:
        """Map sequences (B, T, ...) to rows (R, L, ...), padded with zeros."""
        if self.whole:
            return x
        return x.new_zeros(*self.shape, *x.shape[2:]).index_put((self.row, self.place), x)

    def sequences(self, x: Tensor) -> Tensor:
        """Map rows (R, L, ...) back to sequences (B, T, ...)."""
        return x if self.whole else x[self.row, self.place]


class LstmStack(nn.Module):
    """LSTM layers of one direction, whose states are returned separately."""

    def __init__(self, inputs: int, width: int, depth: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.cells = nn.ModuleList(
            nn.LSTM(width if layer else inputs, width, batch_first=True) for layer in range(depth)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the states (B, T, D) of each layer.

        From the second layer on, a layer adds its input to its states, as in ELMo.
        """
        layers: list[Tensor] = []
        for index, cell in enumerate(self.cells):
            states = _run(cell, self.dropout(x))
            x = states + x if index else states
            layers.append(x)
        return layers


def _run(cell: nn.Module, x: Tensor) -> Tensor:
    """Run an LSTM over (B, T, C), in float32 where autocast asks for a bf16 that does not work.

    There are two such places: CPUs for which oneDNN has no bf16 LSTM (AVX2), and passes without
    gradients, in which torch's counter of FLOPs decomposes LSTMs and loses sight of autocast. All
    passes without gradients are in float32, counted or not, so that they give the same numbers.
    """
    device = x.device.type
    works = torch.is_grad_enabled() and (device != "cpu" or _bf16_kernels())
    casts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if works or not casts:
        return cell(x)[0]
    with torch.autocast(device, enabled=False):
        return cell(x.float())[0]


@cache
def _bf16_kernels() -> bool:
    """Whether an LSTM in bf16 runs on this CPU.

    It always does without oneDNN; else if oneDNN has bf16 kernels. oneDNN answers, because it
    honors ONEDNN_MAX_CPU_ISA.
    """
    return not torch.backends.mkldnn.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()


class Recurrent(TextBackbone):
    """LSTM layers in one or two directions, which are concatenated but never mixed.

    Each half of a token's features depends on one side of the token only. Pooled features are the
    last real token of the forward half and the first token of the backward half. A task that reads
    a sequence at one token (`pool: cls`, `last4` or `mixture`) reads the last one, at which the
    backward half has read no other token; `bilstm` reads both ends.
    """

    offers = frozenset({"tokens", "directions"})

    def disabled(self) -> dict[str, str]:
        return {"directions": "bidirectional: true"} if self.back is None else {}

    def build(self, width: int, depth: int, dropout: float, both: bool) -> None:
        """Build the layers. `width` is that of the embeddings and of each direction."""
        self.ahead = LstmStack(width, width, depth, dropout)
        self.back = LstmStack(width, width, depth, dropout) if both else None
        self.width = width * (2 if both else 1)
        self.depth = depth + 1

    def embed(self, inputs: Tokens) -> Tensor:
        """Embed tokens: (B, T, width)."""
        raise NotImplementedError

    @property
    def causal(self) -> bool:
        return self.back is None

    def forward(self, inputs: Tokens) -> Features:
        # Compilation gains nothing: the kernels are cuDNN's, and the number of packed documents
        # varies. Call `disable` only while compiling, because it imports torch's compiler, which
        # takes seconds.
        read = torch.compiler.disable(self._read) if torch.compiler.is_compiling() else self._read
        return read(inputs)

    def _read(self, inputs: Tokens) -> Features:
        x, real = self.embed(inputs), inputs.real
        documents = UnpackedDocuments(inputs)
        rows, real_rows = documents.rows(x), documents.rows(real)
        layers = [documents.sequences(states) for states in self.ahead(rows)]
        pooled = gather_tokens(layers[-1], last_real(real))
        if self.back is not None:
            backward = [
                documents.sequences(reverse_real(states, real_rows))
                for states in self.back(reverse_real(rows, real_rows))
            ]
            layers = [torch.cat(pair, dim=-1) for pair in zip(layers, backward, strict=True)]
            pooled = torch.cat([pooled, backward[-1][:, 0]], dim=-1)
        # The embeddings are repeated for each direction, because ELMo mixes them with the states.
        bottom = x.repeat(1, 1, self.width // x.shape[-1])
        return Features(
            pooled, layers[-1], read=last_real(real), mask=real, layers=(bottom, *layers)
        )

    def layers(self) -> list[list[nn.Parameter]]:
        stacks = [self.ahead] if self.back is None else [self.ahead, self.back]
        levels: list[list[nn.Parameter]] = []
        for cells in zip(*(stack.cells for stack in stacks), strict=True):
            levels.append([*nn.ModuleList(cells).parameters()])
        recurrent = set(nn.ModuleList(stacks).parameters())
        embeddings = [parameter for parameter in self.parameters() if parameter not in recurrent]
        return [embeddings, *levels]


@backbones.register("lstm")
class Lstm(Recurrent):
    """LSTM over token embeddings (Hochreiter and Schmidhuber 1997), in one or two directions."""

    class Options(Options):
        width: int = Field(256, ge=1)
        """Width of the embeddings and of each direction's states."""
        depth: int = Field(2, ge=1)
        """Number of layers."""
        bidirectional: bool = False
        """Add a second network that reads each sequence from its end."""
        dropout: float = Field(0.1, ge=0, lt=1)
        """Dropout rate on the input of each layer."""

    def __init__(self, options: Options, spec: TextSpec) -> None:
        super().__init__(options, spec)
        self.token_embed = nn.Embedding(spec.vocab, options.width)
        nn.init.normal_(self.token_embed.weight, std=0.02)
        self.build(options.width, options.depth, options.dropout, options.bidirectional)

    @property
    def embedding(self) -> Tensor:
        return self.token_embed.weight

    def embed(self, inputs: Tokens) -> Tensor:
        return self.token_embed(inputs.ids)


CHARACTERS = 256
"""Number of byte values; 0 is padding."""
LONGEST = 16
"""Largest number of bytes read from a token."""


@backbones.register("elmo")
class Elmo(Recurrent):
    """ELMo: a character CNN under a two-layer LSTM language model in each direction.

    Peters et al., NAACL 2018 (arXiv:1802.05365). Tasks can mix its three layers (`pool: mixture`).
    Deviations: characters are those of word pieces, not of words, so that one tokenizer serves
    every row of a table. Widths are half of the paper's by default, and there is one highway layer,
    to save compute.
    """

    class Options(Options):
        width: int = Field(256, ge=8, multiple_of=8)
        """Width of each direction's states; 512 in the paper (projected from 4,096 cells)."""
        dropout: float = Field(0.1, ge=0, lt=1)
        """Dropout rate on the input of each layer."""

    characters: Tensor

    def __init__(self, options: Options, spec: TextSpec) -> None:
        super().__init__(options, spec)
        rows = [list(entry.encode()[:LONGEST]) for entry in spec.tokenizer.strings]
        table = torch.tensor([row + [0] * (LONGEST - len(row)) for row in rows], dtype=torch.uint8)
        self.register_buffer("characters", table)
        width = options.width
        self.char_embed = nn.Embedding(CHARACTERS, 16)
        self.convolutions = nn.ModuleList(
            nn.Conv1d(16, width // 4, kernel, padding=kernel // 2) for kernel in (1, 3, 5, 7)
        )
        self.highway = nn.Linear(width, 2 * width)
        self.build(width, 2, options.dropout, both=True)

    def embed(self, inputs: Tokens) -> Tensor:
        # Each distinct token of the batch is embedded once: letters (U, 16, LONGEST), words (U, D).
        used, places = inputs.ids.unique(return_inverse=True)
        letters = self.char_embed(self.characters[used].long()).transpose(1, 2)
        words = torch.cat([conv(letters).amax(dim=2) for conv in self.convolutions], dim=1).relu()
        gate, change = self.highway(words).chunk(2, dim=1)
        return torch.lerp(words, change.relu(), gate.sigmoid())[places]
