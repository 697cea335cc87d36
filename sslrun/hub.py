"""The hub of models and data sets: check once whether it can be reached, before libraries try again and again."""

from __future__ import annotations

import sys
import threading
import urllib.error
import urllib.request

PATIENCE = 4.0
"""Time limit for an answer from the hub, in seconds."""


def hub_or_offline() -> bool:
    """Whether the hub can be reached. If not, switch huggingface_hub, and with it tokenizers, transformers and datasets,
    to offline mode: they would otherwise retry for half a minute, with messages."""
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE and not _answers(constants.ENDPOINT):
        constants.HF_HUB_OFFLINE = True
    if constants.HF_HUB_OFFLINE and "datasets" in sys.modules:
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True  # its own copy
    return not constants.HF_HUB_OFFLINE


def _answers(url: str) -> bool:
    """Whether anything answers at `url`, within a few seconds whatever the resolver or a proxy do."""
    answered = threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(
                urllib.request.Request(url, method="HEAD"), timeout=PATIENCE
            ).close()
        except urllib.error.HTTPError:
            pass  # an answer all the same
        except (OSError, ValueError):
            return
        answered.set()

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(PATIENCE)
    return answered.is_set()
