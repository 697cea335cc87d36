"""Seeds derived from other numbers, so that nothing random carries over from one step to the next."""

from __future__ import annotations

import hashlib
import struct


def derive_seed(*numbers: int) -> int:
    """A seed of 63 bits that differs whenever any of the numbers does."""
    packed = struct.pack(f"<{len(numbers)}q", *numbers)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1
