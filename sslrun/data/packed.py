"""Many strings in little memory."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np


@dataclass(frozen=True, eq=False)
class PackedStrings(Sequence[str]):
    """Strings as one array of bytes.

    A path of 60 characters takes 68 bytes; as one of a list of `str` it takes 120. Processes that
    are forked share the array, whereas each would copy the `str` that it reads.
    """

    content: np.ndarray
    """(B,) uint8: all strings in UTF-8, one after the other."""
    ends: np.ndarray
    """(N + 1,) int64: 0, and the end of each string in `content`."""

    @classmethod
    def pack(cls, strings: Iterable[str]) -> PackedStrings:
        content, ends = bytearray(), array("q", [0])
        for string in strings:
            content += string.encode("utf-8", "surrogateescape")  # as names of files may need
            ends.append(len(content))
        return cls(np.frombuffer(content, np.uint8), np.frombuffer(ends, np.int64))

    def __len__(self) -> int:
        return len(self.ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        position = range(len(self))[index]  # raises IndexError, and counts from the end
        start, end = self.ends[position : position + 2].tolist()
        return self.content[start:end].tobytes().decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))
