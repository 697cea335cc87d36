"""Protocols: ways to learn a task from a backbone. Importing this package registers them."""

from sslrun.protocols import frozen, finetune, classical, attend  # noqa: F401, I001 (order of tables)
from sslrun.protocols.base import Bench, Protocol, Scores, protocols

__all__ = ["Bench", "Protocol", "Scores", "protocols"]
