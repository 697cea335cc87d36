"""What tables and comparisons ask of the registered protocols. A protocol of a plug-in that is not imported is unknown."""

from __future__ import annotations

from sslrun.protocols import protocols


def protocol_rank(name: str) -> int:
    """The place of a protocol in tables; unknown ones come last."""
    known = protocols.in_order
    return known.index(name) if name in known else len(known)


def protocol_synonyms(name: str) -> tuple[str, ...]:
    """What papers call a protocol."""
    return tuple(protocols[name].synonyms) if name in protocols else ()


def counts_per_class(name: str) -> bool:
    """Whether a protocol's labels are always a number per class."""
    return name in protocols and protocols[name].per_class
