"""sslrun: an experiment runner for self-supervised learning.

`sslrun.load` gives the features of a pretrained backbone in Python.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sslrun.stages.load import load as load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    """Import `load` when it is first used: it imports torch, which takes a second."""
    if name != "load":
        raise AttributeError(f"module 'sslrun' has no attribute '{name}'")
    from sslrun.stages.load import load

    return load
