"""Recurrent networks over text: the LSTM, and ELMo's two-directional language model (Peters et al., NAACL 2018)."""

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


def reversed_real(x: Tensor, real: Tensor) -> Tensor:
    """Reverse each sequence (B, T, ...) and leave its padding at the end. It is its own inverse.

    [a b c 0] -> [c b a 0]
    """
    lengths = real.sum(dim=1, keepdim=True)
    places = torch.arange(x.shape[1], device=x.device)
    source = torch.where(places < lengths, lengths - 1 - places, places)
    return x.gather(1, source.view(*source.shape, *[1] * (x.ndim - 2)).expand_as(x))


class UnpackedDocuments:
    """Each document of packed sequences in a row of its own, so that no state passes from one to the next."""

    def __init__(self, tokens: Tokens) -> None:
        self.whole = not tokens.packed
        """Whether every sequence is one document already."""
        if self.whole:
            return
        number = tokens.documents.cummax(dim=1).values  # padding stays with the last one
        begins = number.diff(dim=1, prepend=torch.zeros_like(number[:, :1])) != 0
        begins[:, 0] = True
        place = torch.arange(number.shape[1], device=number.device)
        self.row = begins.flatten().cumsum(0).view_as(number) - 1
        self.place = place - torch.where(begins, place, 0).cummax(dim=1).values
        self.shape = (int(self.row[-1, -1]) + 1, int(self.place.max()) + 1)
        self.whole = self.shape == self.row.shape

    def rows(self, x: Tensor) -> Tensor:
        """(R, L, ...) of (B, T, ...), padded with zeros."""
        if self.whole:
            return x
        return x.new_zeros(*self.shape, *x.shape[2:]).index_put((self.row, self.place), x)

    def sequences(self, x: Tensor) -> Tensor:
        """(B, T, ...) of (R, L, ...)."""
        return x if self.whole else x[self.row, self.place]


class LstmStack(nn.Module):
    """LSTM layers of one direction, whose states are returned separately."""

    def __init__(self, inputs: int, width: int, depth: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.cells = nn.ModuleList(
            nn.LSTM(width if at else inputs, width, batch_first=True) for at in range(depth)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """States (B, T, D) of each layer. From the second layer on, each adds its input to its states, as in ELMo."""
        found: list[Tensor] = []
        for number, cell in enumerate(self.cells):
            states = _states(cell, self.dropout(x))
            x = states + x if number else states
            found.append(x)
        return found


def _states(cell: nn.Module, x: Tensor) -> Tensor:
    """Run an LSTM over (B, T, C), in float32 where autocast asks for a bf16 that does not work.

    There are two such places: CPUs for which oneDNN has no bf16 LSTM (AVX2), and passes without
    gradients, in which torch's counter of FLOPs decomposes LSTMs and loses sight of autocast. All
    passes without gradients are in float32, counted or not, so that they give the same numbers.
    """
    device = x.device.type
    works = torch.is_grad_enabled() and (device != "cpu" or _bf16_kernels())
    if torch.is_autocast_enabled(device) and not works:
        with torch.autocast(device, enabled=False):
            return cell(x.float())[0]
    return cell(x)[0]


@cache
def _bf16_kernels() -> bool:
    """Whether an LSTM in bf16 runs on this CPU: always without oneDNN, else where oneDNN has bf16 kernels.

    It is asked of oneDNN, which honors ONEDNN_MAX_CPU_ISA.
    """
    return not torch.backends.mkldnn.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()


class Recurrent(TextBackbone):
    """LSTM layers of one or two directions, which never mix below the top.

    Each half of a token's features has seen one side only. Pooled features are the last real token
    of the forward half and the first token of the backward half. A task that reads a sequence at
    one token (`pool: cls`, `last4` or `mixture`) reads the last one. The backward half has seen no
    other token there; `bilstm` reads both ends.
    """

    def build(self, width: int, depth: int, dropout: float, both: bool) -> None:
        """Make the layers. `width` is that of the embeddings and of each direction."""
        self.ahead = LstmStack(width, width, depth, dropout)
        self.back = LstmStack(width, width, depth, dropout) if both else None
        self.width = width * (2 if both else 1)
        self.depth = depth + 1

    def embed(self, inputs: Tokens) -> Tensor:
        raise NotImplementedError

    @property
    def causal(self) -> bool:
        return self.back is None

    def forward(self, inputs: Tokens) -> Features:
        # Not compiled: the kernels are cuDNN's, and the number of rows of packed documents varies.
        # `disable` is called only while compiling, because it imports torch's compiler, which takes
        # seconds.
        read = torch.compiler.disable(self._read) if torch.compiler.is_compiling() else self._read
        return read(inputs)

    def _read(self, inputs: Tokens) -> Features:
        x, real = self.embed(inputs), inputs.real
        apart = UnpackedDocuments(inputs)
        rows, real_rows = apart.rows(x), apart.rows(real)
        layers = [apart.sequences(each) for each in self.ahead(rows)]
        pooled = gather_tokens(layers[-1], last_real(real))
        if self.back is not None:
            read = self.back(reversed_real(rows, real_rows))
            backward = [apart.sequences(reversed_real(each, real_rows)) for each in read]
            layers = [torch.cat(pair, dim=-1) for pair in zip(layers, backward, strict=True)]
            pooled = torch.cat([pooled, backward[-1][:, 0]], dim=-1)
        bottom = x.repeat(
            1, 1, self.width // x.shape[-1]
        )  # once for each direction, as ELMo mixes it
        return Features(
            pooled, layers[-1], read=last_real(real), mask=real, layers=(bottom, *layers)
        )

    def layers(self) -> list[list[nn.Parameter]]:
        stacks = [self.ahead] if self.back is None else [self.ahead, self.back]
        deep = [
            [each for cell in cells for each in cell.parameters()]
            for cells in zip(*(s.cells for s in stacks), strict=True)
        ]
        known = {id(each) for level in deep for each in level}
        return [[each for each in self.parameters() if id(each) not in known], *deep]


@backbones.register("lstm")
class Lstm(Recurrent):
    """LSTM over learned token embeddings (Hochreiter and Schmidhuber 1997), of one direction or two."""

    class Options(Options):
        width: int = Field(256, ge=1)
        """Width of the embeddings and of each direction's states."""
        depth: int = Field(2, ge=1)
        """Number of layers."""
        bidirectional: bool = False
        """Add a second network that reads from the end."""
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
"""Number of byte values of UTF-8; 0 is padding."""
LONGEST = 16
"""Number of bytes that are read from a token."""


@backbones.register("elmo")
class Elmo(Recurrent):
    """ELMo: a character CNN under a two-layer language model in each direction (Peters et al., arXiv:1802.05365).

    Features mix its three layers. Deviations: the characters are those of word pieces, not of
    words, so that one tokenizer serves every row of a table. Widths are half of the paper's by
    default, and there is one highway layer.
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
        used, places = inputs.ids.unique(return_inverse=True)
        letters = self.char_embed(self.characters[used].long()).transpose(1, 2)
        found = torch.cat([conv(letters).amax(dim=2) for conv in self.convolutions], dim=1).relu()
        gate, change = self.highway(found).chunk(2, dim=1)
        return torch.lerp(found, change.relu(), gate.sigmoid())[places]
