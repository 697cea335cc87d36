"""Seeds derived from other numbers.

The random draws of a step depend on its own seed, not on the state that earlier steps left.
"""

from __future__ import annotations

import hashlib
import struct

LARGEST_SEED = 9_999
"""Largest seed that a user may choose; larger ones are those of restarts."""


def derive_seed(*numbers: int) -> int:
    """Hash the numbers to a seed of 63 bits; other numbers, or another order, give another seed."""
    packed = struct.pack(f"<{len(numbers)}q", *numbers)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1
