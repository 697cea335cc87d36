"""Practice reaching imagined goals, and be tested on goals in held-out pictures."""

from sslrun.protocols.practice.protocol import Practice

__all__ = ["Practice"]
