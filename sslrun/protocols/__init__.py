"""Protocols: ways to learn a task from a backbone. Importing this package registers them."""

# The order is that of tables.
from sslrun.protocols import frozen, attentive, finetune, classical  # noqa: F401, I001
from sslrun.protocols import attend, propagate, rollout, practice, zero_shot  # noqa: F401
from sslrun.protocols.base import Bench, Protocol, Scores, protocols

__all__ = ["Bench", "Protocol", "Scores", "protocols"]
