"""Facts about registered protocols for tables and comparisons.

A protocol is unknown if it belongs to a plug-in that is not imported.
"""

from __future__ import annotations

from sslrun.protocols import protocols


def protocol_rank(name: str) -> int:
    """Return the position of a protocol in tables; unknown protocols come last."""
    known = protocols.in_order
    return known.index(name) if name in known else len(known)


def protocol_synonyms(name: str) -> tuple[str, ...]:
    """Return the names of a protocol in papers."""
    return tuple(protocols[name].synonyms) if name in protocols else ()


def counts_per_class(name: str) -> bool:
    """Return whether a protocol's labels are always numbers per class."""
    return name in protocols and protocols[name].per_class
